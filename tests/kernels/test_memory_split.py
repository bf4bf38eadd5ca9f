"""Kernels that stream weights say how a multiprocessor's memory is to be split, to the driver and once."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import pytest

from kit.interpreter import torch  # before any kernel
from kvfold.kernels import memory_split, rounded_product
from kvfold.kernels.matrix import Matrix
from kvfold.kernels.memory_split import PREFERRED_SHARED_MEMORY_CARVEOUT, Splitting
from kvfold.kernels.rounding import SHARED_PERCENT

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


class Launched:
    """A kernel as Triton has it: each grid and set of constants is another function."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*arguments: Any, **constants: Any) -> Any:
            self.calls.append((grid, arguments, constants))
            function = constants.get("function")
            return None if function is None else SimpleNamespace(function=function)

        return run


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    calls: list[tuple[int, int, int]] = []

    def set_attribute(function: ctypes.c_void_p, attribute: int, value: int) -> int:
        calls.append((function.value or 0, attribute, value))
        return 1 if function.value == 13 else 0

    monkeypatch.setattr(memory_split, "_driver", lambda: SimpleNamespace(cuFuncSetAttribute=set_attribute))
    return calls


def test_each_function_is_told_of_once(told: list[tuple[int, int, int]]) -> None:
    kernel = Launched()
    for function in (1001, 1002, 1001, None):
        Splitting(kernel, 25)[(3, 2)]("x", function=function)
    assert told == [(1001, 9, 25), (1002, 9, 25)]
    assert kernel.calls[0] == ((3, 2), ("x",), {"function": 1001}) and len(kernel.calls) == 4


def test_a_driver_that_refuses_is_heard(told: list[tuple[int, int, int]]) -> None:
    with pytest.raises(RuntimeError, match=r"cuFuncSetAttribute\(9, 0\) of a kernel: error 1"):
        Splitting(Launched(), 0)[(1,)](function=13)


@pytest.mark.gpu
@needs_gpu
def test_the_driver_knows_what_products_prefer(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Any] = []
    kernel = rounded_product._linear._kernel
    launch = kernel.run

    def kept(*arguments: Any, **options: Any) -> Any:
        compiled.append(launch(*arguments, **options))
        return compiled[-1]

    monkeypatch.setattr(kernel, "run", kept)
    raw = torch.zeros(64, 8 * 34, dtype=torch.uint8, device="cuda")
    x = torch.zeros(1, 256, dtype=torch.bfloat16, device="cuda")
    rounded_product.linear(x, Matrix("Q8_0", 64, 256, raw, None, 1, True), torch.empty(1, 64, device="cuda"))
    driver, percent = ctypes.CDLL("libcuda.so.1"), ctypes.c_int(-7)
    function = ctypes.c_void_p(compiled[0].function)
    assert driver.cuFuncGetAttribute(ctypes.byref(percent), PREFERRED_SHARED_MEMORY_CARVEOUT, function) == 0
    assert percent.value == SHARED_PERCENT
