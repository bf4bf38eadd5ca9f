"""Which backend runs a model: candidates in order of preference, each with the reasons it would refuse."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from kvfold.backends import gpu, gpu_rates, gpu_weights
from kvfold.cache.latent import PAGE_TOKENS, CacheLayout, CacheType, PagedCache
from kvfold.errors import MissingExtra, SettingError, install_extra
from kvfold.mla.plan import ARITHMETIC, CPU_CODES, CPU_PAIRS, MachineProfile, Path
from kvfold.model.deepseek import DeepseekModel
from kvfold.model.program import Program
from kvfold.model.step import Steps
from kvfold.quant.tensor import Weight, Weights, matrices
from kvfold.quant.types import BlockType

DTYPES = ("auto", "int8", "float32", "bfloat16")
"""int8: linear layers and experts round their activations as quant/activations.py says, all else is float32 (on cuda:
rows that are few, where a weight has a kernel for it; all else is bfloat16).
auto: int8 on cuda and native, float32 on plain."""

# On a GPU, beside weights, cache and workspace: the context of CUDA, compiled kernels, the values of a step.
GPU_RESERVE_BYTES = 2 << 30
# One of weights that an op decodes, kept, and one of keys and values that attention expands.
GPU_WORKSPACES = 2

ISAS = ("auto", "generic", "avx2", "avx512", "amx")


class Backend(Steps, Protocol):
    """A machine that runs steps of one model over one cache."""

    @property
    def name(self) -> str: ...


@dataclass(frozen=True)
class NativeOptions:
    """What only native has.

    isa:            one of ISAS, of the whole process; auto: the fastest, or the one forced before
    deterministic:  the bits of a row depend on its own sequence and on whether it belongs to a prompt, on nothing beside
    check_numerics: NaN and infinity in what an op makes raise NumericsError, which names it
    profile:        every op is timed
    """

    isa: str = "auto"
    deterministic: bool = False
    check_numerics: bool = False
    profile: bool = False

    @property
    def asked(self) -> list[str]:
        """Those that are not as they are by default, as settings are written."""
        values = {name: value for name, value in vars(self).items() if value not in (False, "auto")}
        return [name if value is True else f"{name}={value}" for name, value in values.items()]

    @property
    def refusals(self) -> list[str]:
        """What another backend says to those that are asked for."""
        return [f"{setting} is for backend native, on device=cpu" for setting in self.asked]


@dataclass(frozen=True)
class Room:
    """Bytes a model takes under its settings, in the memory of a GPU.

    wanted_tokens: of the cache: n_ctx, or the model's own context where nobody set it
    least_tokens:  with fewer it does not run: n_ctx, or a page
    smaller:       cache types that take fewer bytes a token, and those bytes
    """

    weight_bytes: int
    workspace_bytes: int
    bytes_per_token: int
    wanted_tokens: int
    least_tokens: int
    smaller: tuple[tuple[str, int], ...] = ()

    @property
    def scratch_bytes(self) -> int:
        return GPU_WORKSPACES * self.workspace_bytes

    def tokens_in(self, free_bytes: int, bytes_per_token: int | None = None) -> int:
        """Whole pages of the cache, in tokens, that fit this GPU memory beside everything else; below 0 for too little."""
        left = free_bytes - self.weight_bytes - self.scratch_bytes - GPU_RESERVE_BYTES
        return left // ((bytes_per_token or self.bytes_per_token) * PAGE_TOKENS) * PAGE_TOKENS


@dataclass(frozen=True)
class Needs:
    """What a model and its settings ask of a backend. room: None asks for none."""

    types: frozenset[BlockType]
    dtype: str  # one of DTYPES
    device: str  # "auto", "cpu", "cuda" or "cuda:N"
    cache_type: CacheType = CacheType.F16
    room: Room | None = None
    native: NativeOptions = field(default_factory=NativeOptions)


@runtime_checkable
class MovesWeights(Protocol):
    """A backend whose weights may move while it runs."""

    def move_weights(self, weights: Weights) -> None:
        """The same weights elsewhere in memory; the old arrays are not read any more when this returns."""

    @property
    def is_answering_first(self) -> bool:
        """Whether somebody waits for the first token of all, however many steps its prompt takes."""


@runtime_checkable
class OnDevice(Protocol):
    """A backend whose cache lies in the memory of a device, which has ceilings of its own."""

    @property
    def device_name(self) -> str: ...

    def write_pages(self, array: int, layer: int, pages: list[int], stored: NDArray[np.generic]) -> None:
        """Cached rows [pages, PAGE_TOKENS, columns] as cache/latent.py stores them."""

    def read_rate(self) -> float:
        """Bytes read a second, measured now."""

    def multiply_adds(self) -> dict[str, float]:
        """A second, by kind of operand ("bf16", "f32"), measured now."""


@dataclass(frozen=True)
class Machine:
    """Where and how a backend computes. progress: (bytes, bytes in all) of weights that it copies itself."""

    dtype: str
    device: str
    threads: int
    workspace_bytes: int
    progress: Callable[[int, int], None] | None = None
    native: NativeOptions = field(default_factory=NativeOptions)


@dataclass(frozen=True)
class Served:
    """What a workspace is to serve: these threads, and sequences of up to n_ctx tokens on any of these paths, fused or not."""

    threads: int
    paths: Collection[Path]
    fused: bool
    n_ctx: int


@dataclass(frozen=True)
class Candidate:
    """devices:       those that a setting may mean there, in order; the first with room for all that is wanted serves, else
                   the one with most room
    shuns:         why it does not run where nobody asked for it by name, though it could
    free_bytes:    of the memory of its own that holds weights and cache, by device that it does not refuse; raises
                   TakesNoWork. None: it uses the system's
    weight_bytes:  of a weight, by its name and the setting dtype, where the backend keeps it
    moves_weights: its backend is one of MovesWeights
    memory_types:  types that weights of a program had better have in memory where they are copied, by name
    least_workspace: bytes without which it does not run; 0: it takes scratch as it needs it
    """

    name: str
    refusals: Callable[[Needs], list[str]]  # empty: it can run
    build: Callable[[DeepseekModel, Weights, PagedCache, Machine], Backend]
    profile: Callable[[Needs], MachineProfile] = lambda needs: ARITHMETIC
    devices: Callable[[str], list[str]] = lambda device: [device]
    shuns: Callable[[Needs], list[str]] = lambda needs: []
    free_bytes: Callable[[str], int] | None = None
    weight_bytes: Callable[[str, Weight, str], int] = lambda name, weight, dtype: stored_bytes(weight)
    moves_weights: bool = False
    memory_types: Callable[[Program, Weights, Needs], Mapping[str, BlockType]] = lambda program, weights, needs: {}
    least_workspace: Callable[[DeepseekModel, Weights, CacheLayout, Needs, Served], int] = lambda *_: 0


@dataclass(frozen=True)
class Choice:
    """needs: what was chosen for, on the device that serves. profile: what the plan knows of the machine under them.
    free_bytes: those the candidate had there, by which it was chosen; None: it uses the system's memory."""

    candidate: Candidate
    needs: Needs
    profile: MachineProfile
    free_bytes: int | None
    reason: str
    refused: tuple[tuple[str, tuple[str, ...]], ...]  # (name, reasons) of those that were passed over


