"""Requests beside each other: same tokens as alone, no page lost, no request waiting for ever."""

from __future__ import annotations

import dataclasses
import itertools
import math
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kit.harness import Harness
from kit.tiny_models import tiny_model, write_gguf
from kvfold.cache.session import Session
from kvfold.engine.request import FinishReason
from kvfold.engine.runner import PROMPT_SHARE, Runner
from kvfold.engine.sampler import Sampler, SamplingParams
from kvfold.errors import NumericsError, OutOfPages, SettingError
from kvfold.model.step import Choice, Step

NO_END: frozenset[int] = frozenset()
Clock = Callable[[], float]


def _greedy(logits: np.ndarray, history: list[int]) -> int:
    return int(logits.argmax())


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Dense: a batch may add in another order, which a router near a tie turns into other tokens.
    return write_gguf(tiny_model("v3", first_k_dense_replace=3), tmp_path_factory.mktemp("m") / "m.gguf")


def _runner(
    path: Path, *, n_ctx: int = 2048, max_prompt_rows: int = 64, clock: Clock = time.perf_counter
) -> tuple[Harness, Runner]:
    harness = Harness(path, n_ctx=n_ctx, backend="native")
    loaded = harness.loaded
    return harness, Runner(
        loaded.backend,
        loaded.pool,
        loaded.plan,
        num_segments=loaded.model.num_segments,
        max_prompt_rows=max_prompt_rows,
        clock=clock,
    )


def _prompts() -> list[list[int]]:
    rng = np.random.default_rng(4)
    return [rng.integers(0, 272, length).tolist() for length in (1, 40, 150, 64, 7)]


def _finish(runner: Runner) -> None:
    for _ in range(1000):
        if runner.is_idle:
            return
        runner.step()
    raise AssertionError("requests are still waiting after 1000 steps")


@pytest.mark.parametrize("n_ctx", [2048, 256])  # 256: requests wait for pages
def test_together_is_as_alone(path: Path, n_ctx: int) -> None:
    alone = []
    for prompt in _prompts():
        _, runner = _runner(path)
        request = runner.submit(prompt, _greedy, 20, NO_END)
        _finish(runner)
        alone.append(request.token_ids)
    harness, runner = _runner(path, n_ctx=n_ctx)
    requests = [runner.submit(prompt, _greedy, 20, NO_END) for prompt in _prompts()]
    _finish(runner)
    assert [r.token_ids for r in requests] == alone
    assert all(r.finish_reason is FinishReason.LENGTH for r in requests)
    assert harness.loaded.pool.num_free == harness.loaded.pool.num_pages


def test_cancel_frees_pages_and_leaves_the_others_alone(path: Path) -> None:
    harness, runner = _runner(path)
    first, second, waiting = (runner.submit(p, _greedy, 30, NO_END) for p in _prompts()[:3])
    for _ in range(4):
        runner.step()
    runner.cancel(first)
    runner.cancel(waiting)
    runner.cancel(first)  # a second time changes nothing
    _finish(runner)
    _, alone = _runner(path)
    expected = alone.submit(_prompts()[1], _greedy, 30, NO_END)
    _finish(alone)
    assert second.token_ids == expected.token_ids
    assert (first.finish_reason, waiting.finish_reason) == (FinishReason.CANCELLED, FinishReason.CANCELLED)
    assert harness.loaded.pool.num_free == harness.loaded.pool.num_pages


def test_an_end_token_ends(path: Path) -> None:
    _, runner = _runner(path)
    request = runner.submit(_prompts()[1], _greedy, 30, NO_END)
    _finish(runner)
    end = request.token_ids[5]
    _, runner = _runner(path)
    ended = runner.submit(_prompts()[1], _greedy, 30, frozenset({end}))
    _finish(runner)
    assert ended.finish_reason is FinishReason.STOP
    assert ended.token_ids == request.token_ids[: request.token_ids.index(end) + 1]


def test_a_request_that_can_never_fit_is_refused_at_once(path: Path) -> None:
    _, runner = _runner(path, n_ctx=128)
    with pytest.raises(
        OutOfPages, match="100 prompt tokens and max_tokens=29 need 192 cache slots; the cache has 128"
    ):
        runner.submit([1] * 100, _greedy, 29, NO_END)
    assert runner.is_idle


