"""Copies of a model's parameters that outlive its weights: taken when it is put to sleep, used when it wakes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial

import torch

from raytier.checkpoint.manifest import ModelManifest, Parameter
from raytier.execution.binding import TORCH_DTYPES, as_tensor, as_weight
from raytier.execution.formed import FormedWeight, Weight
from raytier.planner.plan import Tier, TierSchemes
from raytier.tiers.aligned import AlignedBuffer, align_up


class KeptCopies:
    """Bytes of parameters as the device had them: plain ones of the checkpoint, or those of a form.

    Args:
        views: memory with the copies, by name, each as long as its bytes.
    """

    def __init__(self, views: Mapping[str, memoryview], manifest: ModelManifest, schemes: TierSchemes) -> None:
        self._views = dict(views)
        self._manifest = manifest
        self._schemes = schemes

    def find(self, name: str) -> Callable[[], Weight] | None:
        """What gives the parameter: a plain tensor where it was kept, or a copy of a form in memory of its own."""
        view = self._views.get(name)
        if view is None:
            return None
        parameter = self._manifest.by_name[name]
        if len(view) == parameter.nbytes:
            return partial(as_tensor, view, parameter)
        return partial(self._formed, view, parameter)

    def _formed(self, view: memoryview, parameter: Parameter) -> Weight:
        form = self._schemes.of(parameter.name, Tier.DEVICE).form
        buffer = AlignedBuffer(align_up(len(view)))
        buffer.view[: len(view)] = view
        computed = self._manifest.computed_dtype(parameter)
        return as_weight(buffer.view[: len(view)], parameter, range(parameter.shape[0]), form, computed)

    def clear(self) -> None:
        self._views.clear()


def keepable(resident: Mapping[str, Weight], parameters: Iterable[Parameter]) -> dict[str, int]:
    """What of `resident` can be kept, and its bytes, in the order of `parameters`: not what was packed, or cast."""
    return {p.name: nbytes for p in parameters if (nbytes := _nbytes(resident.get(p.name), p)) is not None}


def _nbytes(weight: Weight | None, parameter: Parameter) -> int | None:
    if isinstance(weight, FormedWeight):
        return weight.nbytes if weight.nbytes < parameter.nbytes else None
    if weight is None or weight.layout is not torch.strided or weight.dtype is not TORCH_DTYPES[parameter.dtype]:
        return None
    return weight.nbytes if weight.nbytes == parameter.nbytes else None


def keep(weight: Weight, parameter: Parameter, view: memoryview) -> None:
    """Copy what is `keepable` to `view`."""
    if isinstance(weight, FormedWeight):
        view[: weight.nbytes] = weight.data.numpy().data
    else:
        as_tensor(view, parameter).copy_(weight)
