"""What each decoder layer asks of attention, seen by running the model once on `meta` (no data, no weights).

The config does not say it reliably: windows, head widths and latent projections are read by each model in its
own way. What reaches the attention function is what the KV store must hold, so that is what is recorded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from raytier.checkpoint.architecture import (
    ATTENTION_NAME,
    PROBE_NAME,
    decoder_layers,
    one_line,
    probe_hook,
    unsupported,
)
from raytier.checkpoint.manifest import KVLayerSpec
from raytier.errors import RaytierError

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
#: Keyword arguments that select keys: ignoring them would give wrong tokens.
_INDEXERS = ("indices", "block_indices", "topk_indices")
_TOKENS, _SEQUENCES = 3, 2


@dataclass(frozen=True)
class _Call:
    module: nn.Module
    layer: object
    spec: KVLayerSpec


def probe_attention(model: PreTrainedModel) -> tuple[KVLayerSpec, ...]:
    """KV cache of each decoder layer of a model from `construct` (parameters and buffers on `meta`).

    The forward call is the engine's: a packed batch, no cache, logits at selected positions.

    Raises:
        UnsupportedModelError: a layer does not call attention exactly once, in order and causally, or states its
            window nowhere but in the mask.
    """
    what = type(model).__name__
    convolution = next((name for name, m in model.named_modules() if isinstance(m, _CONVOLUTIONS)), None)
    if convolution is not None:
        raise unsupported(what, f"{convolution} is a convolution over tokens or pixels, which carries state")

    calls = _run(model, what)
    layers = decoder_layers(model)
    order = [call.layer for call in calls]
    if order != list(range(len(layers))) or any(
        all(call.module is not m for m in layer.modules()) for call, layer in zip(calls, layers, strict=True)
    ):
        raise unsupported(what, f"its {len(layers)} decoder layers do not each run attention once in order")
    for index, call in enumerate(calls):
        expected = _configured_window(model, index)
        if call.spec.sliding_window != expected:
            raise unsupported(
                what,
                f"layer {index} has a window of {expected} tokens by its config and "
                f"{call.spec.sliding_window} in its attention: the window is only in the mask",
                "the model with use_sliding_window off, where it allows that; else a model of "
                "mistral, qwen2, gemma2 or gemma3_text for windows",
            )
    return tuple(call.spec for call in calls)


def _run(model: PreTrainedModel, what: str) -> list[_Call]:
    calls: list[_Call] = []

    def record(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        name = type(module).__name__
        if attention_mask is not None:
            raise unsupported(what, f"{name} builds its own attention mask")
        if kwargs.get("is_causal") is False or getattr(module, "is_causal", True) is False:
            raise unsupported(what, f"{name} attends in both directions")
        selecting = [k for k in _INDEXERS if kwargs.get(k) is not None]
        if selecting:
            raise unsupported(what, f"{name} selects keys by an indexer ({selecting[0]})")
        window = kwargs.get("sliding_window")
        spec = KVLayerSpec(key.shape[1], key.shape[-1], value.shape[-1], int(window) if window else None)
        calls.append(_Call(module, getattr(module, "layer_idx", None), spec))
        return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[-1]), None

    ids = torch.zeros(1, _TOKENS, dtype=torch.int64, device="meta")
    keep = torch.zeros(_SEQUENCES, dtype=torch.int64, device="meta")
    model.config._attn_implementation = PROBE_NAME
    probe_hook.record = record
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
        probe_hook.record = None
        model.config._attn_implementation = ATTENTION_NAME
    if tuple(logits.shape[:2]) != (1, _SEQUENCES):
        raise unsupported(what, "it does not give logits at selected positions (logits_to_keep)")
    return calls


def _configured_window(model: PreTrainedModel, layer: int) -> int | None:
    """The window that the config gives to `layer`, or None."""
    config = model.config
    window = getattr(config, "sliding_window", None)
    if not window or getattr(config, "use_sliding_window", True) is False:
        return None
    layer_types = getattr(config, "layer_types", None)
    if layer_types and layer_types[layer] == "full_attention":
        return None
    return int(window)