def _cuda_refusals(needs: Needs) -> list[str]:
    if needs.device == "cpu":
        return ["device=cpu was asked for"]
    return needs.native.refusals or gpu.refusals(needs.device)  # which may import torch: 3 s


def _cuda_profile(needs: Needs) -> MachineProfile:
    found = gpu.driver().gpus[gpu.device_index(needs.device)]
    return gpu_rates.gpu_profile(found, needs.cache_type, needs.dtype)


def _cuda_free_bytes(device: str) -> int:
    return gpu.free_bytes(device)


def _shortages(room: Room, free: Mapping[str, int], serves: _Device | None) -> Iterator[tuple[list[str], str]]:
    """Devices that lack the same, with one sentence: why their memory is too little, and what would fit the largest or which
    device has more. free: bytes of each that does not serve."""
    fits = {name: room.tokens_in(free_bytes) for name, free_bytes in free.items()}
    lack_room = [name for name in free if fits[name] < PAGE_TOKENS]
    lack_context = [name for name in free if PAGE_TOKENS <= fits[name] < room.least_tokens]
    have_less = [name for name in free if fits[name] >= max(PAGE_TOKENS, room.least_tokens)]
    if lack_room:
        yield lack_room, _lacks_room(room, [free[name] for name in lack_room])
    if lack_context:
        yield lack_context, _lacks_context(room, [free[name] for name in lack_context])
    if have_less:
        assert serves is not None and serves.free_bytes is not None
        most = min(room.wanted_tokens, room.tokens_in(serves.free_bytes))
        fit = _tokens_that_fit(room, [free[name] for name in have_less])
        yield have_less, f"of the model's own {room.wanted_tokens} tokens {fit}, {most} fit {serves.name}"


