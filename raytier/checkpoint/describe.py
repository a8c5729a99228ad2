"""From a local model directory to its description: parameters, their bytes, KV shape, defaults, tokenizer.

Checkpoint names become model names by transformers' own rules, in the order in which `from_pretrained` applies
them, so that a manifest names exactly the tensors that `from_pretrained` would load.
"""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from raytier.checkpoint.architecture import (
    COMPUTE_DTYPES,
    construct,
    decoder_layers,
    layer_prefix,
    load_config,
    own_dtypes,
    restore_buffers,
    stored_tensors,
    text_config,
    unsupported,
)
from raytier.checkpoint.assembly import NotExpressible, StoredTensor
from raytier.checkpoint.defaults import read_generation_defaults, read_metadata
from raytier.checkpoint.manifest import (
    ExpertBank,
    ExpertPart,
    Extent,
    ModelDescription,
    ModelManifest,
    Parameter,
    Role,
    SourceFile,
)
from raytier.checkpoint.probe import probe
from raytier.checkpoint.safetensors_index import CheckpointIndex, has_weights, read_index
from raytier.checkpoint.sample import sample_ratios
from raytier.checkpoint.stored import some, stored_by_name
from raytier.checkpoint.tokenizer import describe_tokenizer
from raytier.checkpoint.torch_index import read_torch_index
from raytier.errors import CheckpointError, UnsupportedModelError
from raytier.model_entry import ModelEntry

_log = logging.getLogger(__name__)
_COMPARE_BYTES = 8 * 2**20


