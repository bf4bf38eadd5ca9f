"""Kernels run compiled where there is a GPU, else in Triton's CPU interpreter, with one repair of it. The interpreter
computes bfloat16 wrongly: tests that run there use float32 and float16."""

import os
from typing import Any

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read where a kernel is defined
pytest.importorskip("triton")

if os.environ.get("TRITON_INTERPRET") == "1":
    from triton.runtime import interpreter

    _patch = interpreter._patch_lang_tensor

    def _patch_with_index(tensor: Any, scope: Any) -> None:
        """Triton 3.6 takes a loop bound as int(array of one element), which NumPy 2.4 refuses."""
        _patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = _patch_with_index


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
