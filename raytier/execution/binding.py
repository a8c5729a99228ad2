"""Which tensor each parameter of a model computes with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from raytier.checkpoint.manifest import ExpertPart, ModelManifest, Parameter
from raytier.codecs.forms import Form
from raytier.execution import fusion, linears
from raytier.execution.experts import bank_of
from raytier.execution.formed import FormedWeight, Weight
from raytier.execution.layout import StreamUnit

TORCH_DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int64": torch.int64,
    "int32": torch.int32,
    "bool": torch.bool,
}


def as_weight(view: memoryview, parameter: Parameter, rows: range, form: Form | None, computed: str) -> Weight:
    """Rows of `parameter` whose bytes in `form` (None: as in the checkpoint) are `view`.

    Without a copy, but where they are plain in another dtype than `computed`.
    """
    if form is None:
        return as_tensor(view, parameter, rows.start, rows.stop)
    shape = (len(rows), *parameter.shape[1:])
    if form.dtype is not None:
        plain = torch.frombuffer(view, dtype=TORCH_DTYPES[form.dtype]).view(shape)
        return plain.to(TORCH_DTYPES[computed])
    outputs, inputs = shape
    return FormedWeight(form, torch.frombuffer(view, dtype=torch.uint8), (outputs, inputs), TORCH_DTYPES[computed])


def as_tensor(view: memoryview, parameter: Parameter, row_start: int = 0, row_stop: int | None = None) -> Tensor:
    """Rows of `parameter` (all of them by default) whose packed bytes are `view`, without a copy."""
    flat = torch.frombuffer(view, dtype=TORCH_DTYPES[parameter.dtype])
    if not parameter.shape:
        return flat.view(())
    rows = (parameter.shape[0] if row_stop is None else row_stop) - row_start
    return flat.view(rows, *parameter.shape[1:])


def members(unit: StreamUnit, view: memoryview, manifest: ModelManifest) -> dict[str, Weight]:
    """The parameters of a unit whose bytes are `view`, by name."""
    weights: dict[str, Weight] = {}
    for m in unit.members:
        parameter = manifest.by_name[m.name]
        form = parameter.stored.form if parameter.stored is not None else None
        part, rows = view[m.offset : m.offset + m.nbytes], range(m.row_start, m.row_stop)
        weights[m.name] = as_weight(part, parameter, rows, form, manifest.computed_dtype(parameter))
    return weights


class Bindings:
    """Binds tensors to the modules of `model`, whose parameters are on `meta` to begin with.

    What is not bound is on `meta`, so that a use outside of its layer fails instead of reading what the ring holds
    by then.
    """

    def __init__(self, model: nn.Module, manifest: ModelManifest) -> None:
        dtype = TORCH_DTYPES[manifest.compute_dtype]
        whole = [p for p in manifest.parameters if p.expert is None]
        self._sites = {p.name: [_site(model, name) for name in (p.name, *p.aliases)] for p in whole}
        self._placeholders = {name: getattr(*sites[0]) for name, sites in self._sites.items()}
        self._experts = {p.name: p.expert for p in manifest.parameters if p.expert is not None}
        self._banks = {bank.name: bank_of(model.get_submodule(bank.name)) for bank in manifest.experts}
        for part in self._experts.values():
            self._banks[part.bank].add(part)
        self._packed: dict[str, Tensor] = {}
        self._packable = {
            name
            for name, ((module, leaf), *others) in self._sites.items()
            if leaf == "weight" and not others and linears.can_pack(module, dtype)
        }
        fusion.adopt(model)

    def bind(self, name: str, weight: Weight) -> None:
        """Compute with `weight` from now on."""
        if (part := self._experts.get(name)) is not None:
            self._banks[part.bank].bind(part, weight)
            return
        formed, tensor = (weight, self._placeholders[name]) if isinstance(weight, FormedWeight) else (None, weight)
        for module, leaf in self._sites[name]:
            if isinstance(module, linears.Linear) and leaf == "weight":
                module.formed = formed
            # A plain tensor among the parameters: no autograd here.
            held: dict[str, Any] = module._parameters if leaf in module._parameters else module._buffers
            held[leaf] = tensor

    def unbind(self, names: Iterable[str]) -> None:
        for name in names:
            if (part := self._experts.get(name)) is not None:
                self._banks[part.bank].bind(part, None)
                continue
            if self._packed.pop(name, None) is not None:
                linears.unbind(self._sites[name][0][0])
            self.bind(name, self._placeholders[name])

    def feed_experts(self, arriving: Callable[[str, Sequence[int]], Iterator[int]]) -> None:
        """Let every bank ask `arriving` for the experts that it is to compute, by its name."""
        for name, bank in self._banks.items():
            bank.arriving = partial(arriving, name)

    def expert_use(self, part: ExpertPart) -> tuple[int, float]:
        """How often an expert was chosen, and when last."""
        return self._banks[part.bank].used(part.expert)

    def can_pack(self, name: str) -> bool:
        """Whether a kernel computes on a layout of its own of this parameter: the weight of one linear layer."""
        return name in self._packable

    def bind_packed(self, name: str, packed: Tensor) -> None:
        """As `bind`, with what `linears.pack` made of the weight."""
        module, _ = self._sites[name][0]
        self.bind(name, self._placeholders[name])
        linears.bind(module, packed)
        self._packed[name] = packed

    def close(self) -> None:
        """Let go of every tensor."""
        self.unbind([*self._sites, *self._experts])


def _site(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that owns parameter `name`, and its attribute there."""
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf
