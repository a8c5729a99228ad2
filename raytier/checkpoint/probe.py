"""What each decoder layer asks of attention and of experts, seen by running the model once on `meta`, without data.

The config does not say it reliably: windows, head widths and latent projections are read by each model in its
own way. What reaches the attention function is what the KV store must hold, so that is what is recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch import nn
from torch.nn.functional import embedding
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from raytier.checkpoint.architecture import (
    ATTENTION_NAME,
    EXPERTS_NAME,
    NEUTRAL,
    PROBE_NAME,
    decoder_layers,
    layer_prefix,
    one_line,
    probe_hook,
    text_config,
    unsupported,
)
from raytier.checkpoint.manifest import ExpertBank, KVLayerSpec
from raytier.errors import RaytierError

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
#: Keyword arguments that select keys: ignoring them would give wrong tokens.
_INDEXERS = ("indices", "block_indices", "topk_indices")
_TOKENS, _SEQUENCES = 3, 2
#: Positions at which masks are looked at, beyond any window and on no border of blocks, and keys after them.
_QUERIES, _BEYOND = (1_000_003, 1_200_001), 5


@dataclass(frozen=True)
class _Call:
    module: nn.Module
    spec: KVLayerSpec


@dataclass(frozen=True)
class Probed:
    """What was seen of a model.

    Attributes:
        kv_layers: KV cache of every attention call.
        experts: the modules that compute routed experts.
        unused: names of the parts that do not continue text (towers for images, ...).
        embedding_read: the table of the input embedding is looked at beside the lookup of rows.
    """

    kv_layers: tuple[KVLayerSpec, ...]
    experts: tuple[ExpertBank, ...]
    unused: tuple[str, ...]
    embedding_read: bool

    def is_unused(self, name: str) -> bool:
        """Whether a module, parameter or buffer belongs to an unused part."""
        return any(name == part or name.startswith(part + ".") for part in self.unused)


def probe(model: PreTrainedModel) -> Probed:
    """What the layers of a model from `construct` (parameters and buffers on `meta`) ask for.

    The forward call is the engine's: a packed batch, no cache, logits at selected positions.

    Raises:
        UnsupportedModelError: the layers do not attend in order and causally, or the model does something else that
            raytier cannot follow.
    """
    what = type(model).__name__
    used: set[nn.Module] = set()
    hooks = [m.register_forward_pre_hook(lambda module, _: used.add(module)) for m in model.modules()]
    layers = decoder_layers(model)
    watch = _Watch([model.get_input_embeddings(), model.get_output_embeddings()])  # type: ignore[no-untyped-call]
    try:
        with watch, _routing_skipped(layers):
            calls, routed = _run(model, what)
    finally:
        for hook in hooks:
            hook.remove()
    convolution = next((name for name, m in model.named_modules() if m in used and isinstance(m, _CONVOLUTIONS)), None)
    if convolution is not None:
        raise unsupported(what, f"{convolution} is a convolution over tokens, which carries state")
    owners = [next((n for n, layer in enumerate(layers) if call.module in layer.modules()), None) for call in calls]
    if [owner for owner, _ in groupby(owners)] != [n for n, layer in enumerate(layers) if layer in used]:
        raise unsupported(what, f"its {len(layers)} decoder layers do not each run attention, once and in order")
    for call, owner in zip(calls, owners, strict=True):
        assert owner is not None
        window, stated = call.spec.sliding_window, _stated_window(model, owner)
        if window != stated:  # transformers' own cache keeps what the config states
            seen = "all tokens" if window is None else f"{window} tokens"
            raise unsupported(what, f"layer {owner} attends to {seen} while its config states a window of {stated}")
    one_each = len(calls) == len(layers)
    specs = (
        call.spec if one_each else replace(call.spec, layer=owner) for call, owner in zip(calls, owners, strict=True)
    )
    return Probed(tuple(specs), _banks(model, routed), tuple(_unused(model, used)), watch.read)


class _Watch(TorchFunctionMode):
    """Notices when the weight of the embedding or of the head (one tensor, if they are tied) is used in another way."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        super().__init__()
        self._weights = [module.weight for module in modules]
        self.read = False

    def __torch_function__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if args and function is not embedding and getattr(function, "__name__", "") not in ("__get__", "linear"):
            self.read |= any(args[0] is weight for weight in self._weights)
        return function(*args, **(kwargs or {}))


@contextmanager
def _routing_skipped(layers: nn.ModuleList) -> Iterator[None]:
    """Let modules in the layers whose computation depends on data, as routing does, give back what they were given.

    What they compute is not of interest here, as long as it does not attend; that all attention was seen is checked.
    """
    wrapped = [m for layer in layers for m in layer.modules() if m is not layer and "forward" not in m.__dict__]

    def wrap(module: nn.Module) -> Callable[..., Any]:
        forward = module.forward

        def either(*args: Any, **kwargs: Any) -> Any:
            try:
                return forward(*args, **kwargs)
            except NotImplementedError:
                if args and isinstance(args[0], torch.Tensor) and args[0].is_floating_point():
                    return torch.empty_like(args[0])
                raise

        return either

    for module in wrapped:
        module.forward = wrap(module)
    try:
        yield
    finally:
        for module in wrapped:
            del module.forward


def _unused(model: PreTrainedModel, used: Collection[nn.Module]) -> Iterator[str]:
    """Decoder layers, neighbours of them and of what holds them, in which no module was called."""
    holder = layer_prefix(model)
    yield from (f"{holder}.{n}" for n, layer in enumerate(decoder_layers(model)) if layer not in used)
    while holder:
        holder, _, inner = holder.rpartition(".")
        for name, module in model.get_submodule(holder).named_children():
            if name != inner:
                yield from _never_called(f"{holder}.{name}".lstrip("."), module, used)


