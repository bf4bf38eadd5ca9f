"""Where the rooms meet: opens a checkpoint, decides backend, cache and context, and builds what runs.

A library room: it never prints. Progress goes to a callback, findings to `Loaded.info`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from kvfold.backends.choose import DTYPES, Backend, Choice, Needs, Weights, choose_backend, types_of
from kvfold.cache.latent import PAGE_TOKENS, CacheLayout, CacheType, PagedCache, parse_cache_type
from kvfold.cache.pages import PagePool, pages_for
from kvfold.config import ModelConfig
from kvfold.errors import NotYet, SettingError
from kvfold.formats.checkpoint import Checkpoint, open_checkpoint
from kvfold.formats.hub import resolve
from kvfold.formats.tensor_names import KvLayout
from kvfold.mla.plan import Fa, Mla, MlaPlan, choose, parse_fa, parse_mla
from kvfold.model.deepseek import DeepseekModel

Progress = Callable[[int, int], None]
"""(bytes read, bytes in all)."""

DEFAULT_WORKSPACE_BYTES = 256 << 20
READ_CHUNK_BYTES = 16 << 20


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

    @classmethod
    def parse(
        cls,
        *,
        mla: str | int = "auto",
        fa: str | int = "auto",
        dtype: str = "auto",
        cache_type: str = "f16",
        backend: str = "auto",
        device: str = "auto",
        threads: int | None = None,
        n_ctx: int | None = None,
        workspace_bytes: int = DEFAULT_WORKSPACE_BYTES,
    ) -> Settings:
        """Raises SettingError (PlanError, NotYet) with the allowed values."""
        if dtype not in DTYPES:
            raise SettingError(f"dtype={dtype}: allowed are {', '.join(DTYPES)}.")
        if device.startswith("cuda") or backend == "cuda":
            raise NotYet("The cuda backend is not there yet: use device=cpu (or auto).")
        if device not in ("auto", "cpu"):
            raise SettingError(f"device={device}: allowed are auto, cpu.")
        if threads is not None and not 1 <= threads <= 1024:
            raise SettingError(f"threads={threads}: allowed are 1 to 1024.")
        if n_ctx is not None and n_ctx < 1:
            raise SettingError(f"n_ctx={n_ctx}: at least 1 token.")
        if workspace_bytes < 1 << 20:
            raise SettingError(f"workspace={workspace_bytes} bytes: at least 1 MiB.")
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
        )


@dataclass(frozen=True)
class Loaded:
    """A model ready to run steps. `info`: one line per finding a user should know."""

    checkpoint: Checkpoint
    model: DeepseekModel
    settings: Settings
    choice: Choice
    backend: Backend
    cache: PagedCache
    pool: PagePool
    n_ctx: int
    info: tuple[str, ...]

    def plan(self, new_rows: int, cached_rows: int, is_prompt: bool) -> MlaPlan:
        return plan_for(self.model.config, self.settings, new_rows, cached_rows, is_prompt)


def plan_for(config: ModelConfig, settings: Settings, new_rows: int, cached_rows: int, is_prompt: bool) -> MlaPlan:
    """The plan of one sequence under these settings."""
    return choose(
        config.mla,
        new_rows=new_rows,
        cached_rows=cached_rows,
        is_prompt=is_prompt,
        setting=settings.mla,
        fa=settings.fa,
    )


def physical_cores() -> int:
    """Cores this process may use, hyper-threads counted once where the kernel tells."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    cores = set()
    for cpu in allowed:
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        cores.add(siblings.read_text() if siblings.exists() else str(cpu))
    return max(1, len(cores))


def available_memory_bytes() -> int | None:
    """MemAvailable, or None where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def embedded_model() -> Path:
    """The storyteller that ships with the package."""
    return Path(str(files("kvfold"))) / "embedded" / "storyteller.gguf"


def cache_layout(config: ModelConfig, settings: Settings) -> CacheLayout:
    make = CacheLayout.standard if settings.mla is Mla.STANDARD else CacheLayout.latent
    return make(config, settings.cache_type)


def default_context(config: ModelConfig, layout: CacheLayout) -> int:
    """The model's own context, or what fits a quarter of the free memory if that is less (at least one page)."""
    free = available_memory_bytes()
    if free is None:
        return config.max_position
    return max(PAGE_TOKENS, min(config.max_position, free // 4 // layout.bytes_per_token))


def load(
    model: str | os.PathLike[str] | Checkpoint | None, settings: Settings, *, progress: Progress | None = None
) -> Loaded:
    """Opens a .gguf, a Hugging Face directory or a hub name ("org/repo"), or takes a checkpoint that is open already;
    None is the embedded model.

    Raises ModelFileError, UnsupportedModel, SettingError, MissingExtra.
    """
    if isinstance(model, Checkpoint):
        checkpoint = model
    else:
        checkpoint = open_checkpoint(embedded_model() if model is None else resolve(model))
    config = checkpoint.config
    choice = choose_backend(
        settings.backend, Needs(types_of(checkpoint.tensors.values()), settings.dtype, settings.device)
    )
    layout = cache_layout(config, settings)
    n_ctx = settings.n_ctx or default_context(config, layout)
    cache = PagedCache(layout, pages_for(n_ctx))
    network = DeepseekModel(
        config, splits_kv_b=checkpoint.kv_layout is KvLayout.K_B_V_B, standard=settings.mla is Mla.STANDARD
    )
    read_ahead(checkpoint.tensors, progress)
    backend = choice.candidate.build(
        network, checkpoint.tensors, cache, settings.dtype, settings.threads, settings.workspace_bytes
    )
    return Loaded(
        checkpoint,
        network,
        settings,
        choice,
        backend,
        cache,
        PagePool(cache.num_pages),
        n_ctx,
        checkpoint.info,
    )


def read_ahead(weights: Weights, progress: Progress | None) -> None:
    """Touches every page of the mapped weights once, so that the first token does not wait for the disk.

    Skipped for a model larger than the free memory: its pages would push each other out.
    """
    parts = [t.raw for w in weights.values() for t in (w if isinstance(w, tuple) else (w,))]
    total = sum(part.nbytes for part in parts)
    free = available_memory_bytes()
    if free is not None and total > free:
        return
    done = 0
    report = progress or _silent
    report(0, total)
    for part in parts:
        flat = part.reshape(-1)
        for start in range(0, flat.nbytes, READ_CHUNK_BYTES):
            chunk = flat[start : start + READ_CHUNK_BYTES]
            chunk[::4096].max(initial=0)
            done += chunk.nbytes
            report(done, total)


def _silent(done: int, total: int) -> None:
    """Progress that nobody watches."""