def _lacks_room(room: Room, free: list[int]) -> str:
    needed = room.weight_bytes + room.scratch_bytes + GPU_RESERVE_BYTES
    largest = max(free) - room.scratch_bytes - GPU_RESERVE_BYTES - room.bytes_per_token * PAGE_TOKENS
    would = f"a type of the model of at most {largest / 1e9:.3g} GB fits" if largest > 0 else "no model fits"
    each = " on each" if len(free) > 1 else ""
    return (
        f"weights and workspace take {needed / 1e9:.3g} GB of GPU memory and {_gigabytes(free)} are free{each}: "
        f"{would}{gpu.OR_CPU}"
    )


def _lacks_context(room: Room, free: list[int]) -> str:
    others = (f", {room.tokens_in(max(free), size)} with cache_type={name}" for name, size in room.smaller)
    return f"of n_ctx={room.least_tokens} tokens {_tokens_that_fit(room, free)}{''.join(others)}"


def _tokens_that_fit(room: Room, free: list[int]) -> str:
    tokens = _from_to(*(str(room.tokens_in(free_bytes)) for free_bytes in (min(free), max(free))))
    return f"{tokens} fit the {_gigabytes(free)} of GPU memory that are free"


def _gigabytes(free: list[int]) -> str:
    return _from_to(*(f"{free_bytes / 1e9:.3g}" for free_bytes in (min(free), max(free)))) + " GB"


def _from_to(least: str, most: str) -> str:
    return least if least == most else f"{least} to {most}"


def _cuda_build(model: DeepseekModel, weights: Weights, cache: PagedCache, machine: Machine) -> Backend:
    import torch

    from kvfold.backends.cuda import CudaBackend
    from kvfold.backends.cuda_weights import upload

    device = torch.device("cuda", gpu.device_index(machine.device))
    dtype = torch.float32 if machine.dtype == "float32" else torch.bfloat16
    try:
        with torch.cuda.device(device):
            return CudaBackend(
                model,
                upload(model, weights, device, dtype, machine.progress, rounds=machine.dtype in ("auto", "int8")),
                cache,
                device=device,
                dtype=dtype,
                workspace_bytes=machine.workspace_bytes,
            )
    except torch.cuda.OutOfMemoryError as error:
        raise SettingError(
            f"The memory of {device} is too small for this model and its cache, though {gpu.free_bytes(str(device)) / 1e9:.3g} "
            f"GB were left: use a smaller context (n_ctx), a smaller type of the model{gpu.OR_CPU}."
        ) from error


def _native_refusals(needs: Needs) -> list[str]:
    if needs.device.startswith("cuda"):
        return ["computes on the CPU"]
    from kvfold import _native

    known = _native.decodable_types().keys() | _native.side_by_side_types(needs.native.isa)
    missing = sorted(t.name for t in needs.types if t.id not in known)
    reasons = [f"no kernels for {', '.join(missing)}"] if missing else []
    if needs.dtype == "bfloat16":
        reasons.append("computes in int8 and float32 only")
    if needs.cache_type is CacheType.FP8:
        reasons.append("keeps its cache in f16, q8_0 (smaller and more exact than fp8), bf16 or f32")
    if needs.native.isa not in ("auto", *_native.isa_names()):
        reasons.append(
            f"isa={needs.native.isa}: this processor, system and build have {', '.join(_native.isa_names())}"
        )
    return reasons


