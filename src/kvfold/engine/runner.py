"""Runs requests: rows are scheduled, a step of them runs, its tokens are taken. Owns the requests between steps; knows
no text.

Generated rows run as a step of their own, all layers at once. A prompt's step runs a slice of layers at a time and stays
open at the cut between two layers, where generated rows, new requests and cancellations come in:

    generation | prompt, layers 0-6 | generation | prompt, layers 7-13 | generation, short prompts | ...

PROMPT_SHARE of the time is the open prompt's: a slice lasts 4 x as long as what came in before it took, and at least a
layer. So a prompt beside others takes at most 1.25 x as long as alone, and a generated token waits for one slice of
one window, never for a whole prompt. Alone, a slice ends after QUIET_SECONDS, which is what a new request waits.

Where the backend chooses tokens itself and every generating request says how in numbers (Request.choices), the next step
of them is launched before the tokens of the last are known; a request that ends meanwhile has a row too many in it, which
nobody reads and whose random number is not used up. What arrives in between waits until that step is taken.

Any thread may call any method; they take turns. What fails in one request (NaN logits, say) ends that request alone;
what fails in a step ends the requests of that step, each with the error. After either, and after an interrupt, the
others go on.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import NDArray

from kvfold.cache.pages import PagePool, Sequence
from kvfold.cache.session import Session
from kvfold.engine.batch import Batch, Planner, Work, build_batch
from kvfold.engine.request import Accept, Choices, FinishReason, Request, Sample
from kvfold.engine.sampler import no_distribution
from kvfold.engine.scheduler import Scheduler
from kvfold.model.step import Choosing, ChoosingRun, StepRun, Steps

PROMPT_SHARE = 0.8
QUIET_SECONDS = 0.1
HAND_OVER_SECONDS = 1e-4
# Rows whose logits are asked for in one step: 102,400 tokens x 4 B x 512 rows are 210 MB.
LOGIT_ROWS = 512

Scheduled = list[tuple[Request, Work]]


@dataclass(frozen=True, eq=False)
class _OpenStep:
    """A step between its first segment and its last. Its rows count as cached when it has ended."""

    scheduled: Scheduled
    batch: Batch
    run: StepRun
    chooses: bool  # the run is a ChoosingRun


class Runner:
    """num_segments: of the model; max_prompt_rows: prompt rows in one step; clock: seconds, for tests."""

    def __init__(
        self,
        backend: Steps,
        pool: PagePool,
        planner: Planner,
        *,
        num_segments: int,
        max_prompt_rows: int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._backend = backend
        self._pool = pool
        self._planner = planner
        self._num_segments = num_segments
        self._max_prompt_rows = max_prompt_rows
        self._clock = clock
        self._scheduler = Scheduler(pool, max_prompt_rows)
        self._prompt: _OpenStep | None = None
        self._ahead: _OpenStep | None = None  # runs, and its tokens are not taken yet
        self._turn = threading.Lock()
        self._asking: deque[object] = deque()  # one entry for each thread that waits for a turn
        self._dropped: deque[Request] = deque()  # to be cancelled within the next turn

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
        choices: Choices | None = None,
    ) -> Request:
        """Queue a prompt of at least one token; what its session has cached of it is not computed again.

        Raises OutOfPages where it can never fit, SettingError where the session is busy.
        """
        with self._take_turn():
            if session is not None:
                session.check_free()
            sequence = session.sequence if session else Sequence(self._pool)
            request = Request(prompt_ids, sample, accept, max_tokens, end_ids, sequence, session, choices)
            self._scheduler.submit(request)
            request.num_reused = session.begin(prompt_ids) if session else 0
            return request

    def cancel(self, request: Request) -> None:
        """End a request now. Does nothing to one that has ended."""
        with self._take_turn():
            self._retire(request, FinishReason.CANCELLED)

    def drop(self, request: Request) -> None:
        """As `cancel`, at the end of the turn under way, if any: never waits, so a finalizer may call it anywhere."""
        self._dropped.append(request)
        if self._turn.acquire(blocking=False):
            try:
                self._retire_dropped()
            finally:
                self._turn.release()

    def advance(self, request: Request, num_tokens: int, watch: Callable[[], None] = lambda: None) -> None:
        """Run steps until this request has more than `num_tokens` tokens or has ended; `watch` is called after each."""
        while request.finish_reason is None and len(request.token_ids) <= num_tokens:
            with self._take_turn():
                if request.finish_reason is None and len(request.token_ids) <= num_tokens:
                    self._step()
            watch()
            if self._asking:  # a lock goes to whoever runs, and that is this thread
                time.sleep(HAND_OVER_SECONDS)

    def step(self) -> None:
        """Every generating request gets a token, the prompts get a slice further; those that end have their
        finish_reason set."""
        with self._take_turn():
            self._step()

    def prompt_rows_done(self, request: Request) -> float:
        """Of the prompt's tokens, those computed; of an open step, its layers' share. Any thread, at any time."""
        if request.token_ids:
            return len(request.prompt_ids)
        done = float(min(request.sequence.length, len(request.prompt_ids)))
        prompt = self._prompt
        if prompt is not None:
            for its, work in prompt.scheduled:
                if its is request:
                    done += len(work.token_ids) * prompt.run.position / self._num_segments
        return min(done, len(request.prompt_ids))

    def logits(self, token_ids: list[int]) -> Iterator[NDArray[np.float32]]:
        """Logits of every position, window by window: float32 [rows, vocab]."""
        sequence = Sequence(self._pool)
        rows = min(self._max_prompt_rows, LOGIT_ROWS)
        try:
            for start in range(0, len(token_ids), rows):
                window = token_ids[start : start + rows]
                with self._take_turn():
                    self._settle()
                    work = Work(sequence, window, is_prompt=True, outputs=len(window))
                    batch = build_batch([work], self._planner)
                    run = self._backend.start(batch.step)
                    run.run()
                    batch.commit()
                yield run.outputs["logits"]
        finally:
            with self._take_turn():
                sequence.release()

    @contextmanager
    def _take_turn(self) -> Iterator[None]:
        asking = object()
        self._asking.append(asking)
        try:
            with self._turn:
                self._asking.remove(asking)
                self._retire_dropped()
                yield
                self._retire_dropped()
        finally:
            if asking in self._asking:  # interrupted
                self._asking.remove(asking)

    def _retire_dropped(self) -> None:
        while self._dropped:
            self._retire(self._dropped.popleft(), FinishReason.CANCELLED)

    def _step(self) -> None:
        self._scheduler.admit()
        started = self._clock()
        others = self._ahead.scheduled if self._ahead else self._scheduler.generation()
        self._generate(others)
        if self._prompt is not None:
            short = self._scheduler.short_prompts(without=[request for request, _ in self._prompt.scheduled])
            self._run_whole(short)
            others += short
        took = self._clock() - started
        self._go_on(took * PROMPT_SHARE / (1 - PROMPT_SHARE) if others else QUIET_SECONDS)

    def _generate(self, scheduled: Scheduled) -> None:
        """The step that was launched ahead, or one of these; where possible the next is launched before it is taken."""
        step, self._ahead = self._ahead or self._launch(scheduled), None
        if step is not None:
            self._take_all(step, self._following(step))

    def _settle(self) -> None:
        """Takes the step that was launched ahead and launches none: the next step may be anybody's."""
        step, self._ahead = self._ahead, None
        if step is not None:
            self._take_all(step, [])

    def _run_whole(self, scheduled: Scheduled) -> None:
        """A step from its first segment to its last."""
        step = self._launch(scheduled)
        if step is not None:
            self._take_all(step, [])

    def _launch(self, scheduled: Scheduled) -> _OpenStep | None:
        step = self._start(scheduled) if scheduled else None
        if step is None:
            return None
        try:
            step.run.run()
        except Exception as error:
            self._fail(scheduled, error)
            return None
        step.batch.commit()
        return step

    def _following(self, step: _OpenStep) -> Scheduled:
        """The next row of each request of a step whose tokens are not known yet; nothing where it has to wait for them."""
        working = [request for request, _ in step.scheduled if request.finish_reason is None]
        if not step.chooses or self._prompt is not None or len(working) < len(self._scheduler.running):
            return []
        return [
            (request, Work(request.sequence, [-1 - rows.start], is_prompt=False, choice=request.choice(1)))
            for (request, _), rows in zip(step.scheduled, step.batch.output_slices, strict=True)
            if request.finish_reason is None and len(request.token_ids) + 1 < request.max_tokens
        ]

    def _go_on(self, seconds: float) -> None:
        """The prompts' step, from where it stands, for so long and at least a segment."""
        if self._prompt is None:
            scheduled = self._scheduler.prompts()
            self._prompt = self._start(scheduled) if scheduled else None
        step = self._prompt
        if step is None:
            return
        until = self._clock() + seconds
        try:
            while step.run.run(step.run.position + 1) < self._num_segments:
                if self._clock() >= until:
                    return
        except Exception as error:
            self._prompt = None
            self._fail(step.scheduled, error)
            return
        self._prompt = None
        step.batch.commit()
        self._take_all(step, [])

    def _start(self, scheduled: Scheduled) -> _OpenStep | None:
        """Before its first segment. None: it cannot run, and its requests have ended."""
        now = time.perf_counter()
        for request, _ in scheduled:
            request.prompt_started_at = request.prompt_started_at or now
        try:
            batch = build_batch([work for _, work in scheduled], self._planner)
            chooses = isinstance(self._backend, Choosing) and self._backend.chooses(batch.step)
            return _OpenStep(scheduled, batch, self._backend.start(batch.step), chooses)
        except Exception as error:
            self._fail(scheduled, error)
            return None

    def _fail(self, scheduled: Scheduled, error: Exception) -> None:
        for request, _ in scheduled:
            self._retire(request, FinishReason.ERROR, error)

    def _take_all(self, step: _OpenStep, following: Scheduled) -> None:
        """The step runs or has run, its rows count as cached: its tokens are sampled. `following` is launched before."""
        untaken = [request for request, work in step.scheduled if work.outputs and request.finish_reason is None]
        try:
            self._ahead = self._launch(following)
            chosen = cast(ChoosingRun, step.run).chosen.tolist() if step.chooses else None
            logits = np.empty(0) if chosen else step.run.outputs["logits"]
            for (request, work), rows in zip(step.scheduled, step.batch.output_slices, strict=True):
                if work.outputs and request.finish_reason is None:
                    self._take(request, chosen[rows][0] if chosen else logits[rows][0])
                    untaken.remove(request)
        finally:  # an interrupt: its rows are in the cache and its token is not known
            for request in untaken:
                self._retire(request, FinishReason.CANCELLED)
        if self._ahead is not None and all(request.finish_reason for request, _ in self._ahead.scheduled):
            self._ahead = None  # its rows are nobody's; whatever takes their pages is launched after it

    def _take(self, request: Request, found: int | NDArray[np.float32]) -> None:
        """found: the token, -1 for none, or the logits to sample it from."""
        try:
            if not isinstance(found, int):
                token = request.sample(found, request.history)
            elif found < 0:
                raise no_distribution("the highest logit is not finite")
            else:
                token = found
                cast(Choices, request.choices).skip()
            request.add(token)
            is_stopped = token in request.end_ids or request.accept(token)
        except Exception as error:
            self._retire(request, FinishReason.ERROR, error)
            return
        if is_stopped:
            self._retire(request, FinishReason.STOP)
        elif len(request.token_ids) >= request.max_tokens:
            self._retire(request, FinishReason.LENGTH)

    def _retire(self, request: Request, reason: FinishReason, error: Exception | None = None) -> None:
        """Ends a request that has not ended. Its pages may be another's from now on, so an open step that would still
        write to them is dropped; the others in it begin that window again."""
        if request.finish_reason is not None:
            return
        if self._prompt is not None and any(its is request for its, _ in self._prompt.scheduled):
            self._prompt = None
        self._scheduler.retire(request, reason, error)
