"""What a run of the command line leaves behind; the `kvfold` fixture of tests/cli returns it."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str


Kvfold = Callable[..., Done]


def heed_interrupts() -> None:
    """For Popen's preexec_fn: a test runner started in the background ignores SIGINT, and its children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
