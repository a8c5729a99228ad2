"""E1: PyTorch's .bin files are read in place, with weights_only, and nothing in them is executed (J2)."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from raytier.checkpoint.describe import describe_model
from raytier.checkpoint.torch_index import read_torch_index
from raytier.engine.sampling_params import SamplingParams
from raytier.errors import CheckpointError
from tests.local_engine import local_engine
from tests.models import MakeModel, random_prompts, transformers_greedy


def as_bin(directory: Path, *, shards: int = 1) -> dict[str, torch.Tensor]:
    """Replace the safetensors file of a model by .bin files."""
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    if shards == 1:
        torch.save(tensors, directory / "pytorch_model.bin")
        return tensors
    names = [f"pytorch_model-{n + 1:05d}-of-{shards:05d}.bin" for n in range(shards)]
    weight_map = {tensor: names[i % shards] for i, tensor in enumerate(tensors)}
    for name in names:
        torch.save({t: tensors[t] for t in tensors if weight_map[t] == name}, directory / name)
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return tensors


@pytest.mark.parametrize("shards", [1, 3])
def test_tensors_are_found_in_the_files(make_model: MakeModel, shards: int) -> None:
    directory = make_model("llama", dtype=torch.bfloat16)
    tensors = as_bin(directory, shards=shards)
    index = read_torch_index(str(directory))
    assert index.tensors.keys() == tensors.keys()
    assert len(index.files) == shards
    for name, entry in index.tensors.items():
        with open(index.files[entry.file].path, "rb") as file:
            file.seek(entry.offset)
            stored = file.read(entry.nbytes)
        assert stored == tensors[name].view(torch.uint8).numpy().tobytes()
        assert (entry.dtype, entry.shape) == ("bfloat16", tuple(tensors[name].shape))


@pytest.mark.parametrize("streamed", [False, True])
def test_answers_are_those_of_transformers(make_model: MakeModel, streamed: bool) -> None:
    directory = make_model("qwen2")
    [prompt] = random_prompts(7)
    wanted = transformers_greedy(directory, [prompt], 5)
    as_bin(directory, shards=2)
    rules = [{"pattern": "proj", "tier": "nvme"}] if streamed else []
    with local_engine(directory, model_format="transformers_pt", placement={"rules": rules}) as local:
        params = SamplingParams.from_request(local.engine.defaults, max_tokens=5, temperature=0, ignore_eos=True)
        assert [list(delta.token_ids) for delta in local.engine.generate([prompt], params)] == wanted
        local.check_bytes()


def test_safetensors_come_first(make_model: MakeModel) -> None:
    directory = make_model("llama")
    (directory / "pytorch_model.bin").write_bytes(b"not looked at")
    manifest = describe_model(str(directory), "transformers_pt").manifest
    assert [os.path.basename(file.path) for file in manifest.files] == ["model.safetensors"]


def test_the_format_says_what_is_read(make_model: MakeModel) -> None:
    directory = make_model("llama")
    as_bin(directory)
    with pytest.raises(CheckpointError, match="set model_format: transformers_pt"):
        describe_model(str(directory))
    (directory / "pytorch_model.bin").unlink()
    with pytest.raises(CheckpointError, match=r"no weights: model.safetensors or pytorch_model.bin"):
        describe_model(str(directory), "transformers_pt")
    (directory / "model.Q4.gguf").touch()
    with pytest.raises(CheckpointError, match="GGUF and ONNX files are not read"):
        describe_model(str(directory))


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_nothing_is_executed(tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(2), "evil": Evil(tmp_path / "executed")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="nothing else is loaded from it"):
        read_torch_index(str(tmp_path))
    assert not (tmp_path / "executed").exists()


def test_what_cannot_be_read_in_place(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    tensor = torch.arange(12.0).reshape(3, 4)
    for content, message in (
        ({"a": tensor.t()}, "not stored as one piece"),
        ({"a": tensor.to_sparse()}, "not stored as one piece|damaged"),
        ({"a": 3}, "'a' is no tensor but int"),
        ([tensor], "a dictionary of tensors is needed, found list"),
    ):
        torch.save(content, path)
        with pytest.raises(CheckpointError, match=message):
            read_torch_index(str(tmp_path))
    torch.save({"a": tensor}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match="since version 1.6"):
        read_torch_index(str(tmp_path))


def test_damaged_files(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.arange(10000.0)}, path)
    whole = path.read_bytes()
    for content in (whole[:-30], whole[: len(whole) // 2], b"", b"\0" * 100, whole[:200] + b"\xff" * 200 + whole[400:]):
        path.write_bytes(content)
        with suppress(CheckpointError):  # else what it says lies in the file
            entry = read_torch_index(str(tmp_path)).tensors["a"]
            assert entry.offset + entry.nbytes <= len(content)
    shutil.rmtree(tmp_path)
    with pytest.raises(CheckpointError):
        read_torch_index(str(tmp_path))
