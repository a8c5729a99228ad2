"""What a model is made of: every parameter, where its bytes lie, and the shape of its KV cache.

Pure data: no torch, no transformers, picklable between processes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from math import prod
from typing import Literal, TypeVar

from pydantic import BaseModel

from raytier.checkpoint.quantisation import quantised
from raytier.codecs.codec import Codec, Frames, frame_step
from raytier.codecs.forms import Form
from raytier.config import AppConfig

Section = TypeVar("Section", bound=BaseModel)

#: Bytes per element of the dtypes raytier computes in or stores (torch's names without the prefix).
DTYPE_BYTES: dict[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2, "int64": 8, "int32": 4, "bool": 1}


#: Of a table: bytes in the checkpoint of a piece that is encoded, and used, by itself, and how many there are at least.
_PIECE_BYTES = 16 << 20
_LEAST_PIECES = 8


class Role(StrEnum):
    """Which part of the model a parameter belongs to."""

    EMBEDDING = "embedding"  # input embedding; also the output head when the two are tied
    LAYER = "layer"  # of decoder layer `Parameter.layer`
    HEAD = "head"  # output projection, not tied
    OTHER = "other"  # final norm, learned positions, ...: small, always resident


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A checkpoint file: absolute path and size in bytes as seen when the manifest was made."""

    path: str
    size: int


@dataclass(frozen=True, slots=True)
class Extent:
    """A contiguous byte range of `ModelManifest.files[file]`."""

    file: int
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Stored:
    """How a parameter's bytes lie in files of a tier.

    What lies there is the concatenation of `extents`. Every extent starts at a multiple of a disk block in its file,
    and all but the last are multiples of it long, so that a reader places them one behind the other.

    Attributes:
        form: None: as in the checkpoint.
        frames: of the form's bytes, coded by `codec`.
        piece_rows: rows that are encoded together, as one of `frames.pieces`; 0: all of them.
    """

    form: Form | None
    codec: Codec
    frames: Frames
    extents: tuple[Extent, ...]
    piece_rows: int = 0

    def __post_init__(self) -> None:
        if sum(extent.nbytes for extent in self.extents) != self.frames.coded_nbytes:
            raise ValueError(f"extents {self.extents} do not hold the {self.frames.coded_nbytes} bytes of the frames")

    @property
    def nbytes(self) -> int:
        """Bytes of the parameter in its form."""
        return self.frames.nbytes


@dataclass(frozen=True, slots=True)
class ExpertPart:
    """Which part of a mixture's fused weights a parameter is: rows of `<bank>.<weight>[expert]`.

    Attributes:
        bank: name of the module that computes the experts (an `ExpertBank`).
        weight: its parameter, of all experts.
        part: number of this part among those of the expert, which follow each other along the first dimension.
    """

    bank: str
    weight: str
    expert: int
    part: int = 0


