"""Tokens chosen on the device: the sampler's, of the same logits and the same point, whatever filters; none where a logit
is no number."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from kvfold.engine.sampler import Sampler, SamplingParams
from kvfold.kernels.choose import choose, take_chosen
from kvfold.model.step import LIKELIEST, MOST_TOP_K, Choice, choices_of

# The host's weights are float32 and rounded by another exponential: a point this near to the edge of a token is on either side.
EDGE = 2e-6


def chosen(logits: NDArray[np.float32], choices: list[Choice], device: str) -> list[int]:
    """The tokens of rows that do not lie side by side."""
    size = len(logits)
    padded = torch.full((size, logits.shape[1] + 3), torch.nan, device=device)
    x = padded[:, : logits.shape[1]]
    x.copy_(torch.from_numpy(logits))
    out = torch.full((size,), 77, dtype=torch.int32, device=device)
    choose(x, torch.from_numpy(choices_of(choices)).to(device), MOST_TOP_K, out)
    return out.tolist()


def sampled(logits: NDArray[np.float32], params: SamplingParams, point: float) -> int:
    sampler = Sampler(params, logits.size)
    sampler._points.append(point)
    return sampler.sample(logits, ())


def check(logits: NDArray[np.float32], params: list[SamplingParams], device: str) -> None:
    """Rows beside each other, each with params and a seed of its own."""
    samplers = [Sampler(p, logits.shape[1]) for p in params]
    choices = [s.choice(0) for s in samplers]
    assert not any(s.needs_logits for s in samplers)
    for row, (token, s) in enumerate(zip(chosen(logits, choices, device), samplers, strict=True)):
        if token == s.sample(logits[row], ()):
            continue
        point = choices[row].point
        near = {sampled(logits[row], params[row], min(max(p, 0), 1 - 1e-16)) for p in (point - EDGE, point + EDGE)}
        assert token in near, f"row {row}, {s.order}: {token}, expected one of {near}"


FILTERS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "likeliest": {"temperature": 0},
    "one of one": {"top_k": 1},
    "top-k alone": {"top_k": 20, "top_p": 1.0, "min_p": 0.0, "temperature": 1.5},
    "as many as may be": {"top_k": MOST_TOP_K, "top_p": 1.0, "min_p": 0.0, "temperature": 30.0},
    "a nucleus of them": {"top_k": MOST_TOP_K, "top_p": 0.5, "min_p": 0.0},
    "two": {"top_k": 2, "top_p": 0.7, "min_p": 0.3},
    "min-p alone": {"top_k": 0, "top_p": 1.0, "min_p": 0.1, "temperature": 1.2},
    "everything": {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "temperature": 1.0},
    "cold": {"temperature": 1e-300},
    "hot": {"temperature": 1000.0},
}


@pytest.mark.parametrize("size", [1, 63, 300, 5000])
def test_the_samplers_token(size: int, device: str) -> None:
    """Every way to filter, beside each other in one launch: spread logits, flat ones, equal ones, some of -inf. The
    interpreter takes 0.3 s a row, so there each has one of the four."""
    rng = np.random.default_rng(size)
    settings = list(FILTERS.values()) * (4 if device == "cuda" else 1)
    logits = np.stack([rng.normal(0, (3, 0.3, 2, 3)[i % 4], size) for i in range(len(settings))]).astype(np.float32)
    logits[2::4] = logits[2::4].round(1)
    logits[3::4][rng.random(logits[3::4].shape) < 0.3] = -np.inf
    logits[3::4, size // 2] = 0
    check(logits, [SamplingParams(**s, seed=seed) for seed, s in enumerate(settings)], device)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("size", [102_400, 129_280, 163_840])
def test_the_samplers_token_of_a_whole_vocabulary(size: int) -> None:
    """Every way to filter, beside each other in one launch, over logits of four spreads and two precisions."""
    rng = np.random.default_rng(size)
    settings = list(FILTERS.values()) * 4
    rows = [rng.standard_normal(size) * (0.5, 1.5, 3, 8)[i % 4] for i in range(len(settings))]
    logits = np.stack([row.round(1) if i % 3 == 0 else row for i, row in enumerate(rows)]).astype(np.float32)
    check(logits, [SamplingParams(**s, seed=seed) for seed, s in enumerate(settings)], "cuda")


def test_points_walk_through_what_filters_keep(device: str) -> None:
    """Of weights 4, 2, 1, 1 with ids out of order: the ends of each token's range, to the last float."""
    logits = np.log(np.array([1, 4, 1, 2], np.float32))
    logits[0] = logits[2] = -logits[3] * 0  # both exactly 0
    sorted_ids = [1, 3, 0, 2]
    before = math.nextafter(0.5, 0)
    points = [0.0, before - 1e-7, 0.5 + 1e-7, 0.75 - 1e-7, 0.75 + 1e-7, 0.875 - 1e-7, 0.875 + 1e-7, 1 - 2**-53]
    expected = [sorted_ids[i] for i in (0, 0, 1, 1, 2, 2, 3, 3)]
    rows = np.repeat(logits[None], len(points), 0)
    assert chosen(rows, [Choice(4, 1, -math.inf, 1, p) for p in points], device) == expected
    by_id = [0, 0.125 - 1e-7, 0.125 + 1e-7, 0.625 - 1e-7, 0.625 + 1e-7, 0.75 - 1e-7, 0.75 + 1e-7, 1 - 2**-53]
    expected = [0, 0, 1, 1, 2, 2, 3, 3]
    assert chosen(rows, [Choice(0, 1, -math.inf, 1, p) for p in by_id], device) == expected


