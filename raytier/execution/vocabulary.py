"""The two ends of a model whose table is not on the device: embedding by rows, output head by chunks of rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from raytier.execution.formed import Weight
from raytier.execution.linears import apply


def attach_embedding(module: nn.Module, rows_of: Callable[[Tensor], Tensor | None]) -> list[RemovableHandle]:
    """Give `module`, an input embedding, a table of just the rows that the batch uses, wherever there is one.

    Removing both handles takes that back.

    Args:
        rows_of: ascending distinct token ids `[N]` -> their rows `[N, hidden]` on the device; None: the module has its
            whole table.
    """
    padding = module.padding_idx
    weight: list[Any] = []

    def enter(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        rows, places = torch.unique(args[0], return_inverse=True)
        table = rows_of(rows)
        if table is None:
            return None
        weight.append(module._parameters["weight"])
        module._parameters["weight"] = table  # type: ignore[assignment]  # a plain tensor: no autograd here
        # In a compact table an index from the configuration means nothing, and F.embedding checks its range.
        module.padding_idx = None  # type: ignore[assignment]
        return (places, *args[1:])

    def leave(_module: nn.Module, _args: Any, _output: Any) -> None:
        if weight:
            module._parameters["weight"] = weight.pop()
            module.padding_idx = padding

    return [module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True)]


def project_in_chunks(head: nn.Module, hidden: Tensor, vocab: int, chunks: Iterable[Weight]) -> Tensor:
    """What `head`, a linear layer, makes of `hidden` `[..., H]`: `[..., vocab]`. `chunks`: its rows, in order."""
    out = hidden.new_empty(*hidden.shape[:-1], vocab)
    start = 0
    for chunk in chunks:
        out[..., start : start + chunk.shape[0]] = apply(hidden, chunk)
        start += chunk.shape[0]
    bias = head._parameters.get("bias")
    return out if bias is None else out + bias
