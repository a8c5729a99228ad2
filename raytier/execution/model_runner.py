"""Runs steps of one model on one device: packed batch in, sampled tokens out."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import torch
from transformers import PreTrainedModel

from raytier.checkpoint.architecture import build_meta, decoder_layers, load_config
from raytier.checkpoint.manifest import ModelManifest, TokenizerSpec
from raytier.engine.kv_setup import host_bytes
from raytier.engine.step import StepBatch, StepResult, StepStats
from raytier.execution.attention import ForwardContext, forward_context
from raytier.execution.binding import TORCH_DTYPES
from raytier.execution.gate import SweepGate
from raytier.execution.kept import keep, keepable
from raytier.execution.kv_store import KVStore
from raytier.execution.kv_tiers import KVTiers
from raytier.execution.parameters import ParameterStatus
from raytier.execution.reader import ReadCount
from raytier.execution.sampler import Sampler
from raytier.execution.sources import Sources
from raytier.execution.threads import compute_with, num_threads
from raytier.execution.weights import Weights
from raytier.kv.orders import LowerShape
from raytier.planner.plan import FILE_TIERS, DevicePlan, Tier, WeightPlan
from raytier.tiers.aligned import ALIGNMENT, AlignedBuffer
from raytier.tiers.copies import TierCopy

Modules = PreTrainedModel


def build(manifest: ModelManifest, device: str) -> Modules:
    """The modules of a model: parameters on `meta`, buffers on `device`.

    Raises:
        UnsupportedModelError: see `build_meta`.
    """
    model = build_meta(load_config(manifest.model_dir), manifest.compute_dtype)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and not buffer.is_meta:  # else it is stored, and bound like a parameter
                module._buffers[name] = buffer.to(device)
    return model


class ModelRunner:
    """A `StepExecutor` in this process. Not thread-safe: one step at a time, best always in the same thread.

    Steps compute with as many CPU threads as the thread that made the runner.
    """

    def __init__(
        self,
        manifest: ModelManifest,
        share: DevicePlan,
        device: torch.device,
        sources: Sources,
        tokenizer: TokenizerSpec | None,
        model: Modules,
    ) -> None:
        self._device = device
        self._threads = torch.get_num_threads()
        self._sources = sources
        self._gate = SweepGate()
        self._weights: Weights
        self._model = model
        self.kv = KVStore(
            manifest.kv_layers,
            share.kv_blocks,
            share.block_size,
            TORCH_DTYPES[manifest.compute_dtype],
            device,
        )
        self.kv_tiers: KVTiers | None = None
        self._kv_host_bytes = 0
        self.sampler = Sampler(manifest.vocab_size, tokenizer)
        self._seen = self._read_counts()
        self._steps = 0
        self._last_step = 0.0

    @classmethod
    def load(
        cls,
        manifest: ModelManifest,
        plan: WeightPlan,
        *,
        device: str,
        host_views: Mapping[str, memoryview] | None = None,
        copies: Mapping[str, TierCopy] | None = None,
        io_threads: int,
        io_bytes: int,
        tokenizer: TokenizerSpec | None = None,
        lower: LowerShape | None = None,
        kv_memory: memoryview | None = None,
        model: Modules | None = None,
        kept: Mapping[str, memoryview] | None = None,
    ) -> ModelRunner:
        """Build the model and begin to read what the plan keeps in memory and to stream the rest.

        Steps may run at once: a layer waits for its own bytes.

        Args:
            device: "cpu" or "cuda:N".
            host_views: writable bytes in the node's arena of each host-tier parameter.
            copies: where the parameters lie that the plan has on the ramdisk or in directories of the disk tier.
            io_threads, io_bytes: reads in flight and largest read, in bytes.
            tokenizer: of the model; without it no sequence can have a grammar.
            lower: what KV goes to below the device. kv_memory: for its slots in the host's memory; without it they
                lie in memory of this process.
            model: from `build`, or of a runner of this manifest that is closed.
            kept: parameters' bytes as the checkpoint has them, in memory, from where they are copied.

        Raises:
            CheckpointError, TierError, UnsupportedModelError: as the message says; nothing is left behind.
        """
        sources = Sources(manifest, io_threads, max(ALIGNMENT, io_bytes // ALIGNMENT * ALIGNMENT))
        try:
            for tier in FILE_TIERS:
                on_tier = {name: copy for name, copy in (copies or {}).items() if plan.tier_of[name] is tier}
                sources.adopt(sources.relocated(on_tier, tier))
            target = torch.device(device)
            model = build(manifest, device) if model is None else model
            runner = cls(manifest, plan.devices[0], target, sources, tokenizer, model)
            runner._weights = Weights(
                runner._model,
                decoder_layers(runner._model),
                sources,
                plan.tier_of,
                plan.schemes,
                plan.devices[0],
                target,
                host_views or {},
                runner._gate,
                kept,
            )
            if lower is not None and lower.host_slots:
                memory = AlignedBuffer(host_bytes(lower)).view if kv_memory is None else kv_memory
                runner._kv_host_bytes = 0 if kv_memory is None else kv_memory.nbytes
                runner.kv_tiers = KVTiers(runner.kv, lower, memory, sources.pool)
            return runner
        except BaseException:
            sources.close()
            raise

    @property
    def model(self) -> Modules:
        """The modules, which another runner may have when this one is closed."""
        return self._model

    @property
    def budget_bytes(self) -> int:
        """Of the device, for everything of this model."""
        return self._weights.room.budget_bytes

    @budget_bytes.setter
    def budget_bytes(self, nbytes: int) -> None:
        self._weights.room.budget_bytes = nbytes

    @property
    def held_bytes(self) -> int:
        """Bytes of that budget that are taken."""
        weights = self._weights
        return weights.room.held_bytes(weights.resident_bytes, weights.ring_bytes)

    def keepable(self) -> dict[str, int]:
        """Parameters on the device that `keep` can copy, and their bytes: as the checkpoint has them, or in a form."""
        return keepable(self._weights.resident, self._weights.manifest.parameters)

    def keep(self, views: Mapping[str, memoryview]) -> None:
        """Copy parameters to memory that outlives this runner; no step runs any more."""
        weights = self._weights
        with num_threads(1):
            for name, view in views.items():
                keep(weights.resident[name], weights.manifest.by_name[name], view)

    def wait_loaded(self) -> None:
        """Return when all that the plan keeps in memory is there, in its final layout.

        Raises:
            CheckpointError, TierError: reading failed.
        """
        self._weights.wait_loaded()

    @property
    def progress(self) -> tuple[int, int]:
        """Bytes read of what is to be in memory, and all of it."""
        return self._weights.bytes_loaded, self._weights.bytes_to_load

    def step(self, batch: StepBatch) -> StepResult:
        """Run one step.

        Raises:
            TierError: reading failed; the next step starts a new sweep.
        """
        began = time.perf_counter()
        compute_with(self._threads)
        weights = self._weights
        with self._gate.sweep():
            streamed, waited = (weights.bytes_streamed, weights.bytes_streamed_ramdisk), weights.io_wait_s
            try:
                with torch.inference_mode():
                    result = self._forward(batch) if batch.chunks else self._move(batch)
            except BaseException:
                weights.abandon_sweep()
                raise
        self._steps += 1
        self._last_step = time.time()
        wall = time.perf_counter() - began
        waited = weights.io_wait_s - waited
        (everything, ramdisk), before = self._read_counts(), self._seen
        self._seen = (everything, ramdisk)
        result.stats = StepStats(
            num_tokens=batch.num_tokens,
            num_sequences=len(batch.chunks),
            bytes_streamed=weights.bytes_streamed - streamed[0],
            bytes_streamed_ramdisk=weights.bytes_streamed_ramdisk - streamed[1],
            bytes_read=everything.nbytes - before[0].nbytes,
            bytes_read_ramdisk=ramdisk.nbytes - before[1].nbytes,
            bytes_decoded=everything.decoded - before[0].decoded,
            reads=everything.reads - before[0].reads,
            reads_ramdisk=ramdisk.reads - before[1].reads,
            damaged=everything.damaged - before[0].damaged,
            damaged_ramdisk=ramdisk.damaged - before[1].damaged,
            mended=everything.mended - before[0].mended,
            io_wait_s=waited,
            compute_s=wall - waited,
            sample_s=result.stats.sample_s,
            mask_wait_s=result.stats.mask_wait_s,
            wall_s=wall,
        )
        return result

    def move(
        self,
        names: Sequence[str],
        destination: Tier,
        host_views: Mapping[str, memoryview],
        copies: Mapping[str, TierCopy],
    ) -> dict[str, Tier]:
        """Move parameters to another tier while steps run; see `Weights.move`."""
        with num_threads(1):  # beside the steps
            return self._weights.move(names, destination, host_views, copies)

    def parameters(self) -> tuple[ParameterStatus, ...]:
        """Where every parameter is now. All but routed experts are used once in a step."""
        weights, manifest = self._weights, self._weights.manifest
        uses = {p.name: weights.used(p) or (self._steps, self._last_step) for p in manifest.parameters}
        return tuple(
            ParameterStatus(
                name=p.name,
                layer=p.layer,
                tier=weights.tier_of[p.name],
                nbytes=p.nbytes,
                current_nbytes=weights.held_nbytes(p.name),
                fixed=weights.fixed(p.name),
                access_count=uses[p.name][0],
                last_access=uses[p.name][1],
                precision=(form.name if (form := weights.scheme_of(p.name).form) is not None else "source"),
                codec=weights.scheme_of(p.name).codec.name,
            )
            for p in manifest.parameters
        )

    def _read_counts(self) -> tuple[ReadCount, ReadCount]:
        pool = self._sources.pool
        return pool.count(), pool.count(Tier.RAMDISK)

    def _forward(self, batch: StepBatch) -> StepResult:
        device = self._device
        tiers = self.kv_tiers
        if tiers is not None:
            tiers.begin(batch.moves)
        self.sampler.begin(batch)
        if batch.copies:
            if tiers is not None:
                tiers.wait()
            self.kv.copy_blocks(batch.copies)
        ids: list[int] = []
        positions: list[int] = []
        for chunk in batch.chunks:
            ids.extend(chunk.token_ids)
            positions.extend(range(chunk.start, chunk.stop))
        context = ForwardContext.build(self.kv, batch.chunks, device, None if tiers is None else tiers.ready)
        with forward_context(context):
            output = self._model(
                input_ids=torch.tensor([ids], device=device),
                position_ids=torch.tensor([positions], device=device),
                use_cache=False,
                logits_to_keep=torch.tensor(self.sampler.rows(batch), dtype=torch.int64, device=device),
            )
        result = self.sampler.finish(batch, output.logits[0])
        if tiers is not None:
            result.moved = tiers.finish()
        return result

    def _move(self, batch: StepBatch) -> StepResult:
        """A step that only moves KV."""
        tiers = self.kv_tiers
        if tiers is None:
            raise RuntimeError(f"step {batch.step} moves KV, and there is nothing below the device")
        self.sampler.begin(batch)
        tiers.begin(batch.moves)
        return StepResult(batch.step, moved=tiers.finish())

    def kept_kv(self) -> list[list[tuple[int, bytes]]]:
        """Per KV cache group (slot, hash) of the blocks that are on disk from before."""
        return [] if self.kv_tiers is None else self.kv_tiers.restored()

    @property
    def bytes_read(self) -> int:
        """Bytes read from ramdisk and disk since loading began."""
        return self._sources.pool.count().nbytes

    @property
    def reads_queued(self) -> int:
        """Reads that wait for a thread."""
        return self._sources.pool.queued

    def memory(self) -> dict[str, int]:
        """Bytes held, by what they hold."""
        return {
            "resident": self._weights.resident_bytes,
            "host": self._weights.host_bytes,
            "ring": self._weights.ring_bytes,
            "kv": self.kv.nbytes,
            "kv_host": self._kv_host_bytes,
        }

    def close(self) -> None:
        """Stop the readers, close the files and let go of all memory."""
        self.sampler.close()
        if self.kv_tiers is not None:
            self.kv_tiers.close()
        self._weights.close()
        self._sources.close()