def test_a_session_computes_only_what_is_new(path: Path) -> None:
    harness, runner = _runner(path)
    session = Session(harness.loaded.pool)
    prompt = _prompts()[2]
    first = runner.submit(prompt, _greedy, 10, NO_END, session=session)
    _finish(runner)
    longer = prompt + first.token_ids + [5, 6, 7]
    second = runner.submit(longer, _greedy, 10, NO_END, session=session)
    assert second.num_reused == len(prompt) + 9  # the last token was sampled, never cached
    _finish(runner)
    edited = [*prompt[:70], *longer[80:]]
    third = runner.submit(edited, _greedy, 10, NO_END, session=session)
    assert third.num_reused >= 70
    _finish(runner)
    again = runner.submit(edited, _greedy, 10, NO_END, session=session)
    assert again.num_reused == len(edited) - 1
    _finish(runner)

    for request, ids in ((second, longer), (third, edited), (again, edited)):
        _, fresh = _runner(path)
        expected = fresh.submit(ids, _greedy, 10, NO_END)
        _finish(fresh)
        assert request.token_ids == expected.token_ids
    session.release()
    assert harness.loaded.pool.num_free == harness.loaded.pool.num_pages


def test_a_failing_sampler_ends_its_request_alone(path: Path) -> None:
    harness, runner = _runner(path)

    def fails(logits: np.ndarray, history: list[int]) -> int:
        raise NumericsError("NaN among the logits")

    good, bad, late = _prompts()[1], _prompts()[3], _prompts()[4]
    first = runner.submit(good, _greedy, 8, NO_END)
    broken = runner.submit(bad, fails, 8, NO_END)
    third = runner.submit(late, _greedy, 8, NO_END)
    _finish(runner)
    assert broken.finish_reason is FinishReason.ERROR
    assert isinstance(broken.error, NumericsError)
    for request, prompt in ((first, good), (third, late)):
        _, alone = _runner(path)
        expected = alone.submit(prompt, _greedy, 8, NO_END)
        _finish(alone)
        assert request.token_ids == expected.token_ids
    assert harness.loaded.pool.num_free == harness.loaded.pool.num_pages


