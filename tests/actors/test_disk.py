"""A3, A5, A6, J1, J2: the actor of a file tier, called in this process: both roles, health, and what is left."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from raytier.actors.disk import DiskTierActor, remote_disk_actor, remove_leftovers
from raytier.config import NvmeTier, RamdiskTier
from raytier.errors import (
    CheckpointError,
    ConfigurationError,
    InvalidRequestError,
    ResourceNotAvailableError,
    TierError,
)
from raytier.tiers.owners import owner_name
from raytier.tiers.ramdisk import filesystem_of, mount_at
from tests.tiers.blobs import Blob, read_copy

MIB = 1 << 20


@pytest.fixture
def start() -> Iterator[Callable[..., DiskTierActor]]:
    """Actors that are closed after the test."""
    with ExitStack() as stack:

        def make(tier: NvmeTier | RamdiskTier) -> DiskTierActor:
            actor = DiskTierActor("raytier:app:disk:0", tier)
            stack.callback(actor.close)
            return actor

        yield make


Start = Callable[..., DiskTierActor]


def nvme(*paths: Path, **options: float) -> NvmeTier:
    for path in paths:
        path.mkdir(exist_ok=True)
    return NvmeTier(paths=tuple(str(path) for path in paths), **{"min_free_gb": 0, **options})


def test_in_place_nothing_is_written(blob: Blob, start: Start) -> None:
    actor = start(NvmeTier())
    parameter = blob.parameter("p", (0, 0, 100))
    manifest = blob.manifest(parameter)
    assert actor.status().files == 0
    assert actor.open_model(manifest) == 2
    assert actor.open_model(manifest) == 2
    with pytest.raises(TierError, match=r"reads the checkpoint in place: set tiers\.nvme\.paths"):
        actor.store("m", manifest, ["p"])
    assert actor.remove("m") == actor.remove("m", ["p"]) == 0
    status = actor.status()
    assert (status.tier, status.in_place, status.files, status.stored_bytes, status.writes) == ("nvme", True, 2, 0, 0)
    (directory,) = status.directories
    assert (directory.path, directory.files) == (manifest.model_dir, 2)
    assert directory.nbytes == sum(file.size for file in blob.files)
    assert status.free_bytes == directory.free_bytes > 0
    assert len(os.listdir(manifest.model_dir)) == 2


@pytest.mark.parametrize("damage", [os.unlink, lambda path: os.truncate(path, 1)])
def test_a_damaged_checkpoint_is_named_and_counted(blob: Blob, start: Start, damage: Callable[[str], None]) -> None:
    actor = start(NvmeTier())
    manifest = blob.manifest(blob.parameter("p", (0, 0, 100)))
    damage(blob.files[1].path)
    with pytest.raises(CheckpointError, match="1.safetensors"):
        actor.open_model(manifest)
    assert actor.status().errors == 1


def test_copies_over_several_directories(blob: Blob, start: Start, tmp_path: Path) -> None:
    paths = tmp_path / "a", tmp_path / "b"
    actor = start(nvme(*paths, stripe_mb=0.0625, max_gb=1))
    large, small = blob.parameter("large", (0, 7, 250_001)), blob.parameter("small", (1, 0, 9))
    manifest = blob.manifest(large, small)
    actor.open_model(manifest)
    copies = actor.store("m", manifest, ["large", "small"])
    assert [len(copies[name].files) for name in ("large", "small")] == [2, 1]
    assert pickle.loads(pickle.dumps(copies)) == copies  # noqa: S301 - as Ray sends them
    for parameter in (large, small):
        assert read_copy(copies[parameter.name]) == blob.content(parameter)
    status = actor.status()
    assert (status.in_place, status.files, status.capacity_bytes) == (False, 3, 1 << 30)
    assert status.stored_bytes == status.bytes_written == sum(f.size for c in copies.values() for f in c.files)
    assert status.source_bytes_read >= 250_010
    assert status.writes > 0 and status.reads == 0 and status.storing is None
    assert [directory.path for directory in status.directories] == [str(path) for path in paths]
    assert actor.remove("m", ["small"]) == 4096
    with pytest.raises(InvalidRequestError, match="'no such' is no parameter of m"):
        actor.store("m", manifest, ["small", "no such"])
    assert actor.status().files == 2
    assert actor.remove("m") == status.stored_bytes - 4096
    actor.close()
    actor.close()
    assert [list(path.iterdir()) for path in paths] == [[], []]


def test_no_room_says_what_to_change(blob: Blob, start: Start, tmp_path: Path) -> None:
    manifest = blob.manifest(blob.parameter("p", (0, 0, 100)))
    with pytest.raises(ResourceNotAvailableError, match=r"0 of the tier's 0 are free; .*tiers\.nvme\.max_gb"):
        start(nvme(tmp_path / "a", max_gb=0)).store("m", manifest, ["p"])
    with pytest.raises(ResourceNotAvailableError, match=r"no room for p in .*tiers\.nvme\.min_free_gb"):
        start(nvme(tmp_path / "b", min_free_gb=1e6)).store("m", manifest, ["p"])


def test_a_missing_directory_names_its_key(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"tiers\.nvme\.paths: .*gone is no directory"):
        DiskTierActor("disk", NvmeTier(paths=(str(tmp_path / "gone"),)))


def test_health_of_reading(start: Start) -> None:
    actor = start(NvmeTier())
    actor.record(3, 1000, 0.5)
    assert actor.status().utilization == 0, "of what?"
    actor.calibrate(4000.0)
    actor.record(1, 1000, 0.5)
    status = actor.status()
    assert (status.reads, status.bytes_read, status.utilization) == (4, 2000, 0.5)
    assert status.measured_bytes_per_s == 4000.0
    actor.record(1, 10**9, 0.5)
    assert actor.status().utilization == 1
    actor.record(1, 1, 0)  # a clock that did not move


def test_utilization_is_of_now(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    actor = start(NvmeTier())
    actor.calibrate(1000.0)
    actor.record(1, 1000, 1)
    later = time.monotonic() + 6
    monkeypatch.setattr(time, "monotonic", lambda: later)
    assert actor.status().utilization == 0


def test_a_ramdisk_holds_copies_and_is_empty_afterwards(blob: Blob, start: Start) -> None:
    before = sorted(os.listdir("/dev/shm"))
    actor = start(RamdiskTier(enabled=True, size_mb=2, usable_percent=50))
    parameter = blob.parameter("p", (0, 7, 250_001))
    manifest = blob.manifest(parameter)
    copy = actor.store("m", manifest, ["p"])["p"]
    (file,) = copy.files
    assert filesystem_of(file.path) == "tmpfs"
    assert file.path.startswith("/dev/shm/raytier-")
    assert read_copy(copy) == blob.content(parameter)
    status = actor.status()
    assert (status.tier, status.in_place, status.capacity_bytes, status.files) == ("ramdisk", False, MIB, 1)
    assert repr(actor) == "DiskTierActor(ramdisk, 0 MiB of copies)"
    for number in range(3):
        actor.store(f"m{number}", manifest, ["p"])
    with pytest.raises(ResourceNotAvailableError, match=r"raise tiers\.ramdisk\.size_mb"):
        actor.store("one more", manifest, ["p"])
    actor.close()
    assert sorted(os.listdir("/dev/shm")) == before


def test_a_ramdisk_on_a_disk_is_refused(tmp_path: Path) -> None:
    if filesystem_of(str(tmp_path)) == "tmpfs":
        pytest.skip("the directory for temporary files is on a tmpfs here")
    with pytest.raises(ConfigurationError, match=r"tiers\.ramdisk\.path: .* not on a tmpfs"):
        DiskTierActor("disk", RamdiskTier(enabled=True, path=str(tmp_path)))
    assert list(tmp_path.iterdir()) == []


def test_two_of_one_process_do_not_share_a_directory(start: Start) -> None:
    tier = RamdiskTier(enabled=True, size_mb=1)
    start(tier)
    with pytest.raises(ResourceNotAvailableError, match="used twice"):
        DiskTierActor("disk", tier)


def test_a_mounted_ramdisk_goes_with_the_actor(blob: Blob, start: Start, tmp_path: Path) -> None:
    path = tmp_path / "ram"
    try:
        actor = start(RamdiskTier(enabled=True, path=str(path), mount=True, size_mb=4))
    except ConfigurationError as error:
        pytest.skip(f"needs the right to mount: {error}")
    parameter = blob.parameter("p", (0, 7, 250_001))
    copy = actor.store("m", blob.manifest(parameter), ["p"])["p"]
    with open(copy.files[0].path, "rb") as reader:
        actor.close()
        assert mount_at(str(path)) is None and not path.exists()
        assert reader.read()[:250_001] == blob.content(parameter), "who reads may finish"


def test_status_answers_while_a_copy_is_made(blob: Blob, start: Start, tmp_path: Path) -> None:
    actor = start(nvme(tmp_path / "a"))
    parameter = blob.parameter("p", (0, 0, 300_000))
    manifest = blob.manifest(parameter)
    held, go_on = threading.Event(), threading.Event()
    show = actor._show

    def hold(written: int, total: int) -> None:
        show(written, total)
        held.set()
        go_on.wait(10)

    actor._show = hold  # type: ignore[method-assign]
    storing = threading.Thread(target=actor.store, args=("m", manifest, ["p"]))
    storing.start()
    assert held.wait(10)
    status = actor.status()
    assert status.storing == (303_104, 303_104)
    assert status.files == 0, "not there before it is whole"
    actor.record(1, 1, 1)
    go_on.set()
    storing.join(10)
    assert (actor.status().files, actor.status().storing) == (1, None)


KILLED = """
import os, signal
from raytier.actors.disk import DiskTierActor
from raytier.config import NvmeTier, RamdiskTier
actor = DiskTierActor("disk", TIER)
os.kill(os.getpid(), signal.SIGKILL)
"""


def kill_one(tier: NvmeTier | RamdiskTier) -> None:
    code = KILLED.replace("TIER", repr(tier))
    run = subprocess.run([sys.executable, "-c", code], timeout=60, check=False, capture_output=True)
    assert run.returncode == -signal.SIGKILL, run.stderr


def test_leftovers_of_a_killed_actor_are_removed(tmp_path: Path) -> None:
    tier = nvme(tmp_path / "a", tmp_path / "b")
    kill_one(tier)
    own = tmp_path / "a" / owner_name()
    own.mkdir()
    removed = remove_leftovers(tier)
    assert sorted(os.path.dirname(path) for path in removed) == sorted(tier.paths)
    assert list((tmp_path / "a").iterdir()) == [own], "this process lives"
    assert remove_leftovers(tier, [os.getpid()], timeout_s=0.05) == []
    assert remove_leftovers(NvmeTier()) == []


def test_leftovers_of_a_killed_ramdisk_are_removed() -> None:
    tier = RamdiskTier(enabled=True, size_mb=1)
    kill_one(tier)
    (path,) = remove_leftovers(tier)
    assert path.startswith("/dev/shm/raytier-")
    assert not os.path.exists(path)


def test_leftovers_of_a_killed_mount_are_removed(tmp_path: Path) -> None:
    tier = RamdiskTier(enabled=True, path=str(tmp_path), mount=True, size_mb=1)
    try:
        DiskTierActor("disk", tier).close()
    except ConfigurationError as error:
        pytest.skip(f"needs the right to mount: {error}")
    kill_one(tier)
    assert mount_at(str(tmp_path)) is not None
    assert remove_leftovers(tier) == [str(tmp_path)]
    assert remove_leftovers(tier) == []
    assert mount_at(str(tmp_path)) is None


def test_leftovers_wait_for_the_end_of_who_was_killed(tmp_path: Path) -> None:
    tier = nvme(tmp_path / "a")
    code = f"""
