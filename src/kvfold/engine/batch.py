"""Builds one Step from the work of several sequences. Decides the plan of each; never runs anything."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from kvfold.cache.latent import PAGE_TOKENS
from kvfold.cache.pages import Sequence
from kvfold.mla.plan import MlaPlan
from kvfold.model.step import Choice, Int32, Step, choices_of


@dataclass(frozen=True)
class Work:
    """New tokens of one sequence. outputs: how many of its last rows the caller wants logits for, or, where the works with
    outputs have one each, the tokens of this choice."""

    sequence: Sequence
    token_ids: list[int]
    is_prompt: bool
    outputs: int = 1
    choice: Choice | None = None


@dataclass(frozen=True)
class Batch:
    """A step, the plan of each work in it and where its output rows stand in the step's outputs, in the order of the
    works given."""

    works: tuple[Work, ...]
    step: Step
    plans: tuple[MlaPlan, ...]
    output_slices: tuple[slice, ...]

    def commit(self) -> None:
        """After the step ran: its rows are part of their sequences."""
        for work in self.works:
            work.sequence.length += len(work.token_ids)


Planner = Callable[[int, int, bool], MlaPlan]
"""(new rows, cached rows, is prompt) -> plan."""


def build_batch(works: list[Work], planner: Planner) -> Batch:
    """Reserves pages for every work (OutOfPages: none is changed but those before it) and lays the step out."""
    for work in works:
        work.sequence.reserve(len(work.token_ids))
    plans = [planner(len(w.token_ids), w.sequence.length, w.is_prompt) for w in works]
    # Neighbours share a path, so each attention op works on one range of rows; and a role within it, for ops whose form
    # follows the role.
    order = sorted(range(len(works)), key=lambda i: (plans[i].path.value, works[i].is_prompt))
    ordered = [works[i] for i in order]

    segments: list[tuple[int, int, int, int]] = []
    for at, i in enumerate(order):
        plan = plans[i]
        if segments and segments[-1][:2] == (plan.path.value, int(plan.fused)):
            segments[-1] = (*segments[-1][:3], at + 1)
        else:
            segments.append((plan.path.value, int(plan.fused), at, at + 1))

    # Whole arrays at once: 64 generated rows over 4096 cached tokens take 0.2 ms, one sequence at a time they took 2 ms.
    num_rows = np.asarray([len(w.token_ids) for w in ordered], np.int32)
    cached = np.asarray([w.sequence.length for w in ordered], np.int32)
    row_starts = _starts(num_rows)
    page_starts = _starts(np.asarray([len(w.sequence.pages) for w in ordered], np.int32))
    # else a row would land on a page of the next sequence
    assert (cached + num_rows <= np.diff(page_starts) * PAGE_TOKENS).all(), (
        "a sequence has too few pages for its rows"
    )
    pages = np.asarray([page for w in ordered for page in w.sequence.pages], np.int32)
    positions = np.arange(row_starts[-1], dtype=np.int32) + np.repeat(cached - row_starts[:-1], num_rows)
    page = pages[np.repeat(page_starts[:-1], num_rows) + positions // PAGE_TOKENS]

    output_slices: list[slice] = [slice(0, 0)] * len(works)
    output_rows: list[int] = []
    for at, i in enumerate(order):
        end = int(row_starts[at + 1])
        output_slices[i] = slice(len(output_rows), len(output_rows) + works[i].outputs)
        output_rows += range(end - works[i].outputs, end)
    choices = [w.choice for w in ordered for _ in range(w.outputs) if w.choice is not None]

    step = Step(
        token_ids=np.asarray([token for w in ordered for token in w.token_ids], np.int32),
        positions=positions,
        slots=page.astype(np.int64) * PAGE_TOKENS + positions % PAGE_TOKENS,
        row_starts=row_starts,
        kv_lens=cached + num_rows,
        page_starts=page_starts,
        pages=pages,
        segments=np.asarray(segments, np.int32).reshape(-1, 4),
        output_rows=np.asarray(output_rows, np.int32),
        is_prompt=np.asarray([w.is_prompt for w in ordered], np.int32),
        choices=choices_of(choices if len(choices) == len(output_rows) else []),
    )
    return Batch(tuple(works), step, tuple(plans), tuple(output_slices))


def _starts(counts: Int32) -> Int32:
    """Where each begins in a line of all, and the whole."""
    return np.concatenate([np.zeros(1, np.int32), np.cumsum(counts, dtype=np.int32)])
