"""Parameters of one model on one device: bound to their modules for good, or as the sweep brings them.

transformers' own modules run unchanged. Resident parameters are bound once. Streamed ones are bound by hooks
right before their decoder layer computes and unbound right after; the output head, where it is streamed,
computes one chunk of vocabulary rows at a time, and the input embedding sees only the rows that the batch needs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from raytier.checkpoint.manifest import ModelManifest, Parameter
from raytier.execution.layout import StreamUnit, assemble, host_units, resident_reads, resident_units, sweep_units
from raytier.execution.reader import ReaderPool
from raytier.execution.rows import RowFetcher
from raytier.execution.stream import WeightStream
from raytier.planner.plan import DevicePlan, Tier
from raytier.tiers.aligned import AlignedBuffer

TORCH_DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def _tensor(view: memoryview, parameter: Parameter, row_start: int, row_stop: int) -> Tensor:
    """Rows of `parameter` whose packed bytes are `view`, without a copy."""
    flat = torch.frombuffer(view, dtype=TORCH_DTYPES[parameter.dtype])
    return flat.view(row_stop - row_start, *parameter.shape[1:]) if parameter.shape else flat.view(())


class Weights:
    """Binds and streams the parameters of `model`, whose modules are on `meta`.

    Args:
        tier_of: tier of every parameter by name.
        host_view: writable bytes of the node's arena for this model, or None when no parameter is there.

    Attributes:
        resident_bytes, host_bytes, ring_bytes: bytes really held.
        rows_streamed: parameter bytes of embedding rows fetched from disk so far.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: nn.ModuleList,
        manifest: ModelManifest,
        tier_of: Mapping[str, Tier],
        share: DevicePlan,
        device: torch.device,
        pool: ReaderPool,
        host_view: memoryview | None,
    ) -> None:
        self._manifest = manifest
        self._tier_of = tier_of
        self._device = device
        self._pool = pool
        self._compute_dtype = TORCH_DTYPES[manifest.compute_dtype]
        self._sites = {p.name: [_site(model, name) for name in (p.name, *p.aliases)] for p in manifest.parameters}
        self._placeholders = {name: getattr(*sites[0]) for name, sites in self._sites.items()}
        self._pinned: list[int] = []
        self.resident_bytes = self.host_bytes = self.ring_bytes = self.rows_streamed = 0

        self._load_device()
        self._host: dict[str, Tensor] = self._load_host(host_view) if host_view is not None else {}
        if device.type == "cpu":
            # Host memory is this device's own memory: used in place.
            for name, tensor in self._host.items():
                self._bind(name, tensor)

        units = sweep_units(manifest, tier_of, share.head_chunk_rows)
        self._stream: WeightStream | None = None
        if units:
            ring = AlignedBuffer(share.ring_bytes)
            self.ring_bytes = ring.nbytes
            self._pin(ring.address, ring.nbytes)
            self._stream = WeightStream(units, pool, ring, share.window)
        self._copy_stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._attach(model, layers, units, share.head_chunk_rows)
        if self._stream is not None:
            self._stream.start()

    # Loading

    def _load_device(self) -> None:
        names = [p.name for p in self._manifest.parameters if self._tier_of[p.name] is Tier.DEVICE]
        if self._device.type == "cuda":
            self._load_through_staging(names)
            return
        parameters = self._manifest.by_name
        in_place = [n for n in names if parameters[n].dtype == self._manifest.compute_dtype]
        for unit in resident_units(self._manifest, in_place):
            buffer = AlignedBuffer(unit.nbytes)
            self._read(unit, buffer.view)
            self.resident_bytes += buffer.nbytes
            for name, tensor in self._members(unit, buffer.view).items():
                self._bind(name, tensor)
        for name in set(names) - set(in_place):
            (unit,) = resident_units(self._manifest, [name])
            with AlignedBuffer(unit.nbytes) as buffer:
                self._read(unit, buffer.view)
                tensor = self._members(unit, buffer.view)[name].to(self._compute_dtype)
            self.resident_bytes += tensor.nbytes
            self._bind(name, tensor)

    def _load_through_staging(self, names: Iterable[str]) -> None:
        """Fill device memory by way of pinned host memory."""
        units = resident_reads(self._manifest, names)
        if not units:
            return
        staging = AlignedBuffer(max(unit.nbytes for unit in units))
        self._pin(staging.address, staging.nbytes)
        tensors: dict[str, Tensor] = {}
        for unit in units:
            self._read(unit, staging.view)
            for member in unit.members:
                parameter = self._manifest.by_name[member.name]
                if member.name not in tensors:
                    tensors[member.name] = torch.empty(parameter.shape, dtype=self._compute_dtype, device=self._device)
                source = _tensor(
                    staging.view[member.offset : member.offset + member.nbytes],
                    parameter,
                    member.row_start,
                    member.row_stop,
                )
                target = tensors[member.name]
                (target[member.row_start : member.row_stop] if parameter.shape else target).copy_(source)
        torch.cuda.synchronize(self._device)
        self._unpin()
        for name, tensor in tensors.items():
            self.resident_bytes += tensor.nbytes
            self._bind(name, tensor)

    def _load_host(self, view: memoryview) -> dict[str, Tensor]:
        """Fill the arena range with the host-tier parameters; views of it by name."""
        tensors: dict[str, Tensor] = {}
        offset = 0
        for unit in host_units(self._manifest, self._tier_of):
            target = view[offset : offset + unit.nbytes]
            self._read(unit, target)
            tensors |= self._members(unit, target)
            offset += unit.nbytes
        self.host_bytes = offset
        if tensors:
            self._pin(torch.frombuffer(view, dtype=torch.uint8).data_ptr(), offset)
        return tensors

    def _read(self, unit: StreamUnit, view: memoryview) -> None:
        self._pool.submit(unit.reads, view).wait()
        assemble(unit, view)

    def _members(self, unit: StreamUnit, view: memoryview) -> dict[str, Tensor]:
        return {
            m.name: _tensor(
                view[m.offset : m.offset + m.nbytes], self._manifest.by_name[m.name], m.row_start, m.row_stop
            )
            for m in unit.members
        }

    # Binding

    def _bind(self, name: str, tensor: Tensor) -> None:
        for module, leaf in self._sites[name]:
            module._parameters[leaf] = tensor  # type: ignore[assignment]  # a plain tensor: no autograd here

    def _unbind(self, names: Iterable[str]) -> None:
        """Back to meta, so that a use outside of its layer fails instead of reading what the ring holds by then."""
        for name in names:
            self._bind(name, self._placeholders[name])

    def _attach(
        self, model: nn.Module, layers: nn.ModuleList, units: tuple[StreamUnit, ...], head_chunk_rows: int
    ) -> None:
        index_of = {unit.layer: index for index, unit in enumerate(units) if unit.layer is not None}
        cuda = self._device.type == "cuda"
        for number, layer in enumerate(layers):
            host = [p.name for p in self._manifest.layer_parameters(number) if cuda and p.name in self._host]
            if number in index_of or host:
                self._attach_layer(layer, index_of.get(number), host)

        embedding = self._manifest.embedding
        if self._tier_of[embedding] is not Tier.DEVICE and (self._tier_of[embedding] is Tier.NVME or cuda):
            self._attach_embedding(model.get_input_embeddings(), self._manifest.by_name[embedding])  # type: ignore[operator]

        head = self._manifest.head
        if self._tier_of[head] is Tier.NVME or (self._tier_of[head] is Tier.HOST and cuda):
            chunks = [(index, *unit.rows) for index, unit in enumerate(units) if unit.rows is not None]
            self._attach_head(model.get_output_embeddings(), head, chunks, head_chunk_rows)  # type: ignore[operator]

    def _attach_layer(self, layer: nn.Module, index: int | None, host: list[str]) -> None:
        bound: list[str] = []

        def enter(_module: nn.Module, _args: Any) -> None:
            tensors = self._acquire(index) if index is not None else {}
            tensors |= {name: self._host[name] for name in host}
            if self._copy_stream is not None:
                tensors = self._upload(tensors)
                self._release(index)
            for name, tensor in tensors.items():
                self._bind(name, tensor)
            bound.extend(tensors)

        def leave(_module: nn.Module, _args: Any, _output: Any) -> None:
            self._unbind(bound)
            bound.clear()
            if self._copy_stream is None:
                self._release(index)

        layer.register_forward_pre_hook(enter)
        layer.register_forward_hook(leave)

    def _attach_embedding(self, module: nn.Module, parameter: Parameter) -> None:
        """Give the embedding module a table of just the rows that the batch uses."""
        fetcher = RowFetcher(parameter, self._pool) if self._tier_of[parameter.name] is Tier.NVME else None
        # With a compact table an index from the configuration means nothing, and F.embedding checks its range.
        module.padding_idx = None  # type: ignore[assignment]
        weight = module._parameters["weight"]

        def enter(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            rows, places = torch.unique(args[0], return_inverse=True)
            if fetcher is not None:
                count = int(rows.numel())
                table = _tensor(fetcher.fetch(rows.tolist()), parameter, 0, count)
                self.rows_streamed += table.nbytes
            else:
                table = self._host[parameter.name][rows.cpu()]
            module._parameters["weight"] = table.to(self._device)  # type: ignore[assignment]
            return (places, *args[1:])

        def leave(_module: nn.Module, _args: Any, _output: Any) -> None:
            module._parameters["weight"] = weight

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave)

    def _attach_head(self, module: nn.Module, name: str, chunks: list[tuple[int, int, int]], rows: int) -> None:
        """Compute the output projection one chunk of vocabulary rows at a time."""
        vocab = self._manifest.by_name[name].shape[0]

        def forward(hidden: Tensor) -> Tensor:
            out = hidden.new_empty(*hidden.shape[:-1], vocab)
            if chunks:
                for index, start, stop in chunks:
                    tensors = self._acquire(index)
                    if self._copy_stream is not None:
                        tensors = self._upload(tensors)
                    out[..., start:stop] = linear(hidden, tensors[name])
                    self._release(index)
            else:
                for start in range(0, vocab, rows or vocab):
                    part = self._upload({name: self._host[name][start : start + (rows or vocab)]})[name]
                    out[..., start : start + part.shape[0]] = linear(hidden, part)
            bias = module._parameters.get("bias")
            return out if bias is None else out + bias

        module.forward = forward

    # Streaming

    def _acquire(self, index: int) -> dict[str, Tensor]:
        assert self._stream is not None
        return self._members(self._stream.units[index], self._stream.acquire(index))

    def _release(self, index: int | None) -> None:
        if index is not None:
            assert self._stream is not None
            self._stream.release(index)

    def _upload(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Copies on the device. Returns when the source may be overwritten; earlier layers still compute meanwhile."""
        assert self._copy_stream is not None
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._copy_stream):
            copies = {name: tensor.to(self._device, non_blocking=True) for name, tensor in tensors.items()}
            done.record(self._copy_stream)
        current = torch.cuda.current_stream(self._device)
        for tensor in copies.values():
            tensor.record_stream(current)
        done.synchronize()
        return copies

    def _pin(self, address: int, nbytes: int) -> None:
        """Register host memory with CUDA so that copies from it are asynchronous and at full rate."""
        if self._device.type == "cuda":
            code = int(torch.cuda.cudart().cudaHostRegister(address, nbytes, 0))  # type: ignore[no-untyped-call]
            if code:
                raise RuntimeError(f"cudaHostRegister of {nbytes} bytes failed with code {code}")
            self._pinned.append(address)

    def _unpin(self) -> None:
        while self._pinned:
            torch.cuda.cudart().cudaHostUnregister(self._pinned.pop())  # type: ignore[no-untyped-call]

    @property
    def bytes_streamed(self) -> int:
        """Parameter bytes from disk that steps have used so far, embedding rows included."""
        return self.rows_streamed + (self._stream.stats.bytes_consumed if self._stream is not None else 0)

    @property
    def io_wait_s(self) -> float:
        """Seconds that the computing thread has waited for the ring so far."""
        return self._stream.stats.io_wait_s if self._stream is not None else 0.0

    def abandon_sweep(self) -> None:
        """After a step that failed half-way: drop what the ring holds; the next step starts a new sweep."""
        self._unbind(n for n, tier in self._tier_of.items() if tier is Tier.NVME)
        if self._stream is not None:
            self._stream.cancel()

    def close(self) -> None:
        """Stop streaming and let go of all memory."""
        if self._stream is not None:
            self._stream.close()
        self._unpin()
        self._unbind(self._sites)
        self._host.clear()


def _site(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that owns parameter `name`, and its attribute there."""
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf
