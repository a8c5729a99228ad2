"""What a model's own files say about generation: generation_config.json, config.json, metadata.json. No torch."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from raytier.checkpoint.manifest import GenerationDefaults
from raytier.checkpoint.safetensors_index import load_json
from raytier.errors import CheckpointError, ConfigurationError


@dataclass(frozen=True, slots=True)
class ModelWishes:
    """The optional `metadata.json` (spec E8); None where it says nothing."""

    max_context: int | None = None
    max_num_seqs: int | None = None
    kv_block_size: int | None = None
    kv_total_blocks: int | None = None


def read_metadata(model_dir: str) -> ModelWishes:
    """`metadata.llm` of `model_dir/metadata.json`; empty when there is no such file.

    Keys that raytier does not use are left alone, since the file serves other programs too.

    Raises:
        ConfigurationError: malformed; names the file and the field.
    """
    path = os.path.join(model_dir, "metadata.json")
    if not os.path.exists(path):
        return ModelWishes()
    try:
        with open(path, encoding="utf-8") as file:
            root = json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigurationError(f"{path}: not valid JSON: {error}") from None
    # Both layouts are in use: the file as the `metadata` object itself, and with that object as a member.
    metadata = _section(path, root, "", "metadata") if isinstance(root, Mapping) and "metadata" in root else root
    llm = _section(path, metadata, "metadata", "llm")
    scheduler = _section(path, llm, "metadata.llm", "scheduler")
    kv_cache = _section(path, llm, "metadata.llm", "kv_cache")
    lengths = [_positive(path, llm, "metadata.llm", key) for key in ("max_sequence_length", "max_seq_len")]
    _positive(path, scheduler, "metadata.llm.scheduler", "max_paddings", minimum=0)
    return ModelWishes(
        max_context=next((n for n in lengths if n is not None), None),
        max_num_seqs=_positive(path, scheduler, "metadata.llm.scheduler", "max_num_seqs"),
        kv_block_size=_positive(path, kv_cache, "metadata.llm.kv_cache", "block_size"),
        kv_total_blocks=_positive(path, kv_cache, "metadata.llm.kv_cache", "total_blocks", minimum=2),
    )


def _section(path: str, parent: object, parent_name: str, key: str) -> Mapping[str, Any]:
    if not isinstance(parent, Mapping):
        raise ConfigurationError(f"{path}: {parent_name or 'the file'}: an object is needed, found {parent!r}")
    value = parent.get(key)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        name = f"{parent_name}.{key}".lstrip(".")
        raise ConfigurationError(f"{path}: {name}: an object is needed, found {value!r}")
    return value


def _positive(path: str, section: Mapping[str, Any], name: str, key: str, minimum: int = 1) -> int | None:
    value = section.get(key)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise ConfigurationError(f"{path}: {name}.{key}: an integer of at least {minimum} is needed, found {value!r}")
    return value


def read_generation_defaults(model_dir: str, class_eos: object = None) -> GenerationDefaults:
    """Defaults of sampling and the model's own stop ids.

    Args:
        class_eos: `eos_token_id` of the config object, see `end_of_sequence_ids`.

    Raises:
        CheckpointError: a value in generation_config.json is of the wrong type or range.
    """
    path, raw = _generation_config(model_dir)
    values: dict[str, Any] = {}
    for key, kind, low, high in (
        ("temperature", float, 0.0, None),
        ("top_p", float, 0.0, 1.0),
        ("top_k", int, 0, None),
        ("max_new_tokens", int, 1, None),
    ):
        value = raw.get(key)
        if value is None:
            continue
        number = isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
        if not number or value < low or (high is not None and value > high):
            raise CheckpointError(f"{path}: {key}: {value!r} is not allowed; correct or remove it")
        values[key] = kind(value)
    # Only when it is said: transformers takes a missing do_sample for greedy, but most files leave it out and
    # give a temperature.
    if raw.get("do_sample") is False:
        values["temperature"] = 0.0
    return GenerationDefaults(**values, stop_token_ids=end_of_sequence_ids(model_dir, class_eos))


def end_of_sequence_ids(model_dir: str, class_eos: object = None) -> tuple[int, ...]:
    """Ends of sequence by generation_config.json and config.json, each id once, in this order.

    Args:
        class_eos: what the config class says; it counts where neither file has `eos_token_id`, since
            transformers leaves values equal to the class's defaults out of config.json.

    Raises:
        CheckpointError: `eos_token_id` is neither an id nor a list of ids.
    """
    found: list[int] = []
    silent = True
    for path, raw in (_generation_config(model_dir), _read_optional(model_dir, "config.json")):
        if "eos_token_id" in raw:
            silent = False
            found += _ids(path, raw["eos_token_id"])
    if silent:
        found += _ids(os.path.join(model_dir, "config.json"), class_eos)
    return tuple(dict.fromkeys(found))


def _ids(path: str, value: object) -> list[int]:
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
        # -1 stands for "none" in some old configs.
        if value == -1:
            return []
        raise CheckpointError(f"{path}: eos_token_id: {value!r} is not a token id or a list of them")
    return list(ids)


def _generation_config(model_dir: str) -> tuple[str, dict[str, Any]]:
    return _read_optional(model_dir, "generation_config.json")


def _read_optional(model_dir: str, name: str) -> tuple[str, dict[str, Any]]:
    path = os.path.join(model_dir, name)
    return path, load_json(path) if os.path.exists(path) else {}
