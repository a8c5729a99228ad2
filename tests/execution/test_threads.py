"""Threads compute with as many cores as each was told, whatever others were told since (T10)."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from raytier.engine.sampling_params import SamplingParams
from raytier.execution.threads import compute_with, num_threads
from tests.local_engine import local_engine


def test_a_thread_keeps_its_number() -> None:
    with ThreadPoolExecutor(1) as steps, ThreadPoolExecutor(1) as helper:
        steps.submit(compute_with, 2).result()
        helper.submit(compute_with, 1).result()
        assert steps.submit(torch.get_num_threads).result() == 2
        assert helper.submit(torch.get_num_threads).result() == 1

        def meanwhile() -> int:
            with num_threads(1):
                return torch.get_num_threads()

        assert steps.submit(meanwhile).result() == 1
        assert steps.submit(torch.get_num_threads).result() == 2


@pytest.mark.parametrize("threads", [1, 2])
def test_steps_compute_as_the_thread_that_loaded(make_model: Callable[..., Path], threads: int) -> None:
    """Loading, which goes on in a thread of its own and computes alone, changes nothing about that."""
    seen: set[int] = set()
    with num_threads(threads), local_engine(make_model("llama")) as local:
        local.runner.wait_loaded()
        local.runner._model.register_forward_hook(lambda *_: seen.add(torch.get_num_threads()))
        with ThreadPoolExecutor(1) as other:
            other.submit(compute_with, 3 - threads).result()
        local.engine.generate([[1, 2, 3]], SamplingParams(temperature=0, top_p=1, top_k=0, max_tokens=3))
    assert seen == {threads}
