"""kvfold runs DeepSeek-family models (Multi-head Latent Attention) from any checkpoint file.

    from kvfold import LLM, SamplingParams

Everything here is imported when it is first used: `import kvfold` alone costs a few milliseconds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvfold import errors, load
    from kvfold.engine.sampler import SamplingParams
    from kvfold.llm import LLM

__version__ = "0.1.0"
__all__ = ["LLM", "SamplingParams", "__version__", "errors", "load"]

_HOMES = {"LLM": "kvfold.llm", "SamplingParams": "kvfold.engine.sampler"}
_ROOMS = ("errors", "load")


def __getattr__(name: str) -> object:
    from importlib import import_module

    if name in _ROOMS:
        return import_module(f"kvfold.{name}")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'kvfold' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
