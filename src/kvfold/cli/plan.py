"""`kvfold plan`: what a model will take and which path each phase of its work takes, before it is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from kvfold.cli.options import (
    Backend,
    BatchRows,
    CacheTypeOption,
    Context,
    Deterministic,
    Device,
    Dtype,
    Fa,
    Isa,
    Json,
    Mla,
    Mmap,
    ModelArgument,
    Threads,
    Workspace,
)
from kvfold.cli.terminal import human_bytes, print_json, print_table, report

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import Console

    from kvfold.explain import Phase, PlanReport


def plan(
    model: ModelArgument = None,
    ctx_size: Context = 0,
    mla: Mla = "auto",
    fa: Fa = "auto",
    cache_type: CacheTypeOption = "auto",
    dtype: Dtype = "auto",
    backend: Backend = "auto",
    device: Device = "auto",
    threads: Threads = None,
    batch_size: BatchRows = None,
    workspace: Workspace = None,
    mmap: Mmap = "auto",
    isa: Isa = "auto",
    deterministic: Deterministic = False,
    json: Json = False,
) -> None:
    """Says what a model takes and which attention path its work takes.

    Memory by part, and whether the weights are copied into it; path, cost and reason of prompts and of generation; where
    the paths cross; which backend runs. The model is not loaded. The exit code is 1 where it could not be.
    """
    from kvfold.explain import model_path, plan_report
    from kvfold.formats.checkpoint import open_checkpoint
    from kvfold.load import Settings

    settings = Settings.parse(
        mla=mla,
        fa=fa,
        dtype=dtype,
        cache_type=cache_type,
        backend=backend,
        device=device,
        threads=threads,
        n_ctx=ctx_size or None,
        workspace_bytes=workspace,
        mmap=mmap,
        isa=isa,
        deterministic=deterministic,
    )
    found = plan_report(open_checkpoint(model_path(model)), settings, batch_rows=batch_size)
    if json:
        print_json(found)
    else:
        _show(report(), found)
    if found.refusal:
        raise typer.Exit(1)


def _show(console: Console, found: PlanReport) -> None:
    config = found.config
    console.print(f"{found.path}: {config.family}, {config.num_layers} layers, context {found.n_ctx:,} tokens\n")
    print_table(console, "Memory", ("", ">", ""), _memory(found))
    if found.backend.name:
        console.print(_verdict(found))
        if found.weight_place:
            console.print(f"weights: {found.weight_place}")
        console.print()
    print_table(
        console,
        f"Attention, 10^9 multiply-adds in all layers, prompts in steps of {found.batch_rows:,} rows",
        ("phase", "path", ">cost", ">standard", ">absorbed", ">decompressed", "reason"),
        [(p.name, _path(p), _giga(p.macs), *(_giga(macs) for _, macs in p.forced), p.reason) for p in found.phases],
    )
    print_table(
        console,
        "New rows in a step from which decompressed is cheaper than absorbed",
        (">cached tokens", ">new rows"),
        [(f"{c.depth:,}", "never" if c.rows is None else f"{c.rows:,}") for c in found.crossovers],
    )
    console.print(f"by the {found.rates}\n")
    for name, reasons in found.backend.refused:
        console.print(f"backend {name} refuses: {', '.join(reasons)}")
    if found.backend.name:
        console.print(f"backend {found.backend.name}: {found.backend.reason}")
    if found.refusal:
        console.print(found.refusal, style="red")
    for line in found.info:
        console.print(f"note: {line}")


def _memory(found: PlanReport) -> Iterator[tuple[str, str, str]]:
    memory, n_ctx = found.memory, found.n_ctx
    for part in memory.weights:
        yield part.part, human_bytes(part.nbytes), ""
    if memory.cache_bytes == memory.full_cache_bytes:
        other = f"as latents: {human_bytes(memory.latent_cache_bytes)}"
    elif memory.full_cache_bytes is None:
        other = f"mla=0 has no {memory.cache_type}"
    else:
        other = f"as full K and V: {human_bytes(memory.full_cache_bytes)}"
    yield f"cache, {n_ctx:,} tokens in {memory.cache_type}", human_bytes(memory.cache_bytes), other
    yield "workspace", human_bytes(memory.workspace_bytes), ""
    rows = min(found.batch_rows, n_ctx)
    yield f"buffers of a step, {rows:,} rows", human_bytes(memory.buffer_bytes), "a smaller -b needs less"
    yield "together", human_bytes(memory.needed_bytes), ""


def _verdict(found: PlanReport) -> str:
    memory = found.memory
    if memory.free_bytes is None:
        return "This system does not tell how much memory is free."
    free = human_bytes(memory.free_bytes)
    if memory.fits:
        return f"{free} are free." if found.refusal else f"Fits: {free} are free."
    lacks = f"Does not fit: {free} are free, {human_bytes(memory.needed_bytes - memory.free_bytes)} are missing."
    if found.refusal:
        return lacks
    if memory.needed_bytes - memory.weight_bytes <= memory.free_bytes:
        return (
            f"{lacks} It runs all the same, from the disk: weights that find no room are read again at every step."
        )
    if memory.cache_bytes <= memory.free_bytes:
        return f"{lacks} Cache, workspace and buffers alone are too large: choose a smaller -b, --workspace or -c."
    return f"{lacks} The cache alone is too large: choose a smaller -c."


def _path(phase: Phase) -> str:
    names = [path.name.lower() for path, _ in phase.steps]
    counts = [f"{count} x " if len(names) > 1 else "" for _, count in phase.steps]
    return f"{', '.join(map(str.__add__, counts, names))}, {'fused' if phase.fused else 'unfused'}"


def _giga(multiply_adds: int) -> str:
    return f"{multiply_adds / 1e9:,.3g}" if multiply_adds < 1e12 else f"{multiply_adds / 1e9:,.0f}"
