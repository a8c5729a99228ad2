"""Which files of a model's repository are needed to run it. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from raytier.errors import UnsupportedModelError

#: Read by `describe_model`: the architecture, defaults, tokenizer, chat template.
_SMALL = re.compile(
    r"config\.json|generation_config\.json|metadata\.json|"
    r"tokenizer[\w.-]*|special_tokens_map\.json|added_tokens\.json|vocab\.(json|txt)|merges\.txt|"
    r"spiece\.model|sentencepiece[\w.]*\.model|tekken\.json|chat_template\.(jinja|json)"
)
_SAFETENSORS = ("model.safetensors", "model.safetensors.index.json", re.compile(r"model-\d+-of-\d+\.safetensors"))
_TORCH = ("pytorch_model.bin", "pytorch_model.bin.index.json", re.compile(r"pytorch_model-\d+-of-\d+\.bin"))


def needed_files(repository: str, names: Iterable[str], model_format: str) -> list[str]:
    """Files that the model runs from, sorted: one set of weights, and what is small.

    Weights in subdirectories, or in formats of others beside (`original/`, `consolidated...`, GGUF), are left out.

    Raises:
        UnsupportedModelError: there are no weights that can be read; says what there is.
    """
    here = sorted(name for name in names if "/" not in name)
    small = [name for name in here if _SMALL.fullmatch(name)]
    formats = [_SAFETENSORS] if model_format == "safetensors" else [_SAFETENSORS, _TORCH]
    for single, index, shard in formats:
        if single in here:
            return sorted([*small, single])
        shards = [name for name in here if shard.fullmatch(name)]
        if index in here and shards:
            return sorted([*small, index, *shards])
    raise UnsupportedModelError(_why_not(repository, list(names), here, model_format))


def _why_not(repository: str, names: Sequence[str], here: Sequence[str], model_format: str) -> str:
    if model_format == "safetensors" and any(name.startswith("pytorch_model") for name in here):
        return f"{repository}: its weights are PyTorch's .bin files: set model_format: transformers_pt"
    for ending, what in ((".gguf", "GGUF"), (".onnx", "ONNX")):
        if any(name.endswith(ending) for name in names):
            return (
                f"{repository}: it holds {what} files only, which are not read. Nearest supported: the repository that "
                "they were made from, with safetensors"
            )
    return (
        f"{repository}: no weights among its {len(names)} files: model.safetensors, or shards with "
        "model.safetensors.index.json, are needed"
    )
