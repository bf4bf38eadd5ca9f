"""One step of work: frozen flat arrays, the same for every backend.

A step advances one or more sequences. The rows of a sequence are contiguous, and sequences that take the same path
are neighbours, so an attention op works on one range of rows (and does nothing when it is empty).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

Int32 = NDArray[np.int32]


MOST_TOP_K = 64


class Choice(NamedTuple):
    """How a Choosing backend chooses a token from a row of logits: filters, in this order, and a draw from what they keep,
    as engine/sampler.py defines them.

    top_k:     keep the k likeliest, at most MOST_TOP_K; 0 keeps all
    top_p:     keep the likeliest tokens that hold this much probability; 1 keeps all, and is the only one with top_k 0
    depth:     keep logits at most so far below the highest (log of min_p, float32), -inf keeps all
    sharpness: 1 / temperature, float32
    point:     of the draw, from 0 to below 1
    """

    top_k: float
    top_p: float
    depth: float
    sharpness: float
    point: float


LIKELIEST = Choice(1, 1, -math.inf, 1, 0)


def choices_of(choices: list[Choice]) -> NDArray[np.float64]:
    """As a step has them: [R, 5]."""
    return np.array(choices, np.float64).reshape(-1, len(Choice._fields))


@dataclass(frozen=True, eq=False)
class Step:
    """T rows of S sequences.

    token_ids   [T]      -1 - i: what a Choosing backend chose for output row i of the step run just before
    positions   [T]      0-based position in the sequence: the angle of RoPE
    slots       [T]      where the row's cache entry goes: page * PAGE_TOKENS + offset (int64: pools may be large)
    row_starts  [S + 1]  rows of sequence s are row_starts[s] .. row_starts[s + 1]
    kv_lens     [S]      keys of sequence s, this step's included; row i of R sees keys 0 .. kv_len - R + i
    page_starts [S + 1]  the page list of sequence s is pages[page_starts[s] : page_starts[s + 1]]
    pages       [..]
    segments    [N, 4]   (Path.value, fused, first sequence, last sequence + 1), one per path present, in order
    output_rows [R]      rows whose hidden state and logits are wanted
    is_prompt   [S]      1 for rows of a prompt, 0 for generated tokens, guessed ones that are checked included
    choices     [R, 5]   how the token of each output row is chosen (Choice, float64); [0, 5]: the caller wants logits
    """

    token_ids: Int32
    positions: Int32
    slots: NDArray[np.int64]
    row_starts: Int32
    kv_lens: Int32
    page_starts: Int32
    pages: Int32
    segments: Int32
    output_rows: Int32
    is_prompt: Int32
    choices: NDArray[np.float64] = field(default_factory=lambda: choices_of([]))

    @property
    def num_rows(self) -> int:
        return len(self.token_ids)

    def segment(self, path: int) -> tuple[bool, range] | None:
        """(fused, sequences) of the segment that takes this path, or None."""
        for segment_path, fused, first, last in self.segments.tolist():
            if segment_path == path:
                return bool(fused), range(first, last)
        return None

    def page_list(self, sequence: int) -> Int32:
        return self.pages[self.page_starts[sequence] : self.page_starts[sequence + 1]]

    def rows(self, sequence: int) -> slice:
        return slice(int(self.row_starts[sequence]), int(self.row_starts[sequence + 1]))


class StepRun(Protocol):
    """One step under way on a backend. It owns the hidden rows between cuts, so other steps may run in between."""

    @property
    def position(self) -> int:
        """The next segment to run; readable from any thread while `run` works."""

    @property
    def outputs(self) -> Mapping[str, NDArray[np.float32]]:
        """After the head: "hidden" [R, hidden] and "logits" [R, vocab]. Nothing of a step whose tokens the backend chose."""

    def run(self, last: int | None = None) -> int:
        """Runs segments up to cut `last` (None: to the end) and returns the cut reached: the end, where a backend launches the
        whole step at once.

        Raises Cancelled at the next cut after `cancel`; the run may go on afterwards.
        """

    def cancel(self) -> None:
        """Ask a `run` under way in another thread to stop at its next cut."""


class Steps(Protocol):
    """What runs steps: every backend is one."""

    def start(self, step: Step) -> StepRun: ...


class ChoosingRun(StepRun, Protocol):
    @property
    def chosen(self) -> Int32:
        """Of each output row the token of its choice, [R]; -1 where the highest logit is not finite. Waits for this step
        alone, also when later ones are under way."""


@runtime_checkable
class Choosing(Protocol):
    """A backend that can choose tokens itself and hand them to the next step, so that it may be started before anybody
    knows them."""

    def chooses(self, step: Step) -> bool:
        """Whether the run of this step is a ChoosingRun: it has choices, and is of a kind that this backend serves."""