@dataclass(frozen=True, slots=True)
class ExpertBank:
    """The routed experts of a decoder layer: each token goes through `per_token` of `num_experts`."""

    name: str
    layer: int
    num_experts: int
    per_token: int


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of the built model, a buffer that its checkpoint stores, or the part of one expert of a mixture.

    Its bytes are the concatenation of `extents`, row-major, little-endian. `extents` is empty when
    the manifest was made from a config without weights. Where it is read from files of a tier, `stored` says how.

    Attributes:
        name: name in the built transformers model (`model.named_parameters()`); of experts `<bank>.<expert>.<weight>`.
        shape: elements per dimension.
        dtype: stored dtype, a key of `DTYPE_BYTES`.
        layer: decoder layer index for `Role.LAYER`, else None.
        aliases: further names bound to the same storage (tied weights).
        matrix: whether it is computed with as the weight `[outputs, inputs]` of linear layers only (and its rows looked
            up, where it is the input embedding as well): such a weight can be in a form that is not plain.
        own_dtype: dtype that it is computed in, where that is not the model's.
        expert: what it is a part of, for routed experts.
        resident: why it can only be on the device, where its role and shape do not say so.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    role: Role
    layer: int | None = None
    extents: tuple[Extent, ...] = ()
    aliases: tuple[str, ...] = ()
    stored: Stored | None = None
    own_dtype: str | None = None
    expert: ExpertPart | None = None
    resident: str | None = None
    matrix: bool = False

    def __post_init__(self) -> None:
        if self.extents and sum(e.nbytes for e in self.extents) != self.nbytes:
            raise ValueError(
                f"{self.name}: extents hold {sum(e.nbytes for e in self.extents)} bytes, not {self.nbytes}"
            )
        if (self.layer is None) == (self.role is Role.LAYER):
            raise ValueError(f"{self.name}: role {self.role} does not go with layer {self.layer}")

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * DTYPE_BYTES[self.dtype]

    @property
    def table(self) -> bool:
        """Whether parts of its rows are used by themselves."""
        return self.role in (Role.EMBEDDING, Role.HEAD)

    def step(self, nbytes: int) -> int:
        """Bytes in each part but the last of the parameter's `nbytes` in some form, as they are coded and checked."""
        return frame_step(nbytes, self.shape[0] if self.shape else 1, table=self.table)

    def piece_rows(self, form: Form | None) -> int:
        """Rows that files of a tier hold as one piece in this form, which is not made of rows; 0: all of them."""
        if not self.table or form is None or form.dtype is not None:
            return 0
        wanted = min(_PIECE_BYTES, self.nbytes // _LEAST_PIECES) * self.shape[0] // self.nbytes
        return min(self.shape[0], max(16, wanted // 16 * 16))


@dataclass(frozen=True, slots=True)
class KVLayerSpec:
    """KV cache of one attention call: heads, widths of a key and a value head, window in tokens or None.

    `layer` is the decoder layer that makes the call; None: the layer of the same number.
    """

    num_kv_heads: int
    key_dim: int
    value_dim: int
    sliding_window: int | None = None
    layer: int | None = None

    def token_bytes(self, dtype: str) -> int:
        """Bytes of keys and values of one token in this layer."""
        return self.num_kv_heads * (self.key_dim + self.value_dim) * DTYPE_BYTES[dtype]


def kv_windows(layers: Sequence[KVLayerSpec]) -> tuple[int | None, ...]:
    """Windows of the KV cache groups, in order: layers of the same window share block tables; that of full attention
    (None) comes first."""
    windows = {layer.sliding_window for layer in layers}
    return tuple(sorted(windows, key=lambda window: (window is not None, window or 0)))


@dataclass(frozen=True)
class ModelManifest:
    """A local model directory, described.

    Attributes:
        model_dir: absolute path of the directory.
        architecture: transformers class name, for instance `LlamaForCausalLM`.
        files: checkpoint files that hold the parameters (empty when made from a config alone).
        compute_dtype: dtype the model runs in; parameters stored otherwise are cast when loaded.
        max_context: longest sequence in tokens that the model supports.
        kv_layers: one entry per attention call of a forward pass, in order; nearly always one per decoder layer.
        embedding: name of the input embedding parameter.
        head: name of the parameter used as output projection (equal to `embedding` when tied).
        experts: the layers' routed experts, none for a dense model.
        ratios: codec -> dtype -> coded over plain bytes of a sample of the parameters.
    """

    model_dir: str
    architecture: str
    model_type: str
    files: tuple[SourceFile, ...]
    parameters: tuple[Parameter, ...]
    num_layers: int
    hidden_size: int
    vocab_size: int
    max_context: int
    compute_dtype: str
    kv_layers: tuple[KVLayerSpec, ...]
    embedding: str
    head: str
    experts: tuple[ExpertBank, ...] = ()
    ratios: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not set(self._kv_owners) <= set(range(self.num_layers)):
            raise ValueError(f"{len(self.kv_layers)} KV layers do not belong to {self.num_layers} decoder layers")
        if len({p.name for p in self.parameters}) != len(self.parameters):
            raise ValueError("duplicate parameter names")
        for name in (self.embedding, self.head):
            if name not in self.by_name:
                raise ValueError(f"{name} is not a parameter")

    @cached_property
    def by_name(self) -> dict[str, Parameter]:
        return {p.name: p for p in self.parameters}

    @property
    def tied(self) -> bool:
        return self.embedding == self.head

    @property
    def nbytes(self) -> int:
        """Bytes of all parameters, a tied pair counted once."""
        return sum(p.nbytes for p in self.parameters)

    @property
    def kv_token_bytes(self) -> int:
        """Bytes of keys and values of one token over all layers in `compute_dtype`."""
        return sum(layer.token_bytes(self.compute_dtype) for layer in self.kv_layers)

    def computed_dtype(self, parameter: Parameter) -> str:
        """The dtype that `parameter` is computed in."""
        return parameter.own_dtype or self.compute_dtype

    @property
    def _kv_owners(self) -> tuple[int, ...]:
        return tuple(index if kv.layer is None else kv.layer for index, kv in enumerate(self.kv_layers))

    def kv_of(self, layer: int) -> tuple[KVLayerSpec, ...]:
        """KV caches of a decoder layer: one per attention call that it makes."""
        return tuple(kv for kv, owner in zip(self.kv_layers, self._kv_owners, strict=True) if owner == layer)

    @property
    def kv_windows(self) -> tuple[int | None, ...]:
        """Of the KV cache groups; see the function of this name."""
        return kv_windows(self.kv_layers)

    def kv_group_token_bytes(self, window: int | None) -> int:
        """Bytes of keys and values of one token over the layers of a KV cache group."""
        layers = (layer for layer in self.kv_layers if layer.sliding_window == window)
        return sum(layer.token_bytes(self.compute_dtype) for layer in layers)

    @cached_property
    def widest(self) -> int:
        """The largest dimension of a matrix in a layer."""
        shapes = {p.shape for p in self.parameters if p.role is Role.LAYER and len(p.shape) > 1}
        return max((max(shape[-2:]) for shape in shapes), default=0)

    @cached_property
    def _by_layer(self) -> tuple[tuple[Parameter, ...], ...]:
        found: list[list[Parameter]] = [[] for _ in range(self.num_layers)]
        for p in self.parameters:
            if p.layer is not None:
                found[p.layer].append(p)
        return tuple(map(tuple, found))

    def layer_parameters(self, layer: int) -> tuple[Parameter, ...]:
        return self._by_layer[layer]


@dataclass(frozen=True)
class TokenizerSpec:
    """A tokenizer, serialised so that processes without torch or transformers can run it.

    Attributes:
        tokenizer_json: the `tokenizers` library's serialisation of the backend that transformers built.
        chat_template: Jinja source, or None when the model has none.
        special_tokens: name (`bos_token`, `eos_token`, ...) -> text, as the template sees them.
        eos_token_ids, bos_token_id: ids; several ends of sequence are kept.
        add_special_tokens: whether a raw prompt gets the tokenizer's own special tokens.
    """

    tokenizer_json: str
    chat_template: str | None
    special_tokens: dict[str, str]
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    add_special_tokens: bool = True


@dataclass(frozen=True)
class GenerationDefaults:
    """What a request gets when it says nothing, from the model's own files (spec E8).

    Order of precedence: metadata.json (`metadata.llm`), generation_config.json, then the values here.
    """

    max_new_tokens: int = 128
    temperature: float = 0.7
    top_p: float = 0.9
    top_k: int = 0
    stop_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class ModelDescription:
    """All that a process without torch needs to plan for and to talk to a model.

    `max_num_seqs`, `kv_block_size` and `kv_total_blocks` are the model's own wishes from
    `metadata.json` (None when absent); the application's configuration overrides them. `quantization_bits` is what its
    entry asks for.
    """

    manifest: ModelManifest
    tokenizer: TokenizerSpec
    defaults: GenerationDefaults = field(default_factory=GenerationDefaults)
    max_num_seqs: int | None = None
    kv_block_size: int | None = None
    kv_total_blocks: int | None = None
    quantization_bits: Literal[4, 8] | None = None

    def configure(self, config: AppConfig) -> AppConfig:
        """`config` with the precision of the model's entry, and its wishes wherever that says nothing (spec E8)."""
        config = quantised(config, self.quantization_bits)
        scheduler = _fill(config.scheduler, max_num_seqs=self.max_num_seqs)
        kv = _fill(config.kv, block_size=self.kv_block_size, max_blocks=self.kv_total_blocks)
        return config.model_copy(update={"scheduler": scheduler, "kv": kv})


def _fill(section: Section, **wishes: int | None) -> Section:
    """`section` with those wishes that are not None and whose fields it was not given."""
    return section.model_copy(
        update={
            name: wish for name, wish in wishes.items() if wish is not None and name not in section.model_fields_set
        }
    )