import time
from raytier.actors.disk import DiskTierActor
from raytier.config import NvmeTier
actor = DiskTierActor("disk", {tier!r})
print("up", flush=True)
time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"up\n"
    killer = threading.Timer(0.3, process.kill)
    killer.start()
    assert len(remove_leftovers(tier, [process.pid], timeout_s=30)) == 1
    process.communicate()


def test_an_orderly_end_of_the_process_leaves_nothing(tmp_path: Path) -> None:
    tier = nvme(tmp_path / "a")
    code = KILLED.replace("os.kill(os.getpid(), signal.SIGKILL)", "").replace("TIER", repr(tier))
    subprocess.run([sys.executable, "-c", code], timeout=60, check=True)
    assert list((tmp_path / "a").iterdir()) == []


@pytest.mark.integration
@pytest.mark.usefixtures("ray_session")
def test_as_a_ray_actor(blob: Blob, tmp_path: Path) -> None:
    """The concurrency groups: status comes while a store runs; an actor that is let go cleans up."""
    import ray

    tier = nvme(tmp_path / "a")
    parameters = [blob.parameter(f"p{n}", (0, n, 50_000)) for n in range(40)]
    manifest = blob.manifest(*parameters)
    actor = remote_disk_actor().options(num_cpus=0).remote("disk", tier)
    storing = actor.store.remote("m", manifest, [parameter.name for parameter in parameters])
    removing = actor.remove.remote("m", ["p0"])
    assert ray.get(actor.ping.remote(), timeout=60) == "disk"
    copies = ray.get(storing, timeout=60)
    assert ray.get(removing, timeout=60) == 53_248
    assert all(read_copy(copies[p.name]) == blob.content(p) for p in parameters[1:])
    status = ray.get(actor.status.remote(), timeout=60)
    assert status.files == 39
    with pytest.raises(ray.exceptions.RayTaskError) as caught:
        ray.get(actor.store.remote("m", manifest, ["nonsense"]), timeout=60)
    assert isinstance(caught.value.cause, InvalidRequestError)
    ray.get(actor.close.remote(), timeout=60)
    assert list((tmp_path / "a").iterdir()) == []
    ray.kill(actor)

    actor = remote_disk_actor().options(num_cpus=0).remote("disk", tier)
    pid = ray.get(actor.status.remote(), timeout=60).pid
    ray.kill(actor)
    remove_leftovers(tier, [pid], timeout_s=30)
    assert list((tmp_path / "a").iterdir()) == []
