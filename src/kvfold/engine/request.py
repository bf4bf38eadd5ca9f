"""One request: a prompt, how to sample, and what has been generated. Token ids only; text is llm.py's."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from kvfold.cache.pages import Sequence as CachedSequence
from kvfold.cache.session import Session
from kvfold.model.step import Choice


class FinishReason(Enum):
    STOP = "stop"  # an end-of-text token or a stop string
    LENGTH = "length"  # max_tokens or the context is reached
    CANCELLED = "cancelled"
    ERROR = "error"  # Request.error says what happened


Sample = Callable[[NDArray[np.float32], Sequence[int]], int]
"""(logits [vocab], prompt and generated tokens so far) -> token id."""


class Choices(Protocol):
    """A request's choices in numbers, for a backend that chooses as its `sample` would (engine/sampler.Sampler is one)."""

    def choice(self, ahead: int) -> Choice:
        """Of the token behind the next `ahead`; may be asked for again and again."""

    def skip(self) -> None:
        """The next token was chosen by `choice(0)`."""


Accept = Callable[[int], bool]
"""Hands a new token to the request's owner; True ends the request (a stop string is complete)."""


@dataclass(eq=False)
class Request:
    prompt_ids: list[int]
    sample: Sample
    accept: Accept
    max_tokens: int
    end_ids: frozenset[int]
    sequence: CachedSequence
    session: Session | None = None  # keeps the sequence when the request ends
    choices: Choices | None = None  # None: `sample` alone can choose
    num_reused: int = 0  # prompt tokens found in the session's cache
    token_ids: list[int] = field(default_factory=list)  # generated
    finish_reason: FinishReason | None = None
    error: Exception | None = None
    prompt_started_at: float = 0.0
    first_token_at: float = 0.0
    last_token_at: float = 0.0

    def __post_init__(self) -> None:
        self.history = list(self.prompt_ids)  # prompt and generated tokens, one growing list

    @property
    def num_pending(self) -> int:
        """Tokens known but not yet in the cache: the rest of the prompt, or the last generated token."""
        return len(self.history) - self.sequence.length

    def pending(self, most: int) -> list[int]:
        """The next pending tokens, at most `most`."""
        return self.history[self.sequence.length : self.sequence.length + most]

    def choice(self, ahead: int) -> Choice | None:
        return self.choices.choice(ahead) if self.choices else None

    def add(self, token: int) -> None:
        now = time.perf_counter()
        self.first_token_at = self.first_token_at or now
        self.last_token_at = now
        self.token_ids.append(token)
        self.history.append(token)

    def end(self, reason: FinishReason, error: Exception | None = None) -> None:
        """The request works no more: its pages go back, or stay with its session."""
        self.finish_reason = reason
        self.error = error
        if self.session is None:
            self.sequence.release()
        else:
            # a step that was launched ahead may have cached a row whose token nobody knows
            self.sequence.truncate(min(self.sequence.length, len(self.history)))
            self.session.record(self.history)
