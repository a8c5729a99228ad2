"""I4, B5: `raytier store` says what is kept, finds damage, and removes what nobody can use."""

from __future__ import annotations

import os
from contextlib import closing
from pathlib import Path

import pytest
from typer.testing import CliRunner

from raytier.checkpoint.manifest import Extent, Parameter, Role, SourceFile
from raytier.cli.main import app
from raytier.codecs.codec import Codec
from raytier.codecs.scheme import Scheme
from raytier.tiers.store import TierStore


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A checkpoint file, three parameters of which are stored."""
    path = tmp_path / "model" / "a.safetensors"
    path.parent.mkdir()
    path.write_bytes(bytes(range(256)) * 1024)
    fill(tmp_path)
    return path


def fill(tmp_path: Path) -> None:
    path = tmp_path / "model" / "a.safetensors"
    parameters = [
        Parameter(f"p{i}", (64, 256), "float32", Role.OTHER, extents=(Extent(0, 64 * i, 65536),)) for i in range(3)
    ]
    schemes = {p.name: Scheme(None, Codec("zstd")) for p in parameters}
    with closing(TierStore([str(tmp_path / "disk")], 1 << 14)) as store:
        store.obtain(str(path.parent), [SourceFile(str(path), path.stat().st_size)], parameters, schemes)


def run(tmp_path: Path, *words: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["store", *words, "--dir", str(tmp_path / "disk")], env={"COLUMNS": "400"})
    return result.exit_code, result.output.strip()


def files(tmp_path: Path) -> list[Path]:
    return sorted(p for p in (tmp_path / "disk" / "raytier-store").iterdir() if p.name != "lock")


def test_what_is_sound_is_listed_and_kept(model: Path, tmp_path: Path) -> None:
    code, output = run(tmp_path, "list")
    assert code == 0 and str(model.parent) in output and "source+zstd-1" in output and "as it was" in output
    assert run(tmp_path, "verify") == (0, "everything is as it was written")
    before = files(tmp_path)
    assert run(tmp_path, "prune") == (0, "removed 0 files, 0.0 MB")
    assert files(tmp_path) == before


def test_damage_is_found_and_removed_and_made_anew(model: Path, tmp_path: Path) -> None:
    flipped, cut, _ = (path for path in files(tmp_path) if path.suffix != ".json")
    data = bytearray(flipped.read_bytes())
    data[10] ^= 1
    flipped.write_bytes(bytes(data))
    os.truncate(cut, 0)
    code, output = run(tmp_path, "verify")
    assert code == 2 and "2 damaged" in output and str(flipped) in output and str(cut) in output
    assert flipped.exists()
    code, output = run(tmp_path, "verify", "--remove")
    assert code == 2 and "removed 2 files" in output and not flipped.exists() and not cut.exists()
    fill(tmp_path)
    assert run(tmp_path, "verify")[0] == 0


@pytest.mark.parametrize("change", ["source changed", "source gone", "stray file", "all"])
def test_what_nobody_can_use_is_pruned(change: str, model: Path, tmp_path: Path) -> None:
    if change == "source changed":
        os.utime(model, ns=(1, 1))
        assert "has changed" in run(tmp_path, "list")[1]
    elif change == "source gone":
        model.unlink()
        assert "is gone" in run(tmp_path, "list")[1]
    elif change == "stray file":
        (tmp_path / "disk" / "raytier-store" / ("0" * 40)).write_bytes(b"x" * 4096)
    code, output = run(tmp_path, "prune", *(["--all"] if change == "all" else []))
    assert code == 0
    if change == "stray file":
        assert "removed 1 files" in output and len(files(tmp_path)) == 4
    else:
        assert "removed 4 files" in output and not files(tmp_path)
        assert run(tmp_path, "list") == (0, "nothing is stored")


def test_a_damaged_manifest_is_named(model: Path, tmp_path: Path) -> None:
    manifest = next(path for path in files(tmp_path) if path.suffix == ".json")
    manifest.write_text("{")
    code, output = run(tmp_path, "list")
    assert code == 1 and "is damaged" in output.replace("\n", "")
    assert run(tmp_path, "prune", "--all")[0] == 0 and not files(tmp_path)
