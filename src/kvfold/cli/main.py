"""`kvfold`: puts the verbs together, and turns errors into sentences and exit codes.

Exit codes: 0 done, 1 an error with its sentence (a file refused, a setting that cannot be, a full disk) or a reader of
stdout that went away, which is quiet, 2 a wrong command line, 130 ended by Ctrl-C, 143 by SIGTERM, 129 by SIGHUP.
KVFOLD_DEBUG=1 shows the traceback behind a sentence.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from io import TextIOWrapper
from types import FrameType
from typing import Annotated

import typer

from kvfold import __version__
from kvfold.cli import terminal
from kvfold.cli.bench import bench
from kvfold.cli.chat import chat
from kvfold.cli.check import check
from kvfold.cli.inspect import inspect
from kvfold.cli.later import accept_later_flags, add_later_verbs
from kvfold.cli.options import with_fa_values
from kvfold.cli.plan import plan
from kvfold.cli.run import run
from kvfold.cli.synth import synth
from kvfold.errors import KvfoldError

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,  # rich costs 0.15 s, half of what `kvfold --help` may take
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    help="Runs DeepSeek-family models (Multi-head Latent Attention) from any checkpoint file.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"kvfold {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    """Options before the verb."""


app.command("run")(accept_later_flags(run))
app.command("chat")(accept_later_flags(chat))
app.command("inspect")(inspect)
app.command("plan")(accept_later_flags(plan))
app.command("bench")(accept_later_flags(bench))
app.command("check")(check)
app.command("synth")(synth)
add_later_verbs(app)


# `timeout` sends its signal to the process and once more to its group: within this time the two are one.
SAME_SIGNAL_SECONDS = 1.0


def _end_in_order_by_signals() -> None:
    """SIGTERM and SIGHUP raise SystemExit, as Ctrl-C raises KeyboardInterrupt: what was measured is printed, and programs
    that were started are ended. What is ignored already stays so (nohup)."""
    ended_at = float("-inf")

    def end(number: int, frame: FrameType | None) -> None:
        nonlocal ended_at
        now = time.monotonic()
        if now >= ended_at + SAME_SIGNAL_SECONDS:
            ended_at = now
            sys.exit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, end)


def _open_closed_streams() -> None:
    """A stream that the shell closed (`<&-`, `>&-`) is None in Python: now it is empty, or goes nowhere. In this order
    each takes its own descriptor, which would otherwise be the next opened file's."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 (as long as the process)


def _full_stream() -> str:
    """Name of the stream whose buffer cannot be written, if one is. What it holds goes nowhere then: at exit it would
    fail once more, in a traceback."""
    found = ""
    for name in ("stderr", "stdout"):
        stream = getattr(sys, name)
        try:
            stream.flush()
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
            found = name
    return found


def _sentence(failure: Exception) -> str:
    if isinstance(failure, MemoryError):
        return f"not enough memory: {failure}. A smaller -c, -b or --workspace needs less (kvfold plan)."
    if isinstance(failure, OSError) and failure.strerror:
        place = failure.filename or _full_stream()
        return f"{place}: {failure.strerror}." if place else f"{failure.strerror}."
    return str(failure)


def main() -> None:
    """Runs the verb of the command line: never returns."""
    _open_closed_streams()
    _end_in_order_by_signals()
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a character that the terminal has not: "?", not a traceback
    try:
        try:
            app(with_fa_values(sys.argv[1:]), prog_name="kvfold")
        finally:
            sys.stdout.flush()  # while what fails still gets its sentence
    except BrokenPipeError:
        _full_stream()
        sys.exit(1)
    except (KvfoldError, MemoryError, OSError) as failure:
        if os.environ.get("KVFOLD_DEBUG") == "1":
            raise
        try:
            terminal.error(_sentence(failure))
        except OSError:  # stderr is on the same full disk
            _full_stream()
        sys.exit(1)
