"""From a local model directory to its description: parameters, their bytes, KV shape, defaults, tokenizer.

Checkpoint names become model names by transformers' own rules, in the order in which `from_pretrained` applies
them, so that a manifest names exactly the tensors that `from_pretrained` would load.
"""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from raytier.checkpoint.architecture import (
    COMPUTE_DTYPES,
    construct,
    layer_prefix,
    load_config,
    restore_buffers,
    unsupported,
)
from raytier.checkpoint.defaults import read_generation_defaults, read_metadata
from raytier.checkpoint.manifest import Extent, ModelDescription, ModelManifest, Parameter, Role, SourceFile
from raytier.checkpoint.probe import probe_attention
from raytier.checkpoint.safetensors_index import CheckpointIndex, TensorEntry, has_weights, read_index
from raytier.checkpoint.tokenizer import describe_tokenizer
from raytier.checkpoint.torch_index import read_torch_index
from raytier.errors import CheckpointError, UnsupportedModelError

_log = logging.getLogger(__name__)
_SHOWN = 5
_COMPARE_BYTES = 8 * 2**20


def describe_model(
    model_dir: str, model_format: str = "safetensors", tokenizer_path: str | None = None
) -> ModelDescription:
    """Everything needed to plan for and to talk to the model in `model_dir`. Reads headers, not weights.

    (One exception: where the config ties two parameters and the checkpoint stores both, they are compared.)

    Args:
        model_format: safetensors, or transformers_pt: PyTorch's .bin files where there are no safetensors.
        tokenizer_path: directory of the tokenizer, where it is not the model's own.

    Raises:
        CheckpointError: a file is missing or damaged, or does not hold what the model needs.
        UnsupportedModelError: the architecture cannot be run; with the reason and the nearest choice.
        ConfigurationError: metadata.json is malformed.
    """
    root = os.path.abspath(model_dir)
    config = load_config(root)
    wishes = read_metadata(root)
    index = read_torch_index(root) if model_format == "transformers_pt" and not has_weights(root) else read_index(root)
    manifest = _manifest(root, config, wishes.max_context, index)
    class_eos = getattr(config, "eos_token_id", None)
    return ModelDescription(
        manifest=manifest,
        tokenizer=describe_tokenizer(root if tokenizer_path is None else tokenizer_path, class_eos),
        defaults=read_generation_defaults(root, class_eos),
        max_num_seqs=wishes.max_num_seqs,
        kv_block_size=wishes.kv_block_size,
        kv_total_blocks=wishes.kv_total_blocks,
    )


def describe_config(model_dir: str) -> ModelManifest:
    """The manifest of a directory that may hold nothing but config.json: no files, parameters without extents.

    Raises:
        CheckpointError, UnsupportedModelError, ConfigurationError: as `describe_model`.
    """
    root = os.path.abspath(model_dir)
    return _manifest(root, load_config(root), read_metadata(root).max_context, None)


def _manifest(
    root: str, config: PreTrainedConfig, wished_context: int | None, index: CheckpointIndex | None
) -> ModelManifest:
    dtype = _compute_dtype(config, index)
    model = construct(config, dtype)
    kv_layers = probe_attention(model)
    # Not used here, but a model whose buffers cannot be restored is refused now and not when it loads.
    restore_buffers(model)
    groups = _tied_groups(model)
    # A stored tensor keeps its stored dtype; without a checkpoint the compute dtype is the best guess.
    if index is None:
        parameters = [_Bound(group[0], tuple(group[1:]), None) for group in groups]
    else:
        parameters = _bind(root, model, groups, index)

    embedding = _name_of(model, "get_input_embeddings", parameters)
    head = _name_of(model, "get_output_embeddings", parameters)
    prefix = re.compile(re.escape(layer_prefix(model)) + r"\.(\d+)\.")
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
    return ModelManifest(
        model_dir=root,
        architecture=type(model).__name__,
        model_type=config.model_type,
        files=index.files if index else (),
        parameters=tuple(_parameter(b, shapes[b.name], dtype, prefix, embedding, head) for b in parameters),
        num_layers=len(kv_layers),
        hidden_size=config.hidden_size,
        vocab_size=shapes[head][0],
        max_context=_max_context(root, config, wished_context),
        compute_dtype=dtype,
        kv_layers=kv_layers,
        embedding=embedding,
        head=head,
    )


