"""What `kvfold inspect` and `kvfold plan` say, as data: computed here, shown by cli/. Reads headers, never weights."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from kvfold.backends.choose import GPU_WORKSPACES, Choice, Needs, choose_backend, stored_bytes, types_of
from kvfold.cache.latent import CacheLayout, CacheType
from kvfold.config import MlaConfig, ModelConfig
from kvfold.errors import KvfoldError, SettingError
from kvfold.formats.checkpoint import Checkpoint, open_checkpoint, open_stored
from kvfold.formats.gguf import GgufFile, GgufTensor, StringArray
from kvfold.formats.hub import resolve
from kvfold.formats.safetensors import HfTensor
from kvfold.load import (
    GPU_WINDOW_ROWS,
    Settings,
    backend_for,
    cache_layout,
    context_of,
    default_context,
    embedded_model,
    place_on_gpu,
    plan_for,
    program_of,
    prompt_window,
    weight_plan,
    with_workspace,
)
from kvfold.machine import available_memory_bytes
from kvfold.mla.plan import ARITHMETIC, MachineProfile, MlaPlan, crossover_rows, multiply_adds
from kvfold.mla.plan import Path as AttentionPath
from kvfold.model.program import Program
from kvfold.prompt_window import step_buffer_bytes
from kvfold.quant.tensor import Weight
from kvfold.quant.types import BlockType

LISTED_ITEMS = 8  # of a metadata array; longer ones are described
PROMPT_ROWS = 512  # the prompt that phases are compared with, as llama-bench's pp512
CROSSOVER_DEPTHS = (0, 256, 1024, 4096, 16384, 65536)  # cached tokens


def model_path(model: str | None) -> Path:
    """The file or directory of what a user calls a model; None is the embedded one. Raises as formats/hub.py does."""
    return embedded_model() if model is None else resolve(model)


# --- inspect ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StoredTensor:
    """One tensor as the file names it; shape with the contiguous dimension last."""

    name: str
    type: str
    shape: tuple[int, ...]
    nbytes: int
    file: str
    offset: int


@dataclass(frozen=True)
class TypeUse:
    """How much of a file is in one tensor type."""

    type: str
    decodes: bool
    num_tensors: int
    nbytes: int


@dataclass(frozen=True)
class CacheCost:
    """Bytes a token takes in the cache, all layers together; None where it cannot be in this type.

    full_bytes: of per-head keys and values, which mla=0 caches
    """

    cache_type: str
    latent_bytes: int | None
    full_bytes: int | None


@dataclass(frozen=True)
class Inspection:
    """What a file is. Where it is refused, everything up to the refusal is filled in.

    format:  "GGUF" or "safetensors", empty where the file is neither
    refusal: the sentence that says why it does not load; empty if it does
    backend: what would run it, and why
    """

    path: str
    format: str
    files: tuple[str, ...]
    metadata: Mapping[str, object]
    tensors: tuple[StoredTensor, ...]
    types: tuple[TypeUse, ...]
    config: ModelConfig | None
    kv_layout: str
    cache: tuple[CacheCost, ...]
    info: tuple[str, ...]
    backend: str
    refusal: str

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(use.nbytes for use in self.types)


def inspect_file(path: Path) -> Inspection:
    """Everything a header says, and whether kvfold runs it. Raises nothing of ours: a refusal is part of the result."""
    refusal, checkpoint = "", None
    try:
        checkpoint = open_checkpoint(path)
    except KvfoldError as error:
        refusal = str(error)
    try:
        stored = _stored(path)
    except KvfoldError as error:
        stored = _Stored("", (), {}, (), ())
        refusal = refusal or str(error)
    config = checkpoint.config if checkpoint else None
    backend = ""
    if checkpoint:
        try:
            choice = choose_backend("auto", Needs(types_of(checkpoint.tensors.values()), "auto", "auto"))
            backend = f"{choice.candidate.name}: {choice.reason}"
        except KvfoldError as error:
            refusal = str(error)
    return Inspection(
        path=str(path),
        format=stored.format,
        files=tuple(file.name for file in stored.files),
        metadata=stored.metadata,
        tensors=stored.tensors,
        types=stored.types,
        config=config,
        kv_layout=checkpoint.kv_layout.value if checkpoint else "",
        cache=tuple(cache_costs(config)) if config else (),
        info=checkpoint.info if checkpoint else (),
        backend=backend,
        refusal=refusal,
    )


def cache_costs(config: ModelConfig) -> Iterable[CacheCost]:
    """Latent against full cache in every number format."""
    for cache_type in CacheType:
        latent = CacheLayout.latent(config, cache_type)
        held = latent.bytes_per_token if latent.holds(config.mla) else None
        yield CacheCost(cache_type.value, held, _full_bytes_per_token(config, cache_type))


def _full_bytes_per_token(config: ModelConfig, cache_type: CacheType) -> int | None:
    full = CacheLayout.standard(config, cache_type)
    return full.bytes_per_token if full.holds(config.mla) else None


@dataclass(frozen=True)
class _Stored:
    """A file's own view of itself, before anyone asks whether it is a model."""

    format: str
    files: tuple[Path, ...]
    metadata: Mapping[str, object]
    tensors: tuple[StoredTensor, ...]
    types: tuple[TypeUse, ...]