def test_a_failing_step_ends_its_requests_and_no_other(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    harness, runner = _runner(path)
    request = runner.submit(_prompts()[1], _greedy, 8, NO_END)
    with monkeypatch.context() as broken:
        broken.setattr(harness.loaded.backend, "start", lambda step: 1 // 0)
        runner.step()
    assert request.finish_reason is FinishReason.ERROR
    assert isinstance(request.error, ZeroDivisionError)
    assert runner.is_idle
    assert harness.loaded.pool.num_free == harness.loaded.pool.num_pages
    later = runner.submit(_prompts()[1], _greedy, 8, NO_END)
    _finish(runner)
    assert later.finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize("where", ["backend", "sampler"])
def test_an_interrupt_leaves_the_engine_usable(path: Path, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    harness, runner = _runner(path)
    requests = [runner.submit(p, _interrupt if where == "sampler" else _greedy, 8, NO_END) for p in _prompts()[:3]]
    with monkeypatch.context() as broken:
        if where == "backend":
            broken.setattr(harness.loaded.backend, "start", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            _finish(runner)
    for request in requests:
        runner.cancel(request)
    assert harness.loaded.pool.num_free == harness.loaded.pool.num_pages
    later = runner.submit(_prompts()[1], _greedy, 8, NO_END)
    _finish(runner)
    assert later.finish_reason is FinishReason.LENGTH


def test_pages_held_by_a_session_are_named_not_waited_for(path: Path) -> None:
    harness, runner = _runner(path, n_ctx=256)
    session = Session(harness.loaded.pool)
    runner.submit(_prompts()[2], _greedy, 4, NO_END, session=session)
    _finish(runner)
    starved = runner.submit(_prompts()[2], _greedy, 4, NO_END)
    runner.step()
    assert isinstance(starved.error, OutOfPages)
    assert "held by other sessions" in str(starved.error)
    session.release()
    again = runner.submit(_prompts()[2], _greedy, 4, NO_END)
    _finish(runner)
    assert again.finish_reason is FinishReason.LENGTH


def test_a_busy_session_refuses_a_second_request(path: Path) -> None:
    harness, runner = _runner(path)
    session = Session(harness.loaded.pool)
    first = runner.submit(_prompts()[1], _greedy, 8, NO_END, session=session)
    runner.step()
    with pytest.raises(SettingError, match="request under way"):
        runner.submit(_prompts()[2], _greedy, 8, NO_END, session=session)
    with pytest.raises(SettingError, match="request under way"):
        session.release()
    _finish(runner)
    assert len(first.token_ids) == 8
    session.release()


# --- steps beside an open prompt ------------------------------------------------------------------------------------


def _slices_of_one_segment() -> Clock:
    """Looks at the clock are further and further apart, so every slice is over at the first look after it began."""
    ticks = itertools.count()
    return lambda: 10.0 ** next(ticks)


def _interrupt(*arguments: object) -> int:
    raise KeyboardInterrupt


def _alone(path: Path, prompt: list[int], num_tokens: int) -> list[int]:
    _, runner = _runner(path, max_prompt_rows=2048)
    request = runner.submit(prompt, _greedy, num_tokens, NO_END)
    _finish(runner)
    return request.token_ids


def test_generation_and_short_prompts_go_on_between_the_layers_of_a_long_prompt(path: Path) -> None:
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, 272, length).tolist() for length in (40, 700, 30)]
    harness, runner = _runner(path, max_prompt_rows=2048, clock=_slices_of_one_segment())
    running = runner.submit(prompts[0], _greedy, 12, NO_END)
    while not running.token_ids:
        runner.step()
    long = runner.submit(prompts[1], _greedy, 4, NO_END)
    late, tokens, done = None, [], []
    while not long.token_ids:
        runner.step()
        tokens.append(len(running.token_ids))
        done.append(runner.prompt_rows_done(long))
        if late is None:
            late = runner.submit(prompts[2], _greedy, 4, NO_END)
    segments = harness.loaded.model.num_segments
    # one segment a step, and in each step one token
    assert tokens == list(range(2, 2 + segments))
    assert done == [pytest.approx(700 * (i + 1) / segments) for i in range(segments)]
    assert late is not None and len(late.token_ids) >= segments - 2, "it came later and was answered earlier"
    _finish(runner)
    for request, prompt in zip((running, long, late), prompts, strict=True):
        assert request.token_ids == _alone(path, prompt, request.max_tokens)
    assert harness.loaded.pool.num_free == harness.loaded.pool.num_pages


def test_an_open_prompt_has_its_share_of_the_time(path: Path) -> None:
    """A step of generation takes 1 second here and a segment of the prompt 0.5."""
    harness, runner = _runner(path, max_prompt_rows=2048)
    now = [0.0]
    runner._clock = lambda: now[0]
    start = harness.loaded.backend.start

    class Timed:
        def __init__(self, step: Step) -> None:
            self._run, self._is_prompt = start(step), step.num_rows > 1

        position = property(lambda self: self._run.position)
        outputs = property(lambda self: self._run.outputs)

        def run(self, last: int | None = None) -> int:
            now[0] += 0.5 if self._is_prompt else 1.0
            return self._run.run(last)

    runner._backend = SimpleNamespace(start=Timed)  # type: ignore[assignment]
    running = runner.submit([1, 2], _greedy, 50, NO_END)
    while not running.token_ids:
        runner.step()
    runner.submit([3] * 300, _greedy, 1, NO_END)
    before = now[0]
    runner.step()
    assert PROMPT_SHARE == 0.8
    spent = min(4.0, 0.5 * harness.loaded.model.num_segments)
    assert now[0] - before == 1.0 + spent


def test_cancelling_an_open_prompt_leaves_its_pages_to_others(path: Path) -> None:
    """Its step must not write to them any more; one that shares the step begins again."""
    rng = np.random.default_rng(2)
    prompts = [rng.integers(0, 272, length).tolist() for length in (300, 310, 320)]
    harness, runner = _runner(path, n_ctx=640, max_prompt_rows=2048, clock=_slices_of_one_segment())
    dropped = runner.submit(prompts[0], _greedy, 4, NO_END)
    beside = runner.submit(prompts[1], _greedy, 4, NO_END)
    waiting = runner.submit(prompts[2], _greedy, 4, NO_END)
    for _ in range(3):
        runner.step()
    assert runner.prompt_rows_done(dropped) > 0
    runner.cancel(dropped)
    assert runner.prompt_rows_done(beside) == 0
    _finish(runner)
    for request, prompt in ((beside, prompts[1]), (waiting, prompts[2])):
        assert request.token_ids == _alone(path, prompt, 4)
    assert harness.loaded.pool.num_free == harness.loaded.pool.num_pages


def test_an_interrupted_slice_goes_on_where_it_stood(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    harness, runner = _runner(path, max_prompt_rows=2048, clock=_slices_of_one_segment())
    prompt = _prompts()[2]
    request = runner.submit(prompt, _greedy, 4, NO_END)
    runner.step()
    assert runner._prompt is not None
    with monkeypatch.context() as broken:
        broken.setattr(runner._prompt.run, "run", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            runner.step()
    assert runner.prompt_rows_done(request) == len(prompt) / harness.loaded.model.num_segments
    _finish(runner)
    assert request.token_ids == _alone(path, prompt, 4)


def test_a_failing_slice_ends_the_prompt_and_no_other(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    harness, runner = _runner(path, max_prompt_rows=2048, clock=_slices_of_one_segment())
    running = runner.submit(_prompts()[1], _greedy, 12, NO_END)
    while not running.token_ids:
        runner.step()
    long = runner.submit(_prompts()[2], _greedy, 4, NO_END)
    runner.step()
    assert runner._prompt is not None
    with monkeypatch.context() as broken:
        broken.setattr(runner._prompt.run, "run", lambda last: 1 // 0)
        runner.step()
    assert isinstance(long.error, ZeroDivisionError) and running.finish_reason is None
    _finish(runner)
    assert running.token_ids == _alone(path, _prompts()[1], 12)
    assert harness.loaded.pool.num_free == harness.loaded.pool.num_pages


def test_a_thread_that_generates_lets_another_come_in_between(path: Path) -> None:
    _, runner = _runner(path, n_ctx=4096)
    long = runner.submit(_prompts()[1], _greedy, 2000, NO_END)
    stepping = threading.Thread(target=runner.advance, args=(long, 1999))
    stepping.start()
    try:
        waits = []
        for _ in range(20):
            started = time.perf_counter()
            other = runner.submit(_prompts()[4], _greedy, 2, NO_END)
            runner.cancel(other)
            waits.append(time.perf_counter() - started)
        assert stepping.is_alive() and max(waits) < 2.0
    finally:
        runner.cancel(long)
        stepping.join()


def test_a_request_dropped_within_a_step_is_cancelled_after_it(path: Path) -> None:
    """A finalizer runs anywhere, in the thread whose turn it is as well."""
    harness, runner = _runner(path)
    other = runner.submit(_prompts()[2], _greedy, 8, NO_END)

    def dropping(logits: np.ndarray, history: list[int]) -> int:
        if not history[len(_prompts()[1]) :]:
            runner.drop(other)
            assert other.finish_reason is None
        return _greedy(logits, history)

    first = runner.submit(_prompts()[1], dropping, 8, NO_END)
    _finish(runner)
    assert other.finish_reason is FinishReason.CANCELLED
    assert first.token_ids == _alone(path, _prompts()[1], 8)
    assert harness.loaded.pool.num_free == harness.loaded.pool.num_pages


def test_an_idle_step_does_nothing(path: Path) -> None:
    _, runner = _runner(path)
    runner.step()
    assert runner.is_idle


def _likeliest() -> Sampler:
    return Sampler(SamplingParams(temperature=0), 272)


def _chosen(logits: np.ndarray, choice: Choice) -> int:
    if not np.isfinite(logits.max()):
        return -1
    params = SamplingParams(
        top_k=int(choice.top_k), top_p=choice.top_p, min_p=math.exp(choice.depth), temperature=1 / choice.sharpness
    )
    sampler = Sampler(params, logits.size)
    sampler._points.append(choice.point)
    return sampler.sample(logits, ())


class _Choosing:
    """A backend that chooses tokens itself: a step may name what the one before it said."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self._chosen = np.zeros(0, np.int32)
        self.num_ahead = 0
        self.serves: Callable[[Step], bool] = lambda step: True

    def chooses(self, step: Step) -> bool:
        return len(step.choices) == step.num_rows == len(step.kv_lens) and self.serves(step)

    def start(self, step: Step) -> Any:
        tokens = step.token_ids.copy()
        named = tokens < 0
        self.num_ahead += bool(named.any())
        tokens[named] = np.maximum(self._chosen[-1 - tokens[named]], 0)
        run = self._backend.start(dataclasses.replace(step, token_ids=tokens))
        choosing = self

        class Run:
            outputs = property(lambda self: {} if choosing.chooses(step) else run.outputs)
            position = property(lambda self: run.position)

            def run(self, last: int | None = None) -> int:
                end = run.run(last)
                if choosing.chooses(step) and "logits" in run.outputs:
                    rows = zip(run.outputs["logits"], step.choices.tolist(), strict=True)
                    self.chosen = np.array([_chosen(logits, Choice(*choice)) for logits, choice in rows], np.int32)
                    choosing._chosen = self.chosen
                return end

        return Run()


def _choosing_runner(path: Path) -> tuple[Harness, Runner, _Choosing]:
    harness, runner = _runner(path)
    backend = _Choosing(harness.loaded.backend)
    runner._backend = backend
    return harness, runner, backend


def _alone(path: Path, prompt: list[int], num_tokens: int) -> list[int]:
    _, runner = _runner(path)
    request = runner.submit(prompt, _greedy, num_tokens, NO_END)
    _finish(runner)
    return request.token_ids


def test_steps_launched_ahead_say_the_same(path: Path) -> None:
    """Requests of five lengths that end at different tokens, one by an end token, one by what its owner accepts."""
    alone = [_alone(path, prompt, 20) for prompt in _prompts()]
    harness, runner, backend = _choosing_runner(path)
    requests = [
        runner.submit(
            prompt,
            _greedy,
            20 - 3 * i,
            frozenset({tokens[9]}) if i == 1 else NO_END,
            accept=(lambda token, tokens=tokens: token == tokens[5]) if i == 2 else lambda token: False,
            choices=_likeliest(),
        )
        for i, (prompt, tokens) in enumerate(zip(_prompts(), alone, strict=True))
    ]
    _finish(runner)
    assert backend.num_ahead > 5
    lengths = [20, alone[1].index(alone[1][9]) + 1, alone[2].index(alone[2][5]) + 1, 11, 8]
    assert [r.token_ids for r in requests] == [t[:n] for t, n in zip(alone, lengths, strict=True)]
    assert harness.loaded.pool.num_free == harness.loaded.pool.num_pages


def test_a_newcomer_joins_steps_launched_ahead(path: Path) -> None:
    first, second = _prompts()[1], _prompts()[4]
    _, runner, backend = _choosing_runner(path)
    early = runner.submit(first, _greedy, 20, NO_END, choices=_likeliest())
    for _ in range(5):
        runner.step()
    late = runner.submit(second, _greedy, 20, NO_END, choices=_likeliest())
    other = runner.submit(second, _greedy, 3, NO_END)  # samples by itself: nobody goes ahead beside it
    _finish(runner)
    assert early.token_ids == _alone(path, first, 20)
    assert late.token_ids == _alone(path, second, 20)
    assert other.token_ids == late.token_ids[:3]
    assert backend.num_ahead > 5


def test_a_session_goes_on_after_a_row_too_many(path: Path) -> None:
    """Cancelled while the next token is under way: what the session keeps is what its owner saw."""
    prompt = _prompts()[1]
    harness, runner, _ = _choosing_runner(path)
    session = Session(harness.loaded.pool)
    request = runner.submit(prompt, _greedy, 20, NO_END, session=session, choices=_likeliest())
    for _ in range(6):
        runner.step()
    runner.cancel(request)
    assert session.sequence.length == len(session.token_ids) <= len(prompt) + len(request.token_ids)
    again = runner.submit([*prompt, *request.token_ids], _greedy, 20, NO_END, session=session, choices=_likeliest())
    _finish(runner)
    assert request.token_ids + again.token_ids == _alone(path, prompt, 20 + len(request.token_ids))
    session.release()
    assert harness.loaded.pool.num_free == harness.loaded.pool.num_pages


def test_logits_between_steps_launched_ahead(path: Path) -> None:
    prompt = _prompts()[1]
    _, runner, _ = _choosing_runner(path)
    request = runner.submit(prompt, _greedy, 20, NO_END, choices=_likeliest())
    for _ in range(4):
        runner.step()
        next(runner.logits([3]))
    _finish(runner)
    assert request.token_ids == _alone(path, prompt, 20)


def test_a_row_without_a_likeliest_token_ends_its_request_alone(path: Path) -> None:
    _, runner, _ = _choosing_runner(path)
    requests = [runner.submit(p, _greedy, 20, NO_END, choices=_likeliest()) for p in _prompts()[1:3]]
    while not all(len(r.token_ids) > 3 for r in requests):
        runner.step()
    ahead = runner._ahead
    assert ahead is not None
    ahead.run.chosen[0] = -1
    _finish(runner)
    assert isinstance(requests[0].error, NumericsError)
    assert requests[1].token_ids == _alone(path, _prompts()[2], 20)


SETTINGS: list[dict[str, Any]] = [
    {"temperature": 1.5},
    {"temperature": 0},
    {"temperature": 2.0, "top_k": 0, "top_p": 1.0},
    {"temperature": 1.0, "top_k": 3},
    {"temperature": 4.0, "top_p": 0.5},
]


def _drawing(runner: Runner, i: int, **changes: Any) -> Any:
    """Prompt i with settings and a seed of its own."""
    sampler = Sampler(SamplingParams(**SETTINGS[i] | changes, seed=i), 272)
    choices = None if sampler.needs_logits else sampler
    return runner.submit(_prompts()[i], sampler.sample, 20 - 3 * i, NO_END, choices=choices)


def test_draws_of_steps_launched_ahead_are_those_of_steps_taken_one_by_one(path: Path) -> None:
    """Settings and seeds of their own, beside each other; each ends with a row too many, whose number nobody uses."""
    alone = []
    for i in range(5):
        _, runner = _runner(path)
        alone.append(_drawing(runner, i))
        _finish(runner)
    _, runner, backend = _choosing_runner(path)
    together = [_drawing(runner, i) for i in range(5)]
    _finish(runner)
    assert backend.num_ahead > 5
    assert [r.token_ids for r in together] == [r.token_ids for r in alone]


def test_draws_go_on_where_a_neighbour_needs_logits(path: Path) -> None:
    """Tokens that the host samples while it has to, because of another request's penalties, use the numbers in order."""
    _, runner = _runner(path)
    alone = [_drawing(runner, i) for i in (0, 2)]
    _finish(runner)
    _, runner, backend = _choosing_runner(path)
    together = [_drawing(runner, 0)]
    for _ in range(4):
        runner.step()
    ahead = backend.num_ahead
    assert ahead > 1
    between = _drawing(runner, 4, presence_penalty=0.5)
    for _ in range(3):
        runner.step()
    together.append(_drawing(runner, 2))
    _finish(runner)
    assert between.finish_reason is FinishReason.LENGTH
    assert backend.num_ahead > ahead
    assert [r.token_ids for r in together] == [r.token_ids for r in alone]


def test_draws_go_on_where_a_step_launched_ahead_does_not_choose(path: Path) -> None:
    """Its ids are those that the step before it chose; its logits go to the sampler, and the next is not launched ahead."""
    _, runner = _runner(path)
    alone = [_drawing(runner, i) for i in (0, 2)]
    _finish(runner)
    _, runner, backend = _choosing_runner(path)
    unserved = set()

    def serves(step: Step) -> bool:
        """Asked several times of a step; every third length of the longer request, whatever the other's is then."""
        if step.kv_lens.max() % 3 == 0 and (step.token_ids < 0).any():
            unserved.add(tuple(step.kv_lens))
            return False
        return True

    backend.serves = serves
    together = [_drawing(runner, i) for i in (0, 2)]
    _finish(runner)
    assert len(unserved) > 1 and backend.num_ahead > len(unserved)
    assert [r.token_ids for r in together] == [r.token_ids for r in alone]


def test_a_step_launched_ahead_that_nobody_takes_uses_no_number(path: Path) -> None:
    """A turn of a session is cancelled while its next token is under way; the same dice go on."""
    prompt = _prompts()[1]
    sampler = Sampler(SamplingParams(temperature=2.0, seed=3), 272)
    harness, runner, _ = _choosing_runner(path)
    request = runner.submit(prompt, sampler.sample, 20, NO_END, choices=sampler)
    for _ in range(6):
        runner.step()
    assert runner._ahead is not None
    runner.cancel(request)
    again = runner.submit([*prompt, *request.token_ids], sampler.sample, 20, NO_END, choices=sampler)
    _finish(runner)
    _, runner = _runner(path)
    expected = Sampler(SamplingParams(temperature=2.0, seed=3), 272)
    alone = runner.submit(prompt, expected.sample, 20 + len(request.token_ids), NO_END)
    _finish(runner)
    assert request.token_ids + again.token_ids == alone.token_ids
    assert harness.loaded.pool.num_free == harness.loaded.pool.num_pages