@dataclass(frozen=True, slots=True)
class _Bound:
    """A parameter of the model, the further names it goes by, and its stored tensor."""

    name: str
    aliases: tuple[str, ...]
    entry: TensorEntry | None


def _parameter(
    bound: _Bound, shape: tuple[int, ...], dtype: str, prefix: re.Pattern[str], embedding: str, head: str
) -> Parameter:
    match = prefix.match(bound.name)
    role = Role.OTHER
    if match:
        role = Role.LAYER
    elif bound.name == embedding:
        role = Role.EMBEDDING
    elif bound.name == head:
        role = Role.HEAD
    entry = bound.entry
    return Parameter(
        name=bound.name,
        shape=shape,
        dtype=entry.dtype if entry else dtype,
        role=role,
        layer=int(match[1]) if match else None,
        extents=(Extent(entry.file, entry.offset, entry.nbytes),) if entry else (),
        aliases=bound.aliases,
    )


def _tied_groups(model: PreTrainedModel) -> list[list[str]]:
    """Names of each parameter of the model, in its order; the first name is the canonical one."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return list(groups.values())


def _name_of(model: PreTrainedModel, getter: str, parameters: Sequence[_Bound]) -> str:
    """Manifest name of the weight of the module that `model.<getter>()` returns."""
    module = getattr(model, getter)()
    if not isinstance(getattr(module, "weight", None), torch.nn.Parameter):
        raise unsupported(type(model).__name__, f"{getter} gives no module with a weight")
    owner = next(name for name, m in model.named_modules() if m is module)
    name = f"{owner}.weight"
    return next(b.name for b in parameters if name == b.name or name in b.aliases)


def _bind(root: str, model: PreTrainedModel, groups: list[list[str]], index: CheckpointIndex) -> list[_Bound]:
    """Find the stored tensor of every parameter; tied names whose stored tensors differ come apart."""
    stored = _by_model_name(root, model, index)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
    bound: list[_Bound] = []
    missing: list[str] = []
    for group in groups:
        present = [name for name in group if name in stored]
        if not present:
            missing.append(group[0])
            continue
        for name in present:
            _check_entry(root, name, stored[name], shapes[name], index.files)
        # As from_pretrained does: the config's tie holds unless the checkpoint stores two different tensors.
        first = stored[present[0]]
        apart = [name for name in present[1:] if not _same_bytes(index.files, first, stored[name])]
        if apart:
            _log.warning(
                "%s: the config ties %s to %s, but the checkpoint stores different tensors: not tied",
                root,
                ", ".join(apart),
                present[0],
            )
        names = [name for name in group if name not in apart]
        bound.append(_Bound(names[0], tuple(names[1:]), first))
        bound.extend(_Bound(name, (), stored[name]) for name in apart)
    if missing:
        looked = [os.path.basename(f.path) for f in index.files]
        raise CheckpointError(
            f"{root}: {len(missing)} parameters of {type(model).__name__} are not in the checkpoint: "
            f"{_some(missing)}; looked in {_some(looked)}; the files and config.json do not belong together"
        )
    return bound


def _by_model_name(root: str, model: PreTrainedModel, index: CheckpointIndex) -> dict[str, TensorEntry]:
    """Stored tensors by the model's names (`transformers.core_model_loading`, the loop of `from_pretrained`)."""
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    state = model.state_dict()
    prefix = model.base_model_prefix
    stored: dict[str, TensorEntry] = {}
    source: dict[str, str] = {}
    unexpected: list[str] = []
    # Some rules act on keys after another key was seen, so the order matters.
    for key in sorted(index.tensors, key=dot_natural_key):
        name, converted = rename_source_key(key, renamings, converters, prefix, state)
        if name not in state and key in state:
            name, converted = rename_source_key(key, [], [], prefix, state)
        if name not in state:
            unexpected.append(name)
        elif converted is not None:
            raise unsupported(type(model).__name__, f"{name} is converted from {key}; converted checkpoints come later")
        elif name in stored:
            raise CheckpointError(f"{root}: both {source[name]!r} and {key!r} are {name}; remove one of them")
        else:
            stored[name], source[name] = index.tensors[key], key
    ignorable = _ignorable_names(model)
    unused = [name for name in unexpected if not ignorable(name)]
    if unused:
        _log.warning("%s: %d tensors are not used by %s: %s", root, len(unused), type(model).__name__, _some(unused))
    return stored


