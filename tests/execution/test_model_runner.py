"""The runner's edges: a disk that fails in mid-sweep, a checkpoint of mixed dtypes, a load that cannot work."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from raytier.engine.step import Arrival, SequenceChunk, SequenceSpec, StepBatch
from raytier.errors import CheckpointError, TierError
from raytier.execution.attention import ForwardContext
from raytier.execution.model_runner import ModelRunner
from raytier.planner.plan import Tier
from raytier.tiers.files import DirectFile
from tests.local_engine import PLACEMENTS, local_engine

GREEDY = SequenceSpec()
PROMPT = (5, 9, 300, 17, 4)


def step(runner: ModelRunner, number: int, tokens: tuple[int, ...] = PROMPT, start: int = 0) -> int:
    chunk = SequenceChunk(1, tokens, start, (3, 1), True)
    arrivals = (Arrival(1, GREEDY, len(PROMPT)),) if start == 0 else ()
    return runner.step(StepBatch("test", 0, number, (chunk,), arrivals)).tokens[1]


@pytest.mark.parametrize("failing_read", [1, 9])
def test_a_failed_read_ends_the_step_and_nothing_else(
    failing_read: int, make_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with local_engine(make_model("llama"), placement={"rules": PLACEMENTS["streamed"]}) as local:
        runner = local.runner
        wanted = step(runner, 1)
        real, count = DirectFile.read_into, 0

        def read_into(self: DirectFile, view: memoryview, offset: int, nbytes: int) -> int:
            nonlocal count
            count += 1
            if count == failing_read:
                raise TierError("injected")
            return real(self, view, offset, nbytes)

        monkeypatch.setattr(DirectFile, "read_into", read_into)
        # Prefetched units are still good: the error comes when its unit is due.
        with pytest.raises(TierError, match="injected"):
            _ = [step(runner, number) for number in range(2, 6)]
        monkeypatch.setattr(DirectFile, "read_into", real)
        assert [step(runner, 7), step(runner, 8)] == [wanted, wanted]


def test_parameters_of_another_dtype_are_cast(make_model: Callable[..., Path]) -> None:
    model_dir = make_model("llama")
    file = model_dir / "model.safetensors"
    tensors = load_file(file)
    odd = [name for name in tensors if "norm" in name or "layers.1.mlp.up_proj" in name]
    save_file(tensors | {name: tensors[name].bfloat16() for name in odd}, file, metadata={"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        wanted = int(model(torch.tensor([PROMPT])).logits[0, -1].argmax())
    with local_engine(model_dir, placement={"rules": PLACEMENTS["streamed"]}) as local:
        assert local.manifest.compute_dtype == "float32"
        assert all(local.plan.tier_of[name] is Tier.DEVICE for name in odd)
        assert step(local.runner, 1) == wanted


def test_a_prefill_without_a_sample_draws_nothing_and_fills_kv(make_model: Callable[..., Path]) -> None:
    with local_engine(make_model("llama"), placement={"rules": PLACEMENTS["streamed"]}) as local:
        runner = local.runner
        wanted = step(runner, 1)
        whole = [runner.kv.read_tokens(layer, (3, 1), 0, 5) for layer in range(4)]
        for tensor in (*runner.kv.keys, *runner.kv.values):
            tensor.zero_()
        first = SequenceChunk(1, PROMPT[:3], 0, (3, 1), False)
        assert runner.step(StepBatch("test", 0, 2, (first,))).tokens == {}
        assert step(runner, 3, PROMPT[3:], start=3) == wanted
        for layer, (keys, values) in enumerate(whole):
            got_keys, got_values = runner.kv.read_tokens(layer, (3, 1), 0, 5)
            torch.testing.assert_close(got_keys, keys)
            torch.testing.assert_close(got_values, values)


def test_a_load_that_fails_leaves_nothing(make_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model_dir = make_model("llama")
    with local_engine(model_dir) as local:
        manifest, plan = local.manifest, local.plan
    threads, descriptors = threading.active_count(), len(os.listdir("/proc/self/fd"))
    os.truncate(model_dir / "model.safetensors", manifest.files[0].size - 1)
    with pytest.raises(CheckpointError, match="truncated or was replaced"):
        ModelRunner.load(manifest, plan, device="cpu", io_threads=2, io_bytes=1 << 20)
    assert threading.active_count() == threads
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_steps_begin_before_everything_is_read(
    make_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first step waits for what it needs, layer by layer, and computes the same."""
    model_dir = make_model("llama")
    with local_engine(model_dir) as local:
        wanted = step(local.runner, 1)
    real, slow = DirectFile.read_into, threading.Event()

    def read_into(self: DirectFile, view: memoryview, offset: int, nbytes: int) -> int:
        if offset + nbytes > self.size // 2:
            slow.wait(10)
        return real(self, view, offset, nbytes)

    monkeypatch.setattr(DirectFile, "read_into", read_into)
    with local_engine(model_dir) as local:
        loaded, to_load = local.runner.progress
        assert loaded < to_load == local.manifest.nbytes
        threading.Timer(0.1, slow.set).start()
        assert step(local.runner, 1) == wanted
        local.runner.wait_loaded()
        assert local.runner.progress == (to_load, to_load)


def test_a_read_that_fails_while_loading_ends_the_steps_that_need_it(
    make_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model_dir = make_model("llama")
    real = DirectFile.read_into

    def read_into(self: DirectFile, view: memoryview, offset: int, nbytes: int) -> int:
        if offset + nbytes > self.size // 2:
            raise TierError("injected")
        return real(self, view, offset, nbytes)

    monkeypatch.setattr(DirectFile, "read_into", read_into)
    with local_engine(model_dir) as local:
        with pytest.raises(TierError, match="injected"):
            local.runner.wait_loaded()
        with pytest.raises(TierError, match="injected"):
            step(local.runner, 1)


def test_a_model_can_be_closed_while_it_is_loaded(
    make_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model_dir = make_model("llama")
    threads, descriptors = threading.active_count(), len(os.listdir("/proc/self/fd"))
    real = DirectFile.read_into

    def read_into(self: DirectFile, view: memoryview, offset: int, nbytes: int) -> int:
        time.sleep(0.02)
        return real(self, view, offset, nbytes)

    monkeypatch.setattr(DirectFile, "read_into", read_into)
    with local_engine(model_dir) as local:
        local.engine.close()
        local.runner.close()
        with pytest.raises(TierError, match="unloaded"):
            local.runner.wait_loaded()
    assert threading.active_count() == threads
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_attention_context_is_cleared_after_an_error(
    make_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with local_engine(make_model("llama")) as local:
        wanted = step(local.runner, 1)
        monkeypatch.setattr(ForwardContext, "mask", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            step(local.runner, 2)
        monkeypatch.undo()
        assert step(local.runner, 3) == wanted
