"""`kvfold bench`: llama-bench's table, with ceilings and opponents measured in the same run."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from kvfold.cli.options import (
    Backend,
    CheckNumerics,
    Deterministic,
    Device,
    Dtype,
    Isa,
    Mmap,
    Model,
    Profile,
    Workspace,
    parse_count,
    parse_fa_option,
)
from kvfold.cli.terminal import ByteProgress, note, print_json, report

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvfold.bench.sweep import Variant
    from kvfold.formats.checkpoint import Checkpoint


class Format(Enum):
    MD = "md"
    JSON = "json"


T = TypeVar("T")

# Lists, as llama-bench takes them: parted by commas, and an option may be given several times.
Words = list[str] | None


def bench(
    context: typer.Context,
    path: Annotated[
        str | None,
        typer.Argument(metavar="[MODEL]", show_default=False, help="The model, if no -m says it."),
    ] = None,
    model: Model = None,
    shape: Annotated[
        str | None,
        typer.Option(
            "--shape",
            envvar="KVFOLD_SHAPE",
            show_default=False,
            help="Random weights of this shape, made in memory, instead of a MODEL: deepseek-v2-lite, deepseek-v2, "
            "deepseek-v3, kimi-k2, moonlight-16b, glm-4.7-flash or tiny.",
        ),
    ] = None,
    layers: Annotated[
        int | None,
        typer.Option(
            "--layers", envvar="KVFOLD_LAYERS", show_default="all", help="Of the shape, only so many layers."
        ),
    ] = None,
    type: Annotated[
        str, typer.Option("--type", envvar="KVFOLD_TYPE", help="Of the shape's matrices, such as q4_k or bf16.")
    ] = "iq4_nl",
    legacy_kv_b: Annotated[
        bool,
        typer.Option(
            "--legacy-kv-b",
            envvar="KVFOLD_LEGACY_KV_B",
            help="In the shape one attn_kv_b a layer, as older files have, instead of attn_k_b and attn_v_b.",
        ),
    ] = False,
    n_prompt: Annotated[
        Words,
        typer.Option(
            "--n-prompt",
            "-p",
            metavar="LIST",
            envvar="KVFOLD_N_PROMPT",
            show_default="512",
            help="Lengths of prompts; 0: none.",
        ),
    ] = None,
    n_gen: Annotated[
        Words,
        typer.Option(
            "--n-gen",
            "-n",
            metavar="LIST",
            envvar="KVFOLD_N_GEN",
            show_default="128",
            help="Numbers of tokens to generate; 0: none.",
        ),
    ] = None,
    n_depth: Annotated[
        Words,
        typer.Option(
            "--n-depth",
            "-d",
            metavar="LIST",
            envvar="KVFOLD_N_DEPTH",
            show_default="0",
            help="Tokens that are cached before; their rows are random numbers, and no time is taken for them.",
        ),
    ] = None,
    repetitions: Annotated[
        int, typer.Option("--repetitions", "-r", min=1, envvar="KVFOLD_REPETITIONS", help="Samples of every test.")
    ] = 5,
    threads: Annotated[
        Words,
        typer.Option(
            "--threads",
            "-t",
            metavar="LIST",
            envvar="KVFOLD_THREADS",
            show_default="the physical cores",
            help="Threads that compute.",
        ),
    ] = None,
    batch_size: Annotated[
        Words,
        typer.Option(
            "--batch-size",
            "-b",
            metavar="LIST",
            envvar="KVFOLD_BATCH_SIZE",
            show_default="what memory allows",
            help="Prompt rows in one step.",
        ),
    ] = None,
    cache_type: Annotated[
        Words,
        typer.Option(
            "--cache-type",
            "-ctk",
            "--cache-type-k",
            metavar="LIST",
            envvar="KVFOLD_CACHE_TYPE",
            show_default="f16, on a GPU bf16",
            help="Number format of the cached rows.",
        ),
    ] = None,
    mla: Annotated[
        Words,
        typer.Option(
            "--mla",
            "-mla",
            metavar="LIST",
            envvar="KVFOLD_MLA",
            show_default="auto",
            help="Attention path: auto, 0, 1, 2 or 3, as in `kvfold run`.",
        ),
    ] = None,
    fa: Annotated[
        Words,
        typer.Option(
            "--fa",
            "-fa",
            "--flash-attn",
            metavar="LIST",
            envvar="KVFOLD_FA",
            show_default="auto",
            help="Fused attention: auto, 0 or 1.",
        ),
    ] = None,
    dtype: Dtype = "auto",
    backend: Backend = "auto",
    device: Device = "auto",
    workspace: Workspace = None,
    mmap: Mmap = "auto",
    isa: Isa = "auto",
    deterministic: Deterministic = False,
    check_numerics: CheckNumerics = False,
    profile: Profile = False,
    opponents: Annotated[
        str | None,
        typer.Option(
            "--opponent",
            metavar="COMMAND",
            envvar="KVFOLD_OPPONENT",
            show_default=False,
            help="Another llama-bench to run in turn with ours: 'llama-bench -m FILE -p 512 -n 128 -r 1 -o json'. At each "
            "row that it prints it is stopped until ours has run the same; at its end it is started again, unless -p "
            "512,512,512 serves three samples at once. No shell reads it: variables go in front, as `env NAME=VALUE`. "
            "A semicolon parts several, and the ratio is to the fastest of each round.",
        ),
    ] = None,
    output: Annotated[
        Format,
        typer.Option("--output", "-o", envvar="KVFOLD_OUTPUT", help="A table, or a JSON list and nothing else."),
    ] = Format.MD,
    seed: Annotated[
        int, typer.Option("--seed", "-s", min=0, envvar="KVFOLD_SEED", help="Of weights, tokens and cached rows.")
    ] = 0,
) -> None:
    """Measures prompts and generation as llama-bench does.

    Rows, lists (512,2048 or 64-256+64 or 1-8*2) and JSON fields are llama-bench's, but what is listed twice is one row.
    What the machine can do at most is measured beside every sample, and the share reached is printed; so is the ratio to an
    opponent run in turn. A sample during which the disk was read does not count and is taken again.
    """
    from kvfold.bench.opponent import Opponent
    from kvfold.bench.report import markdown, row
    from kvfold.bench.sweep import cases_of, parse_counts, sweep, variants
    from kvfold.load import in_memory_order

    def counts(words: Words, default: int) -> list[int]:
        return [count for word in words for count in parse_counts(word)] if words else [default]

    def items(words: Words, default: str) -> list[str]:
        return [item for word in words or [default] for item in word.split(",")]

    def parsed(parse: Callable[[str], T], option: str, words: list[str]) -> list[T]:
        try:
            return [parse(word) for word in words]
        except typer.BadParameter as error:
            raise typer.BadParameter(error.message, param_hint=repr(option)) from None

    cases = cases_of(counts(n_prompt, 512), counts(n_gen, 128), counts(n_depth, 0))
    chosen = variants(
        cases,
        mla=items(mla, "auto"),
        fa=parsed(parse_fa_option, "--fa", items(fa, "auto")),
        cache_type=items(cache_type, "auto"),
        threads=list(counts(threads, 0)) if threads else [None],
        batch_rows=parsed(parse_count, "--batch-size", items(batch_size, "")) if batch_size else [None],
        dtype=dtype,
        backend=backend,
        device=device,
        workspace_bytes=workspace,
        mmap=mmap,
        isa=isa,
        deterministic=deterministic,
        check_numerics=check_numerics,
        profile=profile,
    )
    against = () if opponents is None else Opponent.parse_all(opponents)
    written = {name for name in context.params if _is_from_command_line(context, name)}
    if written >= {"path", "model"}:
        raise typer.BadParameter(f"{path} and -m {model}: one model is measured.")
    model = model if path is None else path
    if shape is not None and model is not None:
        has_model = bool(written & {"path", "model"})
        if has_model and "shape" in written:
            raise typer.BadParameter(f"{model} and --shape {shape}: one of them is measured.")
        model, shape = (model, None) if has_model else (None, shape)
    if shape is None and (of_shape := written & {"layers", "type", "legacy_kv_b"}):
        flags = ", ".join(sorted(f"--{name.replace('_', '-')}" for name in of_shape))
        raise typer.BadParameter(f"{flags}: of a --shape, and a model is what its file says.")
    if shape is None:
        checkpoint = _open(model)
    else:
        checkpoint = in_memory_order(_make(shape, layers, type, legacy_kv_b, seed, chosen), chosen[0].settings)
    results = sweep(checkpoint, chosen, cases, repetitions=repetitions, opponents=against, seed=seed, notice=note)
    rows = []
    try:
        for result in results:
            rows.append(row(result))
    finally:  # whatever ends it early: hours may have been measured
        if rows and output is Format.JSON:
            print_json(rows)
        elif rows:
            console = report()
            for line in markdown(rows):
                console.print(line)


def _is_from_command_line(context: typer.Context, name: str) -> bool:
    return getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"


def _open(model: str | None) -> Checkpoint:
    from kvfold.explain import model_path
    from kvfold.formats.checkpoint import open_checkpoint

    return open_checkpoint(model_path(model))


def _make(
    shape: str, layers: int | None, type: str, legacy_kv_b: bool, seed: int, variants: list[Variant]
) -> Checkpoint:
    from kvfold.bench.sweep import made_in_memory

    with ByteProgress("making") as progress:
        return made_in_memory(
            shape,
            layers=layers,
            type=type,
            legacy_kv_b=legacy_kv_b,
            seed=seed,
            variants=variants,
            progress=progress,
        )
