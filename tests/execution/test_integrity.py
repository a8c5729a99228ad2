"""B5, J2: what is read is checked; damage is read again, made again, or named. Tokens are never computed on it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raytier.codecs import codec as codecs
from raytier.engine.sampling_params import SamplingParams
from raytier.errors import DamagedError, RaytierError
from raytier.execution import sources
from raytier.execution.reader import ReaderPool
from raytier.planner.plan import Tier
from raytier.tiers.files import DirectFile
from tests.local_engine import PLACEMENTS, LocalEngine, local_engine
from tests.models import MakeModel, random_prompts, transformers_greedy

GREEDY = SamplingParams(temperature=0, top_p=1, top_k=0, max_tokens=8, ignore_eos=True)
PROMPTS = random_prompts(5, 17, 2)
STREAMED: dict[str, Any] = {"placement": {"rules": PLACEMENTS["streamed"]}, "tiers": {"device": {"max_mb": 64}}}


@pytest.fixture(params=["one part", "many parts"], autouse=True)
def parts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "many parts":
        monkeypatch.setattr(codecs, "FRAME_BYTES", 1000)


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Checksums of the checkpoint are kept from one engine to the next, there."""
    monkeypatch.setattr(sources, "_cache_dir", str(tmp_path))
    return tmp_path / "checksums"


def tokens(local: LocalEngine) -> list[list[int]]:
    return [list(output.token_ids) for output in local.engine.generate(PROMPTS, GREEDY)]


def damage(path: str | Path, offset: int, nbytes: int = 1) -> None:
    """Change bytes of a file behind everybody's back: size and times stay."""
    status = os.stat(path)
    with open(path, "r+b") as file:
        file.seek(offset)
        data = file.read(nbytes)
        file.seek(offset)
        file.write(bytes(byte ^ 0x55 for byte in data))
        file.flush()
        os.fsync(file.fileno())
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def swept(local: LocalEngine) -> list[Any]:
    manifest = local.runner._weights.manifest
    return [
        p
        for p in manifest.parameters
        if local.plan.tier_of[p.name] is Tier.NVME and (p.name != manifest.embedding or manifest.tied)
    ]


def test_a_damaged_checkpoint_is_named_and_never_computed_on(make_model: MakeModel, known: Path) -> None:
    model_dir = make_model("llama")
    with local_engine(model_dir, **STREAMED) as local:
        expected = tokens(local)
        assert local.engine.stats().total.damaged == 0
    assert len(list(known.iterdir())) == 1
    parameter = swept(local)[3]
    extent = parameter.extents[0]
    file = local.manifest.files[extent.file]
    at = extent.offset + extent.nbytes - 1
    damage(file.path, at)
    with (
        local_engine(model_dir, **STREAMED) as again,
        pytest.raises(RaytierError, match=re.escape(file.path)) as raised,
    ):
        tokens(again)
    assert parameter.name in raised.value.message
    first, last = map(int, re.findall(r"bytes (\d+) to (\d+)", raised.value.message)[0])
    assert first <= at < last
    assert again.runner._sources.pool.count().damaged >= 1
    damage(file.path, at)  # as it was
    with local_engine(model_dir, **STREAMED) as restored:
        assert tokens(restored) == expected == transformers_greedy(model_dir, PROMPTS, 8)


def test_what_stays_in_memory_is_checked_too(make_model: MakeModel, known: Path) -> None:
    model_dir = make_model("gpt2")
    with local_engine(model_dir) as local:
        tokens(local)
    extent = local.manifest.by_name[local.manifest.embedding].extents[0]
    damage(local.manifest.files[extent.file].path, extent.offset + 100)
    with local_engine(model_dir) as local, pytest.raises(RaytierError, match="is damaged"):
        local.runner.wait_loaded()


def test_rows_of_the_embedding_are_checked(make_model: MakeModel, known: Path) -> None:
    model_dir = make_model("llama")
    with local_engine(model_dir, **STREAMED) as local:
        tokens(local)
    extent = local.manifest.by_name[local.manifest.embedding].extents[0]
    damage(local.manifest.files[extent.file].path, extent.offset + PROMPTS[0][0] * local.row_bytes)
    with local_engine(model_dir, **STREAMED) as local, pytest.raises(RaytierError, match="is damaged"):
        tokens(local)


def test_another_checkpoint_is_learned_anew(make_model: MakeModel, known: Path) -> None:
    model_dir = make_model("llama")
    with local_engine(model_dir, **STREAMED) as local:
        tokens(local)
    path = local.manifest.files[0].path
    damage(path, swept(local)[0].extents[0].offset)
    os.utime(path)
    with local_engine(model_dir, **STREAMED) as local:
        assert tokens(local) == transformers_greedy(model_dir, PROMPTS, 8)
    next(known.iterdir()).write_bytes(b"no table")
    with local_engine(model_dir, **STREAMED) as local:
        assert tokens(local) == transformers_greedy(model_dir, PROMPTS, 8)


