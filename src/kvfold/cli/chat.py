"""`kvfold chat`: a conversation. stdout carries the answers alone; thoughts, notes and rates go to stderr.

Reads messages and commands from a person at a terminal, or one message a line from a pipe.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from json import dumps
from pathlib import Path
from types import FrameType, TracebackType
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
from kvfold.cli.run import closing_line, show_choices, show_profile
from kvfold.cli.terminal import ByteProgress, TokenProgress, error, human_bytes, note, plain, print_json
from kvfold.errors import KvfoldError, OutOfPages, SettingError

if TYPE_CHECKING:
    from kvfold.engine.sampler import SamplingParams
    from kvfold.llm import LLM, ChatStream

# llama.cpp's default: a thought has no length that could be foreseen, and Ctrl-C is at hand
DEFAULT_NEW_TOKENS = -1
# The storyteller's tales end by themselves within some 400 tokens; the rare one that does not goes round in circles.
# It is surest of who is who at a low temperature, and a penalty would make it avoid the names it has to keep to.
STORYTELLER_NEW_TOKENS = 512
STORYTELLER_TEMPERATURE = 0.6

HISTORY_LINES = 1000
QUOTES = '"""'
COMMANDS = {
    "/help": "this list",
    "/reset": "start a new conversation; a system message stays",
    "/think": "ask for a thought before the answer, or no longer",
    "/system TEXT": "say what the model should be; without TEXT, no longer",
    "/save FILE": "write the conversation as JSON, as LLM.chat takes it",
    "/quit": "leave, as Ctrl-D does",
}
TYPING = (
    "Ctrl-C stops an answer; what was said of it stays in the conversation.",
    'A line that ends in \\ goes on in the next. """ begins a text of several lines, which ends with """;',
    "what is inside is never a command.",
)
NOT_ANSWERED = "stopped before the answer began: the message is not part of the conversation"
STORYTELLER = (
    "It is a small storyteller, not an assistant: it tells fables and tales about the animals and things you name, from "
    "some hundred plots it has learned, and tries to answer questions about a passage. It knows next to nothing of the world. "
    "Try: Tell me a fable about a fox and a crow."
)


