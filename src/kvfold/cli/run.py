"""`kvfold run`: one prompt in, its continuation out. stdout carries the answer alone."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvfold.cli.options import (
    Backend,
    BatchRows,
    CacheTypeOption,
    CheckNumerics,
    Context,
    Deterministic,
    Device,
    Dtype,
    Fa,
    FrequencyPenalty,
    IgnoreEos,
    Isa,
    Json,
    MinP,
    Mirostat,
    MirostatEta,
    MirostatTau,
    Mla,
    Mmap,
    Model,
    NewTokens,
    PenaltyLastN,
    PresencePenalty,
    Profile,
    RepetitionPenalty,
    Seed,
    Stop,
    Temperature,
    Threads,
    TopK,
    TopP,
    TypicalP,
    Verbose,
    Workspace,
)
from kvfold.cli.terminal import ByteProgress, TokenProgress, human_bytes, note, plain, print_json, show_prompt
from kvfold.errors import SettingError

if TYPE_CHECKING:
    from kvfold.explain import Phase
    from kvfold.llm import LLM, Stats, Stream

DEFAULT_NEW_TOKENS = 256
MODEL_SUFFIXES = (".gguf", ".safetensors", ".bin", ".pt")


def run(
    context: typer.Context,
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL] PROMPT",
            show_default=False,
            help="The prompt, after the model if both are given. - or nothing: the prompt is read from stdin, "
            "without its last line break.",
        ),
    ] = None,
    model: Model = None,
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", "-p", envvar="KVFOLD_PROMPT", help="The prompt.", show_default=False),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            "--file",
            "-f",
            metavar="FILE",
            envvar="KVFOLD_FILE",
            show_default=False,
            help="A text file with the prompt, its last line break left out.",
        ),
    ] = None,
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
    check_numerics: CheckNumerics = False,
    profile: Profile = False,
    new_tokens: NewTokens = DEFAULT_NEW_TOKENS,
    temperature: Temperature = 0.8,
    top_k: TopK = 40,
    top_p: TopP = 0.95,
    min_p: MinP = 0.05,
    typical_p: TypicalP = 1.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    frequency_penalty: FrequencyPenalty = 0.0,
    presence_penalty: PresencePenalty = 0.0,
    penalty_last_n: PenaltyLastN = 64,
    mirostat: Mirostat = 0,
    mirostat_tau: MirostatTau = 5.0,
    mirostat_eta: MirostatEta = 0.1,
    seed: Seed = None,
    stop: Stop = None,
    ignore_eos: IgnoreEos = False,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Continues a prompt.

    The answer goes to stdout, everything else to stderr. Without a model the one that ships with kvfold answers.
    """
    flags = [name for name in ("model", "prompt", "file") if _is_written(context, name)]
    if "prompt" not in flags and (words or "file" in flags):
        prompt = None  # what is written goes before KVFOLD_PROMPT
    if "file" not in flags and (words or "prompt" in flags):
        file = None
    if prompt is not None and file is not None:
        raise typer.BadParameter("the prompt is given twice, as a text (-p) and as a file (-f).")
    model, text = _model_and_prompt(words or [], model, prompt if file is None else str(file), "model" in flags)
    from_stdin = text is None
    if file is not None:
        text = _read_file(file)
    elif text is None:
        text = _as_prompt(sys.stdin.buffer.read(), "stdin")

    from kvfold.engine.sampler import Sampler, SamplingParams
    from kvfold.llm import LLM

    params = SamplingParams(
        max_tokens=1 if new_tokens == -1 else new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        typical_p=typical_p,
        repetition_penalty=repetition_penalty,
        frequency_penalty=frequency_penalty,
        presence_penalty=presence_penalty,
        penalty_last_n=penalty_last_n,
        mirostat=mirostat,
        mirostat_tau=mirostat_tau,
        mirostat_eta=mirostat_eta,
        seed=seed,
        stop=tuple(stop or ()),
        ignore_eos=ignore_eos,
    )
    with ByteProgress("reading") as progress:
        llm = LLM(
            model,
            mla=mla,
            fa=fa,
            dtype=dtype,
            cache_type=cache_type,
            backend=backend,
            device=device,
            threads=threads,
            n_ctx=ctx_size or None,
            batch_rows=batch_size,
            workspace_bytes=workspace,
            mmap=mmap,
            isa=isa,
            deterministic=deterministic,
            check_numerics=check_numerics,
            profile=profile,
            progress=progress,
        )
    sampler = Sampler(params, llm.vocab_size, llm.tokenizer.eos_ids)
    limit = llm.loaded.n_ctx if new_tokens == -1 else new_tokens
    params = replace(params, seed=sampler.seed, max_tokens=limit)
    for line in llm.loaded.info:
        note(f"note: {line}")
    if verbose:
        show_choices(llm, progress.seconds)
        note(f"sampler: {sampler.order}")

    with TokenProgress("prompt") as prompt_progress:
        stream = llm.stream(text, params, progress=prompt_progress)
        if not from_stdin and not json:
            show_prompt(text)
        was_interrupted = _write(stream, to_stdout=not json)
    phases = _phases(llm, stream.stats)
    if json:
        _print_json(llm, stream, phases, sampler.seed, profile)
    if verbose:
        for phase in phases.values():
            names = ", ".join(path.name.lower() for path, _ in phase.steps)
            note(f"{phase.name}: {names}, {'fused' if phase.fused else 'unfused'}; {phase.reason}")
        if llm.loaded.moving is not None:
            note(f"weights: {llm.loaded.moving.place}")
    note(closing_line(stream.stats))
    if profile and not json:
        show_profile(llm)
    if was_interrupted:
        raise typer.Exit(130)


