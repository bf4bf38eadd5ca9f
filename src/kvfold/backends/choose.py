"""Which backend runs a model: candidates in order of preference, each with the reasons it would refuse."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from kvfold.cache.latent import PagedCache
from kvfold.errors import MissingExtra, SettingError
from kvfold.model.deepseek import DeepseekModel
from kvfold.model.step import Step, StepRun
from kvfold.quant.tensor import QuantTensor
from kvfold.quant.types import BlockType

Weights = Mapping[str, QuantTensor | tuple[QuantTensor, ...]]

DTYPES = ("auto", "int8", "float32", "bfloat16")
"""int8: linear layers and experts round their activations as quant/activations.py says, all else is float32.
auto: int8 on native, float32 on plain."""


class Backend(Protocol):
    """A machine that runs steps of one model over one cache."""

    @property
    def name(self) -> str: ...

    def start(self, step: Step) -> StepRun: ...


@dataclass(frozen=True)
class Needs:
    """What a model and its settings ask of a backend."""

    types: frozenset[BlockType]
    dtype: str  # one of DTYPES
    device: str  # "auto" or "cpu"


@dataclass(frozen=True)
class Candidate:
    name: str
    refusals: Callable[[Needs], list[str]]  # empty: it can run
    build: Callable[[DeepseekModel, Weights, PagedCache, str, int, int], Backend]  # .., dtype, threads, workspace


@dataclass(frozen=True)
class Choice:
    candidate: Candidate
    reason: str
    refused: tuple[tuple[str, tuple[str, ...]], ...]  # (name, reasons) of those that were passed over


def _native_refusals(needs: Needs) -> list[str]:
    from kvfold import _native

    known = set(_native.decodable_types())
    missing = sorted(t.name for t in needs.types if t.id not in known)
    reasons = [f"no kernels for {', '.join(missing)}"] if missing else []
    if needs.dtype == "bfloat16":
        reasons.append("computes in int8 and float32 only")
    return reasons


def _native_build(
    model: DeepseekModel, weights: Weights, cache: PagedCache, dtype: str, threads: int, workspace_bytes: int
) -> Backend:
    from kvfold.backends.native import NativeBackend

    return NativeBackend(
        model,
        weights,
        cache,
        threads=threads,
        workspace_bytes=workspace_bytes,
        rounds_activations=dtype in ("auto", "int8"),
    )


def _plain_refusals(needs: Needs) -> list[str]:
    if importlib.util.find_spec("torch") is None:
        return ["torch is not installed: pip install 'kvfold[torch]'"]
    return []


def _plain_build(
    model: DeepseekModel, weights: Weights, cache: PagedCache, dtype: str, threads: int, workspace_bytes: int
) -> Backend:
    import torch

    from kvfold.backends.plain import PlainBackend

    torch.set_num_threads(threads)
    return PlainBackend(
        model,
        weights,
        cache,
        dtype=torch.bfloat16 if dtype == "bfloat16" else torch.float32,
        rounds_activations=dtype == "int8",
        threads=threads,
        workspace_bytes=workspace_bytes,
    )


CANDIDATES = (
    Candidate("native", _native_refusals, _native_build),
    Candidate("plain", _plain_refusals, _plain_build),
)


def choose_backend(requested: str, needs: Needs) -> Choice:
    """The first candidate that can run, or the one requested.

    Raises SettingError for an unknown name or one that cannot run, MissingExtra if only torch is missing.
    """
    names = [c.name for c in CANDIDATES]
    if requested not in ("auto", *names):
        raise SettingError(f"backend={requested}: allowed are auto, {', '.join(names)}.")
    refused: list[tuple[str, tuple[str, ...]]] = []
    for candidate in CANDIDATES:
        if requested not in ("auto", candidate.name):
            continue
        reasons = candidate.refusals(needs)
        if not reasons:
            reason = "requested" if requested != "auto" else "the first that runs this model"
            return Choice(candidate, reason, tuple(refused))
        refused.append((candidate.name, tuple(reasons)))
    sentence = "; ".join(f"{name}: {', '.join(reasons)}" for name, reasons in refused)
    error = MissingExtra if any("pip install" in r for _, reasons in refused for r in reasons) else SettingError
    raise error(f"No backend can run this model: {sentence}.")


def types_of(weights: Iterable[QuantTensor | tuple[QuantTensor, ...]]) -> frozenset[BlockType]:
    """Every block type a model's weights use."""
    return frozenset(t.type for w in weights for t in (w if isinstance(w, tuple) else (w,)))
