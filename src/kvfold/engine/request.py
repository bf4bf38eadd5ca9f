"""One request: a prompt, how to sample, and what has been generated. Token ids only; text is llm.py's."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from kvfold.cache.pages import Sequence
from kvfold.cache.session import Session


class FinishReason(Enum):
    STOP = "stop"  # an end-of-text token or a stop string
    LENGTH = "length"  # max_tokens or the context is reached
    CANCELLED = "cancelled"


Sample = Callable[[NDArray[np.float32], list[int]], int]
"""(logits [vocab], tokens so far) -> token id."""


@dataclass
class Request:
    prompt_ids: list[int]
    sample: Sample
    max_tokens: int
    end_ids: frozenset[int]
    sequence: Sequence
    session: Session | None = None  # keeps the sequence when the request ends
    num_reused: int = 0  # prompt tokens found in the session's cache
    token_ids: list[int] = field(default_factory=list)  # generated
    finish_reason: FinishReason | None = None
    submitted_at: float = field(default_factory=time.perf_counter)
    prompt_started_at: float = 0.0
    first_token_at: float = 0.0
    last_token_at: float = 0.0

    @property
    def num_pending(self) -> int:
        """Tokens known but not yet in the cache: the rest of the prompt, or the last generated token."""
        return len(self.prompt_ids) + len(self.token_ids) - self.sequence.length

    def end(self) -> None:
        """The request works no more: its pages go back, or stay with its session."""
        if self.session is None:
            self.sequence.release()
        else:
            self.session.record(self.prompt_ids + self.token_ids)

    def pending(self, most: int) -> list[int]:
        """The next pending tokens, at most `most`."""
        known = self.prompt_ids + self.token_ids if self.token_ids else self.prompt_ids
        return known[self.sequence.length : self.sequence.length + most]