def _is_written(context: typer.Context, name: str) -> bool:
    """Whether an option stands on the command line, not in the environment."""
    return getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"


def _model_and_prompt(
    words: list[str], model: str | None, prompt: str | None, model_is_flag: bool
) -> tuple[str | None, str | None]:
    """(model, prompt), the prompt None where it comes from stdin. A MODEL beside the prompt goes before
    KVFOLD_MODEL, not beside -m."""
    most = 1 if prompt is not None else 2
    most -= model_is_flag
    if len(words) > most:
        raise typer.BadParameter(
            f"{len(words)} arguments, at most {most} expected here: kvfold run [MODEL] PROMPT. Quote a prompt of "
            f"several words."
        )
    if prompt is not None:
        return (words[0] if words else model), _unless_dash(prompt)
    if len(words) == 2:
        return words[0], _unless_dash(words[1])
    if not words:
        if sys.stdin.isatty():
            raise typer.BadParameter('the prompt is missing: kvfold run "Once upon a time"')
        return model, None
    if model is None and os.path.exists(words[0]):
        raise typer.BadParameter(
            f"{words[0]} is a file or directory, and there is no prompt: kvfold run {words[0]} PROMPT, or - for a "
            f"prompt from stdin. A prompt that is really spelled so goes after -p."
        )
    if model is None and _names_a_file(words[0]):
        raise typer.BadParameter(
            f"{words[0]}: there is no such file or directory, and there is no prompt: kvfold run MODEL PROMPT, or - for "
            f"a prompt from stdin. A prompt that is really spelled so goes after -p."
        )
    return model, _unless_dash(words[0])


def _names_a_file(word: str) -> bool:
    """Whether a model is meant, or a hub name: nobody wants the story that continues "modle.gguf"."""
    return word.endswith(MODEL_SUFFIXES) or ("/" in word and not any(map(str.isspace, word)))


def _unless_dash(prompt: str) -> str | None:
    return None if prompt == "-" else prompt


def _read_file(file: Path) -> str:
    try:
        return _as_prompt(file.read_bytes(), str(file))
    except OSError as error:
        raise SettingError(f"{file}: the prompt cannot be read: {error.strerror}.") from error


