"""E1: models come from the hub with `huggingface_hub`'s own code: only the needed files, resumed, with progress; what
went wrong is said. Against a hub of the tests on localhost."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from raytier.config import parse_config
from raytier.errors import ConfigurationError, ModelLoadingError, ResourceNotAvailableError, UnsupportedModelError
from raytier.model_entry import ModelEntry
from raytier.sources import huggingface
from raytier.sources.hub_files import needed_files
from raytier.sources.huggingface import HuggingFaceLoader
from raytier.sources.loader import FetchOptions
from tests.sources.hub import Hub

ID = "org/tiny"
#: 6 MB: above what is fetched in one piece.
WEIGHTS = bytes(range(256)) * 24576
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b"{}",
    "model.safetensors": WEIGHTS,
    "pytorch_model.bin": b"never" * 9999,
    "tiny.Q4.gguf": b"never" * 9999,
    "original/consolidated.00.pth": b"never" * 9999,
    "README.md": b"never",
}


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a small file comes in many: what is smaller than one is not kept."""
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 65536)


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub()
    hub.repositories[ID] = {"main": dict(FILES), "v2": {**FILES, "config.json": b'{"model_type": "qwen2"}'}}
    yield hub
    hub.close()


@pytest.fixture
def settings(hub: Hub, tmp_path: Path) -> dict[str, Any]:
    return {"cache_dir": str(tmp_path / "cache"), "endpoint": hub.url}


def loader(settings: dict[str, Any]) -> HuggingFaceLoader:
    return HuggingFaceLoader(
        parse_config({"models": [{"model_id": "a", "source_path": "/a"}], "huggingface": settings})
    )


def entry(**changes: Any) -> ModelEntry:
    return ModelEntry.model_validate({"model_id": "tiny", "source_type": "huggingface", "source_path": ID, **changes})


async def load(
    loader: HuggingFaceLoader, entry: ModelEntry, token: str | None = None
) -> tuple[Path, list[tuple[int, int]]]:
    shown: list[tuple[int, int]] = []
    directory = await loader.load(entry, lambda here, total: shown.append((here, total)), FetchOptions(token))
    return Path(directory), shown


def partial_of(settings: dict[str, Any]) -> Path | None:
    """What is kept of a file that came in part."""
    return next(Path(settings["cache_dir"]).rglob("*partial*"), None)


def files_of(settings: dict[str, Any]) -> list[Path]:
    return [path for path in Path(settings["cache_dir"]).rglob("*") if path.is_file()]


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


async def test_only_what_is_needed_is_fetched_once(hub: Hub, settings: dict[str, Any]) -> None:
    one = loader(settings)
    assert one.find(entry()) is None
    directory, shown = await load(one, entry())
    wanted = {name: FILES[name] for name in ("config.json", "tokenizer.json", "model.safetensors")}
    assert contents(directory) == wanted
    assert hub.sent == {name: len(content) for name, content in wanted.items()}
    total = sum(map(len, wanted.values()))
    assert shown[0] == (0, total) and shown[-1] == (total, total)
    assert [here for here, _ in shown] == sorted(here for here, _ in shown)
    assert one.find(entry()) == str(directory)
    again, shown = await load(one, entry())
    assert again == directory and shown == [(total, total)]
    assert sum(hub.sent.values()) == total, "nothing is fetched twice"


async def test_revisions_are_kept_apart(hub: Hub, settings: dict[str, Any]) -> None:
    one = loader(settings)
    first, _ = await load(one, entry())
    second, _ = await load(one, entry(revision="v2"))
    assert (first / "config.json").read_bytes() == FILES["config.json"]
    assert (second / "config.json").read_bytes() == b'{"model_type": "qwen2"}'
    assert hub.sent["model.safetensors"] == len(WEIGHTS), "the same bytes once"
    commit = hub.commit(ID, "v2")
    assert commit is not None
    assert (await load(one, entry(revision=commit)))[0] == second
    with pytest.raises(ModelLoadingError, match="no revision 'v3'"):
        await load(one, entry(revision="v3"))


async def test_a_broken_connection_goes_on_where_it_broke(hub: Hub, settings: dict[str, Any]) -> None:
    hub.break_after["model.safetensors"] = [2_000_000, 1_000_000]
    directory, shown = await load(loader(settings), entry())
    assert (directory / "model.safetensors").read_bytes() == WEIGHTS
    assert len(WEIGHTS) <= hub.sent["model.safetensors"] < 1.1 * len(WEIGHTS)
    assert shown[-1][0] == shown[-1][1]


async def test_an_interrupted_download_is_resumed_by_the_next(hub: Hub, settings: dict[str, Any]) -> None:
    """Cancelled in the midst of a file: nothing goes on, what has come is kept, and the next one begins there."""
    half = asyncio.Event()
    loop = asyncio.get_running_loop()

    def show(here: int, total: int) -> None:
        if here > total / 2 and not half.is_set() and hub.slow.is_set():
            hub.slow.clear()
            loop.call_soon_threadsafe(half.set)

    running = asyncio.ensure_future(loader(settings).load(entry(), show, FetchOptions()))
    await asyncio.wait_for(half.wait(), 20)
    running.cancel()
    await asyncio.sleep(0)
    hub.slow.set()
    with pytest.raises(asyncio.CancelledError):
        await running
    partial = partial_of(settings)
    assert partial is not None
    kept = partial.stat().st_size
    assert 0 < kept < len(WEIGHTS)
    assert loader(settings).find(entry()) is None
    before = hub.sent["model.safetensors"]
    directory, shown = await load(loader(settings), entry())
    assert (directory / "model.safetensors").read_bytes() == WEIGHTS
    assert hub.sent["model.safetensors"] - before == len(WEIGHTS) - kept
    assert shown[-1][0] == shown[-1][1]
    assert partial_of(settings) is None