def _never_called(name: str, module: nn.Module, used: Collection[nn.Module]) -> Iterator[str]:
    """`module`, or parts of it that are no single layers: others may use the weights of these without calling them."""
    if not any(m in used for m in module.modules()):
        yield name
    elif module in used:
        for inner, child in module.named_children():
            if any(True for _ in child.children()):
                yield from _never_called(f"{name}.{inner}", child, used)


def _banks(model: PreTrainedModel, routed: Mapping[nn.Module, int]) -> tuple[ExpertBank, ...]:
    names = {module: name for name, module in model.named_modules()}
    banks = []
    for number, layer in enumerate(decoder_layers(model)):
        for module in layer.modules():
            if module in routed:
                fused = max(module.parameters(recurse=False), key=lambda p: p.ndim)
                banks.append(ExpertBank(names[module], number, fused.shape[0], routed[module]))
    return tuple(banks)


def _run(model: PreTrainedModel, what: str) -> tuple[list[_Call], dict[nn.Module, int]]:
    calls: list[_Call] = []
    routed: dict[nn.Module, int] = {}
    masks: dict[int, tuple[torch.Tensor, int | None]] = {}  # by identity, each kept alive

    def route(module: nn.Module, hidden: torch.Tensor, top_k_index: torch.Tensor, *_: object) -> torch.Tensor:
        routed[module] = top_k_index.shape[-1]
        return torch.empty_like(hidden)

    def look(q_length: int, kv_length: int, mask_function: Callable[..., torch.Tensor], **_: object) -> torch.Tensor:
        try:
            window = _window_of(mask_function)
        except Exception as error:
            reason = f"its attention is no causal one, nor a sliding window of it: {one_line(error)}"
            raise unsupported(what, reason) from error
        mask = torch.empty(1, 1, q_length, kv_length, dtype=torch.bool, device="meta")
        masks[id(mask)] = mask, window
        return mask

    def record(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        name = type(module).__name__
        if attention_mask is not None and id(attention_mask) not in masks:
            raise unsupported(what, f"{name} builds its own attention mask")
        if kwargs.get("is_causal") is False or getattr(module, "is_causal", True) is False:
            raise unsupported(what, f"{name} attends in both directions")
        selecting = [k for k in _INDEXERS if kwargs.get(k) is not None]
        if selecting:
            raise unsupported(what, f"{name} selects keys by an indexer ({selecting[0]})")
        unknown = [k for k, v in kwargs.items() if isinstance(v, torch.Tensor) and k not in NEUTRAL | {"s_aux"}]
        if unknown:
            raise unsupported(what, f"{name} passes {unknown[0]} to attention, which raytier does not know")
        window = kwargs.get("sliding_window")
        if attention_mask is not None:  # what transformers' own attention follows
            _, window = masks[id(attention_mask)]
        spec = KVLayerSpec(key.shape[1], key.shape[-1], value.shape[-1], int(window) if window else None)
        calls.append(_Call(module, spec))
        return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[-1]), None

    ids = torch.zeros(1, _TOKENS, dtype=torch.int64, device="meta")
    keep = torch.zeros(_SEQUENCES, dtype=torch.int64, device="meta")
    model.config._attn_implementation = model.config._experts_implementation = PROBE_NAME
    probe_hook.attention, probe_hook.experts, probe_hook.mask = record, route, look
    try:
        with torch.no_grad():
            logits = model(input_ids=ids, position_ids=ids, use_cache=False, logits_to_keep=keep).logits
    except RaytierError:
        raise
    except Exception as error:  # any operation that needs data, any argument that the class does not take
        raise unsupported(
            what, f"its forward pass cannot be traced without data: {type(error).__name__}: {one_line(error)}"
        ) from error
    finally:
        probe_hook.attention = probe_hook.experts = probe_hook.mask = None
        model.config._attn_implementation = ATTENTION_NAME
        model.config._experts_implementation = EXPERTS_NAME
    if tuple(logits.shape[:2]) != (1, _SEQUENCES):
        raise unsupported(what, "it does not give logits at selected positions (logits_to_keep)")
    return calls, routed


def _window_of(mask_function: Callable[..., torch.Tensor]) -> int | None:
    """Tokens that a query sees by a mask of transformers, itself included; None: all before it.

    Raises:
        ValueError: it hides or shows something else.
    """
    zero = torch.zeros(1, dtype=torch.int64)
    seen = []
    for query in _QUERIES:
        keys = torch.arange(query + _BEYOND)
        visible = torch.as_tensor(mask_function(zero, zero, torch.full_like(keys, query), keys)).expand(len(keys))
        if bool(visible[query + 1 :].any()):
            raise ValueError("it attends in both directions")
        count = int(visible.sum())
        if not bool(visible[query + 1 - count : query + 1].all()):
            raise ValueError(
                f"query {query} does not see itself and the {count - 1} tokens before it, and nothing else"
            )
        seen.append(count)
    if seen == [query + 1 for query in _QUERIES]:
        return None
    if len(set(seen)) > 1:
        raise ValueError(f"queries {_QUERIES} see {seen} tokens, which is no sliding window")
    return seen[0]


def _stated_window(model: PreTrainedModel, layer: int) -> int | None:
    """The window that the config gives to `layer`, or None."""
    config = text_config(model.config)
    window = getattr(config, "sliding_window", None)
    if not window or getattr(config, "use_sliding_window", True) is False:
        return None
    layer_types = getattr(config, "layer_types", None)
    if layer_types and layer_types[layer] == "full_attention":
        return None
    return int(window)
