"""Packed linear layers compute what plain ones do, and their memory is one copy (D7, T10)."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

from raytier.execution.linears import bind, can_pack, pack, packed_nbytes, unbind

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def module_of(rows: int, columns: int, dtype: torch.dtype, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(columns, rows, bias=bias, dtype=dtype).requires_grad_(False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns"), [(64, 128), (100, 33), (8, 64), (1, 16), (300, 7)])
@torch.inference_mode()
def test_same_result(dtype: torch.dtype, rows: int, columns: int) -> None:
    """Any number of rows and leading dimensions, with and without a bias, against fp64."""
    module = module_of(rows, columns, dtype)
    if not can_pack(module, dtype):
        pytest.skip(f"oneDNN does not pack {dtype} here")
    weight, bias = module.weight.double(), module.bias.double()
    bind(module, pack(module.weight))
    plain = module_of(rows, columns, dtype, bias=False)
    bind(plain, pack(plain.weight))
    # fp32: accumulated in another order; else one rounding of the exact result, and one more for the bias.
    tolerance = 1e-5 if dtype is torch.float32 else 2 * torch.finfo(dtype).eps
    for leading in [(1,), (3,), (17,), (130,), (1, 5), (2, 3, 4), (0,), (1, 0), ()]:
        hidden = torch.randn(*leading, columns).to(dtype)
        for layer, expected in (
            (module, linear(hidden.double(), weight, bias)),
            (plain, linear(hidden.double(), plain.weight.double())),
        ):
            result = layer(hidden)
            assert result.dtype is dtype and result.shape == (*leading, rows)
            torch.testing.assert_close(result.double(), expected, atol=tolerance, rtol=tolerance)


@torch.inference_mode()
def test_hidden_states_need_not_be_contiguous() -> None:
    module = module_of(48, 32, torch.float32, bias=False)
    expected = module.weight
    bind(module, pack(expected))
    for hidden in (torch.randn(32, 6).t(), torch.randn(6, 96)[:, 32:64], torch.randn(6, 64)[:, ::2]):
        torch.testing.assert_close(module(hidden), linear(hidden, expected), atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_bind_and_unbind() -> None:
    """While bound the own weight is not looked at; the bias is, at every call; unbound all is as before."""
    module = module_of(16, 32, torch.float32)
    hidden = torch.randn(2, 32)
    weight, before = module.weight, module(hidden)
    bind(module, pack(weight))
    module._parameters["weight"] = nn.Parameter(torch.empty(16, 32, device="meta"))
    torch.testing.assert_close(module(hidden), before, atol=1e-5, rtol=1e-5)
    module._parameters["bias"] = nn.Parameter(module.bias + 1)
    torch.testing.assert_close(module(hidden), before + 1, atol=1e-5, rtol=1e-5)
    bind(module, pack(2 * weight))  # binding anew replaces
    torch.testing.assert_close(module(hidden), 2 * (before + 1 - module.bias) + module.bias, atol=1e-5, rtol=1e-5)
    module._parameters["weight"] = weight
    unbind(module)
    unbind(module)
    assert torch.equal(module(hidden), linear(hidden, weight, module.bias))


def test_what_cannot_be_packed() -> None:
    class Router(nn.Linear):
        pass

    linear_module = module_of(8, 8, torch.float32)
    assert can_pack(linear_module, torch.float32)
    assert can_pack(nn.Linear(8, 8, device="meta"), torch.float32)
    assert not can_pack(Router(8, 8), torch.float32), "a subclass may compute something else"
    assert not can_pack(nn.Embedding(8, 8), torch.float32)
    assert not can_pack(linear_module, torch.int8) and not can_pack(linear_module, torch.float64)
    linear_module.forward = lambda hidden: hidden
    assert not can_pack(linear_module, torch.float32), "somebody replaced its forward"


def test_packed_memory_goes_with_the_module() -> None:
    """By reference counting: a cycle would hold gigabytes until the collector happens to run."""
    module = module_of(16, 32, torch.float32)
    bind(module, pack(module.weight))
    gone = weakref.ref(module.forward._packed)  # type: ignore[attr-defined]
    gc.disable()
    try:
        del module
        assert gone() is None
    finally:
        gc.enable()


_MEMORY = """
import sys, torch
from raytier.execution.linears import pack, packed_nbytes
torch.set_num_threads(1)

def kib(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field))

shape, count = (1500, 2100), 50
pack(torch.ones(64, 64, dtype=torch.bfloat16))
start = kib("VmRSS")
weights = [torch.ones(shape, dtype=torch.bfloat16) for _ in range(count)]
plain = kib("VmRSS") - start
packed = []
while weights:
    packed.append(pack(weights.pop()))
print(plain, kib("VmRSS") - start, kib("VmHWM") - start, sum(map(packed_nbytes, packed)) // 1024)
"""


def test_packing_in_a_loop_takes_no_second_copy() -> None:
    """300 MB, each plain weight freed once packed: memory stays at one copy and a few weights."""
    result = subprocess.run([sys.executable, "-c", _MEMORY], capture_output=True, text=True, check=True, timeout=120)
    plain, packed, peak, bound = map(int, result.stdout.split())
    one = plain // 50
    assert plain > 280_000
    assert packed <= bound + 3 * one and packed > 0.9 * plain
    assert peak <= max(plain, bound) + 4 * one


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_bytes(dtype: torch.dtype) -> None:
    """Exact, so padding is in it: a packed weight is never smaller, and a large one hardly larger."""
    for shape in [(128, 64), (130, 70), (1, 1), (1000, 1000)]:
        size = torch.ones(shape, dtype=dtype).nbytes
        padded = packed_nbytes(pack(torch.ones(shape, dtype=dtype)))
        assert size <= padded <= (shape[0] + 63) * (shape[1] + 63) * dtype.itemsize
