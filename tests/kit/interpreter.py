"""Kernels where there is no GPU: in Triton's CPU interpreter, with two repairs of it. Import this before any kernel.

The interpreter computes bfloat16 wrongly: what runs there uses float32 and float16.
"""

import os
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read where a kernel is defined
pytest.importorskip("triton")

if os.environ.get("TRITON_INTERPRET") == "1":
    import triton.language as tl
    from triton.runtime import interpreter

    _patch = interpreter._patch_lang_tensor

    def _patch_with_index(tensor: Any, scope: Any) -> None:
        """Triton 3.6 to 3.9 takes a loop bound as int(array of one element), which NumPy 2.4 refuses."""
        _patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = _patch_with_index

    def _topk(x: Any, k: Any, dim: None = None) -> Any:
        """Triton sorts by sums by xor, each of which takes a call of Python for every number of the tile: 2 s for 1024."""
        highest = np.sort(x.handle.data, axis=-1)[..., ::-1][..., : int(k)]
        return interpreter.ReduceOps(0, None, False).to_tensor(highest.copy(), x.dtype)

    tl.topk = _topk