def _ignorable_names(model: PreTrainedModel) -> Callable[[str], bool]:
    """Tells unused tensors that old checkpoints carry: by the model's own list, or because it is one of its buffers."""
    patterns = set(model._keys_to_ignore_on_load_unexpected or ()) | {r"rotary_emb\.inv_freq", r"(^|\.)position_ids$"}
    expression = re.compile("|".join(f"({p})" for p in patterns))
    buffers = {name for name, _ in model.named_buffers()}
    return lambda name: name in buffers or expression.search(name) is not None


def _check_entry(root: str, name: str, entry: TensorEntry, shape: tuple[int, ...], files: Sequence[SourceFile]) -> None:
    file = os.path.basename(files[entry.file].path)
    if entry.shape != shape:
        raise CheckpointError(
            f"{root}: {name} has shape {list(entry.shape)} in {file}, the config asks for {list(shape)}; "
            "the weights and config.json do not belong together"
        )
    if entry.dtype not in COMPUTE_DTYPES:
        raise UnsupportedModelError(
            f"{root}: {name} is stored as {entry.dtype} in {file}; raytier reads {', '.join(COMPUTE_DTYPES)}. "
            "Nearest supported: the model's unquantised checkpoint"
        )


def _same_bytes(files: Sequence[SourceFile], a: TensorEntry, b: TensorEntry) -> bool:
    if (a.dtype, a.nbytes) != (b.dtype, b.nbytes):
        return False
    with open(files[a.file].path, "rb") as left, open(files[b.file].path, "rb") as right:
        left.seek(a.offset)
        right.seek(b.offset)
        rest = a.nbytes
        while rest:
            count = min(rest, _COMPARE_BYTES)
            if left.read(count) != right.read(count):
                return False
            rest -= count
    return True


def _compute_dtype(config: PreTrainedConfig, index: CheckpointIndex | None) -> str:
    """The config's dtype; else the one of most of the checkpoint's bytes; else bfloat16."""
    if config.dtype is not None:
        name = str(config.dtype).removeprefix("torch.")
        if name not in COMPUTE_DTYPES:
            raise unsupported(config.model_type, f"dtype {name} in config.json", f"one of {', '.join(COMPUTE_DTYPES)}")
        return name
    count: Counter[str] = Counter()
    for entry in index.tensors.values() if index else ():
        if entry.dtype in COMPUTE_DTYPES:
            count[entry.dtype] += entry.nbytes
    return count.most_common(1)[0][0] if count else "bfloat16"


def _max_context(root: str, config: PreTrainedConfig, wished: int | None) -> int:
    """Tokens that positions reach by the config; metadata.json can only lower it."""
    limit = getattr(config, "max_position_embeddings", None)
    rope = cast(Mapping[str, Any], getattr(config, "rope_parameters", None) or {})
    if limit and rope.get("rope_type") == "yarn" and rope.get("original_max_position_embeddings"):
        # Checkpoints that ship plain name YaRN's reach by its factor alone.
        limit = max(limit, int(rope["original_max_position_embeddings"] * rope.get("factor", 1)))
    if not limit:
        if wished is None:
            raise CheckpointError(
                f"{root}/config.json: max_position_embeddings is missing; "
                "add it, or metadata.llm.max_sequence_length to metadata.json"
            )
        return wished
    if wished is not None and wished > limit:
        _log.warning("%s: metadata.json asks for %d tokens, the model reaches %d", root, wished, limit)
    return int(limit if wished is None else min(limit, wished))


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