def flip(files: list[str]) -> None:
    damage(files[0], 7)


def cut(files: list[str]) -> None:
    os.truncate(files[0], 0)


def swap(files: list[str]) -> None:
    other = next(path for path in files[1:] if os.path.getsize(path) == os.path.getsize(files[0]))
    os.rename(files[0], f"{other}.x")
    os.rename(other, files[0])
    os.rename(f"{other}.x", other)


@pytest.mark.parametrize("change", [flip, cut, swap])
@pytest.mark.parametrize("setting", [{"nvme": "zstd-planes"}, {"nvme": "zstd"}], ids=["planes", "zstd"])
def test_damaged_tier_files_are_made_again(
    setting: dict[str, Any], change: Callable[[list[str]], None], make_model: MakeModel, tmp_path: Path
) -> None:
    """Between two starts, and while the engine runs: the tokens stay the same."""
    model_dir = make_model("llama")
    settings = STREAMED | {"compression": setting}
    expected = transformers_greedy(model_dir, PROMPTS, 8)
    with local_engine(model_dir, store=tmp_path, **settings) as local:
        manifest = local.runner._weights.manifest
        files = [manifest.files[p.stored.extents[0].file].path for p in swept(local)]
        if change is not swap:  # what is open stays open
            change(files)
            assert tokens(local) == expected
            total = local.engine.stats().total
            assert total.damaged >= 1 and total.mended == 1
        change(files)
    with local_engine(model_dir, store=tmp_path, **settings) as local:
        assert tokens(local) == expected
        total = local.engine.stats().total
        assert total.mended == {flip: 1, swap: 2, cut: 0}[change], "what is cut is converted before it is opened"
    with local_engine(model_dir, store=tmp_path, **settings) as local:
        assert tokens(local) == expected
        assert local.engine.stats().total.damaged == 0


def test_without_the_source_a_damaged_tier_file_is_an_error(make_model: MakeModel, tmp_path: Path, known: Path) -> None:
    model_dir = make_model("llama")
    settings = STREAMED | {"compression": {"nvme": "zstd-planes"}}
    with local_engine(model_dir, store=tmp_path, **settings) as local:
        tokens(local)
        manifest = local.runner._weights.manifest
        parameter = swept(local)[0]
        path = manifest.files[parameter.stored.extents[0].file].path
        damage(path, 7)
        extent = parameter.extents[0]
        damage(manifest.files[extent.file].path, extent.offset)
        with pytest.raises(RaytierError, match=f"(?s){re.escape(path)}.*cannot be made again") as raised:
            tokens(local)
    assert parameter.name in raised.value.message
    assert not os.path.exists(path), "the next start makes it anew, or says that it cannot"
    with pytest.raises(DamagedError, match="restore the file"), local_engine(model_dir, store=tmp_path, **settings):
        pass


def test_a_passing_fault_of_the_disk_is_read_again(make_model: MakeModel, known: Path, monkeypatch: Any) -> None:
    model_dir = make_model("llama")
    with local_engine(model_dir, **STREAMED) as local:
        expected = tokens(local)
    reads, read_into = [0], DirectFile.read_into

    def faulty(file: DirectFile, view: memoryview, offset: int, nbytes: int) -> int:
        count = read_into(file, view, offset, nbytes)
        reads[0] += 1
        if reads[0] % 7 == 0:
            view[min(nbytes, 5000) // 2] ^= 1
        return count

    monkeypatch.setattr(DirectFile, "read_into", faulty)
    with local_engine(model_dir, **STREAMED) as local:
        assert tokens(local) == expected
        assert local.engine.stats().total.damaged > 0


def test_parts_that_several_requests_bring_are_checked_once_all_are_there(
    make_model: MakeModel, known: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_dir = make_model("llama")
    settings = STREAMED | {"tiers": {"device": {"max_mb": 64}, "nvme": {"io_mb": 0.0625}}}
    monkeypatch.setattr(ReaderPool, "_split", lambda self, n: [(at, min(4096, n - at)) for at in range(0, n, 4096)])
    with local_engine(model_dir, **settings) as local:
        expected = tokens(local)
    with local_engine(model_dir, **settings) as local:
        assert tokens(local) == expected
        assert local.engine.stats().total.damaged == 0
    extent = max((e for p in swept(local) for e in p.extents), key=lambda e: e.nbytes)
    damage(local.manifest.files[extent.file].path, extent.offset + extent.nbytes // 2)
    with local_engine(model_dir, **settings) as local, pytest.raises(RaytierError, match="is damaged"):
        tokens(local)