def native_profile(cache_type: CacheType, isa: str = "auto", dtype: str = "int8") -> MachineProfile:
    """Of an instruction set, one of ISAS; auto: the one in use. The rates were measured in dtype int8; float32 has other
    kernels, whose rates nobody measured."""
    from kvfold import _native

    if dtype not in ("auto", "int8"):
        return ARITHMETIC
    rates = CPU_CODES if cache_type is CacheType.Q8_0 else CPU_PAIRS
    measured = rates.get(_native.isa() if isa == "auto" else isa, ARITHMETIC)
    return replace(measured, head_lanes=_native.HEAD_LANES)


def _native_build(model: DeepseekModel, weights: Weights, cache: PagedCache, machine: Machine) -> Backend:
    from kvfold import _native
    from kvfold.backends.native import NativeBackend

    if machine.native.isa != "auto":
        _native.force_isa(machine.native.isa)
    return NativeBackend(
        model,
        weights,
        cache,
        threads=machine.threads,
        workspace_bytes=machine.workspace_bytes,
        rounds_activations=machine.dtype in ("auto", "int8"),
        deterministic=machine.native.deterministic,
        check_numerics=machine.native.check_numerics,
        profile=machine.native.profile,
    )


def _native_least_workspace(
    model: DeepseekModel, weights: Weights, layout: CacheLayout, needs: Needs, served: Served
) -> int:
    from kvfold.backends.native import least_workspace_bytes

    return least_workspace_bytes(
        model,
        weights,
        layout,
        threads=served.threads,
        rounds_activations=needs.dtype in ("auto", "int8"),
        isa=needs.native.isa,
        paths=served.paths,
        fused=served.fused,
        n_ctx=served.n_ctx,
    )


def _native_memory_types(program: Program, weights: Weights, needs: Needs) -> Mapping[str, BlockType]:
    """None where bits must not depend on whether and when weights were copied, and where nothing is multiplied on blocks."""
    from kvfold.backends.native import side_by_side

    if needs.native.deterministic or needs.dtype not in ("auto", "int8"):
        return {}
    return side_by_side(program, weights, needs.native.isa)


def _plain_refusals(needs: Needs) -> list[str]:
    if needs.device.startswith("cuda"):
        return ["computes on the CPU"]
    if needs.native.asked:
        return needs.native.refusals
    if importlib.util.find_spec("torch") is None:
        return [f"torch is not installed: {install_extra('torch')}"]
    return []


def _plain_shuns(needs: Needs) -> list[str]:
    """Native's refusal names what serves better: q8_0."""
    if needs.cache_type is CacheType.FP8:
        return ["with cache_type=fp8 it runs only where backend=plain is asked for"]
    return []


def _plain_build(model: DeepseekModel, weights: Weights, cache: PagedCache, machine: Machine) -> Backend:
    import torch

    from kvfold import _native
    from kvfold.backends.plain import PlainBackend
    from kvfold.quant.attention import Numbers

    torch.set_num_threads(machine.threads)
    return PlainBackend(
        model,
        weights,
        cache,
        dtype=torch.bfloat16 if machine.dtype == "bfloat16" else torch.float32,
        rounds_activations=machine.dtype == "int8",
        attention_numbers=Numbers(_native.attention_numbers()),
        threads=machine.threads,
        workspace_bytes=machine.workspace_bytes,
    )


CANDIDATES = (
    Candidate(
        "cuda",
        _cuda_refusals,
        _cuda_build,
        _cuda_profile,
        devices=gpu.devices,
        free_bytes=_cuda_free_bytes,
        weight_bytes=gpu_weights.device_bytes,
    ),
    Candidate(
        "native",
        _native_refusals,
        _native_build,
        lambda needs: native_profile(needs.cache_type, needs.native.isa, needs.dtype),
        moves_weights=True,
        memory_types=_native_memory_types,
        least_workspace=_native_least_workspace,
    ),
    Candidate("plain", _plain_refusals, _plain_build, shuns=_plain_shuns),
)