def describe_model(
    model_dir: str, model_format: str = "safetensors", tokenizer_path: str | None = None
) -> ModelDescription:
    """Everything needed to plan for and to talk to the model in `model_dir`. Reads headers and a sample
    of weights.

    Where the config ties two parameters and the checkpoint stores both, they are compared.

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
    class_eos = getattr(text_config(config), "eos_token_id", None)
    return ModelDescription(
        manifest=replace(manifest, ratios=sample_ratios(manifest.parameters, manifest.files)),
        tokenizer=describe_tokenizer(root if tokenizer_path is None else tokenizer_path, class_eos),
        defaults=read_generation_defaults(root, class_eos),
        max_num_seqs=wishes.max_num_seqs,
        kv_block_size=wishes.kv_block_size,
        kv_total_blocks=wishes.kv_total_blocks,
    )


def describe_entry(entry: ModelEntry, model_dir: str) -> ModelDescription:
    """The model of an entry, whose files are in `model_dir`; raises as `describe_model`."""
    description = describe_model(model_dir, entry.model_format, entry.tokenizer_path)
    return replace(description, quantization_bits=entry.quantization_bits)


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
    probed = probe(model)
    # Not used here, but a model whose buffers cannot be restored is refused now and not when it loads.
    restore_buffers(model)
    groups = [group for group in _tied_groups(model) if not any(probed.is_unused(name) for name in group)]
    if index is None:
        bound = [_Bound(group[0], tuple(group[1:]), None) for group in groups]
    else:
        bound = _bind(root, model, groups, index, own_dtypes(model, dtype))

    embedding = _name_of(model, "get_input_embeddings", bound)
    head = _name_of(model, "get_output_embeddings", bound)
    maker = _Maker(
        type(model).__name__,
        dtype,
        own_dtypes(model, dtype),
        {name: tuple(tensor.shape) for name, tensor in stored_tensors(model)},
        re.compile(re.escape(layer_prefix(model)) + r"\.(\d+)\."),
        {embedding: Role.EMBEDDING} if embedding == head else {embedding: Role.EMBEDDING, head: Role.HEAD},
        {bank.name for bank in probed.experts},
        {embedding: "looked at beside the lookup of rows"} if probed.embedding_read else {},
        _linear_weights(model, embedding) | _linear_experts(model, probed.experts),
    )
    return ModelManifest(
        model_dir=root,
        architecture=type(model).__name__,
        model_type=config.model_type,
        files=index.files if index else (),
        parameters=tuple(parameter for b in bound for parameter in maker.parameters(b)),
        num_layers=len(decoder_layers(model)),
        hidden_size=text_config(config).hidden_size,
        vocab_size=maker.shapes[head][0],
        max_context=_max_context(root, text_config(config), wished_context),
        compute_dtype=dtype,
        kv_layers=probed.kv_layers,
        embedding=embedding,
        head=head,
        experts=probed.experts,
    )


@dataclass(frozen=True, slots=True)
class _Bound:
    """A tensor of the model, the further names it goes by, and where it is stored."""

    name: str
    aliases: tuple[str, ...]
    stored: StoredTensor | None


@dataclass(frozen=True)
class _Maker:
    """Makes the manifest's parameters of the model's tensors; those of routed experts come apart."""

    what: str
    dtype: str
    own_dtypes: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    layers: re.Pattern[str]
    roles: Mapping[str, Role]
    banks: Collection[str]
    resident: Mapping[str, str]
    matrices: Collection[str]

    def parameters(self, bound: _Bound) -> list[Parameter]:
        try:
            return list(self._parameters(bound))
        except NotExpressible as error:
            raise unsupported(self.what, f"{bound.name} cannot be read in place: {error}") from None

    def _parameters(self, bound: _Bound) -> Iterator[Parameter]:
        owner, _, leaf = bound.name.rpartition(".")
        shape = self.shapes[bound.name]
        if owner not in self.banks or len(shape) < 3:
            resident = self.resident.get(bound.name) or ("biases of experts" if owner in self.banks else None)
            yield self._parameter(bound, bound.name, shape, bound.stored, resident=resident)
            return
        experts = [None] * shape[0] if bound.stored is None else bound.stored.unstack()
        for expert, stored in enumerate(experts):
            name = f"{owner}.{expert}.{leaf}"
            # What lies in several pieces is computed with piece by piece: nothing needs to be copied together.
            blocks = [None] if stored is None else stored.blocks()
            for part, block in enumerate(blocks):
                yield self._parameter(
                    bound,
                    name if len(blocks) == 1 else f"{name}.{part}",
                    shape[1:] if block is None else tuple(block.shape),
                    block,
                    expert=ExpertPart(owner, leaf, expert, part),
                )

    def _parameter(
        self,
        bound: _Bound,
        name: str,
        shape: tuple[int, ...],
        stored: StoredTensor | None,
        *,
        expert: ExpertPart | None = None,
        resident: str | None = None,
    ) -> Parameter:
        match = self.layers.match(name)
        own = self.own_dtypes.get(bound.name)
        return Parameter(
            name=name,
            shape=shape,
            # A stored tensor keeps its stored dtype; without a checkpoint the computed dtype is the best guess.
            dtype=stored.dtype if stored else own or self.dtype,
            role=Role.LAYER if match else self.roles.get(name, Role.OTHER),
            layer=int(match[1]) if match else None,
            extents=stored.extents() if stored else (),
            aliases=bound.aliases,
            own_dtype=own,
            expert=expert,
            resident=resident,
            matrix=all(name in self.matrices for name in (bound.name, *bound.aliases)),
        )


def _linear_weights(model: PreTrainedModel, embedding: str) -> set[str]:
    """Names of the weights of linear layers (of subclasses none: they may compute something else), and `embedding`."""
    return {embedding} | {f"{path}.weight" for path, m in model.named_modules() if type(m) is torch.nn.Linear}


def _linear_experts(model: PreTrainedModel, banks: Sequence[ExpertBank]) -> set[str]:
    """Names of the fused weights of routed experts that are `[expert, outputs, inputs]`."""
    modules = ((bank.name, model.get_submodule(bank.name)) for bank in banks)
    return {
        f"{path}.{leaf}"
        for path, m in modules
        if not m.is_transposed
        for leaf in ("gate_up_proj", "up_proj", "down_proj")
    }


def _tied_groups(model: PreTrainedModel) -> list[list[str]]:
    """Names of each stored tensor of the model, in its order; the first name is the canonical one."""
    groups: dict[int, list[str]] = {}
    for name, tensor in stored_tensors(model):
        groups.setdefault(id(tensor), []).append(name)
    return list(groups.values())


def _name_of(model: PreTrainedModel, getter: str, parameters: Sequence[_Bound]) -> str:
    """Manifest name of the weight of the module that `model.<getter>()` returns."""
    module = getattr(model, getter)()
    if not isinstance(getattr(module, "weight", None), torch.nn.Parameter):
        raise unsupported(type(model).__name__, f"{getter} gives no module with a weight")
    owner = next(name for name, m in model.named_modules() if m is module)
    name = f"{owner}.weight"
    return next(b.name for b in parameters if name == b.name or name in b.aliases)


def _bind(
    root: str,
    model: PreTrainedModel,
    groups: list[list[str]],
    index: CheckpointIndex,
    own_dtypes: Mapping[str, str],
) -> list[_Bound]:
    """Find the stored tensor of every parameter; tied names whose stored tensors differ come apart."""
    stored = stored_by_name(root, model, index)
    shapes = {name: tuple(tensor.shape) for name, tensor in stored_tensors(model)}
    bound: list[_Bound] = []
    missing: list[str] = []
    for group in groups:
        present = [name for name in group if name in stored]
        if not present:
            missing.append(group[0])
            continue
        for name in present:
            _check_stored(root, name, stored[name], shapes[name], own_dtypes.get(name), index.files)
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
            f"{some(missing)}; looked in {some(looked)}; the files and config.json do not belong together"
        )
    return bound


def _check_stored(
    root: str,
    name: str,
    stored: StoredTensor,
    shape: tuple[int, ...],
    own_dtype: str | None,
    files: Sequence[SourceFile],
) -> None:
    where = some([os.path.basename(files[number].path) for number in stored.files])
    if stored.shape != shape:
        raise CheckpointError(
            f"{root}: {name} has shape {list(stored.shape)} in {where}, the config asks for {list(shape)}; "
            "the weights and config.json do not belong together"
        )
    if stored.dtype not in COMPUTE_DTYPES and stored.dtype != own_dtype:
        raise UnsupportedModelError(
            f"{root}: {name} is stored as {stored.dtype} in {where}; raytier reads {', '.join(COMPUTE_DTYPES)}. "
            "Nearest supported: the model's unquantised checkpoint"
        )


def _same_bytes(files: Sequence[SourceFile], a: StoredTensor, b: StoredTensor) -> bool:
    left, right = a.extents(), b.extents()
    if a.dtype != b.dtype or [e.nbytes for e in left] != [e.nbytes for e in right]:
        return False
    return all(_same_range(files, *pair) for pair in zip(left, right, strict=True))


def _same_range(files: Sequence[SourceFile], a: Extent, b: Extent) -> bool:
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
