"""What a run of the command line leaves behind; the `kvfold` fixture of tests/cli returns it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str


Kvfold = Callable[..., Done]


def heed_signals() -> None:
    """For Popen's preexec_fn: a test runner started in the background ignores SIGINT, under nohup SIGHUP, and its
    children inherit that."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def start(*arguments: object, encoding: str = "utf-8", **pipes: int) -> subprocess.Popen[bytes]:
    """The command line in a process of its own."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("KVFOLD_")}
    environment["PYTHONIOENCODING"] = encoding
    command = [sys.executable, "-m", "kvfold", *map(str, arguments)]
    return subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        preexec_fn=heed_signals,  # noqa: PLW1509 (runs before any thread)
        **pipes,
    )