def choose_backend(requested: str, needs: Needs) -> Choice:
    """The first candidate that can run, or the one requested.

    Raises SettingError for an unknown name or one that cannot run, MissingExtra if only torch is missing.
    """
    names = [c.name for c in CANDIDATES]
    if requested not in ("auto", *names):
        raise SettingError(f"backend={requested}: allowed are auto, {', '.join(names)}.")
    if requested == "auto" and needs.device.startswith("cuda"):
        requested = "cuda"  # the only one that computes there
    refused: list[tuple[str, tuple[str, ...]]] = []
    for candidate in CANDIDATES:
        if requested not in ("auto", candidate.name):
            continue
        looked = _look(candidate, needs, is_requested=requested != "auto")
        refused += looked.refused
        if looked.serves is not None:
            there = replace(needs, device=looked.serves.name)
            reason = "requested" if requested != "auto" else "the first that runs this model"
            profile = candidate.profile(there)
            return Choice(candidate, there, profile, looked.serves.free_bytes, reason, tuple(refused))
    sentence = "; ".join(f"{name}: {', '.join(reasons)}" for name, reasons in refused)
    error = MissingExtra if any("pip install" in r for _, reasons in refused for r in reasons) else SettingError
    raise error(f"No backend can run this model: {sentence}.")


@dataclass(frozen=True)
class _Device:
    """free_bytes: of the memory of its own that holds weights and cache; None: it uses the system's."""

    name: str
    free_bytes: int | None


@dataclass(frozen=True)
class _Looked:
    """The device of a candidate that serves, None where none does, and why those that were looked at do not."""

    serves: _Device | None
    refused: tuple[tuple[str, tuple[str, ...]], ...]


def _look(candidate: Candidate, needs: Needs, *, is_requested: bool) -> _Looked:
    """Asks the candidate's devices in turn, until one has room for all that is wanted."""
    devices, room = candidate.devices(needs.device), needs.room
    passed_over: dict[tuple[str, ...], list[str]] = {}  # devices by reasons, which are often the same
    short: dict[str, int] = {}  # of devices without room for all of it, their free bytes
    serves = None
    for name in devices:
        there = replace(needs, device=name)
        reasons = candidate.refusals(there) + ([] if is_requested else candidate.shuns(there))
        free_bytes = None
        if not reasons and candidate.free_bytes is not None:
            try:
                free_bytes = candidate.free_bytes(name)
            except gpu.TakesNoWork as error:
                reasons = [str(error)]
        if reasons:
            passed_over.setdefault(tuple(reasons), []).append(name)
        elif room is None or free_bytes is None or room.tokens_in(free_bytes) >= room.wanted_tokens:
            serves = _Device(name, free_bytes)
            break
        else:
            short[name] = free_bytes
    refused = [
        (candidate.name if where == devices else f"{candidate.name} on {gpu.in_words(where)}", why)
        for why, where in passed_over.items()
    ]
    if room is not None and short:
        most = max(short, key=lambda name: room.tokens_in(short[name]))  # the first of equals
        if serves is None and room.tokens_in(short[most]) >= room.least_tokens:
            serves = _Device(most, short.pop(most))
        for where, sentence in _shortages(room, short, serves):
            on = f" on {gpu.in_words(where)}" if len(devices) > 1 else ""
            refused.append((candidate.name + on, (sentence,)))
    return _Looked(serves, tuple(refused))


def stored_bytes(weight: Weight) -> int:
    """Of a weight as its file has it."""
    return sum(part.nbytes for part in matrices(weight))


def types_of(weights: Iterable[Weight]) -> frozenset[BlockType]:
    """Every block type a model's weights use."""
    return frozenset(part.type for weight in weights for part in matrices(weight))
