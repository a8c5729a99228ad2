"""E2, D1, D5: of a mixture only the experts that the router chose are fetched, wherever they are moved meanwhile."""

from __future__ import annotations

import errno
import os
import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from raytier.checkpoint.describe import describe_model
from raytier.engine.sampling_params import SamplingParams
from raytier.errors import TierError
from raytier.execution.expert_stream import ExpertPlan, ExpertStream
from raytier.execution.layout import sweep_units
from raytier.execution.reader import ReaderPool
from raytier.execution.stream import StreamStats
from raytier.planner.plan import Tier
from raytier.tiers.files import DirectFile
from tests.execution.test_model_runner import step
from tests.execution.test_moves import Mover
from tests.execution.test_stream import within
from tests.local_engine import LocalEngine, local_engine
from tests.models import random_prompts, transformers_greedy

GREEDY = SamplingParams(temperature=0, top_p=1, top_k=0, max_tokens=12, ignore_eos=True)
PROMPTS = random_prompts(1, 23, 7)
MIXTURES = ["mixtral", "qwen3_moe"]
#: Everything that can be, or the experts alone.
EVERYTHING, EXPERTS = [{"pattern": "re:.", "tier": "nvme"}], [{"pattern": "experts", "tier": "nvme"}]


def settings(rules: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    tiers = {"device": {"max_mb": 64}, "host": {"max_mb": 64}, "nvme": {"io_threads": 2, "io_mb": 0.0625}}
    return {"placement": {"rules": rules}, "tiers": tiers, **changes}


def chosen(local: LocalEngine) -> dict[tuple[str, int], int]:
    """How often every expert was chosen."""
    uses = {}
    for status in local.runner.parameters():
        part = local.manifest.by_name[status.name].expert
        if part is not None:
            assert uses.setdefault((part.bank, part.expert), status.access_count) == status.access_count
    return uses


@pytest.mark.parametrize("family", MIXTURES)
@pytest.mark.parametrize("rules", [EVERYTHING, EXPERTS], ids=["all", "experts"])
@pytest.mark.parametrize("slots", [None, 1, 3, 1000])
def test_tokens_and_bytes(
    family: str,
    rules: list[dict[str, Any]],
    slots: int | None,
    make_model: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Token-identical for few and many slots, and what is streamed are the chosen experts' bytes and no others."""
    if slots is not None:
        of = ExpertPlan.of
        monkeypatch.setattr(ExpertPlan, "of", lambda *args: replace(of(*args), slots=slots))
    model_dir = make_model(family)
    wanted = transformers_greedy(model_dir, PROMPTS, GREEDY.max_tokens or 0)
    with local_engine(model_dir, **settings(rules, scheduler={"max_num_batched_tokens": 13})) as local:
        outputs = local.engine.generate(PROMPTS, GREEDY)
        assert [list(o.token_ids) for o in outputs] == wanted
        local.check_bytes()
        stats, steps = local.engine.stats().total, local.engine.stats().steps
        stream = local.runner._weights._streamed.experts
        stream.check_integrity()
        found = local.runner._weights._streamed.stats.bytes_found
        uses, banks = chosen(local), {bank.name: bank for bank in local.manifest.experts}
        assert all(count <= steps for count in uses.values())
        assert sum(uses.values()) >= steps * sum(bank.per_token for bank in banks.values())
        experts = sum(p.nbytes for p in local.manifest.parameters if p.expert)
        assert stats.bytes_streamed < steps * (local.swept_bytes + experts), "not all experts were chosen in every step"
        if slots == 1000:
            once = {key for key, count in uses.items() if count}
            assert local.fetched_bytes == sum(
                p.nbytes for p in local.manifest.parameters if p.expert and (p.expert.bank, p.expert.expert) in once
            ), "each was read once"
        elif slots == 1:
            assert found == 0 and local.fetched_bytes == sum(
                p.nbytes * uses[p.expert.bank, p.expert.expert] for p in local.manifest.parameters if p.expert
            )


@pytest.mark.parametrize("family", MIXTURES)
def test_a_single_token_reads_the_experts_of_one_token(family: str, make_model: Callable[..., Path]) -> None:
    with local_engine(make_model(family), **settings(EVERYTHING)) as local:
        local.engine.generate([[5]], replace(GREEDY, max_tokens=1))
        assert local.engine.stats().steps == 1
        size = {(p.expert.bank, p.expert.expert): 0 for p in local.manifest.parameters if p.expert}
        for p in local.manifest.parameters:
            if p.expert:
                size[p.expert.bank, p.expert.expert] += p.nbytes
        expected = sum(bank.per_token * size[bank.name, 0] for bank in local.manifest.experts)
        assert len(set(size.values())) == 1
        assert local.fetched_bytes == expected
        total = local.engine.stats().total
        assert total.bytes_streamed == local.swept_bytes + expected + local.row_bytes
        assert sum(chosen(local).values()) == sum(bank.per_token for bank in local.manifest.experts)


@pytest.mark.parametrize("tier", [Tier.DEVICE, Tier.HOST])
def test_experts_in_memory_cost_no_reads(tier: Tier, make_model: Callable[..., Path]) -> None:
    model_dir = make_model("qwen3_moe")
    wanted = transformers_greedy(model_dir, PROMPTS, GREEDY.max_tokens or 0)
    rules = [{"pattern": "experts", "tier": tier.value}, {"pattern": "re:.", "tier": "nvme", "priority": 200}]
    with local_engine(model_dir, **settings(rules)) as local:
        assert {local.plan.tier_of[p.name] for p in local.manifest.parameters if p.expert} == {tier}
        assert [list(o.token_ids) for o in local.engine.generate(PROMPTS, GREEDY)] == wanted
        local.check_bytes()
        assert local.fetched_bytes == 0 and local.runner._weights._streamed.experts.nbytes == 0


@pytest.mark.parametrize("family", MIXTURES)
def test_single_experts_and_layers_move_while_steps_run(
    family: str, make_model: Callable[..., Path], tmp_path: Path
) -> None:
    model_dir = make_model(family)
    with local_engine(model_dir, **settings(EVERYTHING)) as local:
        expected = [output.token_ids for output in local.engine.generate(PROMPTS, GREEDY)]
    rng = random.Random(5)
    with local_engine(model_dir, **settings(EVERYTHING)) as local:
        mover = Mover(local, tmp_path)
        stop = threading.Event()
        rounds: list[list[tuple[int, ...]]] = []

        def generate() -> None:
            while not stop.is_set():
                rounds.append([output.token_ids for output in local.engine.generate(PROMPTS, GREEDY)])

        thread = threading.Thread(target=generate)
        thread.start()
        try:
            experts = [p for p in mover.movable if p.expert]
            seen = set()
            for number in range(150):
                if number > 50 and len(seen) == 12:
                    break
                destination = rng.choice(list(Tier))
                one = rng.choice(experts)
                assert one.expert is not None
                whole = [p for p in experts if p.expert and p.expert.bank == one.expert.bank]
                same = [p for p in whole if p.expert and p.expert.expert == one.expert.expert]
                layer = [p for p in mover.movable if p.layer == one.layer]
                seen |= {
                    (t, destination) for t in mover.move(rng.choice(([one], same, whole, layer)), destination).values()
                }
            mover.move(mover.movable, Tier.RAMDISK)
            mover.move(mover.movable, Tier.DEVICE)
        finally:
            stop.set()
            thread.join()
        assert len(seen) == 12, "every pair of tiers"
        assert rounds and all(tokens == expected for tokens in rounds)
        mover.check()
        local.runner._weights._streamed.experts.check_integrity()
        assert local.runner.memory()["ring"] == 0
        mover.move(experts[:1], Tier.NVME)
        assert [o.token_ids for o in local.engine.generate(PROMPTS, GREEDY)] == expected
        mover.check()


def test_a_failed_step_leaves_nothing_and_the_next_one_is_right(
    make_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with local_engine(make_model("mixtral"), **settings(EXPERTS)) as local:
        local.runner.wait_loaded()
        stream = local.runner._weights._streamed.experts
        real, calls = DirectFile.read_into, 0

        def read_into(self: DirectFile, view: memoryview, offset: int, nbytes: int) -> int:
            nonlocal calls
            calls += 1
            if calls % 5 == 0:
                raise TierError("injected")
            return real(self, view, offset, nbytes)

        monkeypatch.setattr(DirectFile, "read_into", read_into)
        for number in range(1, 4):
            with pytest.raises(TierError, match="injected"):
                step(local.runner, number)
            stream.check_integrity()
            assert not any(slot.pinned or slot.ticket for slot in stream._slots)
        monkeypatch.undo()
        outputs = local.engine.generate(PROMPTS, GREEDY)
        wanted = transformers_greedy(Path(local.manifest.model_dir), PROMPTS, GREEDY.max_tokens or 0)
        assert [list(o.token_ids) for o in outputs] == wanted


@pytest.fixture
def stored(make_model: Callable[..., Path]) -> Any:
    return describe_model(str(make_model("mixtral"))).manifest


def test_units_of_layers_have_no_experts_and_those_of_experts_all(stored: Any) -> None:
    tier_of = dict.fromkeys(stored.by_name, Tier.NVME)
    layers = {m.name for unit in sweep_units(stored, tier_of, 40) for m in unit.members}
    plan = ExpertPlan.of(stored, tier_of, 0)
    experts = {m.name for unit in plan.units.values() for m in unit.members}
    assert experts == {p.name for p in stored.parameters if p.expert} and not experts & layers
    assert plan.slots == 2, "the experts of one token"
    assert ExpertPlan.of(stored, tier_of, 5 * plan.slot_bytes + 1).slots == 5
    assert ExpertPlan.of(stored, tier_of, 1 << 40).slots == len(plan.units)
    tier_of |= dict.fromkeys((p.name for p in stored.parameters if p.expert and p.layer != 1), Tier.HOST)
    assert {bank for bank, _ in ExpertPlan.of(stored, tier_of, 0).units} == {stored.experts[1].name}
    assert ExpertPlan.of(stored, dict.fromkeys(stored.by_name, Tier.DEVICE), 1 << 40) == ExpertPlan()


def test_slots_requests_in_flight_and_reuse(stored: Any) -> None:
    """All chosen experts are asked for before the first one is waited for; often chosen ones stay."""
    gate, asked = threading.Event(), []

    def preadv(fd: int, views: Sequence[memoryview], offset: int) -> int:
        asked.append(offset)
        assert gate.wait(20)
        return os.preadv(fd, list(views), offset)

    bank = stored.experts[0].name
    plan = replace(ExpertPlan.of(stored, dict.fromkeys(stored.by_name, Tier.NVME), 0), slots=3)
    files = [DirectFile(f.path, f.size, preadv=preadv) for f in stored.files]

    def run() -> None:
        with ReaderPool(files, 4, 1 << 20) as pool:
            stream = ExpertStream(pool, None, stats := StreamStats())
            stream.start(plan, stored)
            fetched = stream.fetch(bank, [0, 2, 5])
            timer = threading.Timer(0.2, gate.set)
            timer.start()
            number, tensors = next(fetched)
            assert number == 0 and {t.shape[-1] for t in tensors.values()} <= {32, 48}
            assert len(asked) == sum(len(plan.units[bank, e].reads) for e in (0, 2, 5))
            stream.check_integrity()
            assert [e for e, _ in fetched] == [2, 5]
            size = plan.units[bank, 0].wanted_bytes
            assert (stats.bytes_consumed, stats.bytes_found, stats.units) == (3 * size, 0, 3)
            for _ in range(3):
                assert [e for e, _ in stream.fetch(bank, [0, 2])] == [0, 2]
            assert [e for e, _ in stream.fetch(bank, [1, 3, 6, 7])] == [1, 3, 6, 7], "more than there are slots"
            assert (stats.bytes_consumed, stats.bytes_found) == (7 * size, 6 * size)
            assert stats.bytes_read == pool.count().nbytes
            stream.check_integrity()
            half_way = stream.fetch(bank, [2, 4, 5])
            next(half_way)
            stream.cancel()
            stream.check_integrity()
            assert stats.bytes_read == pool.count().nbytes
            assert [e for e, _ in stream.fetch(bank, [4, 5])] == [4, 5]
            stream.close()
            assert stream.nbytes == 0

    try:
        within(60, run)
    finally:
        for file in files:
            file.close()


def test_an_error_of_the_disk_surfaces_and_is_forgotten(stored: Any) -> None:
    fails = True

    def preadv(fd: int, views: Sequence[memoryview], offset: int) -> int:
        if fails:
            raise OSError(errno.EIO, "Input/output error")
        return os.preadv(fd, list(views), offset)

    plan = ExpertPlan.of(stored, dict.fromkeys(stored.by_name, Tier.NVME), 0)
    files = [DirectFile(f.path, f.size, preadv=preadv) for f in stored.files]
    bank = stored.experts[1].name
    try:
        with ReaderPool(files, 2, 1 << 20) as pool:
            stream = ExpertStream(pool, None, StreamStats())
            stream.start(plan, stored)
            with pytest.raises(TierError, match="Input/output error"):
                list(stream.fetch(bank, [0, 1, 2]))
            stream.cancel()
            stream.check_integrity()
            fails = False
            assert [e for e, _ in stream.fetch(bank, [0, 1, 2])] == [0, 1, 2]
            stream.close()
    finally:
        for file in files:
            file.close()