@pytest.mark.parametrize("settings", [{"top_k": 40}, {"top_k": 40, "top_p": 0.5}, {"top_k": 0}], ids=str)
def test_equal_logits_stay_by_their_ids(settings: dict[str, Any], device: str) -> None:
    """All are as likely, so a filter's edge is between equals and its weights are whole numbers: no rounding."""
    params = SamplingParams(**{"top_p": 1.0, "min_p": 0.0} | settings)
    points = [0.0, 0.3, 0.5, 0.99, 1 - 2**-53]
    logits = np.full((len(points), 5000), -2.5, np.float32)
    choice = Sampler(params, 5000).choice(0)
    got = chosen(logits, [choice._replace(point=p) for p in points], device)
    assert got == [sampled(logits[0], params, p) for p in points]


@pytest.mark.parametrize("choice", [LIKELIEST, Choice(40, 0.95, -3, 1.25, 0.0), Choice(0, 1, -math.inf, 1, 0.0)])
def test_no_number_no_token(choice: Choice, device: str) -> None:
    logits = np.random.default_rng(0).standard_normal((6, 9001)).astype(np.float32)
    logits[0, :] = -np.inf
    logits[1, 3] = np.nan
    logits[2, 8000] = np.inf
    logits[3, :9000] = -np.inf
    logits[4] = np.nan
    assert chosen(logits, [choice] * 6, device)[:5] == [-1, -1, -1, 9000, -1]


def test_the_lowest_id_of_the_highest_logit(device: str) -> None:
    logits = np.random.default_rng(0).standard_normal((3, 9001)).astype(np.float32)
    logits[1, [7000, 4500, 8999]] = 9  # equal, in three blocks
    logits[2] = -1
    logits[2, 300:500:2], logits[2, 301:500:2] = 0.0, -0.0
    assert chosen(logits, [LIKELIEST] * 3, device) == [int(logits[0].argmax()), 4500, 300]
    last = Choice(2, 1, -math.inf, 1, 1 - 2**-53)
    assert chosen(logits, [last] * 3, device)[1:] == [7000, 301]


def test_steps_take_what_was_chosen(device: str) -> None:
    tokens = torch.tensor([5, -1, -3, 0, -2], dtype=torch.int32, device=device)
    take_chosen(tokens, torch.tensor([11, -1, 13], dtype=torch.int32, device=device))
    assert tokens.tolist() == [5, 11, 13, 0, 0]
