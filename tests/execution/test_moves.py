"""D5, D6, G2: parameters change their tier while steps run; tokens stay the same and every byte is accounted for."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raytier.checkpoint.manifest import Extent, Parameter, SourceFile, Stored
from raytier.codecs.codec import NONE, Frames, checksum, frame_ranges, frame_step
from raytier.engine.outputs import OutputDelta
from raytier.engine.sampling_params import SamplingParams
from raytier.errors import InvalidRequestError, ResourceNotAvailableError, TierError
from raytier.execution.weights import Weights
from raytier.planner.plan import FILE_TIERS, Tier
from raytier.tiers.aligned import ALIGNMENT, align_up
from raytier.tiers.copies import TierCopy
from raytier.tiers.files import DirectFile
from tests.local_engine import PLACEMENTS, LocalEngine, local_engine

GREEDY = SamplingParams(temperature=0, top_p=1, top_k=0, max_tokens=40, ignore_eos=True)
PROMPTS = [[5, 9, 300, 17, 4], [7], list(range(20, 60))]
ROOMY = {"device": {"max_mb": 64}, "host": {"max_mb": 64}}


def copy_of(parameter: Parameter, manifest_files: tuple[SourceFile, ...], folder: Path) -> TierCopy:
    """The parameter in two files, in stripes of one block each but the last."""
    data = b""
    for extent in parameter.extents:
        with open(manifest_files[extent.file].path, "rb") as file:
            file.seek(extent.offset)
            data += file.read(extent.nbytes)
    halves: list[bytes] = [b"", b""]
    extents = []
    for number, start in enumerate(range(0, len(data), ALIGNMENT)):
        stripe = data[start : start + ALIGNMENT]
        extents.append(Extent(number % 2, len(halves[number % 2]), len(stripe)))
        halves[number % 2] += stripe.ljust(align_up(len(stripe)), b"\0")
    used = halves if len(extents) > 1 else halves[:1]
    files = []
    for number, half in enumerate(used):
        path = folder / f"{parameter.name}.{number}"
        path.write_bytes(half)
        files.append(SourceFile(str(path), len(half)))
    step = frame_step(len(data), parameter.shape[0])
    ranges = list(frame_ranges(len(data), step))
    frames = Frames(
        len(data), step, tuple(stop - start for start, stop in ranges), tuple(checksum(data[a:b]) for a, b in ranges)
    )
    return TierCopy(tuple(files), Stored(None, NONE, frames, tuple(extents)))


class Mover:
    """Moves parameters of a running engine and keeps what a host pool and a ramdisk would keep."""

    def __init__(self, local: LocalEngine, folder: Path) -> None:
        self.local = local
        self.weights: Weights = local.runner._weights
        self.movable = [p for p in local.manifest.parameters if self.weights.fixed(p.name) is None]
        self.folder = folder
        self.copies: dict[str, TierCopy] = {}
        self.arena = memoryview(bytearray(sum(p.nbytes for p in self.movable)))

    def move(self, parameters: list[Parameter], destination: Tier) -> dict[str, Tier]:
        names = [p.name for p in parameters]
        views, copies, offset = {}, {}, 0
        for p in self.movable:
            views[p.name] = self.arena[offset : offset + p.nbytes]
            offset += p.nbytes
        if destination is Tier.RAMDISK:
            files = self.local.manifest.files
            new = [p for p in parameters if p.name not in self.copies]
            copies = {p.name: copy_of(p, files, self.folder) for p in new}
        came_from = self.local.runner.move(names, destination, views, copies)
        for name in came_from:
            if (old := self.copies.pop(name, None)) is not None:
                for file in old.files:
                    os.unlink(file.path)
            if destination is Tier.RAMDISK:
                self.copies[name] = copies[name]
        return came_from

    def check(self) -> None:
        """Bytes by tier add up, and only the files of what is on the ramdisk are there and open."""
        status = {p.name: p for p in self.local.runner.parameters()}
        assert sum(p.nbytes for p in status.values()) == self.local.manifest.nbytes
        held = self.local.runner.memory()
        assert held["host"] == sum(p.current_nbytes for p in status.values() if p.tier is Tier.HOST)
        assert held["resident"] == sum(p.current_nbytes for p in status.values() if p.tier is Tier.DEVICE)
        head = self.local.manifest.head
        streamed = [p for p in status.values() if p.layer is not None or p.name == head]
        assert (held["ring"] > 0) == any(p.tier in FILE_TIERS for p in streamed)
        opened = {file.path for file in self.weights._sources.pool.files}
        on_ramdisk = {f.path for name, p in status.items() if p.tier is Tier.RAMDISK for f in self.copies[name].files}
        assert opened == on_ramdisk | {file.path for file in self.local.manifest.files}


@pytest.mark.parametrize(
    ("family", "start", "packed"),
    [("llama", "resident", True), ("llama", "streamed", False), ("qwen2", "half", True), ("gpt2", "host", False)],
)
def test_random_moves_during_generation_leave_the_tokens_alone(
    family: str, start: str, packed: bool, make_model: Callable[..., Path], tmp_path: Path
) -> None:
    model_dir = make_model(family)
    settings = {"placement": {"rules": PLACEMENTS[start]}, "tiers": ROOMY, "packed": packed}
    with local_engine(model_dir, **settings) as local:
        expected = [output.token_ids for output in local.engine.generate(PROMPTS, GREEDY)]
    rng = random.Random(3)
    with local_engine(model_dir, **settings) as local:
        mover = Mover(local, tmp_path)
        stop = threading.Event()
        rounds: list[list[tuple[int, ...]]] = []

        def generate() -> None:
            while not stop.is_set():
                outputs: list[OutputDelta] = local.engine.generate(PROMPTS, GREEDY)
                rounds.append([output.token_ids for output in outputs])

        thread = threading.Thread(target=generate)
        thread.start()
        seen = set()
        try:
            for number in range(400):
                if number > 60 and len(seen) == 12:
                    break
                chosen = rng.sample(mover.movable, rng.choice((1, 1, 3)))
                destination = rng.choice(list(Tier))
                seen |= {(tier, destination) for tier in mover.move(chosen, destination).values()}
            mover.move(mover.movable, Tier.RAMDISK)  # everything, then back
            mover.move(mover.movable, Tier.DEVICE)
        finally:
            stop.set()
            thread.join()
        assert len(seen) == 12, "every pair of tiers"
        assert rounds and all(tokens == expected for tokens in rounds)
        mover.check()
        assert local.runner.memory()["ring"] == 0 and not mover.copies
        total = local.engine.stats().total
        assert 0 < total.bytes_streamed_ramdisk < total.bytes_streamed
        assert 0 < total.bytes_read_ramdisk <= total.bytes_read
        mover.move(mover.movable, Tier.NVME)
        before = local.engine.stats()
        assert [o.token_ids for o in local.engine.generate(PROMPTS[:1], GREEDY)] == [expected[0]]
        after = local.engine.stats()
        tied = local.manifest.tied
        swept = sum(p.nbytes for p in mover.movable if tied or p.name != local.manifest.embedding)
        streamed = after.total.bytes_streamed - before.total.bytes_streamed
        assert streamed >= swept * (after.steps - before.steps)
        mover.check()


def test_a_full_device_refuses_and_goes_on_from_where_it_was(make_model: Callable[..., Path], tmp_path: Path) -> None:
    model_dir = make_model("llama")
    small: dict[str, Any] = {"kv": {"max_blocks": 40}, "scheduler": {"max_num_batched_tokens": 16}}
    with local_engine(model_dir, tiers=ROOMY, **small) as local:
        share = local.plan.devices[0]
        tight = (share.kv_bytes + share.activation_bytes + share.resident_bytes * 0.7) / 2**20
    tiers = {"device": {"max_mb": tight, "reserved_mb": 0, "max_utilization": 1}, "host": {"max_mb": 0}}
    with local_engine(model_dir, tiers=tiers, placement={"rules": PLACEMENTS["streamed"]}, **small) as local:
        assert local.plan.streamed_bytes
        mover = Mover(local, tmp_path)
        expected = local.engine.generate(PROMPTS, GREEDY)
        places = dict(mover.weights.tier_of)
        with pytest.raises(ResourceNotAvailableError, match="the device is full: .* its budget is"):
            mover.move(mover.movable, Tier.DEVICE)
        assert mover.weights.tier_of == places
        assert [o.token_ids for o in local.engine.generate(PROMPTS, GREEDY)] == [o.token_ids for o in expected]
        local.check_bytes()
        mover.check()


def test_what_cannot_move_is_refused(make_model: Callable[..., Path], tmp_path: Path) -> None:
    with local_engine(make_model("llama"), tiers=ROOMY) as local:
        for name, reason in (("model.norm.weight", "outside the layers"), ("nothing", "no parameter of this model")):
            with pytest.raises(InvalidRequestError, match=reason):
                local.runner.move([name], Tier.NVME, {}, {})
        assert Mover(local, tmp_path).move([], Tier.NVME) == {}


def test_a_move_whose_copy_cannot_be_read_changes_nothing(
    make_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing streams here, so that the fault hits the move alone and no prefetch."""
    with local_engine(make_model("llama"), placement={"rules": PLACEMENTS["resident"]}, tiers=ROOMY) as local:
        mover = Mover(local, tmp_path)
        expected = local.engine.generate(PROMPTS, GREEDY)
        chosen = next(p for p in mover.movable if p.layer is not None)
        copy = copy_of(chosen, local.manifest.files, tmp_path)
        os.truncate(copy.files[0].path, 0)
        with pytest.raises(Exception, match="truncated or was replaced"):
            local.runner.move([chosen.name], Tier.RAMDISK, {}, {chosen.name: copy})

        def read_into(self: DirectFile, view: memoryview, offset: int, nbytes: int) -> int:
            raise TierError("injected")

        monkeypatch.setattr(DirectFile, "read_into", read_into)
        with pytest.raises(TierError, match="injected"):
            mover.move([chosen], Tier.HOST)
        monkeypatch.undo()
        assert mover.weights.tier_of[chosen.name] is Tier.DEVICE
        assert [o.token_ids for o in local.engine.generate(PROMPTS, GREEDY)] == [o.token_ids for o in expected]
        mover.check()


def test_unloading_ends_a_transfer_under_way(make_model: Callable[..., Path], tmp_path: Path) -> None:
    with local_engine(make_model("llama"), placement={"rules": PLACEMENTS["streamed"]}, tiers=ROOMY) as local:
        mover = Mover(local, tmp_path)
        local.engine.close()
        local.runner.close()
        with pytest.raises(TierError):
            mover.move(mover.movable, Tier.DEVICE)
