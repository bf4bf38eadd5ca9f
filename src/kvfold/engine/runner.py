"""One step is three calls: schedule, run, take the tokens. Owns the requests between steps; knows no text.

Any thread may call any method. What fails in one request (NaN logits, say) ends that request alone; what fails in a step
ends the requests of that step, each with the error. After either, and after an interrupt, the others go on.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from kvfold.cache.pages import PagePool, Sequence
from kvfold.cache.session import Session
from kvfold.engine.batch import Planner, Work, build_batch
from kvfold.engine.request import Accept, FinishReason, Request, Sample
from kvfold.engine.scheduler import Scheduler
from kvfold.model.step import Step, StepRun, Steps


class Runner:
    def __init__(self, backend: Steps, pool: PagePool, planner: Planner, *, max_prompt_rows: int) -> None:
        self._backend = backend
        self._pool = pool
        self._planner = planner
        self._max_prompt_rows = max_prompt_rows
        self._scheduler = Scheduler(pool, max_prompt_rows)
        self._lock = threading.RLock()

    @property
    def is_idle(self) -> bool:
        return self._scheduler.is_idle

    def submit(
        self,
        prompt_ids: list[int],
        sample: Sample,
        max_tokens: int,
        end_ids: frozenset[int],
        *,
        accept: Accept = lambda token: False,
        session: Session | None = None,
    ) -> Request:
        """Queue a prompt of at least one token; what its session has cached of it is not computed again.

        Raises OutOfPages where it can never fit, SettingError where the session is busy.
        """
        with self._lock:
            if session is not None:
                session.check_free()
            sequence = session.sequence if session else Sequence(self._pool)
            request = Request(prompt_ids, sample, accept, max_tokens, end_ids, sequence, session)
            self._scheduler.submit(request)
            request.num_reused = session.begin(prompt_ids) if session else 0
            return request

    def cancel(self, request: Request) -> None:
        """End a request now. Does nothing to one that has ended."""
        with self._lock:
            if request.finish_reason is None:
                self._scheduler.retire(request, FinishReason.CANCELLED)

    def advance(self, request: Request, num_tokens: int) -> None:
        """Run steps until this request has more than `num_tokens` tokens or has ended."""
        while request.finish_reason is None and len(request.token_ids) <= num_tokens:
            with self._lock:
                if request.finish_reason is None and len(request.token_ids) <= num_tokens:
                    self.step()

    def step(self) -> None:
        """Run one step: every scheduled request gets further, those that end have their finish_reason set."""
        with self._lock:
            scheduled = self._scheduler.next_works()
            if not scheduled:
                return
            started = time.perf_counter()
            for request, _ in scheduled:
                request.prompt_started_at = request.prompt_started_at or started
            try:
                batch = build_batch([work for _, work in scheduled], self._planner)
                logits = self._run(batch.step).outputs["logits"]
            except Exception as error:
                for request, _ in scheduled:
                    self._scheduler.retire(request, FinishReason.ERROR, error)
                return
            batch.commit()
            untaken = [request for request, work in scheduled if work.outputs]
            try:
                for (request, work), rows in zip(scheduled, batch.output_slices, strict=True):
                    if work.outputs:
                        self._take(request, logits[rows][0])
                        untaken.remove(request)
            finally:  # an interrupt: its rows are in the cache and its token is not known
                for request in untaken:
                    self.cancel(request)

    def _take(self, request: Request, logits: NDArray[np.float32]) -> None:
        try:
            token = request.sample(logits, request.history)
            request.add(token)
            is_stopped = token in request.end_ids or request.accept(token)
        except Exception as error:
            self._scheduler.retire(request, FinishReason.ERROR, error)
            return
        if is_stopped:
            self._scheduler.retire(request, FinishReason.STOP)
        elif len(request.token_ids) >= request.max_tokens:
            self._scheduler.retire(request, FinishReason.LENGTH)

    def logits(self, token_ids: list[int]) -> Iterator[NDArray[np.float32]]:
        """Logits of every position, window by window: float32 [rows, vocab]."""
        sequence = Sequence(self._pool)
        try:
            for start in range(0, len(token_ids), self._max_prompt_rows):
                window = token_ids[start : start + self._max_prompt_rows]
                with self._lock:
                    work = Work(sequence, window, is_prompt=True, outputs=len(window))
                    batch = build_batch([work], self._planner)
                    logits = self._run(batch.step).outputs["logits"]
                    batch.commit()
                yield logits
        finally:
            with self._lock:
                sequence.release()

    def _run(self, step: Step) -> StepRun:
        run = self._backend.start(step)
        run.run()
        return run
