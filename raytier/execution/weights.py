"""Parameters of one model on one device: in memory for good, or streamed as the sweep brings them, and moved between
the two while steps run.

transformers' own modules run unchanged. Parameters in memory are bound when they have been read, behind the first
steps. Streamed ones are bound by hooks right before their decoder layer computes and unbound right after; the output
head, where it is streamed, computes one chunk of vocabulary rows at a time, and the input embedding sees only the
rows that the batch needs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from raytier.checkpoint.manifest import ModelManifest, Parameter, Role
from raytier.codecs.scheme import PLAIN, Scheme
from raytier.errors import InvalidRequestError, TierError
from raytier.execution import linears
from raytier.execution.binding import Bindings, as_tensor
from raytier.execution.bus import Bus
from raytier.execution.conversion import Converter
from raytier.execution.expert_stream import RoutedExperts
from raytier.execution.formed import FormedWeight, Weight, plain
from raytier.execution.gate import SweepGate
from raytier.execution.kept import KeptCopies
from raytier.execution.layout import row_bytes
from raytier.execution.loading import ResidentLoader, begin_read, groups_in_memory
from raytier.execution.reader import Urgency
from raytier.execution.room import Room, resident_bytes
from raytier.execution.rows import RowFetcher
from raytier.execution.sources import Sources
from raytier.execution.streamed import StreamedWeights, SweepPlan
from raytier.execution.vocabulary import attach_embedding, project_in_chunks
from raytier.planner.plan import FILE_TIERS, DevicePlan, Tier, TierSchemes
from raytier.planner.sizing import HEAD_CHUNK_ALONE, always_resident, resident_nbytes
from raytier.tiers.aligned import AlignedBuffer
from raytier.tiers.copies import TierCopy


class Weights:
    """Binds, streams and moves the parameters of `model`, whose modules are on `meta`.

    Invariants: a parameter is on exactly one tier (`tier_of`), and changes it between sweeps only (`gate`); resident
    bytes, ring, KV and activations stay within the device's budget.

    Args:
        layers: the decoder layers, part of `model`.
        tier_of: tier of every parameter by name.
        schemes: in which form each tier holds a parameter.
        host_views: writable bytes in the node's arena of each host-tier parameter.
        gate: held by whoever runs a sweep.
        kept: copies in memory of what is not to be read (`KeptCopies`).

    Attributes:
        room: what the model may take of the device.
        bytes_loaded, bytes_to_load: of what is to be in memory, what has been read.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: nn.ModuleList,
        sources: Sources,
        tier_of: Mapping[str, Tier],
        schemes: TierSchemes,
        share: DevicePlan,
        device: torch.device,
        host_views: Mapping[str, memoryview],
        gate: SweepGate,
        kept: Mapping[str, memoryview] | None = None,
    ) -> None:
        self._sources = sources
        self._share = share
        self.room = Room(share)
        self._handles: list[RemovableHandle] = []
        self._device = device
        self._gate = gate
        self._tier_of = dict(tier_of)
        self._schemes = schemes
        self._host_views = dict(host_views)
        self._bindings = Bindings(model, sources.manifest)
        self._bus = Bus(device) if device.type == "cuda" else None
        self._converter = Converter(sources.manifest, schemes, self._bus)
        self._kept = KeptCopies(kept or {}, sources.manifest, schemes)
        self._resident: dict[str, Weight] = {}  # of the device tier, as they are bound
        self._host: dict[str, Weight] = {}
        self._streamed = StreamedWeights(sources.pool, share.window, self._bus)
        self._experts = RoutedExperts(sources.manifest, self._bindings, self._streamed.experts, self._host, self._bus)
        self._rows: RowFetcher | None = None
        self._closed = False
        self._rows_streamed = self._rows_ramdisk = self.bytes_loaded = 0
        self._head = model.get_output_embeddings()  # type: ignore[operator]
        self._head_chunked = False
        self._attach(model, layers)
        self._wire_head()
        self._streamed.start(SweepPlan.of(sources.manifest, self._tier_of, share))
        groups = groups_in_memory(self.manifest, self._tier_of)
        self.bytes_to_load = sum(self.manifest.by_name[name].nbytes for _, names in groups for name in names)
        self._loader = ResidentLoader(groups, self._begin_load, self._pack_all)

    @property
    def manifest(self) -> ModelManifest:
        """What lies where now."""
        return self._sources.manifest

    @property
    def tier_of(self) -> Mapping[str, Tier]:
        """Tier of every parameter now."""
        return self._tier_of

    # Loading

    def _begin_load(self, names: Sequence[str]) -> Callable[[], None]:
        reading = deque((name, *self._begin_read(name)) for name in names)

        def finish() -> None:
            while reading:  # and let go of each: what was converted is not needed as it was read
                name, buffer, arrived = reading.popleft()
                parameter, tensor = self.manifest.by_name[name], arrived()
                if isinstance(tensor, FormedWeight):
                    self._keep_on_device(name, tensor)
                elif self._tier_of[name] is Tier.HOST:
                    self._keep_on_host(name, self._converter.to_host(parameter, tensor, self._host_views[name]))
                else:
                    self._keep_on_device(name, self._converter.to_device(parameter, tensor, buffer))
                self.bytes_loaded += parameter.nbytes

        return finish

    def _begin_read(self, name: str) -> tuple[AlignedBuffer | None, Callable[[], Weight]]:
        if (kept := self._kept.find(name)) is not None:  # it is copied instead
            return None, kept
        return begin_read(self._sources, name, Urgency.STREAM)

    def _keep_on_device(self, name: str, weight: Weight) -> None:
        self._resident[name] = weight
        self._bindings.bind(name, weight)

    def _keep_on_host(self, name: str, weight: Weight) -> None:
        self._host[name] = weight
        if self._bus is not None:
            self._bus.pin(plain(weight))
        else:  # host memory is this device's own memory: used in place
            self._bindings.bind(name, weight)

    def _pack_all(self, stopped: Callable[[], bool]) -> None:
        """Bring resident weights into the kernel's own layout, one at a time: until then the plain ones serve."""
        for name in [name for name in self._resident if self._packs(name)]:
            if stopped():
                return
            packed = linears.pack(plain(self._resident[name]))
            self._gate.between(partial(self._keep_packed, name, packed))

    def _packs(self, name: str) -> bool:
        formed = self._schemes.of(name, Tier.DEVICE).form is not None
        return self._share.packed and self._bus is None and not formed and self._bindings.can_pack(name)

    def _keep_packed(self, name: str, packed: Tensor) -> None:
        self._resident[name] = packed
        self._bindings.bind_packed(name, packed)

    def wait_loaded(self) -> None:
        """Return when all that is to be in memory is there; raises what went wrong while loading."""
        self._loader.wait_all()

    # Hooks

    def _attach(self, model: nn.Module, layers: nn.ModuleList) -> None:
        for number, layer in enumerate(layers):
            names = [p.name for p in self.manifest.layer_parameters(number) if p.expert is None]
            self._attach_layer(layer, number, names)
        self._bindings.feed_experts(self._experts.arriving)
        self._handles += attach_embedding(model.get_input_embeddings(), self._embedding_rows)  # type: ignore[operator]
        self._handles.append(self._head.register_forward_pre_hook(lambda *_: self._loader.wait(Role.HEAD)))

    def _attach_layer(self, layer: nn.Module, number: int, names: list[str]) -> None:
        bound: list[str] = []

        def enter(_module: nn.Module, _args: Any) -> None:
            if not self._loader.done:
                self._loader.wait(number)
            index = self._streamed.unit_of(number)
            if index is None and self._bus is None:
                return
            weights = self._streamed.acquire(index) if index is not None else {}
            if self._bus is not None:
                weights |= {name: self._host[name] for name in names if name in self._host}
                weights = {**self._bus.upload({name: plain(weight) for name, weight in weights.items()})}
                if index is not None:
                    self._streamed.release(index)
            for name, weight in weights.items():
                self._bindings.bind(name, weight)
            bound.extend(weights)

        def leave(_module: nn.Module, _args: Any, _output: Any) -> None:
            if bound:
                self._bindings.unbind(bound)
                bound.clear()
                index = self._streamed.unit_of(number)
                if index is not None and self._bus is None:
                    self._streamed.release(index)

        self._handles += [layer.register_forward_pre_hook(enter), layer.register_forward_hook(leave)]

    def _embedding_rows(self, ids: Tensor) -> Tensor | None:
        """Rows of the embedding for the token ids of a batch, where its module has not got the table."""
        self._loader.wait(Role.OTHER)
        name = self.manifest.embedding
        tier = self._tier_of[name]
        if tier in FILE_TIERS:
            return self._fetch_rows(ids.tolist()).to(self._device)
        if tier is Tier.HOST and self._bus is not None:
            return plain(self._host[name])[ids.cpu()].to(self._device)
        held = self._host.get(name) if tier is Tier.HOST else self._resident.get(name)
        if isinstance(held, FormedWeight):
            return torch.cat([held.rows(row, 1) for row in ids.tolist()])
        return None

    def _fetch_rows(self, rows: list[int]) -> Tensor:
        parameter = self._sources.by_rows(self.manifest.embedding)
        if self._rows is None:
            self._rows = RowFetcher(parameter, self.manifest.files, self._sources.pool)
        table = as_tensor(self._rows.fetch(rows), parameter, 0, len(rows))
        self._rows_streamed += table.nbytes
        if self._tier_of[parameter.name] is Tier.RAMDISK:
            self._rows_ramdisk += table.nbytes
        return table

    def _wire_head(self) -> None:
        """Where the output head is not on the device, compute it one chunk of vocabulary rows at a time."""
        tier = self._tier_of[self.manifest.head]
        chunked = tier in FILE_TIERS or (self._bus is not None and tier is Tier.HOST)
        if chunked:
            self._head.forward = self._chunked_head
        elif self._head_chunked:
            del self._head.forward
        self._head_chunked = chunked

    def _chunked_head(self, hidden: Tensor) -> Tensor:
        head = self.manifest.by_name[self.manifest.head]
        return project_in_chunks(self._head, hidden, head.shape[0], self._head_chunks(head))

    def _head_chunks(self, head: Parameter) -> Iterator[Weight]:
        """Rows of the head in order, each chunk valid until the next one is asked for."""
        if self._tier_of[head.name] in FILE_TIERS:
            for index in self._streamed.head_units():
                rows = self._streamed.acquire(index)[head.name]
                yield rows if self._bus is None else self._bus.upload({head.name: plain(rows)})[head.name]
                self._streamed.release(index)
        else:
            assert self._bus is not None
            for part in torch.split(plain(self._host[head.name]), max(1, HEAD_CHUNK_ALONE // row_bytes(head))):
                yield self._bus.upload({head.name: part})[head.name]

    # Moving

    def fixed(self, name: str) -> str | None:
        """Why a parameter cannot move; None when it can."""
        return always_resident(self.manifest.by_name[name], self.manifest)

    def move(
        self,
        names: Sequence[str],
        destination: Tier,
        host_views: Mapping[str, memoryview],
        copies: Mapping[str, TierCopy],
    ) -> dict[str, Tier]:
        """Move parameters to another tier: bytes are brought beside running sweeps, the change is made between two.

        Args:
            host_views: for HOST, the range of the arena for each of `names`.
            copies: for RAMDISK, and NVME with directories of its own, where each is. Without a copy, NVME means the
                checkpoint's files.

        Returns:
            The tier that each one came from; those that were there already are left out.

        Raises:
            InvalidRequestError: a name is not known or cannot move. ResourceNotAvailableError: the device has no room.
            TierError, CheckpointError: reading failed. In all cases nothing has changed.
        """
        for name in names:
            if name not in self._tier_of:
                raise InvalidRequestError(f"{name!r} is no parameter of this model", param="layer_id")
            if (reason := self.fixed(name)) is not None:
                raise InvalidRequestError(f"{name} cannot leave the device: {reason}", param="layer_id")
        self.wait_loaded()
        came_from = {name: self._tier_of[name] for name in names if self._tier_of[name] is not destination}
        if not came_from:
            return {}
        if destination is Tier.RAMDISK and not came_from.keys() <= copies.keys():
            raise ValueError("a parameter can be on the ramdisk only where it has been copied to")
        ready: dict[str, Weight] = {}
        if destination not in FILE_TIERS:
            self.room.check(
                self._resident_nbytes(self._tier_of | dict.fromkeys(came_from, destination)), self.ring_bytes
            )
            for name in came_from:
                ready[name] = self._bring(name, destination, host_views)
        self._gate.between(lambda: self._settle(destination, came_from, ready, copies))
        return came_from

    def _bring(self, name: str, destination: Tier, host_views: Mapping[str, memoryview]) -> Weight:
        """The parameter in memory of `destination`, as it is kept there."""
        held, buffer = self._host.get(name), None
        if isinstance(held, Tensor):
            tensor = held
        else:  # what is packed on the device, or in another form, is read again: the checkpoint has the plain bytes
            buffer, arrived = begin_read(self._sources, name, Urgency.BACKGROUND)
            tensor = arrived()
        parameter = self.manifest.by_name[name]
        if destination is Tier.HOST:
            return self._converter.to_host(parameter, tensor, host_views[name])
        return linears.pack(tensor) if self._packs(name) else self._converter.to_device(parameter, tensor, buffer)

    def _settle(
        self,
        destination: Tier,
        came_from: Mapping[str, Tier],
        ready: Mapping[str, Weight],
        copies: Mapping[str, TierCopy],
    ) -> None:
        if self._closed:
            raise TierError("the model was unloaded while a transfer was under way")
        tier_of = self._tier_of | dict.fromkeys(came_from, destination)
        try:
            where = {name: copies.get(name) if destination in FILE_TIERS else None for name in came_from}
            manifest = self._sources.relocated(where, destination)
            plan = SweepPlan.of(manifest, tier_of, self._share)
            self.room.check(self._resident_nbytes(tier_of), plan.nbytes)
        except BaseException:
            self._sources.adopt(self.manifest)
            raise
        self._bindings.unbind(came_from)
        self._rows = None
        self._tier_of = tier_of
        for name in came_from:
            self._resident.pop(name, None)
            host = self._host.pop(name, None)
            if host is not None and self._bus is not None:
                self._bus.unpin(plain(host).data_ptr())
        self._wire_head()
        self._streamed.start(plan)
        self._sources.adopt(manifest)
        for name, weight in ready.items():
            if destination is Tier.HOST:
                self._keep_on_host(name, weight)
            elif self._packs(name):
                self._keep_packed(name, plain(weight))
            else:
                self._keep_on_device(name, weight)

    def _resident_nbytes(self, tier_of: Mapping[str, Tier]) -> int:
        return resident_bytes(self.manifest, tier_of, self._resident, self._schemes)

    # What is held and has been done

    def held_nbytes(self, name: str) -> int:
        """Bytes of a parameter where it is computed on."""
        parameter, tier = self.manifest.by_name[name], self._tier_of[name]
        held = (self._resident if tier is Tier.DEVICE else self._host).get(name)
        if isinstance(held, FormedWeight):
            return held.nbytes
        if tier is Tier.DEVICE:
            return resident_nbytes(parameter, self.manifest)
        return parameter.stored.nbytes if parameter.stored is not None else parameter.nbytes

    def scheme_of(self, name: str) -> Scheme:
        """What has been made of a parameter where it is."""
        tier, stored = self._tier_of[name], self.manifest.by_name[name].stored
        if tier in FILE_TIERS:
            return PLAIN if stored is None else Scheme(stored.form, stored.codec)
        held = (self._resident if tier is Tier.DEVICE else self._host).get(name)
        return Scheme(held.form) if isinstance(held, FormedWeight) else PLAIN

    @property
    def resident_bytes(self) -> int:
        """Bytes of the device tier's parameters."""
        return self._resident_nbytes(self._tier_of)

    @property
    def host_bytes(self) -> int:
        """Bytes of parameters in the node's arena."""
        return sum(tensor.nbytes for tensor in list(self._host.values()))

    @property
    def ring_bytes(self) -> int:
        """Bytes of the ring, and beside it of the slots of experts."""
        return self._streamed.nbytes

    @property
    def bytes_streamed(self) -> int:
        """Parameter bytes from ramdisk and disk that steps have used so far, embedding rows included."""
        return self._rows_streamed + self._streamed.stats.bytes_consumed

    @property
    def bytes_streamed_ramdisk(self) -> int:
        """Of these, what came from the ramdisk."""
        return self._rows_ramdisk + self._streamed.bytes_ramdisk

    def used(self, parameter: Parameter) -> tuple[int, float] | None:
        """How often a parameter of a routed expert was chosen, and when last (Unix time); None for all others."""
        return self._bindings.expert_use(parameter.expert) if parameter.expert is not None else None

    @property
    def io_wait_s(self) -> float:
        """Seconds that the computing thread has waited for the ring so far."""
        return self._streamed.stats.io_wait_s

    @property
    def resident(self) -> Mapping[str, Weight]:
        """The device's parameters as they are bound."""
        return self._resident

    def abandon_sweep(self) -> None:
        """After a step that failed half-way: drop what the ring holds; the next step starts a new sweep."""
        self._bindings.unbind(name for name, tier in self._tier_of.items() if tier in FILE_TIERS)
        self._experts.unbind()
        self._streamed.cancel()

    def close(self) -> None:
        """Stop loading and streaming and let go of all memory."""
        self._loader.close()
        self._gate.between(self._close)

    def _close(self) -> None:
        """The model is as it was: on `meta`, without hooks."""
        self._closed = True
        for handle in self._handles:
            handle.remove()
        if self._head_chunked:
            del self._head.forward
            self._head_chunked = False
        self._streamed.close()
        if self._bus is not None:
            self._bus.close()
        self._bindings.close()
        for held in (self._resident, self._host, self._host_views):
            held.clear()
        self._kept.clear()
        self._handles.clear()
        self._rows = None
