"""Runs steps of one model on one device: packed batch in, sampled tokens out."""

from __future__ import annotations

import time

import torch

from raytier.checkpoint.architecture import build_meta, decoder_layers, load_config
from raytier.checkpoint.manifest import ModelManifest
from raytier.engine.step import StepBatch, StepResult, StepStats
from raytier.execution.attention import ForwardContext, forward_context
from raytier.execution.kv_store import KVStore
from raytier.execution.reader import ReaderPool
from raytier.execution.sampler import sample
from raytier.execution.weights import TORCH_DTYPES, Weights
from raytier.planner.plan import WeightPlan
from raytier.tiers.aligned import ALIGNMENT
from raytier.tiers.arena import Arena, ArenaHandle
from raytier.tiers.files import DirectFile


class ModelRunner:
    """A `StepExecutor` in this process. Not thread-safe: one step at a time."""

    def __init__(self, manifest: ModelManifest, plan: WeightPlan, device: torch.device, pool: ReaderPool) -> None:
        self._manifest = manifest
        self._device = device
        self._pool = pool
        self._share = plan.devices[0]
        self._arena: Arena | None = None
        self._weights: Weights
        self._model = build_meta(load_config(manifest.model_dir), manifest.compute_dtype)
        for module in self._model.modules():
            for name, buffer in module._buffers.items():
                module._buffers[name] = buffer if buffer is None else buffer.to(device)
        self.kv = KVStore(
            manifest.kv_layers,
            self._share.kv_blocks,
            self._share.block_size,
            TORCH_DTYPES[manifest.compute_dtype],
            device,
        )
        self._seen_bytes = self._seen_reads = 0

    @classmethod
    def load(
        cls,
        manifest: ModelManifest,
        plan: WeightPlan,
        *,
        device: str,
        arena: tuple[ArenaHandle, int, int] | None = None,
        io_threads: int,
        io_bytes: int,
    ) -> ModelRunner:
        """Build the model, load what the plan keeps in memory, and begin to stream the rest.

        Args:
            device: "cpu" or "cuda:N".
            arena: handle, offset and bytes of the range for host-tier parameters.
            io_threads, io_bytes: reads in flight and largest read, in bytes.

        Raises:
            CheckpointError, TierError, UnsupportedModelError: as the message says; nothing is left behind.
        """
        files: list[DirectFile] = []
        pool: ReaderPool | None = None
        runner: ModelRunner | None = None
        try:
            for file in manifest.files:
                files.append(DirectFile(file.path, file.size))
            pool = ReaderPool(files, io_threads, max(ALIGNMENT, io_bytes // ALIGNMENT * ALIGNMENT))
            target = torch.device(device)
            runner = cls(manifest, plan, target, pool)
            host_view = None
            if arena is not None:
                handle, offset, nbytes = arena
                runner._arena = Arena.attach(handle)
                host_view = runner._arena.view[offset : offset + nbytes]
            runner._weights = Weights(
                runner._model,
                decoder_layers(runner._model),
                manifest,
                plan.tier_of,
                runner._share,
                target,
                pool,
                host_view,
            )
            return runner
        except BaseException:
            if runner is not None and runner._arena is not None:
                runner._arena.close()
            if pool is not None:
                pool.close()
            for opened in files:
                opened.close()
            raise

    def step(self, batch: StepBatch) -> StepResult:
        """Run one step.

        Raises:
            TierError: reading failed; the next step starts a new sweep.
        """
        began = time.perf_counter()
        streamed, waited = self._weights.bytes_streamed, self._weights.io_wait_s
        try:
            with torch.inference_mode():
                tokens = self._forward(batch)
        except BaseException:
            self._weights.abandon_sweep()
            raise
        wall = time.perf_counter() - began
        waited = self._weights.io_wait_s - waited
        stats = StepStats(
            num_tokens=batch.num_tokens,
            num_sequences=len(batch.chunks),
            bytes_streamed=self._weights.bytes_streamed - streamed,
            bytes_read=self._pool.bytes_read - self._seen_bytes,
            reads=self._pool.reads - self._seen_reads,
            io_wait_s=waited,
            compute_s=wall - waited,
            wall_s=wall,
        )
        self._seen_bytes += stats.bytes_read
        self._seen_reads += stats.reads
        return StepResult(batch.step, tokens, stats)

    def _forward(self, batch: StepBatch) -> dict[int, int]:
        device = self._device
        ids: list[int] = []
        positions: list[int] = []
        last: list[int] = []
        sampled = []
        for chunk in batch.chunks:
            ids.extend(chunk.token_ids)
            positions.extend(range(chunk.start, chunk.start + len(chunk.token_ids)))
            if chunk.sample is not None:
                last.append(len(ids) - 1)
                sampled.append((chunk.seq_id, chunk.sample))
        context = ForwardContext.build(self.kv, batch.chunks, device)
        with forward_context(context):
            output = self._model(
                input_ids=torch.tensor([ids], device=device),
                position_ids=torch.tensor([positions], device=device),
                use_cache=False,
                logits_to_keep=torch.tensor(last, dtype=torch.int64, device=device),
            )
        drawn = sample(output.logits[0], [spec for _, spec in sampled])
        return {seq_id: token for (seq_id, _), token in zip(sampled, drawn, strict=True)}

    @property
    def bytes_read(self) -> int:
        """Bytes read from disk since loading began."""
        return self._pool.bytes_read

    def memory(self) -> dict[str, int]:
        """Bytes held, by what they hold."""
        return {
            "resident": self._weights.resident_bytes,
            "host": self._weights.host_bytes,
            "ring": self._weights.ring_bytes,
            "kv": self.kv.nbytes,
        }

    def close(self) -> None:
        """Stop the readers, close the files and let go of all memory."""
        self._weights.close()
        self._pool.close()
        for file in self._pool.files:
            file.close()
        if self._arena is not None:
            self._arena.close()