def _stored(path: Path) -> _Stored:
    stored = open_stored(path)
    tensors, types = _tensors(stored.tensors.values())
    if isinstance(stored, GgufFile):
        metadata = {key: _shown(value) for key, value in stored.metadata.items()}
        return _Stored("GGUF", stored.files, metadata, tensors, types)
    return _Stored("safetensors", stored.files, dict(stored.config), tensors, types)


def _tensors(
    tensors: Iterable[GgufTensor | HfTensor],
) -> tuple[tuple[StoredTensor, ...], tuple[TypeUse, ...]]:
    listed = []
    counts: Counter[BlockType] = Counter()
    sizes: Counter[BlockType] = Counter()
    for tensor in tensors:
        scale = tensor.scale if isinstance(tensor, HfTensor) else None
        nbytes = tensor.raw.nbytes + (0 if scale is None else scale.nbytes)
        listed.append(
            StoredTensor(tensor.name, tensor.type.name, tensor.shape, nbytes, tensor.file.name, tensor.offset)
        )
        counts[tensor.type] += 1
        sizes[tensor.type] += nbytes
    uses = (TypeUse(type.name, type.decodes, counts[type], nbytes) for type, nbytes in sizes.most_common())
    return tuple(listed), tuple(uses)


def _shown(value: object) -> object:
    """A metadata value as JSON can hold it; long arrays are described."""
    if isinstance(value, StringArray):
        return value[:] if len(value) <= LISTED_ITEMS else f"array of {len(value)} strings"
    if isinstance(value, np.ndarray):
        return value.tolist() if value.size <= LISTED_ITEMS else f"array of {value.size} {value.dtype.name}"
    return value


# --- plan ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MemoryPart:
    part: str
    nbytes: int


@dataclass(frozen=True)
class Memory:
    """What a loaded model takes, and whether that is there.

    latent_cache, full_cache: bytes of n_ctx tokens as latents, and as per-head keys and values (mla=0; None where it
                  cannot use this cache type)
    weights:      by part, where the backend keeps them: a GPU has some in another form than the file
    cache_bytes:  of the cache these settings choose
    buffer_bytes: values between the ops of the largest step, as backend native keeps them: one sequence, one output row
    free_bytes:   memory available now where the backend keeps the model; None where the system does not tell, and where no
                  backend can run the model
    """

    weights: tuple[MemoryPart, ...]
    cache_type: str
    latent_cache_bytes: int
    full_cache_bytes: int | None
    cache_bytes: int
    workspace_bytes: int
    buffer_bytes: int
    free_bytes: int | None

    @property
    def weight_bytes(self) -> int:
        return sum(part.nbytes for part in self.weights)

    @property
    def needed_bytes(self) -> int:
        return self.weight_bytes + self.cache_bytes + self.workspace_bytes + self.buffer_bytes

    @property
    def fits(self) -> bool | None:
        return None if self.free_bytes is None else self.needed_bytes <= self.free_bytes


@dataclass(frozen=True)
class Phase:
    """One kind of work under the plan. Multiply-adds are attention and up-projections, all layers, all steps.

    steps:  (path, number of steps that take it); a long prompt is run in steps of batch_rows
    fused:  online softmax
    macs:   of the paths taken
    forced: of each path, taken in every step
    reason: the plan's, for the last step
    """

    name: str
    new_rows: int
    cached_rows: int
    steps: tuple[tuple[AttentionPath, int], ...]
    fused: bool
    macs: int
    forced: tuple[tuple[AttentionPath, int], ...]
    reason: str


@dataclass(frozen=True)
class Crossover:
    """From `rows` new rows on, decompressed is the cheaper path over `depth` cached ones; None: never below 2^20."""

    depth: int
    rows: int | None


@dataclass(frozen=True)
class BackendReport:
    """name is empty where no backend can run the model; `reason` then says why."""

    name: str
    reason: str
    refused: tuple[tuple[str, tuple[str, ...]], ...]