async def test_what_was_kept_is_checked(hub: Hub, settings: dict[str, Any]) -> None:
    hub.break_after["model.safetensors"] = [2_000_000]
    hub.status = None
    one = loader(settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.file_download.time.sleep", lambda _: setattr(hub, "status", 500))
        with pytest.raises(ModelLoadingError, match="what has come is kept"):
            await load(one, entry())
    hub.status = None
    partial = partial_of(settings)
    assert partial is not None
    with partial.open("r+b") as file:
        file.write(b"rotten")
    with pytest.raises(ModelLoadingError, match="checksum"):
        await load(one, entry())
    assert partial_of(settings) is None
    directory, _ = await load(one, entry())
    assert (directory / "model.safetensors").read_bytes() == WEIGHTS


async def test_offline_the_cache_is_used(hub: Hub, settings: dict[str, Any]) -> None:
    offline = loader({**settings, "offline": True})
    with pytest.raises(ModelLoadingError, match="not wholly, in the cache, and huggingface.offline is set"):
        await load(offline, entry())
    directory, _ = await load(loader(settings), entry())
    hub.requests.clear()
    assert (await load(offline, entry()))[0] == directory
    assert hub.requests == []
    os.unlink(directory / "tokenizer.json")
    with pytest.raises(ModelLoadingError, match="not wholly"):
        await load(offline, entry())


async def test_a_hub_that_cannot_be_reached(
    hub: Hub, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    directory, _ = await load(loader(settings), entry())
    away = loader({**settings, "endpoint": "http://127.0.0.1:9"})
    assert (await load(away, entry()))[0] == directory, "the cache has all of it"
    with pytest.raises(ModelLoadingError, match="cannot be reached"):
        await load(away, entry(source_path="org/other"))
    hub.status = 503
    assert (await load(loader(settings), entry()))[0] == directory


async def test_tokens(hub: Hub, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    hub.token = "hf_secret"
    one = loader({**settings, "token_env": "MY_TOKEN"})
    with pytest.raises(ModelLoadingError, match="knows no such model.*MY_TOKEN"):
        await load(one, entry())
    with pytest.raises(ModelLoadingError) as raised:
        await load(one, entry(), token="hf_wrong")
    assert "hf_wrong" not in str(raised.value) and "hf_wrong" not in repr(FetchOptions("hf_wrong"))
    await load(one, entry(), token="hf_secret")
    monkeypatch.setenv("MY_TOKEN", "hf_secret")
    await load(one, entry(revision="v2"))
    for path in files_of(settings):
        assert b"hf_secret" not in path.read_bytes()


async def test_gated_models(hub: Hub, settings: dict[str, Any]) -> None:
    hub.gated.add(ID)
    with pytest.raises(ModelLoadingError, match="granted on request"):
        await load(loader(settings), entry())


async def test_no_room(hub: Hub, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    usage = huggingface.shutil.disk_usage
    monkeypatch.setattr(huggingface.shutil, "disk_usage", lambda path: usage(path)._replace(free=1000))
    with pytest.raises(ResourceNotAvailableError, match=r"6 MB are to be fetched .* 0 MB are free"):
        await load(loader(settings), entry())
    assert not hub.sent


@pytest.mark.parametrize("path", ["a/b/c", "../etc", "org/../x", "", "org/", "-\n", "https://huggingface.co/org/x"])
def test_ids_that_are_none(path: str) -> None:
    with pytest.raises((ConfigurationError, ValueError)):
        loader({}).check(entry(source_path=path))


def test_weights_in_shards_and_formats() -> None:
    shards = [f"model-{n:05d}-of-00002.safetensors" for n in (1, 2)]
    torch = ["pytorch_model.bin", "config.json"]
    index = "model.safetensors.index.json"
    assert needed_files(ID, [*shards, index, *torch], "safetensors") == sorted([*shards, index, "config.json"])
    assert needed_files(ID, torch, "transformers_pt") == sorted(torch)
    assert needed_files(ID, [*shards, index, *torch], "transformers_pt") == sorted([*shards, index, "config.json"])
    with pytest.raises(UnsupportedModelError, match="set model_format: transformers_pt"):
        needed_files(ID, torch, "safetensors")
    with pytest.raises(UnsupportedModelError, match="GGUF files only"):
        needed_files(ID, ["config.json", "x.Q8.gguf"], "transformers_pt")
    with pytest.raises(UnsupportedModelError, match="ONNX files only"):
        needed_files(ID, ["config.json", "onnx/model.onnx"], "safetensors")
    with pytest.raises(UnsupportedModelError, match="no weights among its 2 files"):
        needed_files(ID, [shards[0], "config.json"], "safetensors")