def chat(
    context: typer.Context,
    model_argument: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", show_default="the embedded model", help="The same as --model."),
    ] = None,
    model: Model = None,
    system: Annotated[
        str | None,
        typer.Option(
            "--system-prompt",
            "-sys",
            envvar="KVFOLD_SYSTEM_PROMPT",
            show_default=False,
            help="The system message: what the model should be.",
        ),
    ] = None,
    thinking: Annotated[
        bool | None,
        typer.Option(
            "--think/--no-think",
            envvar="KVFOLD_THINK",
            show_default="as the model's template has it",
            help="Ask for a thought before the answer.",
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
    """Converses with a model; /help lists the commands.

    The embedded model tells at most 512 tokens, at temperature 0.6, unless -n and --temp say otherwise. Answers go to stdout, everything else to stderr. From a pipe every line is a message (or a command), and with
    --json every answer is one object on a line. Without a model the one that ships with kvfold answers.
    """
    if model_argument is not None:
        if _source(context, "model") == "COMMANDLINE":
            raise typer.BadParameter("the model is given twice: as an argument and after -m.")
        model = _as_model(model_argument)

    from kvfold.engine.sampler import SamplingParams
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
    tells = _is_storyteller(llm)
    if new_tokens == -1:
        short = tells and _source(context, "new_tokens") == "DEFAULT"
        params = replace(params, max_tokens=STORYTELLER_NEW_TOKENS if short else llm.loaded.n_ctx)
    if tells and _source(context, "temperature") == "DEFAULT":
        params = replace(params, temperature=STORYTELLER_TEMPERATURE)
    conversation = Conversation(llm, params, system, thinking, as_json=json, verbose=verbose)
    conversation.check()
    for line in llm.loaded.info:
        note(f"note: {line}")
    if verbose:
        show_choices(llm, progress.seconds)
    if sys.stdin.isatty():
        _show_banner(llm)
        with _line_history():
            _talk(conversation, _person(), is_person=True)
        done = True
    else:
        done = _talk(conversation, _pipe(), is_person=False)
    if profile:
        show_profile(llm)
    if not done:
        raise typer.Exit(1)


def _source(context: typer.Context, name: str) -> str:
    """Where a value comes from: "COMMANDLINE", "ENVIRONMENT" or "DEFAULT"."""
    return getattr(context.get_parameter_source(name), "name", "")


def _as_model(argument: str) -> str:
    """The MODEL argument; BadParameter for what can only be a message."""
    if not argument or os.path.exists(argument) or ("/" in argument and not any(map(str.isspace, argument))):
        return argument
    raise typer.BadParameter(
        f"{argument}: there is no such file or directory, and it is no hub name (org/repo). kvfold chat takes a "
        "model; messages are typed when it runs, or come from stdin, one a line."
    )


def _is_storyteller(llm: LLM) -> bool:
    from kvfold.load import embedded_model

    return llm.loaded.checkpoint.path == embedded_model()


def _show_banner(llm: LLM) -> None:
    checkpoint = llm.loaded.checkpoint
    if _is_storyteller(llm):
        note(f"This is kvfold's own storyteller, {human_bytes(checkpoint.nbytes)}. {STORYTELLER}")
    else:
        config = checkpoint.config
        name = config.name if config.name == config.family else f"{config.name} ({config.family})"
        note(f"This is {name}, {human_bytes(checkpoint.nbytes)}, from {checkpoint.path}.")
    note(
        f"It remembers {llm.loaded.n_ctx:,} tokens. /help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves."
    )


def _talk(conversation: Conversation, messages: Iterator[Message], *, is_person: bool) -> bool:
    """Answers until the messages end or one is /quit. Whether everything could be done."""
    done = True
    for message in messages:
        try:
            if not message.is_command:
                if conversation.answer(message.text) and not is_person:
                    raise typer.Exit(130)
            elif message.text.split() == ["/quit"]:
                break
            else:
                conversation.command(message.text)
        except KeyboardInterrupt:  # while a template is rendered, or text encoded
            if not is_person:
                raise
            note(NOT_ANSWERED)
        except (KvfoldError, OSError) as failure:
            if isinstance(failure, BrokenPipeError):
                raise
            error(failure)
            done = False
    return done


@dataclass
class Conversation:
    """What was said so far, and how the next message is answered."""

    llm: LLM
    params: SamplingParams
    system: str | None
    thinking: bool | None
    as_json: bool
    verbose: bool
    turns: list[dict[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._session = self.llm.session()

    @property
    def messages(self) -> list[dict[str, str]]:
        return ([{"role": "system", "content": self.system}] if self.system else []) + self.turns

    def check(self) -> None:
        """UnsupportedModel, TemplateError where this model cannot converse."""
        self.llm.chat_prompt([*self.messages, {"role": "user", "content": "?"}], thinking=self.thinking)

    # ---- a turn

    def answer(self, text: str) -> bool:
        """Answers on stdout; True if Ctrl-C ended it. A message that gets no answer is not part of the conversation.

        Raises OutOfPages (in a sentence for a person), TemplateError, SettingError, NumericsError.
        """
        from kvfold.engine.sampler import Sampler

        asked = [*self.messages, {"role": "user", "content": text}]
        sampler = Sampler(self.params, self.llm.vocab_size, self.llm.tokenizer.eos_ids)
        params = replace(self.params, seed=sampler.seed)
        progress = TokenProgress("prompt")
        try:
            stream = self.llm.chat_stream(
                asked, params, session=self._session, thinking=self.thinking, progress=progress
            )
        except OutOfPages as failure:
            size = len(self.llm.chat_prompt(asked, thinking=self.thinking))
            raise OutOfPages(
                f"with this message the conversation has {size:,} tokens, and {self.llm.loaded.n_ctx:,} are "
                "remembered. The message was not sent: /reset starts a new conversation, /save FILE keeps this one "
                "first, and -c SIZE remembers more."
            ) from failure
        with progress, closing(stream):
            was_interrupted = _show(stream, as_json=self.as_json)
        output = stream.output
        if self.as_json:
            print_json(plain(output) | {"seed": sampler.seed})
            sys.stdout.flush()
        if output.text or not was_interrupted:
            self.turns += [asked[-1], {"role": "assistant", "content": output.text}]
        else:
            note(NOT_ANSWERED)
        if self.verbose:
            note(f"sampler: {sampler.order}")
        if output.finish_reason == "length":
            used = output.stats.prompt_tokens + output.stats.generated_tokens
            note(
                f"cut off: all {self.llm.loaded.n_ctx:,} tokens that are remembered are used. /reset starts a new "
                "conversation, -c SIZE remembers more"
                if used >= self.llm.loaded.n_ctx
                else f"cut off after {output.stats.generated_tokens:,} tokens: -n SIZE allows more, -n -1 any number"
            )
        note(closing_line(output.stats))
        return was_interrupted

    # ---- commands

    def command(self, line: str) -> None:
        """SettingError: there is no such command, or it lacks what it needs. OSError: the file cannot be written."""
        name, _, rest = line.strip().partition(" ")
        rest = rest.strip()
        if name == "/help":
            width = max(map(len, COMMANDS))
            for usage, meaning in COMMANDS.items():
                note(f"{usage:{width}}  {meaning}")
            for tip in TYPING:
                note(tip)
        elif name == "/reset":
            self.turns.clear()
            self._session.release()
            note("a new conversation")
        elif name == "/think":
            self._toggle_thinking()
        elif name == "/system":
            self.system = rest or None
            note(f"system message: {rest}" if rest else "no system message")
        elif name == "/save":
            if not rest:
                raise SettingError("/save needs the name of a file: /save talk.json")
            path = Path(rest).expanduser()
            _write_whole(path, dumps(self.messages, ensure_ascii=False, indent=1) + "\n")
            note(f"{len(self.messages)} messages in {path}")
        else:
            raise SettingError(f"there is no command {name}; there are {', '.join(COMMANDS)}")

    def _toggle_thinking(self) -> None:
        probe = [*self.messages, {"role": "user", "content": "?"}]
        prompts = {wanted: self.llm.chat_prompt(probe, thinking=wanted) for wanted in (None, False, True)}
        if prompts[False] == prompts[True]:
            raise SettingError("the chat template of this model has no choice of thinking")
        if self.thinking is None:
            self.thinking = prompts[None] == prompts[True]
        self.thinking = not self.thinking
        note(f"thinking {'on' if self.thinking else 'off'}")


def _write_whole(path: Path, text: str) -> None:
    """The file is the old one or the new one, never half of it."""
    part = path.parent / f"{path.name}.part"
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def _show(stream: ChatStream, *, as_json: bool) -> bool:
    """Runs the stream to its end, or to Ctrl-C: then True, and the stream is cancelled."""
    from kvfold.cli.answer import AnswerView

    with CtrlC() as ctrl_c, AnswerView() as view:
        while True:
            try:
                ctrl_c.raises = not ctrl_c.pressed
                piece = next(stream, None)
                ctrl_c.raises = False
            except KeyboardInterrupt:
                stream.close()
                continue  # what was generated until now is still to be read
            if ctrl_c.pressed:
                stream.close()
            if piece is None:
                return ctrl_c.pressed
            if not as_json:
                view.write(piece.thought, piece.answer)


class CtrlC(AbstractContextManager["CtrlC"]):
    """SIGINT as a fact to be looked at, and as KeyboardInterrupt only where `raises` says so: while the model computes,
    which may take minutes. In the midst of drawing it would leave the terminal, and rich, half drawn."""

    def __init__(self) -> None:
        self.pressed = False
        self.raises = False

    def _press(self, number: int, frame: FrameType | None) -> None:
        self.pressed = True
        if self.raises:
            self.raises = False
            raise KeyboardInterrupt

    def __enter__(self) -> CtrlC:
        self._before = signal.signal(signal.SIGINT, self._press)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, failure: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGINT, self._before)


# ---- reading messages


@dataclass(frozen=True)
class Message:
    text: str
    is_command: bool


def _person() -> Iterator[Message]:
    """What is typed; Ctrl-C drops the message that is being typed."""
    read = input if sys.stdout.isatty() else _input_beside_a_pipe
    while True:
        try:
            message = _next_message(read)
        except KeyboardInterrupt:
            note("\nCtrl-D or /quit leaves")
            continue
        except EOFError:
            note("")
            return
        if message.text.strip():
            yield message


def _input_beside_a_pipe(prompt: str) -> str:
    """`input` writes its prompt to stdout, which is the answers' alone here."""
    sys.stderr.write(prompt)
    sys.stderr.flush()
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.removesuffix("\n")


def _pipe() -> Iterator[Message]:
    """What stdin holds. SettingError where it is no UTF-8."""
    lines: Iterator[bytes] = iter(sys.stdin.buffer.readline, b"")

    def read(_: str) -> str:
        for line in lines:
            try:
                return line.decode().removesuffix("\n").removesuffix("\r")
            except UnicodeDecodeError as failure:
                raise SettingError(
                    f"stdin: byte {failure.start} of a line is not UTF-8 ({failure.reason})."
                ) from failure
        raise EOFError

    with suppress(EOFError):
        while True:
            message = _next_message(read)
            if message.text.strip():
                yield message


def _next_message(read: Callable[[str], str]) -> Message:
    """Lines up to the end of a message. EOFError: there is none, or it has no end."""
    line = read("> ")
    if line.startswith(QUOTES):
        text = line.removeprefix(QUOTES)
        while not text.rstrip().endswith(QUOTES):
            text += "\n" + read(". ")
        return Message(text.rstrip().removesuffix(QUOTES).strip("\n"), is_command=False)
    while line.endswith("\\"):
        line = line[:-1] + "\n" + read(". ")
    return Message(line, is_command=line.startswith("/"))


@contextmanager
def _line_history() -> Iterator[None]:
    """Line editing, and the lines typed in earlier conversations. Does without where the system has none."""
    try:
        import readline
    except ImportError:
        yield
        return
    state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    path = Path(state).expanduser() / "kvfold" / "chat_history"
    with suppress(OSError):
        readline.read_history_file(path)
    readline.set_history_length(HISTORY_LINES)
    try:
        yield
    finally:
        with suppress(OSError):
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            path.touch(mode=0o600)  # what was typed is nobody else's
            readline.write_history_file(path)
