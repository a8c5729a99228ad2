"""From a checkpoint's names and tensors to the model's, by the rules and in the order of transformers' own loading."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from copy import deepcopy

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from raytier.checkpoint.architecture import one_line, unsupported
from raytier.checkpoint.assembly import StoredTensor
from raytier.checkpoint.safetensors_index import CheckpointIndex
from raytier.errors import CheckpointError

_log = logging.getLogger(__name__)
_SHOWN = 5


def stored_by_name(root: str, model: PreTrainedModel, index: CheckpointIndex) -> dict[str, StoredTensor]:
    """Stored tensors by the model's names (`transformers.core_model_loading`, the loop of `from_pretrained`).

    Raises:
        CheckpointError: two stored tensors have one name in the model.
        UnsupportedModelError: a tensor is converted in a way that no list of file ranges expresses.
    """
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    state = model.state_dict()
    prefix = model.base_model_prefix
    stored: dict[str, StoredTensor] = {}
    source: dict[str, str] = {}
    converted: dict[str, WeightConverter] = {}
    unexpected: list[str] = []
    # Some rules act on keys after another key was seen, so the order matters.
    for key in sorted(index.tensors, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, state)
        if name not in state and key in state:
            name, pattern = rename_source_key(key, [], [], prefix, state)
        if name not in state:
            unexpected.append(name)
        elif pattern is not None:
            if name not in converted:
                converted[name] = deepcopy(by_pattern[pattern])
            converted[name].add_tensor(name, key, pattern, StoredTensor.of(index.tensors[key]))  # type: ignore[arg-type]
        elif name in stored:
            raise CheckpointError(f"{root}: both {source[name]!r} and {key!r} are {name}; remove one of them")
        else:
            stored[name], source[name] = StoredTensor.of(index.tensors[key]), key
    for name, converter in converted.items():
        stored |= _convert(model, name, converter)
    ignorable = _ignorable_names(model)
    unused = [name for name in unexpected if not ignorable(name)]
    if unused:
        _log.warning("%s: %d tensors are not used by %s: %s", root, len(unused), type(model).__name__, some(unused))
    return stored


def _convert(model: PreTrainedModel, name: str, converter: WeightConverter) -> dict[str, StoredTensor]:
    try:
        results = converter.convert(name, model=model, config=model.config)
    except Exception as error:  # the operations are transformers', and so is what they raise
        operations = ", ".join(type(operation).__name__ for operation in converter.operations)
        raise unsupported(
            type(model).__name__, f"{name} is converted from the checkpoint by {operations}: {one_line(error)}"
        ) from error
    return {target: tensor[0] if isinstance(tensor, list) else tensor for target, tensor in results.items()}


def _ignorable_names(model: PreTrainedModel) -> Callable[[str], bool]:
    """Tells unused tensors that old checkpoints carry: by the model's own list, or because it is one of its buffers."""
    patterns = set(model._keys_to_ignore_on_load_unexpected or ()) | {r"rotary_emb\.inv_freq", r"(^|\.)position_ids$"}
    expression = re.compile("|".join(f"({p})" for p in patterns))
    buffers = {name for name, _ in model.named_buffers()}
    return lambda name: name in buffers or expression.search(name) is not None


def some(names: Sequence[str]) -> str:
    """The first few of `names`, for a message."""
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
