"""What a run of the command line leaves behind; the `kvfold` fixture of tests/cli returns it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str


Kvfold = Callable[..., Done]
