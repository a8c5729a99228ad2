"""A parameter as it was read becomes what its tier in memory holds: in a form, or in the dtype it is computed in."""

from __future__ import annotations

from torch import Tensor

from raytier.checkpoint.manifest import ModelManifest, Parameter
from raytier.errors import ResourceNotAvailableError
from raytier.execution.binding import TORCH_DTYPES, as_tensor, as_weight
from raytier.execution.bus import Bus
from raytier.execution.formed import Weight, encoded, in_new_memory
from raytier.planner.plan import Tier, TierSchemes
from raytier.tiers.aligned import AlignedBuffer


class Converter:
    """Makes the weights of one model on one device; `bus` where that is not the CPU."""

    def __init__(self, manifest: ModelManifest, schemes: TierSchemes, bus: Bus | None) -> None:
        self._manifest = manifest
        self._schemes = schemes
        self._bus = bus

    def to_device(self, parameter: Parameter, tensor: Tensor, buffer: AlignedBuffer | None) -> Weight:
        """For the device; it may stay in `buffer`, which it was read into."""
        computed = self._manifest.computed_dtype(parameter)
        form = self._schemes.of(parameter.name, Tier.DEVICE).form
        if form is not None and (data := encoded(form, tensor)) is not None:
            return as_weight(in_new_memory(data), parameter, range(tensor.shape[0]), form, computed)
        dtype = TORCH_DTYPES[computed]
        if self._bus is not None:
            return self._bus.copy(tensor.to(dtype))
        return tensor.to(dtype, copy=buffer is None)

    def to_host(self, parameter: Parameter, tensor: Tensor, view: memoryview) -> Weight:
        """In the arena, whose pages are small: direct reads into them are slow, hence by way of a buffer.

        Raises:
            ResourceNotAvailableError: `view` was planned for fewer bytes than the parameter has in its form.
        """
        form = self._schemes.of(parameter.name, Tier.HOST).form
        data = encoded(form, tensor) if form is not None else None
        nbytes = parameter.nbytes if data is None else data.nbytes
        if nbytes > len(view):
            raise ResourceNotAvailableError(
                f"{parameter.name} takes {nbytes} bytes in the host pool and was planned for {len(view)}: it shrinks "
                "less than usual; set precision.host to source and compression.host to none"
            )
        if data is None:
            target = as_tensor(view[:nbytes], parameter)
            return target if target.data_ptr() == tensor.data_ptr() else target.copy_(tensor)  # it was kept there
        view[:nbytes] = data.data
        rows, computed = range(tensor.shape[0]), self._manifest.computed_dtype(parameter)
        return as_weight(view[:nbytes], parameter, rows, form, computed)
