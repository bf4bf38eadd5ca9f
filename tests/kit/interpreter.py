"""Kernels where there is no GPU: in Triton's CPU interpreter, with two repairs of it. Import this before any kernel.

The interpreter computes bfloat16 wrongly: what runs there uses float32 and float16.

At every call of a jitted function, inside of kernels as well, it looks through all members of triton.language for what it has
to replace, and it makes its table of types anew for each value. Here it finds them once: interpreted tests take 0.55 of the time.
"""

import functools
import inspect
import os
from types import FunctionType, SimpleNamespace
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

    _builtins = {
        place: [name for name, member in inspect.getmembers(place) if tl.core.is_builtin(member)]
        for place in (tl, tl.core, tl.math, tl.core.tensor, tl.core.tensor_descriptor_base)
    }

    def _patch_builtins(place: Any, *settings: Any) -> None:
        for name in _builtins[place]:
            member = getattr(place, name)
            if tl.core.is_builtin(member):  # not replaced yet
                interpreter._patch_attr(place, name, member, *settings)

    _patch_languages = interpreter._patch_lang
    _languages: dict[str, SimpleNamespace] = {}

    def _patch_known_languages(function: FunctionType) -> Any:
        """What a function sees of triton.language, by its module."""
        if function.__module__ not in _languages:
            seen = {name: x for name, x in function.__globals__.items() if x is tl or x is tl.core}
            _languages[function.__module__] = SimpleNamespace(__globals__=seen)
        return _patch_languages(_languages[function.__module__])

    _numpy_type = interpreter._get_np_dtype
    _number_type = functools.cache(_numpy_type)

    def _known_numpy_type(type: Any) -> Any:
        scalar = type.scalar
        return _numpy_type(scalar) if isinstance(scalar, tl.pointer_type) else _number_type(scalar)

    interpreter._patch_builtin = _patch_builtins
    interpreter._patch_lang = _patch_known_languages
    interpreter._get_np_dtype = _known_numpy_type
