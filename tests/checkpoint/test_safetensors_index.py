"""J2: headers of checkpoints, hostile ones too."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from raytier.checkpoint.safetensors_index import INDEX_FILE, SINGLE_FILE, read_index
from raytier.errors import CheckpointError


def write_raw(path: Path, header: Any, data: bytes = b"") -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def entry(start: int, stop: int, shape: list[int] | None = None, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [(stop - start) // 4] if shape is None else shape, "data_offsets": [start, stop]}


def test_reads_what_safetensors_wrote(tmp_path: Path) -> None:
    tensors = {
        "a.weight": np.arange(12, dtype=np.float32).reshape(3, 4),
        "b": np.array([True, False, True]),
        "c": np.arange(5, dtype=np.int64),
        "empty": np.zeros((0, 7), dtype=np.float16),
        "scalar": np.array(3, dtype=np.float32),
    }
    save_file(tensors, tmp_path / SINGLE_FILE, metadata={"format": "pt"})
    index = read_index(str(tmp_path))
    assert index.tensors.keys() == tensors.keys()
    assert index.files[0].size == (tmp_path / SINGLE_FILE).stat().st_size
    blob = (tmp_path / SINGLE_FILE).read_bytes()
    for name, found in index.tensors.items():
        assert found.dtype == str(tensors[name].dtype)
        assert found.shape == tensors[name].shape
        assert blob[found.offset : found.offset + found.nbytes] == tensors[name].tobytes()


def test_shards_and_symbolic_links(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    model = tmp_path / "model"
    model.mkdir()
    for i in (1, 2):
        save_file({f"t{i}": np.full(i, i, dtype=np.float32)}, tmp_path / "blobs" / f"{i}")
        os.symlink(tmp_path / "blobs" / f"{i}", model / f"model-{i}.safetensors")  # as in the Hugging Face cache
    (model / INDEX_FILE).write_text(
        json.dumps({"weight_map": {"t1": "model-1.safetensors", "t2": "model-2.safetensors"}})
    )
    index = read_index(str(model))
    assert [os.path.basename(f.path) for f in index.files] == ["model-1.safetensors", "model-2.safetensors"]
    assert index.tensors["t2"].file == 1
    assert index.tensors["t2"].nbytes == 8


def test_unknown_dtype_keeps_its_name(tmp_path: Path) -> None:
    write_raw(tmp_path / SINGLE_FILE, {"q": entry(0, 8, [8], "F8_E4M3"), "x": entry(8, 9, [2], "F4")}, b"\0" * 9)
    index = read_index(str(tmp_path))
    assert index.tensors["q"].dtype == "F8_E4M3"
    assert index.tensors["x"].dtype == "F4"


GOOD = {"a": entry(0, 8), "b": entry(8, 16)}


@pytest.mark.parametrize(
    ("header", "data", "says"),
    [
        (GOOD, b"\0" * 15, "truncated: .* bytes expected"),
        (GOOD, b"\0" * 17, "longer than its header says"),
        ({"a": entry(0, 8), "b": entry(4, 12)}, b"\0" * 12, "overlap"),
        ({"a": entry(0, 8), "b": entry(0, 8)}, b"\0" * 8, "overlap"),
        ({"a": entry(0, 8, [3])}, b"\0" * 8, "do not hold"),
        ({"a": entry(8, 0, [0])}, b"\0" * 8, "do not hold"),
        ({"a": entry(-8, 0, [2])}, b"\0" * 8, "data_offsets"),
        ({"a": entry(0, 8, [-2])}, b"\0" * 8, "shape"),
        ({"a": entry(0, 8, [True, 2])}, b"\0" * 8, "shape"),
        ({"a": entry(0, 8, [1] * 1000 + [2])}, b"\0" * 8, "shape"),
        ({"a": entry(0, 2**70, [2**68])}, b"\0" * 8, "shape|data_offsets"),
        ({"a": {"dtype": 3, "shape": [], "data_offsets": [0, 4]}}, b"\0" * 4, "dtype"),
        ({"a": {"dtype": "F32", "shape": [1]}}, b"\0" * 4, "data_offsets"),
        ({"a": 7}, b"", "not an object"),
        ([1, 2], b"", "JSON object is needed"),
        (b"not json", b"", "not valid JSON"),
        (b"\xff\xfe{}", b"", "not valid JSON"),
        (b"[" * 100_000, b"", "not valid JSON"),
        (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{}}', b"\0" * 4, "twice"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, header: Any, data: bytes, says: str) -> None:
    write_raw(tmp_path / SINGLE_FILE, header, data)
    with pytest.raises(CheckpointError, match=says) as caught:
        read_index(str(tmp_path))
    assert SINGLE_FILE in caught.value.message


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "truncated: at least 8 bytes expected, 0 found"),
        (b"\1\2\3", "truncated"),
        (struct.pack("<Q", 1000) + b"{}", "at least 1008 bytes expected, 10 found"),
        (struct.pack("<Q", 2**63) + b"{}", "header of"),
    ],
)
def test_damaged_prefix_is_refused(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / SINGLE_FILE).write_bytes(content)
    with pytest.raises(CheckpointError, match=says):
        read_index(str(tmp_path))


def test_truncation_names_both_sizes(tmp_path: Path) -> None:
    path = tmp_path / SINGLE_FILE
    save_file({"a": np.zeros(100, dtype=np.float32)}, path)
    size = path.stat().st_size
    with open(path, "r+b") as file:
        file.truncate(size - 10)
    with pytest.raises(CheckpointError, match=f"{size} bytes expected, {size - 10} found"):
        read_index(str(tmp_path))


@pytest.mark.parametrize("shard", ["../x.safetensors", "/etc/passwd", "a/../../x", "", ".", "a//b", "a\0b", "..\\x", 3])
def test_shards_outside_of_the_directory_are_refused(tmp_path: Path, shard: Any) -> None:
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": {"t": shard}}))
    with pytest.raises(CheckpointError, match="inside the model directory"):
        read_index(str(tmp_path))


@pytest.mark.parametrize("content", ["{}", "[]", '{"weight_map": {}}', '{"weight_map": [1]}', "nonsense"])
def test_malformed_index_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / INDEX_FILE).write_text(content)
    with pytest.raises(CheckpointError, match=INDEX_FILE):
        read_index(str(tmp_path))


def test_missing_shard_duplicate_and_wrong_map(tmp_path: Path) -> None:
    save_file({"t": np.zeros(1, dtype=np.float32)}, tmp_path / "s1.safetensors")
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": {"t": "s1.safetensors", "u": "s2.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"1 of 2 shards missing: s2\.safetensors"):
        read_index(str(tmp_path))
    save_file({"v": np.zeros(1, dtype=np.float32)}, tmp_path / "s2.safetensors")
    with pytest.raises(CheckpointError, match=r"'u' is in s2\.safetensors, but it is in no shard"):
        read_index(str(tmp_path))
    save_file({k: np.zeros(1, dtype=np.float32) for k in "tu"}, tmp_path / "s2.safetensors")
    with pytest.raises(CheckpointError, match="'t' is in both"):
        read_index(str(tmp_path))


def test_nothing_to_read_says_what_is_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such directory"):
        read_index(str(tmp_path / "none"))
    with pytest.raises(CheckpointError, match="no weights"):
        read_index(str(tmp_path))
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(
        CheckpointError, match=r"found pytorch_model\.bin; to read those, set model_format: transformers_pt"
    ):
        read_index(str(tmp_path))
    (tmp_path / "model-00001-of-00002.safetensors").touch()
    with pytest.raises(CheckpointError, match="index file is missing"):
        read_index(str(tmp_path))


def test_a_pipe_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / SINGLE_FILE)
    with pytest.raises(CheckpointError, match="not a regular file"):
        read_index(str(tmp_path))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 10_000), value=st.integers(0, 255), cut=st.integers(0, 400))
def test_random_damage_never_points_outside(tmp_path: Path, position: int, value: int, cut: int) -> None:
    path = tmp_path / SINGLE_FILE
    save_file({f"t{i}": np.zeros((i, 3), dtype=np.float32) for i in range(4)}, path)
    blob = bytearray(path.read_bytes())
    blob[position % len(blob)] = value
    path.write_bytes(blob[: len(blob) - cut] if cut < len(blob) else b"")
    try:
        index = read_index(str(tmp_path))
    except CheckpointError:
        return
    assert all(e.offset + e.nbytes <= path.stat().st_size for e in index.tensors.values())


def test_imports_no_torch() -> None:
    code = (
        "import sys, raytier.checkpoint.safetensors_index, raytier.checkpoint.defaults, raytier.checkpoint.manifest; "
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0
