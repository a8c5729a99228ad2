"""Weights that are not plain tensors, but bytes of a form that kernels compute on (B2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from raytier.codecs.coded import DoesNotShrinkError
from raytier.codecs.forms import Bytes, Form
from raytier.tiers.aligned import AlignedBuffer, align_up


@dataclass(frozen=True, slots=True, eq=False)
class FormedWeight:
    """A matrix `[outputs, inputs]` in a form.

    Attributes:
        data: its bytes, uint8 `[nbytes]`, contiguous, on the CPU.
        dtype: of the plain weight that stands for it where no kernel computes on the form.
    """

    form: Form
    data: Tensor
    shape: tuple[int, int]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return self.data.numel()

    def rows(self, first: int, count: int) -> Tensor:
        """Rows [first, first + count) of the weight, in new memory."""
        weights = self.form.decode(self.data.numpy(), self.shape, first, first + count)
        return torch.from_numpy(weights).to(self.dtype)

    def integers(self) -> tuple[Tensor, Tensor]:
        """Numbers `[outputs, inputs]` in int8 and scales `[outputs]` in fp32 of a form in 8 bits, without a copy."""
        numbers, scales = self.form.integers(self.data.numpy(), self.shape)
        return torch.from_numpy(numbers), torch.from_numpy(scales)


#: What a linear layer may have as its weight.
Weight = Tensor | FormedWeight


def plain(weight: Weight) -> Tensor:
    """A weight that is known to be no other than plain."""
    assert isinstance(weight, Tensor), "a weight in a form where only plain ones are handled"
    return weight


def encoded(form: Form, tensor: Tensor) -> Bytes | None:
    """The bytes of a weight in `form`; None where coded they would be no fewer, so that it stays plain."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    source = tensor.contiguous().view(torch.uint8).numpy().reshape(-1)
    try:
        return form.encode(source, dtype, tuple(tensor.shape))
    except DoesNotShrinkError:
        return None


def in_new_memory(data: Bytes) -> memoryview:
    """A copy in huge pages, where the system gives them: what is read in every step is read faster from there."""
    buffer = AlignedBuffer(align_up(data.nbytes))
    buffer.view[: data.nbytes] = data.data
    return buffer.view[: data.nbytes]
