"""A3, A6, J1, J2: copies of parameters on disk: bit for bit, within their room, and never half of one."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from raytier.checkpoint.manifest import Parameter
from raytier.codecs import codec, scheme
from raytier.errors import CheckpointError, ConfigurationError, ResourceNotAvailableError, TierError
from raytier.tiers import copying
from raytier.tiers.aligned import AlignedBuffer, align_up
from raytier.tiers.files import DirectFile
from raytier.tiers.owners import owner_name
from raytier.tiers.tier_files import TierFiles
from tests.tiers.blobs import Blob, read_copy

MIB = 1 << 20


@pytest.fixture
def directories(tmp_path: Path) -> list[str]:
    paths = [tmp_path / name for name in ("one", "two", "three")]
    for path in paths:
        path.mkdir()
    return [str(path) for path in paths]


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several requests per file without files of many megabytes."""
    monkeypatch.setattr(copying, "CHUNK_BYTES", 3 * 4096)
    monkeypatch.setattr(scheme, "_AT_ONCE", 3 * 4096)
    monkeypatch.setattr(codec, "FRAME_BYTES", 3 * 4096)


def files_below(*directories: str) -> list[str]:
    """Everything on disk but the owners' locks."""
    return sorted(
        os.path.join(root, name)
        for top in directories
        for root, _, names in os.walk(top)
        for name in names
        if name != "lock"
    )


def test_large_ones_are_striped_and_small_ones_are_spread(blob: Blob, directories: list[str]) -> None:
    large = blob.parameter("large", (0, 11, 200_000))
    small = [blob.parameter(f"small{n}", (1, n, 5000 + n)) for n in range(3)]
    with TierFiles(directories, 65536) as files:
        copies = files.store("m", blob.files, [large, *small])
        assert [len(copies[p.name].files) for p in [large, *small]] == [3, 1, 1, 1]
        assert [e.nbytes for e in copies["large"].stored.extents] == [65536, 65536, 65536, 200_000 - 3 * 65536]
        # The first directory has the fourth stripe, so the others come first.
        homes = [os.path.dirname(os.path.dirname(copies[p.name].files[0].path)) for p in small]
        assert homes == [directories[1], directories[2], directories[0]]
        for parameter in [large, *small]:
            assert read_copy(copies[parameter.name]) == blob.content(parameter)
        usage = files.usage()
        on_disk = files_below(*directories)
        assert usage.files == len(on_disk) == sum(d.files for d in usage.directories) == 6
        assert usage.nbytes == sum(os.path.getsize(path) for path in on_disk) == usage.bytes_written
        assert usage.nbytes == sum(align_up(p.nbytes) for p in [large, *small])
        assert [directory.path for directory in usage.directories] == directories
        assert all(directory.free_bytes > 0 for directory in usage.directories)
        assert (usage.errors, usage.capacity) == (0, None)
        assert sum(p.nbytes for p in [large, *small]) <= usage.source_bytes_read
        files.check_integrity()
        assert files.remove("m", ["small0", "never there"]) == 8192
        assert files.remove("m") == usage.nbytes - 8192
        assert files_below(*directories) == []
        assert (files.usage().files, files.usage().nbytes) == (0, 0)
        files.check_integrity()
    assert [list(Path(path).iterdir()) for path in directories] == [[], [], []]


EXTENT = st.tuples(st.integers(0, 1), st.integers(0, 60_000), st.integers(1, 10_000)) | st.tuples(
    st.just(0), st.integers(0, 100_000), st.integers(1, 200_000)
)


