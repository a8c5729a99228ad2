"""B3, D2, J2: what was converted is used again, as long as it is what the checkpoint says and all there."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from raytier.checkpoint.manifest import DTYPE_BYTES, Extent, Parameter, Role, SourceFile
from raytier.codecs import codec as codecs
from raytier.codecs.codec import Codec, Decoder, checksum
from raytier.codecs.forms import FORMS
from raytier.codecs.scheme import Scheme, element_of
from raytier.errors import CheckpointError, TierError
from raytier.tiers import store as stores
from raytier.tiers.copies import TierCopy
from raytier.tiers.store import TierStore
from tests.tiers.blobs import Blob, read_copy

PLANES = Scheme(None, Codec("zstd-planes"))
SCHEMES = [PLANES, Scheme(None, Codec("zstd", 3)), Scheme(FORMS["int8"]), Scheme(FORMS["int4-64"], Codec("zstd"))]


@contextmanager
def opened(*directories: Path) -> Iterator[TierStore]:
    with closing(TierStore([str(directory) for directory in directories], 1 << 14)) as store:
        yield store


def weight(blob: Blob, name: str, rows: int, columns: int, offset: int, dtype: str = "bfloat16") -> Parameter:
    nbytes = rows * columns * DTYPE_BYTES[dtype]
    return Parameter(name, (rows, columns), dtype, Role.OTHER, extents=(Extent(0, offset, nbytes),))


def decoded(copy: TierCopy, parameter: Parameter) -> bytes:
    """The parameter's form as a reader has it, checksums checked."""
    coded, stored = np.frombuffer(read_copy(copy), np.uint8), copy.stored
    out, offsets, decoder = np.empty(stored.nbytes, np.uint8), stored.frames.offsets(), Decoder()
    for index, sum_ in enumerate(stored.frames.checksums):
        frame = coded[offsets[index] : offsets[index + 1]]
        assert checksum(frame.data) == sum_
        start = index * stored.frames.step
        into = out[start : start + (stored.frames.starts()[index + 1] - stored.frames.starts()[index])]
        decoder.decode(stored.codec, element_of(stored.form, parameter.dtype), frame, into)
    return out.tobytes()


def tree(directory: Path) -> dict[str, tuple[int, int]]:
    """Files of parameters: inode and time of change, which tell whether one was written anew."""
    return {str(p): (p.stat().st_ino, p.stat().st_mtime_ns) for p in directory.rglob("*") if len(p.name) == 40}


def obtain(store: TierStore, blob: Blob, schemes: dict[Parameter, Scheme]) -> dict[str, TierCopy]:
    model_dir = str(Path(blob.files[0].path).parent)
    return store.obtain(model_dir, blob.files, list(schemes), {p.name: scheme for p, scheme in schemes.items()})


def test_forms_and_codecs_come_back(blob: Blob, tmp_path: Path) -> None:
    weights = np.random.default_rng(0).standard_normal(75_000, dtype=np.float32).view(np.uint32) >> 16
    blob.data[0] = weights.astype(np.uint16).tobytes()
    Path(blob.files[0].path).write_bytes(blob.data[0])
    blob.files = (SourceFile(blob.files[0].path, len(blob.data[0])), blob.files[1])
    with opened(tmp_path / "a", tmp_path / "b") as store:
        for number, scheme in enumerate(SCHEMES):
            parameter = weight(blob, f"p{number}", 128, 256, 64 * number)
            copy = obtain(store, blob, {parameter: scheme})[parameter.name]
            source = np.frombuffer(blob.content(parameter), np.uint8)
            expected = source
            if scheme.form is not None:
                expected = scheme.form.encode(source, parameter.dtype, parameter.shape)
            assert decoded(copy, parameter) == expected.tobytes()
        usage = store.usage()
        assert usage.files == len(tree(tmp_path)) > len(SCHEMES), "some are striped"
        assert usage.nbytes == sum(os.path.getsize(path) for path in tree(tmp_path))


SHAPES = st.tuples(st.integers(1, 3), st.integers(0, 700))