@dataclass(frozen=True)
class PlanReport:
    """rates:        what paths were chosen by, in words
    weight_place: where the weights will lie, and why, in a few words; empty where the model does not load
    refusal:      the sentence that says why it does not load; empty if it does
    """

    path: str
    config: ModelConfig
    n_ctx: int
    batch_rows: int
    memory: Memory
    phases: tuple[Phase, ...]
    crossovers: tuple[Crossover, ...]
    rates: str
    backend: BackendReport
    weight_place: str
    refusal: str
    info: tuple[str, ...]


def plan_report(checkpoint: Checkpoint, settings: Settings, *, batch_rows: int | None) -> PlanReport:
    """Memory, backend and attention of a model under these settings, without loading it. batch_rows: prompt rows in a
    step; None: what memory allows."""
    config = checkpoint.config
    choice, backend = _backend(checkpoint, settings)
    candidate = None if choice is None else choice.candidate
    machine = ARITHMETIC if choice is None else choice.profile
    own_memory = None if candidate is None else candidate.free_bytes
    free_bytes: int | None
    if choice is None:
        free_bytes = None
        n_ctx = settings.n_ctx or default_context(config, cache_layout(config, settings))
    else:
        free_bytes = available_memory_bytes() if own_memory is None else choice.free_bytes
        n_ctx = context_of(config, settings, choice)
    too_small = ""
    if choice is not None:
        try:
            settings = with_workspace(checkpoint, settings, choice, n_ctx)
        except SettingError as error:
            too_small = str(error)
    program = program_of(checkpoint, settings)
    if batch_rows is None and own_memory is not None:
        batch_rows = GPU_WINDOW_ROWS
    elif batch_rows is None:
        batch_rows = prompt_window(program, checkpoint, settings, n_ctx, available_memory_bytes())
    memory = memory_of(
        program,
        checkpoint,
        settings,
        n_ctx,
        batch_rows,
        free_bytes,
        machine,
        workspaces=1 if own_memory is None else GPU_WORKSPACES,
        weight_bytes=None if candidate is None else candidate.weight_bytes,
    )
    weight_place, refusal = _weight_place(checkpoint, settings, choice, memory)
    prompt = min(PROMPT_ROWS, n_ctx)
    half = n_ctx // 2
    kinds = (
        (f"prompt of {prompt:,}", prompt, 0, True),
        (f"prompt of {min(prompt, n_ctx - half):,} at {half:,}", min(prompt, n_ctx - half), half, True),
        (f"prompt of {n_ctx:,}", n_ctx, 0, True),
        (f"generation at {n_ctx - 1:,}", 1, n_ctx - 1, False),
    )
    return PlanReport(
        path=str(checkpoint.path),
        config=config,
        n_ctx=n_ctx,
        batch_rows=batch_rows,
        memory=memory,
        phases=tuple(
            phase(name, config, settings, new, cached, is_prompt=is_prompt, batch_rows=batch_rows, machine=machine)
            for name, new, cached, is_prompt in kinds
        ),
        crossovers=tuple(
            Crossover(depth, crossover_rows(config.mla, depth, machine))
            for depth in CROSSOVER_DEPTHS
            if depth < n_ctx
        ),
        rates=machine.in_words,
        backend=backend,
        weight_place="" if too_small else weight_place,
        refusal=too_small or refusal or ("" if backend.name else backend.reason),
        info=checkpoint.info,
    )


def memory_of(
    program: Program,
    checkpoint: Checkpoint,
    settings: Settings,
    n_ctx: int,
    batch_rows: int,
    free_bytes: int | None,
    machine: MachineProfile,
    *,
    workspaces: int = 1,
    weight_bytes: Callable[[str, Weight, str], int] | None = None,
) -> Memory:
    """workspaces: as many as the backend may hold at once. weight_bytes: a candidate's; None: as the file has them."""
    config = checkpoint.config
    sizes = dict.fromkeys(_GROUPS, 0)
    for name, tensor in checkpoint.tensors.items():
        held = stored_bytes(tensor) if weight_bytes is None else weight_bytes(name, tensor, settings.dtype)
        sizes[weight_group(name)] += held
    full = _full_bytes_per_token(config, settings.cache_type)
    return Memory(
        weights=tuple(MemoryPart(part, nbytes) for part, nbytes in sizes.items() if nbytes),
        cache_type=settings.cache_type.value,
        latent_cache_bytes=n_ctx * CacheLayout.latent(config, settings.cache_type).bytes_per_token,
        full_cache_bytes=None if full is None else n_ctx * full,
        cache_bytes=n_ctx * cache_layout(config, settings).bytes_per_token,
        workspace_bytes=workspaces * settings.workspace_bytes,
        buffer_bytes=_buffer_bytes(program, config, settings, n_ctx, batch_rows, machine),
        free_bytes=free_bytes,
    )


