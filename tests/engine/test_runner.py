"""Requests beside each other: same tokens as alone, no page lost, no request waiting for ever."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kit.harness import Harness
from kit.tiny_models import tiny_model, write_gguf
from kvfold.cache.session import Session
from kvfold.engine.request import FinishReason
from kvfold.engine.runner import Runner
from kvfold.errors import NumericsError, OutOfPages, SettingError

NO_END: frozenset[int] = frozenset()


def _greedy(logits: np.ndarray, history: list[int]) -> int:
    return int(logits.argmax())


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Dense: a batch may add in another order, which a router near a tie turns into other tokens.
    return write_gguf(tiny_model("v3", first_k_dense_replace=3), tmp_path_factory.mktemp("m") / "m.gguf")


def _runner(path: Path, *, n_ctx: int = 2048, max_prompt_rows: int = 64) -> tuple[Harness, Runner]:
    harness = Harness(path, n_ctx=n_ctx)
    loaded = harness.loaded
    return harness, Runner(loaded.backend, loaded.pool, loaded.plan, max_prompt_rows=max_prompt_rows)


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

    def interrupt(*arguments: object) -> int:
        raise KeyboardInterrupt

    requests = [runner.submit(p, interrupt if where == "sampler" else _greedy, 8, NO_END) for p in _prompts()[:3]]
    with monkeypatch.context() as broken:
        if where == "backend":
            broken.setattr(harness.loaded.backend, "start", interrupt)
        with pytest.raises(KeyboardInterrupt):
            runner.step()
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


def test_an_idle_step_does_nothing(path: Path) -> None:
    _, runner = _runner(path)
    runner.step()
    assert runner.is_idle