@given(
    shape=SHAPES,
    dtype=st.sampled_from(sorted(DTYPE_BYTES)),
    seed=st.integers(0, 99),
    codec=st.sampled_from(["zstd", "zstd-planes"]),
    frame=st.integers(1, 3000),
    stripe=st.integers(1, 3),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_parameter_comes_back_bit_for_bit(
    blob: Blob,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    shape: tuple[int, int],
    dtype: str,
    seed: int,
    codec: str,
    frame: int,
    stripe: int,
) -> None:
    monkeypatch.setattr(codecs, "FRAME_BYTES", frame)
    parameter = weight(blob, "p", *shape, seed, dtype)
    directories = [tmp_path / str(number) for number in range(stripe)]
    for directory in directories:
        shutil.rmtree(directory, ignore_errors=True)
    with closing(TierStore([str(directory) for directory in directories], 4096)) as store:
        scheme = Scheme(None, Codec(codec))  # type: ignore[arg-type]
        copy = obtain(store, blob, {parameter: scheme})["p"]
        assert decoded(copy, parameter) == blob.content(parameter)
        assert copy == obtain(store, blob, {parameter: scheme})["p"], "as it was written"


def test_it_is_used_again(blob: Blob, tmp_path: Path) -> None:
    wanted = {weight(blob, "p", 64, 64, 0): PLANES, weight(blob, "q", 64, 64, 9): SCHEMES[1]}
    with opened(tmp_path) as store:
        first = obtain(store, blob, wanted)
        assert obtain(store, blob, wanted) == first
    before = tree(tmp_path)
    with opened(tmp_path) as store:
        assert obtain(store, blob, wanted) == first
        assert store.usage().bytes_written == 0 and store.usage().files == 2
        more = wanted | {weight(blob, "r", 8, 8, 0): PLANES}
        assert obtain(store, blob, more).keys() == {"p", "q", "r"}
    assert {path: stamp for path, stamp in tree(tmp_path).items() if path in before} == before


@pytest.mark.parametrize("what", ["mtime", "header", "size", "dtype", "scheme", "version"])
def test_what_has_changed_is_made_anew(what: str, blob: Blob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parameter, scheme = weight(blob, "p", 64, 64, 4096), PLANES
    with opened(tmp_path) as store:
        obtain(store, blob, {parameter: scheme})
    before = tree(tmp_path)
    path = Path(blob.files[0].path)
    status = path.stat()
    if what == "mtime":
        os.utime(path, ns=(0, status.st_mtime_ns + 1))
    elif what == "header":
        path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
        os.utime(path, ns=(0, status.st_mtime_ns))
    elif what == "size":
        path.write_bytes(path.read_bytes() + b"x")
        os.utime(path, ns=(0, status.st_mtime_ns))
        blob.files = (SourceFile(str(path), path.stat().st_size), blob.files[1])
    elif what == "dtype":
        parameter = weight(blob, "p", 64, 64, 4096, "float16")
    elif what == "scheme":
        scheme = SCHEMES[1]
    else:
        monkeypatch.setattr("raytier.codecs.scheme.CODEC_VERSION", 999)
    with opened(tmp_path) as store:
        copy = obtain(store, blob, {parameter: scheme})["p"]
        assert decoded(copy, parameter) == blob.content(parameter)[: parameter.nbytes]
        assert store.usage().bytes_written > 0
    assert tree(tmp_path) != before


@pytest.mark.parametrize(
    "damage",
    [
        os.unlink,
        lambda path: os.truncate(path, 4096),
        lambda path: os.truncate(path, os.path.getsize(path) + 4096),
    ],
    ids=["deleted", "cut", "longer"],
)
def test_a_file_that_is_not_as_it_was_is_made_anew(damage: Callable[[str], None], blob: Blob, tmp_path: Path) -> None:
    wanted = {weight(blob, name, 128, 64, 0): PLANES for name in "pq"}
    with opened(tmp_path) as store:
        copies = obtain(store, blob, wanted)
    damage(copies["p"].files[0].path)
    with opened(tmp_path) as store:
        assert obtain(store, blob, wanted) == copies
        for parameter in wanted:
            assert decoded(copies[parameter.name], parameter) == blob.content(parameter)
        assert store.usage().bytes_written == sum(file.size for file in copies["p"].files)


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", '{"version": 1}', '{"version": 1, "source": [{"path": 1}], "entries": {}}', "\0" * 100],
)
def test_a_damaged_manifest_is_made_anew(content: str, blob: Blob, tmp_path: Path) -> None:
    wanted = {weight(blob, "p", 64, 64, 0): PLANES}
    with opened(tmp_path) as store:
        copies = obtain(store, blob, wanted)
    (manifest,) = tmp_path.rglob("*.json")
    manifest.write_text(content)
    with opened(tmp_path) as store:
        assert obtain(store, blob, wanted) == copies
    assert json.loads(manifest.read_text())["entries"].keys() == {"p"}


def test_an_entry_cannot_lead_out_of_the_store(blob: Blob, tmp_path: Path) -> None:
    """J2: whoever writes to the manifest does not choose what is read."""
    wanted = {weight(blob, "p", 64, 64, 0): PLANES}
    with opened(tmp_path) as store:
        copies = obtain(store, blob, wanted)
    (manifest,) = tmp_path.rglob("*.json")
    outside = tmp_path / ("a" * 40)
    shutil.copy(copies["p"].files[0].path, outside)
    manifest.write_text(manifest.read_text().replace(copies["p"].files[0].path, str(outside)))
    with opened(tmp_path) as store:
        assert obtain(store, blob, wanted) == copies


def test_an_interrupted_conversion_goes_on(blob: Blob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was complete is not made again; what was not leaves nothing."""
    monkeypatch.setattr(stores, "_BATCH_BYTES", 1)
    wanted = {weight(blob, name, 64, 64, n): PLANES for n, name in enumerate("pqrs")}
    seen: list[tuple[int, int]] = []

    def stop(done: int, total: int) -> None:
        seen.append((done, total))
        if done > total // 2:
            raise KeyboardInterrupt

    model_dir = str(Path(blob.files[0].path).parent)
    schemes = {p.name: PLANES for p in wanted}
    with opened(tmp_path) as store, pytest.raises(KeyboardInterrupt):
        store.obtain(model_dir, blob.files, list(wanted), schemes, stop)
    made = tree(tmp_path)
    assert len(made) == 2 and seen[-1][1] == sum(p.nbytes for p in wanted)
    with opened(tmp_path) as store:
        copies = store.obtain(model_dir, blob.files, list(wanted), schemes, lambda *state: seen.append(state))
        assert list(copies) == list("pqrs")
    assert made.items() <= tree(tmp_path).items()
    assert seen[-1] == (2 * 8192, 2 * 8192), "of what was missing"


def test_a_killed_conversion_goes_on(blob: Blob, tmp_path: Path) -> None:
    source = blob.files[0]
    code = f"""
import os
from raytier.checkpoint.manifest import Extent, Parameter, Role, SourceFile
from raytier.codecs.codec import Codec
from raytier.codecs.scheme import Scheme
from raytier.tiers import store
store._BATCH_BYTES = 1
source = SourceFile({source.path!r}, {source.size})
names = "pqrs"
parameters = [Parameter(n, (64, 64), "bfloat16", Role.OTHER, extents=(Extent(0, 0, 8192),)) for n in names]
def kill(done, total):
    if done > total // 2:
        os.kill(os.getpid(), 9)
files = store.TierStore([{str(tmp_path)!r}], 1 << 16)
schemes = dict.fromkeys(names, Scheme(None, Codec("zstd-planes")))
files.obtain({os.path.dirname(source.path)!r}, [source], parameters, schemes, kill)
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == -9
    made = tree(tmp_path)
    assert 2 <= len(made) < 4
    wanted = {weight(blob, name, 64, 64, 0): PLANES for name in "pqrs"}
    blob.files = blob.files[:1]
    with opened(tmp_path) as store:
        for name, copy in obtain(store, blob, wanted).items():
            assert decoded(copy, next(p for p in wanted if p.name == name)) == blob.content(next(iter(wanted)))
        assert store.usage().files == 4


def test_a_missing_checkpoint_is_named(blob: Blob, tmp_path: Path) -> None:
    os.unlink(blob.files[0].path)
    with opened(tmp_path) as store, pytest.raises(CheckpointError, match=r"0\.safetensors: No such file"):
        obtain(store, blob, {weight(blob, "p", 64, 64, 0): PLANES})


def test_a_closed_store_says_so(blob: Blob, tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        pass
    with pytest.raises((TierError, ValueError)):
        obtain(store, blob, {weight(blob, "p", 64, 64, 0): PLANES})
