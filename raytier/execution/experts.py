"""Routed experts, each with weights of its own, registered with transformers' `ExpertsInterface` as `raytier`.

transformers' modules hold the weights of all experts of a layer in fused parameters `[experts, ...]`. Here these stay
on `meta`: an `ExpertBank` beside each such module has the weights of every expert for itself, and only the ones that
the router has chosen are looked at, or fetched (`expert_stream`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ExpertsInterface

from raytier.checkpoint.architecture import EXPERTS_NAME
from raytier.checkpoint.manifest import ExpertPart
from raytier.execution import linears
from raytier.execution.formed import Weight

_ATTRIBUTE = "_raytier_bank"


class ExpertBank:
    """The weights of the routed experts of one module. A weight may come in several parts along its first dimension.

    Attributes:
        arriving: brings those experts that are not there, and gives each one back when it is bound, until the next one
            is asked for.
    """

    def __init__(self) -> None:
        self._parts: dict[tuple[str, int], list[Weight | None]] = {}
        self._uses: dict[int, tuple[int, float]] = {}
        self.arriving: Callable[[Sequence[int]], Iterator[int]] = iter

    def chosen(self, experts: Sequence[int]) -> Iterator[int]:
        """The experts that the router has chosen for a batch, each bound until the next one is asked for."""
        now = time.time()
        for expert in experts:
            self._uses[expert] = self.used(expert)[0] + 1, now
        return self.arriving(experts)

    def used(self, expert: int) -> tuple[int, float]:
        """How many batches an expert was chosen for, and when last (Unix time, 0: never)."""
        return self._uses.get(expert, (0, 0.0))

    def add(self, part: ExpertPart) -> None:
        """There will be this part."""
        parts = self._parts.setdefault((part.weight, part.expert), [])
        parts.extend([None] * (part.part + 1 - len(parts)))

    def bind(self, part: ExpertPart, weight: Weight | None) -> None:
        """Compute with `weight` from now on; None: it is not there."""
        self._parts[part.weight, part.expert][part.part] = weight

    def parts(self, weight: str, expert: int) -> list[Weight]:
        """The parts of a weight, all of which must be there."""
        parts = self._parts[weight, expert]
        missing = [number for number, part in enumerate(parts) if part is None]
        if missing:
            raise RuntimeError(f"part {missing[0]} of {weight} of expert {expert} is not bound")
        return parts  # type: ignore[return-value]


def bank_of(module: nn.Module) -> ExpertBank:
    """The bank beside a module that computes experts; made on first use."""
    bank: ExpertBank | None = module.__dict__.get(_ATTRIBUTE)
    if bank is None:
        bank = module.__dict__[_ATTRIBUTE] = ExpertBank()
    return bank


def experts_forward(module: Any, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What the chosen experts make of each token, weighted and added up, expert by expert in their order.

    Args:
        hidden: `[T, H]`; top_k_index, top_k_weights: `[T, k]`. Indices from `num_experts` on mean no expert.
    """
    bank = bank_of(module)
    result = torch.zeros_like(hidden)
    weights = top_k_weights.to(hidden.dtype) if top_k_weights.dtype.is_floating_point else top_k_weights
    for expert in bank.chosen(hit_experts(top_k_index, module.num_experts)):
        rows, places = torch.where(top_k_index == expert)
        out = _expert(module, bank, expert, hidden[rows])
        result.index_add_(0, rows, (out * weights[rows, places, None]).to(result.dtype))
    return result


def hit_experts(top_k_index: Tensor, num_experts: int) -> list[int]:
    """The experts that a batch goes through, in their order."""
    return [expert for expert in torch.unique(top_k_index).tolist() if 0 <= expert < num_experts]


def _expert(module: Any, bank: ExpertBank, expert: int, hidden: Tensor) -> Tensor:
    """One expert on the tokens that chose it, `[n, H]` -> `[n, H]`; as `grouped_mm_experts_forward` of transformers."""

    def project(name: str, hidden: Tensor) -> Tensor:
        bias = getattr(module, f"{name}_bias")[expert] if module.has_bias else None
        return _project(hidden, bank.parts(name, expert), bias, transposed=module.is_transposed)

    if module.has_gate:
        inner = module._apply_gate(project("gate_up_proj", hidden))
    else:
        inner = module.act_fn(project("up_proj", hidden))
    out = project("down_proj", inner)
    return module.post_expert_norm(out) if module.has_post_expert_norm else out


def _project(hidden: Tensor, parts: Sequence[Weight], bias: Tensor | None, *, transposed: bool) -> Tensor:
    """`hidden` through a weight in parts: rows of it are outputs, or inputs where it is transposed."""
    if transposed:
        first, results = 0, []
        for part in parts:
            assert isinstance(part, Tensor)  # only weights of linear layers have other forms
            results.append(hidden[..., first : first + part.shape[0]] @ part)
            first += part.shape[0]
        out = results[0] if len(results) == 1 else torch.stack(results).sum(0)
    else:
        results = [linears.apply(hidden, part) for part in parts]
        out = results[0] if len(results) == 1 else torch.cat(results, dim=-1)
    return out if bias is None else out + bias


ExpertsInterface.register(EXPERTS_NAME, experts_forward)
