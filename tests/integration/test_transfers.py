"""D5, D6, A5, J1: parameters move between all tiers while tokens flow; every byte, range and file is accounted for."""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import ray

from raytier import LLM
from raytier.checkpoint.describe import describe_model
from raytier.checkpoint.manifest import ModelManifest, Role
from raytier.errors import EngineDeadError
from raytier.planner.plan import FILE_TIERS, Tier
from raytier.tiers.transfers import Transfer, TransferState
from tests.integration.application import is_alive
from tests.integration.offline import greedy, nothing_is_left
from tests.models import random_prompts, transformers_greedy

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

PROMPTS = random_prompts(5, 33, 12)
COUNT = 10
#: Ordered pairs of tiers.
WAYS = set(permutations(Tier, 2))


@pytest.fixture(scope="module")
def manifest(layered_dir: Path) -> ModelManifest:
    return describe_model(str(layered_dir)).manifest


@pytest.fixture(scope="module")
def wanted(layered_dir: Path) -> list[list[int]]:
    return transformers_greedy(layered_dir, PROMPTS, COUNT)


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two for the disk tier, as if on two disks."""
    first, second = tmp_path_factory.mktemp("nvme"), tmp_path_factory.mktemp("nvme")
    return first, second


@pytest.fixture(scope="module")
def llm(ray_session: None, layered_dir: Path, cache_dir: str, directories: tuple[Path, Path]) -> Iterator[LLM]:
    """30 MB of weights in 20 layers, some in every tier, whatever the machine's rates; no tier could hold them all."""
    tiers = {
        "device": {"max_mb": 18},
        "host": {"max_mb": 6},
        "ramdisk": {"enabled": True, "size_mb": 10},
        "nvme": {"paths": [str(path) for path in directories], "stripe_mb": 0.0625, "min_free_gb": 0, "io_threads": 2},
    }
    layers = {"device": "[0-4]", "host": "[5-7]", "ramdisk": "([89]|10|11)", "nvme": "1[2-9]"}
    rules = [{"pattern": rf"re:layers\.{numbers}\.", "tier": tier} for tier, numbers in layers.items()]
    settings: dict[str, Any] = {
        "placement": {"rules": rules},
        "kv": {"max_blocks": 17, "expected_sequences": 2, "expected_context": 64},
        "scheduler": {"max_num_seqs": 8, "max_num_batched_tokens": 64},
        "compute": {"threads": 1},
    }
    with LLM(str(layered_dir), tiers=tiers, cache_dir=cache_dir, **settings) as llm:
        yield llm


def files_in(*directories: Path) -> list[Path]:
    """What tiers of raytier have in directories, the locks that mark their owners left out."""
    owned = [path for directory in directories for path in directory.glob("raytier-*")]
    return [path for each in owned for path in each.rglob("*") if path.is_file() and path.name != "lock"]


def check_accounts(llm: LLM, manifest: ModelManifest, directories: tuple[Path, Path]) -> None:
    """What the parameters say of their places is what the owners of these say, and what lies on disk."""
    layers, status = llm.layers(), llm.status()
    assert [p.name for p in layers] == [p.name for p in manifest.parameters]
    assert sum(p.nbytes for p in layers) == manifest.nbytes
    by_tier = {tier: [p for p in layers if p.tier is tier] for tier in Tier}
    sums = {tier: sum(p.current_nbytes for p in found) for tier, found in by_tier.items()}
    assert status.device.resident_bytes == sums[Tier.DEVICE]
    assert status.device.host_bytes == sums[Tier.HOST]
    assert status.host.owners.get("layered", 0) == status.device.host_bytes + status.device.kv_host_bytes
    assert status.host.ranges == len(by_tier[Tier.HOST]) + bool(status.device.kv_host_bytes)
    assert status.host.free <= status.host.capacity - sums[Tier.HOST]
    assert status.ramdisk.files == len(by_tier[Tier.RAMDISK]) == len(files_in(Path("/dev/shm")))
    assert sum(path.stat().st_size for path in files_in(Path("/dev/shm"))) == status.ramdisk.stored_bytes
    assert sums[Tier.RAMDISK] <= status.ramdisk.stored_bytes <= status.ramdisk.capacity_bytes
    on_disk = files_in(*directories)
    assert status.disk.files == len(on_disk) >= len(by_tier[Tier.NVME])
    assert sum(path.stat().st_size for path in on_disk) == status.disk.stored_bytes >= sums[Tier.NVME]
    budget = llm.plan.devices[0]
    assert sums[Tier.DEVICE] + status.device.ring_bytes + status.device.kv_bytes <= budget.budget_bytes


def check_streamed(llm: LLM, manifest: ModelManifest, wanted: list[list[int]]) -> None:
    """Without transfers on the way, every step streams what is on ramdisk and disk now, to the byte."""
    tier_of = {p.name: p.tier for p in llm.layers()}
    before = llm.stats()
    assert greedy(llm, PROMPTS, COUNT) == wanted
    after = llm.stats()
    steps = after.steps - before.steps
    embedding = manifest.by_name[manifest.embedding]
    row = embedding.nbytes // embedding.shape[0]

    def swept(*tiers: Tier) -> int:
        found = [p for p in manifest.parameters if tier_of[p.name] in tiers]
        return sum(p.nbytes for p in found if p.role is not Role.EMBEDDING or manifest.tied)

    for streamed, tiers in (
        (after.total.bytes_streamed - before.total.bytes_streamed, FILE_TIERS),
        (after.total.bytes_streamed_ramdisk - before.total.bytes_streamed_ramdisk, (Tier.RAMDISK,)),
    ):
        rows = streamed - steps * swept(*tiers)
        assert rows % row == 0
        assert (rows > 0) == (tier_of[embedding.name] in tiers)


