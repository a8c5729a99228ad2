"""Copies from host memory to a CUDA device."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class Bus:
    """Pins host memory and copies from it on a stream of its own, beside the kernels of earlier layers."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pinned: set[int] = set()

    def copy(self, tensor: Tensor) -> Tensor:
        """A copy on the device, complete when this returns."""
        return tensor.to(self._device, copy=True)

    def upload(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies on the device. Returns when the source may be overwritten; earlier layers still compute meanwhile."""
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._stream):
            copies = {name: tensor.to(self._device, non_blocking=True) for name, tensor in tensors.items()}
            done.record(self._stream)
        current = torch.cuda.current_stream(self._device)
        for tensor in copies.values():
            tensor.record_stream(current)
        done.synchronize()
        return copies

    def pin(self, tensor: Tensor) -> None:
        """Register the memory of a host tensor, so that copies from it are asynchronous and at full rate."""
        self.pin_range(tensor.data_ptr(), tensor.nbytes)

    def pin_range(self, address: int, nbytes: int) -> None:
        code = int(torch.cuda.cudart().cudaHostRegister(address, nbytes, 0))  # type: ignore[no-untyped-call]
        if code:
            raise RuntimeError(f"cudaHostRegister of {nbytes} bytes failed with code {code}")
        self._pinned.add(address)

    def unpin(self, address: int) -> None:
        self._pinned.remove(address)
        torch.cuda.cudart().cudaHostUnregister(address)  # type: ignore[no-untyped-call]

    def close(self) -> None:
        """Unpin everything."""
        for address in list(self._pinned):
            self.unpin(address)
