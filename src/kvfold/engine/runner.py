"""One step is three calls: schedule, run, take the tokens. Owns the requests between steps; knows no text."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvfold.cache.pages import PagePool, Sequence
from kvfold.cache.session import Session
from kvfold.engine.batch import Batch, Planner, Work, build_batch
from kvfold.engine.request import FinishReason, Request, Sample
from kvfold.engine.scheduler import Scheduler
from kvfold.model.step import Step, StepRun, Steps


@dataclass(frozen=True)
class Token:
    """A token that a step gave a request."""

    request: Request
    token_id: int


class Runner:
    def __init__(self, backend: Steps, pool: PagePool, planner: Planner, *, max_prompt_rows: int) -> None:
        self._backend = backend
        self._pool = pool
        self._planner = planner
        self._max_prompt_rows = max_prompt_rows
        self._scheduler = Scheduler(pool, max_prompt_rows)

    @property
    def is_idle(self) -> bool:
        return self._scheduler.is_idle

    def submit(
        self,
        prompt_ids: list[int],
        sample: Sample,
        max_tokens: int,
        end_ids: frozenset[int],
        session: Session | None = None,
    ) -> Request:
        """Queue a prompt of at least one token; what its session has cached of it is not computed again.

        Raises OutOfPages where it can never fit.
        """
        sequence = session.sequence if session else Sequence(self._pool)
        request = Request(prompt_ids, sample, max_tokens, end_ids, sequence, session)
        self._scheduler.submit(request)
        request.num_reused = session.rewind_to(prompt_ids) if session else 0
        return request

    def cancel(self, request: Request, reason: FinishReason = FinishReason.CANCELLED) -> None:
        """End a request now. Does nothing to one that has ended."""
        if request.finish_reason is None:
            request.finish_reason = reason
            self._scheduler.retire(request)

    def step(self) -> list[Token]:
        """Run one step and return the tokens it gave. A request that ends has its finish_reason set."""
        scheduled = self._scheduler.next_works()
        started = time.perf_counter()
        batch = build_batch([work for _, work in scheduled], self._planner)
        logits = self._run(batch.step).outputs["logits"]
        batch.commit()
        now = time.perf_counter()
        tokens = []
        for (request, work), rows in zip(scheduled, batch.output_slices, strict=True):
            request.prompt_started_at = request.prompt_started_at or started
            if work.outputs:
                tokens.append(self._take(request, logits[rows][0], now))
        return tokens

    def _take(self, request: Request, logits: NDArray[np.float32], now: float) -> Token:
        token = request.sample(logits, request.prompt_ids + request.token_ids)
        request.token_ids.append(token)
        request.first_token_at = request.first_token_at or now
        request.last_token_at = now
        if token in request.end_ids:
            self.cancel(request, FinishReason.STOP)
        elif len(request.token_ids) >= request.max_tokens:
            self.cancel(request, FinishReason.LENGTH)
        return Token(request, token)

    def logits(self, token_ids: list[int]) -> Iterator[NDArray[np.float32]]:
        """Logits of every position, window by window: float32 [rows, vocab]."""
        sequence = Sequence(self._pool)
        try:
            for start in range(0, len(token_ids), self._max_prompt_rows):
                window = token_ids[start : start + self._max_prompt_rows]
                batch: Batch = build_batch(
                    [Work(sequence, window, is_prompt=True, outputs=len(window))], self._planner
                )
                yield self._run(batch.step).outputs["logits"]
                batch.commit()
        finally:
            sequence.release()

    def _run(self, step: Step) -> StepRun:
        run = self._backend.start(step)
        run.run()
        return run