def _as_prompt(raw: bytes, source: str) -> str:
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise SettingError(f"{source}: byte {error.start} is not UTF-8 ({error.reason}).") from error
    text = text.removesuffix("\n").removesuffix("\r")
    if not text:
        raise SettingError(f"{source}: the prompt is empty.")
    return text


def _write(stream: Stream, *, to_stdout: bool) -> bool:
    """Runs the stream to its end, or to Ctrl-C: then True, and the stream is cancelled."""
    was_interrupted = False
    try:
        for piece in stream:
            if to_stdout:
                sys.stdout.write(piece)
                sys.stdout.flush()
    except KeyboardInterrupt:
        stream.close()
        was_interrupted = True
    if to_stdout:
        sys.stdout.write("\n")
        sys.stdout.flush()
    return was_interrupted


def _phases(llm: LLM, stats: Stats) -> dict[str, Phase]:
    """The plan of what was run: the prompt, and the last generated token."""
    from kvfold.explain import phase

    loaded = llm.loaded
    depth = stats.prompt_tokens + max(stats.generated_tokens - 1, 0)
    config, settings = loaded.model.config, loaded.settings
    kinds = {"prompt": (stats.prompt_tokens, 0, True), "generation": (1, depth, False)}
    return {
        name: phase(
            name,
            config,
            settings,
            rows,
            cached,
            is_prompt=is_prompt,
            batch_rows=llm.batch_rows,
            machine=loaded.choice.profile,
        )
        for name, (rows, cached, is_prompt) in kinds.items()
    }


def _print_json(llm: LLM, stream: Stream, phases: dict[str, Phase], seed: int, profile: bool) -> None:
    from kvfold.bench.profile import profile_of

    loaded = llm.loaded
    print_json(
        plain(stream.output)
        | {
            "model": loaded.checkpoint.path,
            "family": loaded.model.config.family,
            "backend": loaded.backend.name,
            "isa": loaded.isa,
            "seed": seed,
            "plan": phases,
        }
        | ({"profile": profile_of(loaded)} if profile else {})
    )


def show_choices(llm: LLM, seconds: float) -> None:
    """What was loaded in so many seconds, which backend runs it, and the cache."""
    loaded = llm.loaded
    checkpoint, choice = loaded.checkpoint, loaded.choice
    note(
        f"model: {checkpoint.path}, {checkpoint.config.family}, {checkpoint.format}, "
        f"{human_bytes(checkpoint.nbytes)} in {seconds:.1f} s, latent up-projection as {checkpoint.kv_layout.value}"
    )
    note(f"weights: {loaded.weight_place}")
    for name, reasons in choice.refused:
        note(f"backend {name} refuses: {', '.join(reasons)}")
    threads = f"{loaded.settings.threads} threads" + (f" on {loaded.isa}" if loaded.isa else "")
    note(f"backend {choice.candidate.name}: {choice.reason}; {threads}")
    layout = loaded.cache.layout
    note(
        f"cache: {loaded.n_ctx:,} tokens in {layout.cache_type.value}, {layout.bytes_per_token:,} bytes a token, "
        f"{human_bytes(loaded.n_ctx * layout.bytes_per_token)}"
    )


def show_profile(llm: LLM) -> None:
    """Tables of where the time went, on stderr."""
    from kvfold.bench.profile import markdown, profile_of

    for line in markdown(profile_of(llm.loaded)):
        note(line)


def closing_line(stats: Stats) -> str:
    """Counts and rates of one answer."""
    reused = f" ({stats.reused_tokens} from the cache)" if stats.reused_tokens else ""
    prompt = f"prompt {stats.prompt_tokens} tokens{reused}, {_rate(stats.prompt_rate)}"
    generation = f"generation {stats.generated_tokens} tokens, {_rate(stats.generation_rate)}"
    return f"{prompt}; {generation}; peak memory {stats.peak_memory_bytes / 2**20:,.0f} MiB"


def _rate(rate: float) -> str:
    return f"{rate:.1f} t/s" if rate > 0 else "- t/s"