@pytest.mark.usefixtures("small_chunks")
@given(
    cuts=st.lists(st.lists(EXTENT, min_size=1, max_size=4), min_size=1, max_size=5),
    count=st.integers(1, 3),
    stripe=st.integers(1, 12 * 4096),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_parameter_comes_back_bit_for_bit(
    blob: Blob, directories: list[str], cuts: list[list[tuple[int, int, int]]], count: int, stripe: int
) -> None:
    parameters = [blob.parameter(f"p{n}", *extents) for n, extents in enumerate(cuts)]
    with TierFiles(directories[:count], stripe) as files:
        copies = files.store("m", blob.files, parameters)
        assert list(copies) == [parameter.name for parameter in parameters]
        for parameter in parameters:
            copy = copies[parameter.name]
            assert copy.nbytes == parameter.nbytes
            assert read_copy(copy) == blob.content(parameter)
            whole = parameter.nbytes <= align_up(stripe)
            assert len(copy.files) == (1 if whole else min(count, -(-parameter.nbytes // align_up(stripe))))
            assert all(file.size % 4096 == 0 for file in copy.files)
            assert all(extent.offset % 4096 == 0 for extent in copy.stored.extents)
            assert all(extent.nbytes % 4096 == 0 for extent in copy.stored.extents[:-1])
        files.check_integrity()


def test_as_a_reader_takes_it(blob: Blob, directories: list[str]) -> None:
    """Aligned reads of whole blocks, one extent behind the other, give the parameter; the padding is zero."""
    parameter = blob.parameter("p", (0, 4097, 150_001))
    with TierFiles(directories, 16384) as files, AlignedBuffer(align_up(parameter.nbytes)) as buffer:
        copy = files.store("m", blob.files, [parameter])["p"]
        opened = [DirectFile(file.path, file.size) for file in copy.files]
        position = 0
        for extent in copy.stored.extents:
            nbytes = align_up(extent.nbytes)
            opened[extent.file].read_into(buffer.view[position:], extent.offset, nbytes)
            position += nbytes
        for file in opened:
            file.close()
        assert buffer.view[: parameter.nbytes] == blob.content(parameter)
        assert not any(buffer.view[parameter.nbytes : position])


def test_nothing_and_parameters_without_bytes(blob: Blob, directories: list[str]) -> None:
    with TierFiles(directories, MIB) as files:
        assert files.store("m", blob.files, []) == {}
        assert files.store("m", blob.files, [blob.parameter("empty")])["empty"].nbytes == 0
        from_config = Parameter("p", (5,), "float32", blob.parameter("x").role)
        with pytest.raises(CheckpointError, match="p has no bytes: the model directory holds no weights"):
            files.store("m", blob.files, [from_config])
        assert files.remove("m") == 0
        files.check_integrity()


def test_progress_counts_up_to_all_of_it(blob: Blob, directories: list[str], small_chunks: None) -> None:
    seen: list[tuple[int, int]] = []
    with TierFiles(directories, 16384) as files:

        def progress(done: int, total: int) -> None:
            files.usage()  # who is told may ask
            seen.append((done, total))

        files.store("m", blob.files, [blob.parameter("p", (0, 0, 100_000)), blob.parameter("q", (1, 5, 50))], progress)
    total = align_up(100_000) + 4096
    assert seen == sorted(seen)
    assert len(seen) > 5 and seen[-1] == (total, total)


def test_memory_does_not_grow_with_the_parameter(tmp_path: Path) -> None:
    """D7: a parameter of 96 MiB is copied through buffers of a few."""
    big = Blob(tmp_path, [96 * MIB + 5])
    code = f"""
import resource
from pathlib import Path
from raytier.checkpoint.manifest import Extent, Parameter, Role, SourceFile
from raytier.tiers.tier_files import TierFiles
source = SourceFile({big.files[0].path!r}, {big.files[0].size})
parameter = Parameter("p", (source.size - 1,), "bool", Role.OTHER, extents=(Extent(0, 1, source.size - 1),))
with TierFiles([{str(tmp_path)!r}], 1 << 20) as files:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    files.store("m", [source], [parameter])
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    grown = int(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60).stdout)
    assert grown * 1024 < 40 * MIB


HOSTILE = [
    "../../etc/passwd",
    "/etc/passwd",
    "a" * 10_000,
    "new\nline",
    "\0",
    "",
    ".",
    "..",
    "\ud800",
    "lock",
    "日本",
    "a/b",
]


def test_hostile_names_stay_inside_and_apart(blob: Blob, directories: list[str], tmp_path: Path) -> None:
    everything = {path for path in tmp_path.rglob("*") if not path.is_relative_to(directories[0])}
    with TierFiles(directories[:1], MIB) as files:
        pairs = [(model, name) for model in HOSTILE for name in HOSTILE]
        for number, (model, name) in enumerate(pairs):
            copy = files.store(model, blob.files, [blob.parameter(name, (0, number, 100))])[name]
            (file,) = copy.files
            assert os.path.dirname(os.path.realpath(file.path)) == files.paths[0]
        assert files.usage().files == len(pairs) == len(files_below(directories[0]))
        files.check_integrity()
        assert files.remove("..", [".."]) == 4096
        assert files.remove("/etc/passwd") == 4096 * len(HOSTILE)
        files.check_integrity()
    assert {path for path in tmp_path.rglob("*") if not path.is_relative_to(directories[0])} == everything


def test_a_second_copy_is_refused(blob: Blob, directories: list[str]) -> None:
    first, second = blob.parameter("a", (0, 0, 10)), blob.parameter("b", (0, 10, 10))
    with TierFiles(directories, MIB) as files:
        copy = files.store("m", blob.files, [first])["a"]
        for wish in ([second, first], [second, second]):
            with pytest.raises(TierError, match=r"m: \w has a copy already; remove it first"):
                files.store("m", blob.files, wish)
        assert read_copy(copy) == blob.content(first)
        assert files.store("other", blob.files, [first])
        files.check_integrity()


# --- room -------------------------------------------------------------------------------------------------------------


def test_capacity_is_held_and_named(blob: Blob, directories: list[str]) -> None:
    with TierFiles(directories, 8192, 5 * 4096, advice="raise tiers.nvme.max_gb") as files:
        files.store("m", blob.files, [blob.parameter("a", (0, 0, 4097))])
        message = r"m: 16384 bytes are to be copied to .*one, .*three, 12288 of the tier's 20480 are free; raise tiers"
        with pytest.raises(ResourceNotAvailableError, match=message):
            files.store("m", blob.files, [blob.parameter("b", (0, 0, 12289))])
        assert files.store("m", blob.files, [blob.parameter("b", (0, 0, 12288))])
        assert files.usage().errors == 1
        files.check_integrity()


def test_space_that_is_to_stay_free_stays_free(blob: Blob, small_disk: Callable[[int], Path]) -> None:
    disk = str(small_disk(MIB))
    status = os.statvfs(disk)
    reserve = status.f_bavail * status.f_frsize - 4 * 4096  # the own directory takes one block on some kernels
    with TierFiles([disk], MIB, min_free_bytes=reserve, advice="lower tiers.nvme.min_free_gb") as files:
        message = rf"no room for p in {disk}: 20480 bytes are needed, \d+ may be used \({reserve} .* lower tiers.nvme"
        with pytest.raises(ResourceNotAvailableError, match=message):
            files.store("m", blob.files, [blob.parameter("p", (0, 0, 20_000))])
        files.store("m", blob.files, [blob.parameter("p", (0, 0, 8192))])
        free = os.statvfs(disk).f_bavail * status.f_frsize
        assert free >= reserve
        with pytest.raises(ResourceNotAvailableError, match="no room for r"):  # q would fit, both do not
            files.store("m", blob.files, [blob.parameter(name, (0, 0, 8192)) for name in "qr"])
        files.check_integrity()


def test_two_directories_of_one_filesystem_share_its_room(blob: Blob, small_disk: Callable[[int], Path]) -> None:
    disk = small_disk(256 << 10)
    (disk / "a").mkdir()
    (disk / "b").mkdir()
    with TierFiles([str(disk / "a"), str(disk / "b")], 65536) as files:
        with pytest.raises(ResourceNotAvailableError, match="299008 bytes are needed, 262144 may be used"):
            files.store("m", blob.files, [blob.parameter("p", (0, 0, 300_001 - 2000))])
        files.check_integrity()


def test_a_full_directory_is_left_out_of_the_stripes(
    blob: Blob, small_disk: Callable[[int], Path], directories: list[str]
) -> None:
    tight = str(small_disk(64 << 10))
    with TierFiles([tight, *directories[:2]], 16384) as files:
        parameter = blob.parameter("p", (0, 3, 250_000))
        copy = files.store("m", blob.files, [parameter])["p"]
        assert len(copy.files) == 2 and not any(file.path.startswith(tight) for file in copy.files)
        assert read_copy(copy) == blob.content(parameter)
        files.check_integrity()


def test_a_disk_that_fills_up_on_the_way(blob: Blob, small_disk: Callable[[int], Path], small_chunks: None) -> None:
    """ENOSPC in the middle: somebody else took what was free when the copy began."""
    disk = small_disk(512 << 10)
    with TierFiles([str(disk)], MIB, advice="free some space") as files:
        kept = blob.parameter("kept", (1, 0, 10_000))
        files.store("m", blob.files, [kept])

        def grab(done: int, total: int) -> None:
            if not (disk / "other").exists():
                status = os.statvfs(disk)
                (disk / "other").write_bytes(bytes((status.f_bavail - 4) * status.f_frsize))

        message = rf"{disk} is full \(No space left on device\): \d+ bytes were still to be written, \d+ are free; free"
        with pytest.raises(ResourceNotAvailableError, match=message):
            files.store("m", blob.files, [blob.parameter(name, (0, 0, 100_000)) for name in "ab"], grab)
        files.check_integrity()
        assert files.usage().files == 1 and files.usage().errors == 1
        (disk / "other").unlink()
        assert files.store("m", blob.files, [blob.parameter("a", (0, 0, 100_000))])
        files.check_integrity()


# --- faults -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: os.unlink(path), "0.safetensors is missing"),
        (lambda path: os.truncate(path, 4096), "0.safetensors has 4096 bytes, expected 300001"),
    ],
)
def test_a_damaged_checkpoint_leaves_nothing(
    blob: Blob, directories: list[str], damage: Callable[[str], None], message: str
) -> None:
    damage(blob.files[0].path)
    with TierFiles(directories, 8192) as files:
        with pytest.raises(CheckpointError, match=message):
            files.store("m", blob.files, [blob.parameter("b", (1, 0, 60_000)), blob.parameter("a", (0, 0, 100))])
        assert files_below(*directories) == []
        assert files.store("m", blob.files, [blob.parameter("b", (1, 0, 60_000))]), "the other file is in order"


def test_an_extent_beyond_its_file(blob: Blob, directories: list[str]) -> None:
    with TierFiles(directories, 8192) as files:
        with pytest.raises(CheckpointError, match="has 70000 bytes, .* reaches beyond its end"):
            files.store("m", blob.files, [blob.parameter("a", (1, 69_999, 2))])
        assert files_below(*directories) == []


@pytest.mark.usefixtures("small_chunks")
def test_a_checkpoint_cut_while_it_is_copied(blob: Blob, directories: list[str]) -> None:
    def cut(done: int, total: int) -> None:
        os.truncate(blob.files[0].path, 4096)

    with TierFiles(directories, 4096) as files:
        with pytest.raises(TierError, match="cut while in use"):
            files.store("m", blob.files, [blob.parameter("a", (0, 0, 300_000))], cut)
        assert files_below(*directories) == []
        files.check_integrity()


def test_a_write_error_names_the_file_and_leaves_nothing(blob: Blob, directories: list[str]) -> None:
    opened: list[str] = []

    def opener(path: str, flags: int, mode: int) -> int:
        opened.append(path)
        if len(opened) == 3:
            raise OSError(errno.EIO, "Input/output error", path)
        return os.open(path, flags, mode)

    with TierFiles(directories, 8192, opener=opener) as files:
        with pytest.raises(
            TierError, match=r"writing .*/raytier-\d+-\d+/\w{40}\.new failed: Input/output error \(errno 5"
        ):
            files.store("m", blob.files, [blob.parameter(f"p{n}", (0, n, 5000)) for n in range(60)])
        assert len(opened) <= 3 + copying.THREADS, "the others stop as well"
        assert files_below(*directories) == []
        assert files.usage().errors == 1
        assert files.store("m", blob.files, [blob.parameter("p0", (0, 0, 5000))])


def test_without_direct_io_it_is_written_through_the_page_cache(blob: Blob, directories: list[str]) -> None:
    def refuse(path: str, flags: int, mode: int) -> int:
        if flags & os.O_DIRECT:
            os.close(os.open(path, flags & ~os.O_DIRECT, mode))  # as some filesystems do: made, then refused
            raise OSError(errno.EINVAL, "Invalid argument", path)
        return os.open(path, flags, mode)

    parameter = blob.parameter("p", (0, 1, 100_001))
    with TierFiles(directories, 16384, opener=refuse) as files:
        assert read_copy(files.store("m", blob.files, [parameter])["p"]) == blob.content(parameter)
        files.check_integrity()


def test_direct_io_refused_at_the_first_write(
    blob: Blob, directories: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, short = os.pwrite, iter([1000, 5, 4096])

    def pwrite(fd: int, view: memoryview, offset: int) -> int:
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return plain(fd, view[: next(short, None)], offset)  # and some writes are cut short

    monkeypatch.setattr(os, "pwrite", pwrite)
    parameter = blob.parameter("p", (0, 1, 100_001))
    with TierFiles(directories, 16384) as files:
        assert read_copy(files.store("m", blob.files, [parameter])["p"]) == blob.content(parameter)


def test_writes_are_direct_here(blob: Blob, directories: list[str]) -> None:
    flags_seen: list[int] = []

    def opener(path: str, flags: int, mode: int) -> int:
        flags_seen.append(flags)
        return os.open(path, flags, mode)

    with TierFiles(directories, 16384, opener=opener) as files:
        files.store("m", blob.files, [blob.parameter("p", (0, 1, 100_001))])
    assert len(flags_seen) == 3, "nobody asked twice"
    assert all(flags & os.O_DIRECT for flags in flags_seen)


def test_a_copy_that_cannot_be_removed_stays_counted(
    blob: Blob, directories: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with TierFiles(directories[:1], MIB) as files:
        copies = files.store("m", blob.files, [blob.parameter(name, (0, 0, 10)) for name in "ab"])
        stuck = copies["a"].files[0].path
        plain = os.unlink

        def unlink(path: str) -> None:
            if path == stuck:
                raise PermissionError(errno.EPERM, "Operation not permitted", path)
            plain(path)

        monkeypatch.setattr(os, "unlink", unlink)
        with pytest.raises(TierError, match=f"1 copies could not be removed: {stuck}: Operation not permitted"):
            files.remove("m")
        monkeypatch.undo()
        assert (files.usage().files, files.usage().errors) == (1, 1)
        files.check_integrity()
        assert files.remove("m") == 4096


def test_no_descriptor_is_left_open(blob: Blob, directories: list[str]) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with TierFiles(directories, 8192) as files:
        files.store("m", blob.files, [blob.parameter("p", (0, 0, 100_000))])
        with pytest.raises(CheckpointError):
            files.store("m", blob.files, [blob.parameter("q", (0, 300_000, 2))])
        assert len(os.listdir("/proc/self/fd")) == before + 3, "one lock per directory"
    assert len(os.listdir("/proc/self/fd")) == before


# --- life -------------------------------------------------------------------------------------------------------------


def test_close_stops_a_store_and_removes_everything(blob: Blob, directories: list[str], small_chunks: None) -> None:
    files = TierFiles(directories, 4096)
    begun, closing = threading.Event(), threading.Event()
    errors: list[BaseException] = []

    def progress(done: int, total: int) -> None:
        begun.set()
        closing.wait(10)

    def store() -> None:
        try:
            files.store("m", blob.files, [blob.parameter("p", (0, 0, 300_000))], progress)
        except TierError as error:
            errors.append(error)

    storing = threading.Thread(target=store)
    storing.start()
    assert begun.wait(10)
    threading.Timer(0.05, closing.set).start()
    files.close()
    storing.join(10)
    assert "was stopped" in str(errors[0])
    assert [list(Path(path).iterdir()) for path in directories] == [[], [], []]
    files.close()
    with pytest.raises(TierError, match="the tier has been closed"):
        files.store("m", blob.files, [blob.parameter("p", (0, 0, 1))])


def test_removing_waits_for_what_is_being_stored(blob: Blob, directories: list[str]) -> None:
    """A model that is unloaded while a parameter of it is copied leaves nothing."""
    begun, go_on = threading.Event(), threading.Event()

    def progress(done: int, total: int) -> None:
        begun.set()
        go_on.wait(10)

    with TierFiles(directories, MIB) as files:
        work = blob.files, [blob.parameter("p", (0, 0, 5000))], progress
        storing = threading.Thread(target=files.store, args=("m", *work))
        removing = threading.Thread(target=files.remove, args=("m",))
        storing.start()
        assert begun.wait(10)
        removing.start()
        removing.join(0.05)
        go_on.set()
        storing.join(10)
        removing.join(10)
        assert files.usage().files == 0
        files.check_integrity()


def test_a_killed_process_is_cleaned_up_after_at_the_next_start(directories: list[str], blob: Blob) -> None:
    code = f"""
import os, signal
from raytier.checkpoint.manifest import Extent, Parameter, Role, SourceFile
from raytier.tiers.tier_files import TierFiles
files = TierFiles({directories!r}, 4096)
parameter = Parameter("p", (100000,), "bool", Role.OTHER, extents=(Extent(0, 0, 100000),))
files.store("m", [SourceFile({blob.files[0].path!r}, {blob.files[0].size})], [parameter])
os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run([sys.executable, "-c", code], timeout=60, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert len(files_below(*directories)) == 3
    with TierFiles(directories, MIB) as files:
        assert files_below(*directories) == []
        assert [os.path.basename(path) for path in files.paths] == [owner_name()] * 3


def test_left_behind_when_that_is_wished(directories: list[str], blob: Blob) -> None:
    files = TierFiles(directories[:1], MIB, owner="raytier-4194305-1")
    files.store("m", blob.files, [blob.parameter("p", (0, 0, 1))])
    files.close(remove=False)
    assert len(files_below(directories[0])) == 1
    TierFiles(directories[:1], MIB).close()
    assert files_below(directories[0]) == []


def test_directories_that_cannot_be_had(directories: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="gone is no directory"):
        TierFiles([*directories, str(tmp_path / "gone")], MIB)
    assert [list(Path(path).iterdir()) for path in directories] == [[], [], []], "the first ones are given back"
    (tmp_path / "link").symlink_to(directories[0])
    with pytest.raises(ResourceNotAvailableError, match="used twice by one process"):
        TierFiles([directories[0], str(tmp_path / "link")], MIB)
    with pytest.raises(ConfigurationError, match=r"directories \[\]"):
        TierFiles([], MIB)


@pytest.mark.usefixtures("small_chunks")
def test_stores_removals_and_questions_at_once(blob: Blob, directories: list[str]) -> None:
    """Threads of several models, one of them with too large a wish; afterwards every byte is accounted for."""
    wrong: list[str] = []
    done = threading.Event()

    def work(model: str) -> None:
        for turn in range(12):
            parameters = [blob.parameter(f"p{n}", (0, 100 * turn + n, 3000 + 9000 * n)) for n in range(4)]
            try:
                copies = files.store(model, blob.files, parameters)
            except ResourceNotAvailableError:
                continue
            wrong.extend(p.name for p in parameters if read_copy(copies[p.name]) != blob.content(p))
            files.remove(model, ["p1", "p3"])
            files.remove(model)

    def ask() -> None:
        while not done.is_set():
            usage = files.usage()
            if usage.nbytes > 200_000 or usage.nbytes != sum(d.nbytes for d in usage.directories):
                wrong.append(f"{usage}")

    with TierFiles(directories, 8192, 200_000) as files:
        workers = [threading.Thread(target=work, args=(name,)) for name in ("m", "n", "..")]
        asking = threading.Thread(target=ask)
        for thread in (*workers, asking):
            thread.start()
        for thread in workers:
            thread.join(60)
        done.set()
        asking.join(10)
        assert not wrong
        files.check_integrity()
        assert files.usage().files == 0
        assert files_below(*directories) == []


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("raytier-copy")]