def _buffer_bytes(
    program: Program, config: ModelConfig, settings: Settings, n_ctx: int, batch_rows: int, machine: MachineProfile
) -> int:
    """The largest step of a prompt that fills the context."""
    runs = _runs(partial(plan_for, config, settings, is_prompt=True, machine=machine), n_ctx, 0, batch_rows)
    return max(step_buffer_bytes(program, run.plan.path, run.rows) for run in runs)


_GROUPS = (
    "embedding and head",
    "attention",
    "dense layers",
    "routed experts",
    "shared experts",
    "norms and routers",
)


def weight_group(name: str) -> str:
    """The part of the model that a tensor belongs to, by its canonical name."""
    stem = name.split(".")[-2]
    if stem in ("token_embd", "output"):
        return "embedding and head"
    if stem.endswith("norm") or stem in ("ffn_gate_inp", "exp_probs_b"):
        return "norms and routers"
    if stem.startswith("attn_"):
        return "attention"
    if stem.endswith("_exps"):
        return "routed experts"
    return "shared experts" if stem.endswith("_shexp") else "dense layers"


def phase(
    name: str,
    config: ModelConfig,
    settings: Settings,
    new_rows: int,
    cached_rows: int,
    *,
    is_prompt: bool,
    batch_rows: int,
    machine: MachineProfile,
) -> Phase:
    """What the plan does with `new_rows` rows of one sequence over `cached_rows` cached ones."""
    plan = partial(plan_for, config, settings, is_prompt=is_prompt, machine=machine)
    runs = list(_runs(plan, new_rows, cached_rows, batch_rows))
    steps: Counter[AttentionPath] = Counter()
    for run in runs:
        steps[run.plan.path] += run.count
    return Phase(
        name=name,
        new_rows=new_rows,
        cached_rows=cached_rows,
        steps=tuple(steps.items()),
        fused=runs[-1].plan.fused,
        macs=config.num_layers * sum(run.multiply_adds(run.plan.path, config.mla) for run in runs),
        forced=tuple(
            (path, config.num_layers * sum(run.multiply_adds(path, config.mla) for run in runs))
            for path in AttentionPath
        ),
        reason=runs[-1].plan.reason,
    )


@dataclass(frozen=True)
class _Run:
    """`count` steps of `rows` new rows each, one behind the other, that take one path; the first of them over
    `cached_rows`. plan: of the last."""

    count: int
    rows: int
    cached_rows: int
    plan: MlaPlan

    def multiply_adds(self, path: AttentionPath, mla: MlaConfig) -> int:
        """Of one layer. A step's grow by the same number from each to the next, so they sum as count times the mean of the
        first and the last."""
        last = self.cached_rows + (self.count - 1) * self.rows
        ends = (multiply_adds(path, mla, self.rows, cached) for cached in (self.cached_rows, last))
        return self.count * sum(ends) // 2


def _runs(plan: Callable[[int, int], MlaPlan], new_rows: int, cached_rows: int, batch_rows: int) -> Iterator[_Run]:
    """The steps of a prompt in a few runs, however many they are: 400,000,000 tokens are 800,000 steps of 512 rows.

    plan: of a step, by its new and cached rows. Steps of as many rows change their path at most once, since the seconds of either path grow in a line with the cached
    rows (mla/plan.py). So the change is found by bisection.
    """

    def runs(rows: int, cached: range) -> Iterator[_Run]:
        first = plan(rows, cached[0]).path
        change = bisect_left(cached, True, key=lambda depth: plan(rows, depth).path is not first)
        for part in filter(None, (cached[:change], cached[change:])):
            yield _Run(len(part), rows, part[0], plan(rows, part[-1]))

    rest = new_rows % batch_rows
    end = cached_rows + new_rows
    if whole := range(cached_rows, end - rest, batch_rows):
        yield from runs(batch_rows, whole)
    if rest:
        yield from runs(rest, range(end - rest, end, rest))


def _weight_place(
    checkpoint: Checkpoint, settings: Settings, choice: Choice | None, memory: Memory
) -> tuple[str, str]:
    """(where, refusal), one of them empty; both where no backend runs the model."""
    if choice is None:
        return "", ""
    if choice.candidate.free_bytes is not None:
        return place_on_gpu(choice), ""
    try:
        plan = weight_plan(checkpoint, settings, memory.needed_bytes - memory.weight_bytes, memory.free_bytes)
    except SettingError as error:
        return "", str(error)
    return plan.in_words, ""


def _backend(checkpoint: Checkpoint, settings: Settings) -> tuple[Choice | None, BackendReport]:
    try:
        choice = backend_for(checkpoint, settings)
    except KvfoldError as error:
        return None, BackendReport("", str(error), ())
    return choice, BackendReport(choice.candidate.name, choice.reason, choice.refused)
