"""Where the rooms meet: opens a checkpoint, decides backend, cache and context, and builds what runs.

A library room: it never prints. Progress goes to a callback, findings to `Loaded.info`.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from kvfold.backends import gpu, gpu_weights
from kvfold.backends.choose import (
    DTYPES,
    ISAS,
    Backend,
    Choice,
    Machine,
    MovesWeights,
    NativeOptions,
    Needs,
    Room,
    Served,
    choose_backend,
    types_of,
)
from kvfold.cache.latent import PAGE_TOKENS, CacheLayout, CacheType, PagedCache, parse_cache_type
from kvfold.cache.pages import PagePool, pages_for
from kvfold.config import ModelConfig
from kvfold.errors import SettingError
from kvfold.formats.checkpoint import Checkpoint, open_checkpoint
from kvfold.formats.hub import resolve
from kvfold.formats.tensor_names import KvLayout
from kvfold.machine import available_memory_bytes, physical_cores
from kvfold.mla.plan import ARITHMETIC, Fa, MachineProfile, Mla, MlaPlan, choose, parse_fa, parse_mla, paths_of
from kvfold.mla.plan import Path as AttentionPath
from kvfold.model.deepseek import DeepseekModel
from kvfold.model.program import Program, record
from kvfold.prompt_window import (
    LEAST_WINDOW_ROWS,
    default_workspace_bytes,
    step_buffer_bytes,
    window_rows,
)
from kvfold.quant.tensor import matrices
from kvfold.quant.types import BlockType
from kvfold.weight_memory import MovingWeights, WeightCopy, copied, guarded, put_in_order, read_ahead

Progress = Callable[[int, int], None]
"""(bytes read, bytes in all)."""

MMAP = ("auto", "on", "off")
"""auto: copy the weights into memory if they fit, else leave them mapped; on: leave them mapped; off: copy, or refuse. A GPU,
which has the weights in its own memory, takes auto alone."""
# A GPU's step keeps its values in the GPU's memory, of which the cache leaves GPU_RESERVE_BYTES. V2-Lite on an H200: 8192 rows
# take 93 ms in bf16; 2048 take 36 ms in Q4_0, whose layers are replayed (backends/cuda_layers.py).
GPU_WINDOW_ROWS = 8192
# Weights of at least this size are copied while the model answers from their map, where a caller lets them be. The first
# touch of 8.9 GB alone took 3 s of CPU time, and 18 s on a virtual machine whose host had to find the memory.
EARLY_ANSWER_BYTES = 1 << 30
MOST_TOKENS = 2**31 - 1  # positions are int32
MOST_WORKSPACE_BYTES = 1 << 40
# Threads that copy the weights at least: a disk wants several reads at a time, however many threads compute.
MIN_READERS = 4


@dataclass(frozen=True)
class Settings:
    """What a user may set when loading; every value is checked by `parse`."""

    mla: Mla
    fa: Fa
    dtype: str
    cache_type: CacheType
    backend: str
    device: str
    threads: int
    n_ctx: int | None
    workspace_bytes: int
    is_workspace_given: bool
    mmap: str
    isa: str
    deterministic: bool
    check_numerics: bool
    profile: bool

    @property
    def native(self) -> NativeOptions:
        return NativeOptions(self.isa, self.deterministic, self.check_numerics, self.profile)

    @classmethod
    def parse(
        cls,
        *,
        mla: str | int = "auto",
        fa: str | int = "auto",
        dtype: str = "auto",
        cache_type: str = "auto",
        backend: str = "auto",
        device: str = "auto",
        threads: int | None = None,
        n_ctx: int | None = None,
        workspace_bytes: int | None = None,
        mmap: str = "auto",
        isa: str = "auto",
        deterministic: bool = False,
        check_numerics: bool = False,
        profile: bool = False,
    ) -> Settings:
        """Raises SettingError (PlanError) with the allowed values. cache_type "auto" is bf16 where a GPU would compute,
        f16 elsewhere; workspace_bytes None follows from the free memory (prompt_window.py), and from what the model and
        the threads need when they are known (with_workspace)."""
        if dtype not in DTYPES:
            raise SettingError(f"dtype={dtype}: allowed are {', '.join(DTYPES)}.")
        gpu.check_device(device)
        if cache_type == "auto":
            cache_type = "bf16" if backend in ("auto", "cuda") and gpu.is_wanted(device) else "f16"
        if threads is not None and not 1 <= threads <= 1024:
            raise SettingError(f"threads={threads}: allowed are 1 to 1024.")
        if n_ctx is not None and not 1 <= n_ctx <= MOST_TOKENS:
            raise SettingError(f"n_ctx={n_ctx}: allowed are 1 to {MOST_TOKENS} tokens.")
        is_workspace_given = workspace_bytes is not None
        if workspace_bytes is None:
            workspace_bytes = default_workspace_bytes(available_memory_bytes())
        if not 1 << 20 <= workspace_bytes <= MOST_WORKSPACE_BYTES:
            raise SettingError(f"workspace={workspace_bytes} bytes: allowed are 1 MiB to 1 TiB.")
        if mmap not in MMAP:
            raise SettingError(f"mmap={mmap}: allowed are {', '.join(MMAP)}.")
        if isa not in ISAS:
            raise SettingError(f"isa={isa}: allowed are {', '.join(ISAS)}.")
        return cls(
            parse_mla(mla),
            parse_fa(fa),
            dtype,
            parse_cache_type(cache_type),
            backend,
            device,
            threads or physical_cores(),
            n_ctx,
            workspace_bytes,
            is_workspace_given,
            mmap,
            isa,
            deterministic,
            check_numerics,
            profile,
        )


@dataclass(frozen=True)
class Loaded:
    """A model ready to run steps.

    info:         one line per finding a user should know
    weight_copy:  what copying the weights took; None where nothing was copied
    weight_place: where the weights lie, and why, in a few words
    window_rows:  prompt rows that one step takes, by the memory there was
    moving:       a copy under way beside the answers; None where there is none
    """

    checkpoint: Checkpoint
    model: DeepseekModel
    settings: Settings
    choice: Choice
    backend: Backend
    cache: PagedCache
    pool: PagePool
    n_ctx: int
    info: tuple[str, ...]
    weight_copy: WeightCopy | None
    weight_place: str
    window_rows: int
    moving: MovingWeights | None

    @property
    def isa(self) -> str:
        """The instruction set whose kernels run, by the name that --isa takes; empty where the backend has no choice."""
        isa: str = getattr(self.backend, "isa", "")
        return isa

    @property
    def dtype(self) -> str:
        """One of DTYPES, auto resolved."""
        if self.settings.dtype != "auto":
            return self.settings.dtype
        return "float32" if self.backend.name == "plain" else "int8"

    def plan(self, new_rows: int, cached_rows: int, is_prompt: bool) -> MlaPlan:
        return plan_for(self.model.config, self.settings, new_rows, cached_rows, is_prompt, self.choice.profile)


def plan_for(
    config: ModelConfig,
    settings: Settings,
    new_rows: int,
    cached_rows: int,
    is_prompt: bool,
    machine: MachineProfile = ARITHMETIC,
) -> MlaPlan:
    """The plan of one sequence under these settings."""
    return choose(
        config.mla,
        new_rows=new_rows,
        cached_rows=cached_rows,
        is_prompt=is_prompt,
        setting=settings.mla,
        fa=settings.fa,
        machine=machine,
        by_role=settings.deterministic,
    )


def embedded_model() -> Path:
    """The storyteller that ships with the package."""
    return Path(__file__).parent / "embedded" / "storyteller.gguf"


def cache_layout(config: ModelConfig, settings: Settings) -> CacheLayout:
    layout = _layout_of(config, settings, settings.cache_type)
    layout.check_blocks(config.mla)
    return layout


def _layout_of(config: ModelConfig, settings: Settings, cache_type: CacheType) -> CacheLayout:
    make = CacheLayout.standard if settings.mla is Mla.STANDARD else CacheLayout.latent
    return make(config, cache_type)


def _cache_sizes(config: ModelConfig, settings: Settings) -> dict[CacheType, int]:
    """Bytes per token of every cache type that this model can have."""
    layouts = [_layout_of(config, settings, cache_type) for cache_type in CacheType]
    return {layout.cache_type: layout.bytes_per_token for layout in layouts if layout.holds(config.mla)}


def default_context(config: ModelConfig, layout: CacheLayout) -> int:
    """The model's own context, or what fits a quarter of the free memory if that is less (at least one page)."""
    free = available_memory_bytes()
    if free is None:
        return config.max_position
    return max(PAGE_TOKENS, min(config.max_position, free // 4 // layout.bytes_per_token))


def needs_of(checkpoint: Checkpoint, settings: Settings) -> Needs:
    """What a model asks of a backend under these settings."""
    per_token = cache_layout(checkpoint.config, settings).bytes_per_token
    smaller = tuple(
        (other.value, size) for other, size in _cache_sizes(checkpoint.config, settings).items() if size < per_token
    )
    weights = checkpoint.tensors
    weight_bytes = sum(gpu_weights.device_bytes(name, weight, settings.dtype) for name, weight in weights.items())
    wanted, least = settings.n_ctx or checkpoint.config.max_position, settings.n_ctx or PAGE_TOKENS
    room = Room(weight_bytes, settings.workspace_bytes, per_token, wanted, least, smaller)
    types = types_of(checkpoint.tensors.values())
    return Needs(types, settings.dtype, settings.device, settings.cache_type, room, settings.native)


def backend_for(checkpoint: Checkpoint, settings: Settings) -> Choice:
    """Which backend runs a model, before anything is read. Raises SettingError and MissingExtra where none can."""
    choice = choose_backend(settings.backend, needs_of(checkpoint, settings))
    candidate = choice.candidate
    asked_for = settings.backend == candidate.name or settings.device.startswith("cuda")
    if candidate.free_bytes is not None and settings.mmap != "auto" and asked_for:
        raise SettingError(
            f"mmap={settings.mmap}: backend {candidate.name} reads the weights into the memory of the GPU once and keeps "
            f"neither a map nor a copy. Leave it out{gpu.OR_CPU}."
        )
    if candidate.free_bytes is None and settings.mmap == "on" and not checkpoint.maps:
        raise SettingError("mmap=on: these weights are in memory, there is no file to map. Leave it out.")
    return choice


def context_of(config: ModelConfig, settings: Settings, choice: Choice) -> int:
    """Tokens that the cache holds: n_ctx, or the model's own context as far as the memory of the backend allows."""
    if settings.n_ctx is not None:
        return settings.n_ctx
    if choice.free_bytes is not None and (room := choice.needs.room) is not None:
        return min(room.wanted_tokens, room.tokens_in(choice.free_bytes))
    return default_context(config, cache_layout(config, settings))


def with_workspace(checkpoint: Checkpoint, settings: Settings, choice: Choice, n_ctx: int) -> Settings:
    """The settings with a workspace in which these threads run the model over n_ctx tokens. SettingError where one that was
    asked for is too small."""
    least = choice.candidate.least_workspace(
        _network(checkpoint, settings),
        checkpoint.tensors,
        cache_layout(checkpoint.config, settings),
        choice.needs,
        Served(settings.threads, paths_of(settings.mla), settings.fa is not Fa.UNFUSED, n_ctx),
    )
    if settings.workspace_bytes >= least:
        return settings
    if settings.is_workspace_given:
        many = settings.threads > 1
        served, smaller = (f"{settings.threads} threads", ["fewer threads (-t)"]) if many else ("one thread", [])
        if settings.fa is Fa.UNFUSED:
            served += f" and the scores of {n_ctx} tokens"
            smaller += ["a smaller context (-c)", "fa=1, which stores no scores"]
        advice = f", or use {', '.join(smaller)}" if smaller else ""
        raise SettingError(
            f"workspace={settings.workspace_bytes} bytes: with {served} this model needs {least}. Raise --workspace "
            f"(workspace_bytes){advice}."
        )
    return replace(settings, workspace_bytes=least)


def opened(model: str | os.PathLike[str] | None) -> Checkpoint:
    """Opens a .gguf, a Hugging Face directory or a hub name ("org/repo"); None is the embedded model. Raises
    ModelFileError, UnsupportedModel."""
    return open_checkpoint(embedded_model() if model is None else resolve(model))


def load(
    model: str | os.PathLike[str] | Checkpoint | None,
    settings: Settings,
    *,
    progress: Progress | None = None,
    answers_early: bool = False,
) -> Loaded:
    """Takes what `opened` does, or a checkpoint that is open already.

    The weights are copied into memory where settings.mmap says so and they fit: with the cache and the workspace into
    what is available. `Loaded.checkpoint` then has the copies, and a second load of it copies nothing. answers_early:
    with mmap=auto a large copy is made meanwhile (`Loaded.moving`), the model answers from the map until it is complete.

    Raises ModelFileError, UnsupportedModel, SettingError, MissingExtra.
    """
    checkpoint = model if isinstance(model, Checkpoint) else opened(model)
    config = checkpoint.config
    choice = backend_for(checkpoint, settings)
    candidate = choice.candidate
    layout = cache_layout(config, settings)
    n_ctx = context_of(config, settings, choice)
    settings = with_workspace(checkpoint, settings, choice, n_ctx)
    notes: tuple[str, ...] = ()
    if n_ctx > config.max_position:
        notes = (f"n_ctx={n_ctx} is beyond the {config.max_position} tokens the model was made for.",)
    cache = PagedCache(layout, pages_for(n_ctx))
    network = _network(checkpoint, settings)
    program = program_of(checkpoint, settings)
    if candidate.free_bytes is not None:
        window = GPU_WINDOW_ROWS
        placed = _Placed(checkpoint, None, place_on_gpu(choice))
    else:
        window = prompt_window(program, checkpoint, settings, n_ctx, available_memory_bytes())
        buffer_bytes = step_buffer_bytes(program, _prompt_path(checkpoint, settings), window)
        other_bytes = cache.nbytes + settings.workspace_bytes + buffer_bytes
        early = answers_early and candidate.moves_weights and checkpoint.nbytes >= EARLY_ANSWER_BYTES
        memory_types = candidate.memory_types(program, checkpoint.tensors, choice.needs)
        placed = _place_weights(checkpoint, settings, memory_types, other_bytes, progress, early=early)
    checkpoint = placed.checkpoint
    machine = Machine(
        settings.dtype, choice.needs.device, settings.threads, settings.workspace_bytes, progress, settings.native
    )
    backend = candidate.build(network, checkpoint.tensors, cache, machine)
    moving = None
    if placed.is_moving:
        assert isinstance(backend, MovesWeights)
        used = {name: checkpoint.tensors[name] for name in program.weight_names}
        moving = MovingWeights(
            used,
            checkpoint.maps,
            backend.move_weights,
            lambda: backend.is_answering_first,
            _readers(settings),
            memory_types,
        )
    loaded = Loaded(
        checkpoint,
        network,
        settings,
        choice,
        backend,
        cache,
        PagePool(cache.num_pages, cache.give_back),
        n_ctx,
        checkpoint.info + placed.info + notes,
        placed.copy,
        placed.place,
        window,
        moving,
    )
    if moving is not None:
        weakref.finalize(loaded, moving.cancel)
    return loaded


def in_memory_order(checkpoint: Checkpoint, settings: Settings) -> Checkpoint:
    """Weights made in memory, in the order that the copy of a file would give them: a model of random weights is then as fast
    as one that was loaded. Their arrays are written, so the checkpoint must be the caller's own.

    Raises UnsupportedModel and SettingError as `load` does.
    """
    choice = backend_for(checkpoint, settings)
    types = choice.candidate.memory_types(program_of(checkpoint, settings), checkpoint.tensors, choice.needs)
    return replace(checkpoint, tensors=put_in_order(checkpoint.tensors, types, settings.threads))


def program_of(checkpoint: Checkpoint, settings: Settings) -> Program:
    """The model as recorded: what its steps keep between their ops."""
    widths = {name: sum(part.rows for part in matrices(tensor)) for name, tensor in checkpoint.tensors.items()}
    return record(_network(checkpoint, settings), widths)


def prompt_window(
    program: Program, checkpoint: Checkpoint, settings: Settings, n_ctx: int, free_bytes: int | None
) -> int:
    """Prompt rows of one step that memory has room for beside weights, cache and workspace."""
    if free_bytes is not None:
        weight_bytes = checkpoint.nbytes if checkpoint.maps else 0  # in memory already
        cache_bytes = n_ctx * cache_layout(checkpoint.config, settings).bytes_per_token
        free_bytes = max(0, free_bytes - weight_bytes - cache_bytes - settings.workspace_bytes)
    return window_rows(program, _prompt_path(checkpoint, settings), left_bytes=free_bytes, n_ctx=n_ctx)


def _prompt_path(checkpoint: Checkpoint, settings: Settings) -> AttentionPath:
    """Of a long prompt."""
    return plan_for(checkpoint.config, settings, LEAST_WINDOW_ROWS, 0, True).path


def _network(checkpoint: Checkpoint, settings: Settings) -> DeepseekModel:
    splits_kv_b = checkpoint.kv_layout is KvLayout.K_B_V_B
    return DeepseekModel(checkpoint.config, splits_kv_b=splits_kv_b, standard=settings.mla is Mla.STANDARD)


@dataclass(frozen=True)
class WeightPlan:
    """What becomes of the weights of a file: copied onto 2 MiB pages, or left in its map. in_words: where, and why.

    sizes: what it was decided by; empty where it was not by size
    """

    is_copy: bool
    in_words: str
    sizes: str = ""


def weight_plan(checkpoint: Checkpoint, settings: Settings, other_bytes: int, free_bytes: int | None) -> WeightPlan:
    """other_bytes: what else the model needs in the system's memory: cache, workspace, the values of a step. free_bytes: None
    where the system does not tell; a user who asks for a copy may know.

    Raises SettingError where mmap=off and there is no room.
    """
    if not checkpoint.maps:
        return WeightPlan(False, "in memory already")
    if settings.mmap == "on":
        return WeightPlan(False, "mapped: requested")
    needed = checkpoint.nbytes + other_bytes
    sizes = f"weights, cache and a step take {needed / 1e9:.3g} GB"
    if free_bytes is None and settings.mmap == "auto":
        return WeightPlan(False, "mapped: the system does not tell how much memory is available")
    if free_bytes is not None:
        sizes += f" and {free_bytes / 1e9:.3g} GB of memory are available"
        if needed > free_bytes:
            return _mapped_for_lack(settings, sizes)
    return WeightPlan(True, "copied into memory, on 2 MiB pages", sizes)


def place_on_gpu(choice: Choice) -> str:
    """Where the weights lie that a GPU has in its own memory."""
    return f"in the memory of cuda:{gpu.device_index(choice.needs.device)}"


def _mapped_for_lack(settings: Settings, sizes: str) -> WeightPlan:
    if settings.mmap == "off":
        raise SettingError(
            f"mmap=off: the weights cannot be copied into memory, {sizes}. Use mmap=auto, a smaller context "
            f"(n_ctx), or a smaller type of the model."
        )
    return WeightPlan(False, f"mapped: {sizes}", sizes)


@dataclass(frozen=True)
class _Placed:
    checkpoint: Checkpoint
    copy: WeightCopy | None
    place: str
    info: tuple[str, ...] = ()
    is_moving: bool = False  # to be copied once the backend is there


def _place_weights(
    checkpoint: Checkpoint,
    settings: Settings,
    memory_types: Mapping[str, BlockType],
    other_bytes: int,
    progress: Progress | None,
    *,
    early: bool,
) -> _Placed:
    """Copies the weights, or leaves them in their maps and has them read ahead.

    memory_types: those that weights get in a copy, by name. other_bytes: as weight_plan takes them.
    """
    free = available_memory_bytes()
    plan = weight_plan(checkpoint, settings, other_bytes, free)
    if not checkpoint.maps:
        return _Placed(checkpoint, None, plan.in_words)
    if plan.is_copy and early and settings.mmap == "auto":
        guarded(checkpoint.maps)
        return _Placed(checkpoint, None, "mapped, and copied onto 2 MiB pages meanwhile", is_moving=True)
    if plan.is_copy:
        try:
            return _copied(checkpoint, settings, memory_types, progress)
        except OSError as error:
            plan = _mapped_for_lack(settings, f"{plan.sizes}, but the system gives none: {error.strerror}")
    guarded(checkpoint.maps)
    if free is None or checkpoint.nbytes <= free:
        read_ahead(checkpoint.maps)  # more than that would push its own pages out
    info = (f"The weights stay mapped from the file: {plan.sizes}.",) if plan.sizes else ()
    return _Placed(checkpoint, None, plan.in_words, info)


def _copied(
    checkpoint: Checkpoint, settings: Settings, memory_types: Mapping[str, BlockType], progress: Progress | None
) -> _Placed:
    tensors, copy = copied(
        checkpoint.tensors,
        checkpoint.maps,
        readers=_readers(settings),
        memory_types=memory_types,
        progress=progress,
    )
    return _Placed(replace(checkpoint, tensors=tensors, maps=()), copy, copy.in_words)


def _readers(settings: Settings) -> int:
    return max(settings.threads, MIN_READERS)