class Generating:
    """Generation that goes on and on in the background, every answer compared."""

    def __init__(self, llm: LLM, wanted: list[list[int]]) -> None:
        self._llm, self._wanted = llm, wanted
        self._end = threading.Event()
        self.rounds = 0
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        try:
            while not self._end.is_set():
                assert greedy(self._llm, PROMPTS, COUNT) == self._wanted
                self.rounds += 1
        except BaseException as error:
            self.error = error

    def __enter__(self) -> Generating:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()
        if self.error is not None:
            raise self.error


def test_random_transfers_between_all_tiers_under_load(
    llm: LLM, manifest: ModelManifest, wanted: list[list[int]], directories: tuple[Path, Path]
) -> None:
    dice = random.Random(5)
    names = [p.name for p in llm.layers() if p.fixed is None]
    layer_of = {p.name: p.layer for p in manifest.parameters}
    check_accounts(llm, manifest, directories)
    assert {llm.plan.tier_of[f"model.layers.{n}.mlp.up_proj.weight"] for n in (4, 7, 11, 19)} == set(Tier)
    seen: set[tuple[Tier, Tier]] = set()
    told: list[str] = []
    submitted = completed = moved = 0
    before = llm.stats().steps
    with Generating(llm, wanted) as generating:
        while seen < WAYS or submitted < 120 or generating.rounds < 3:
            assert generating.error is None
            assert submitted < 2000, f"never seen: {WAYS - seen}"
            batch: list[tuple[Future[Transfer], Tier]] = []
            for _ in range(6):
                name, destination = dice.choice(names), dice.choice(list(Tier))
                target: dict[str, Any] = {"parameter": name}
                if dice.random() < 0.25 and layer_of[name] is not None:
                    target = {"layer": layer_of[name]}
                future = llm.transfer(
                    **target,
                    destination=str(destination),
                    priority=dice.randint(1, 10),
                    on_finished=lambda transfer: told.append(transfer.id),
                )
                batch.append((future, destination))
            for future, destination in batch:
                transfer = future.result(60)
                submitted += 1
                if transfer.state is TransferState.FAILED:
                    assert "full" in transfer.reason or "no room" in transfer.reason, transfer.reason
                    continue
                completed += 1
                moved += transfer.nbytes
                assert transfer.nbytes == sum(manifest.by_name[n].nbytes for n in transfer.sources)
                seen |= {(Tier(source), destination) for source in transfer.sources.values()}
            check_accounts(llm, manifest, directories)
    assert len(told) == len(set(told)) == submitted
    assert 20 < completed < submitted, "some must have found a tier full"
    assert moved > manifest.nbytes / 2
    assert llm.stats().steps - before >= 3 * COUNT
    check_streamed(llm, manifest, wanted)
    llm.engine._scheduler.check_integrity()


def test_a_full_destination_says_so_and_changes_nothing(
    llm: LLM, manifest: ModelManifest, wanted: list[list[int]], directories: tuple[Path, Path]
) -> None:
    for layer in range(manifest.num_layers):
        assert llm.transfer(layer=layer, destination="nvme").result(60).state is TransferState.COMPLETED
    full: dict[Tier, Transfer] = {}
    layer = 0
    for destination in (Tier.HOST, Tier.RAMDISK, Tier.DEVICE):
        while destination not in full:
            before = {p.name: p.tier for p in llm.layers()}
            transfer = llm.transfer(layer=layer, destination=destination).result(60)
            if transfer.state is TransferState.COMPLETED:
                layer += 1
            else:
                full[destination] = transfer
                assert {p.name: p.tier for p in llm.layers()} == before
        check_accounts(llm, manifest, directories)
    assert "no room in the host pool" in full[Tier.HOST].reason
    assert "tiers.ramdisk.size_mb" in full[Tier.RAMDISK].reason
    assert "the device is full" in full[Tier.DEVICE].reason
    assert {p.tier for p in llm.layers() if p.fixed is None} == set(Tier)
    check_streamed(llm, manifest, wanted)


def test_what_is_killed_during_a_transfer_leaves_nothing(
    llm: LLM, manifest: ModelManifest, directories: tuple[Path, Path]
) -> None:
    """First the owner of the ramdisk, then the device; in the end nothing is left of any of them."""
    status = llm.status()
    pids = [each.pid for each in (status.device, status.host, status.disk, status.ramdisk)]
    assert files_in(Path("/dev/shm"), *directories)
    for pid, destination in ((status.ramdisk.pid, "ramdisk"), (status.device.pid, "nvme")):
        ended = 0

        def kill_soon(_: Transfer, pid: int = pid) -> None:  # some have ended, others are on their way
            nonlocal ended
            ended += 1
            if ended == 3:
                threading.Timer(0.003, os.kill, (pid, signal.SIGKILL)).start()

        layers = range(manifest.num_layers)
        queued = [llm.transfer(layer=n, destination=destination, on_finished=kill_soon) for n in layers]
        reasons = [future.result(60).reason for future in queued]
        assert any("an actor is gone" in (reason or "") for reason in reasons), reasons
    with pytest.raises(EngineDeadError):
        greedy(llm, PROMPTS, COUNT)
    llm.close()
    nothing_is_left(pids)
    assert not any(is_alive(pid) for pid in pids)
    assert not files_in(Path("/dev/shm"), *directories)
    assert not [path for directory in directories for path in directory.iterdir()]
    assert ray.is_initialized()
