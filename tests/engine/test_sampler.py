"""Every filter draws from exactly the distribution it is defined by; settings and logits that make no sense have a
name; the same seed gives the same tokens."""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from kvfold.engine.sampler import Sampler, SamplingParams
from kvfold.errors import NumericsError, SettingError
from kvfold.model.step import LIKELIEST, MOST_TOP_K

OFF: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
HISTORY = [3, 3, 7, 3, 11, 40, 7, 3, 0]


def some_logits(size: int = 60, seed: int = 0) -> NDArray[np.float32]:
    """Spread so that no filter keeps all or one; two pairs of equal logits and a -inf."""
    logits = np.random.default_rng(seed).normal(0, 2, size).astype(np.float32)
    logits[5], logits[20], logits[30] = logits[4], logits[21], -np.inf
    return logits


def exact(p: SamplingParams, logits: NDArray[np.float32], history: list[int]) -> NDArray[np.float64]:
    """The definition, step by step, in float64 over sorted lists."""
    x = logits.astype(np.float64)
    for id, bias in p.logit_bias.items():
        x[id] += bias
    seen = [] if p.penalty_last_n == 0 else history if p.penalty_last_n < 0 else history[-p.penalty_last_n :]
    for id in set(seen):
        x[id] = x[id] / p.repetition_penalty if x[id] > 0 else x[id] * p.repetition_penalty
        x[id] -= seen.count(id) * p.frequency_penalty + p.presence_penalty
    alive = sorted(range(len(x)), key=lambda i: (-x[i], i))

    def probabilities(t: float = 1.0) -> dict[int, float]:
        highest = x[alive].max()
        weights = {i: math.exp((x[i] - highest) / t) for i in alive}
        total = sum(weights.values())
        return {i: weight / total for i, weight in weights.items()}

    def until(order: list[int], share: float) -> list[int]:
        q, total, kept = probabilities(), 0.0, []
        for i in order:
            kept.append(i)
            total += q[i]
            if total >= share:
                break
        return kept

    if p.top_k:
        alive = alive[: p.top_k]
    if p.typical_p < 1:
        q = probabilities()
        entropy = -sum(v * math.log(v) for v in q.values() if v)
        alive = until(sorted(alive, key=lambda i: abs(-math.log(q[i]) - entropy) if q[i] else 1e9), p.typical_p)
    if p.top_p < 1:
        alive = until(sorted(alive, key=lambda i: (-x[i], i)), p.top_p)
    if p.min_p:
        q = probabilities()
        highest = max(q.values())
        alive = [i for i in alive if q[i] >= p.min_p * highest]
    result = np.zeros(len(x))
    for i, v in probabilities(p.temperature).items():
        result[i] = v
    return result


def chi_square_is_plausible(counts: NDArray[np.int64], expected: NDArray[np.float64]) -> None:
    """p > 0.001, by Wilson and Hilferty's normal approximation; nothing outside the support was drawn."""
    assert not counts[expected == 0].any(), f"drew {np.flatnonzero(counts * (expected == 0))}, of probability 0"
    likely = expected * counts.sum() >= 5
    observed = np.append(counts[likely], counts[~likely].sum())
    hoped = np.append(expected[likely], expected[~likely].sum()) * counts.sum()
    observed, hoped = observed[hoped > 0], hoped[hoped > 0]
    statistic, freedom = ((observed - hoped) ** 2 / hoped).sum(), max(len(hoped) - 1, 1)
    z = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    assert z < 3.09, f"chi-square {statistic:.1f} with {freedom} degrees of freedom (z {z:.1f})"


FILTERS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "temperature": {"temperature": 0.5},
    "hot": {"temperature": 3.0},
    "top-k": {"top_k": 7},
    "top-p": {"top_p": 0.8},
    "min-p": {"min_p": 0.1},
    "typical-p": {"typical_p": 0.6},
    "repetition": {"repetition_penalty": 1.7},
    "repetition of all": {"repetition_penalty": 0.6, "penalty_last_n": -1},
    "frequency": {"frequency_penalty": 0.7},
    "presence of the last 3": {"presence_penalty": 1.5, "penalty_last_n": 3},
    "penalties of none": {"presence_penalty": 1.5, "penalty_last_n": 0},
    "logit bias": {"logit_bias": {2: 3.0, 41: -100.0}},
    "defaults": {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.05},
    "everything": {
        **{"temperature": 0.7, "top_k": 30, "typical_p": 0.9, "top_p": 0.85, "min_p": 0.02},
        **{"repetition_penalty": 1.2, "frequency_penalty": 0.3, "presence_penalty": -0.4, "logit_bias": {9: 2.0}},
    },
}


def check_distribution(settings: dict[str, Any], draws: int) -> None:
    params = SamplingParams(**OFF | settings, seed=12)
    logits = some_logits()
    before = logits.copy()
    sampler = Sampler(params, logits.size)
    ids = [sampler.sample(logits, HISTORY) for _ in range(draws)]
    chi_square_is_plausible(np.bincount(ids, minlength=logits.size), exact(params, logits, HISTORY))
    assert (logits == before).all()


@pytest.mark.parametrize("name", FILTERS)
def test_draws_follow_the_exact_distribution(name: str) -> None:
    check_distribution(FILTERS[name], 10_000)


@pytest.mark.full
@pytest.mark.parametrize("name", FILTERS)
def test_many_draws_follow_the_exact_distribution(name: str) -> None:
    check_distribution(FILTERS[name], 100_000)


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("size", [1, 2, 65, 5000])
def test_a_filter_keeps_what_its_definition_keeps(name: str, size: int) -> None:
    """Over random logits of odd sizes, ties included: every draw is inside the support."""
    settings = {k: v for k, v in FILTERS[name].items() if k != "logit_bias"}
    for seed in range(3):
        params = SamplingParams(**OFF | settings, seed=seed)
        logits = np.random.default_rng(seed).normal(0, 2, size).astype(np.float32).round(1)
        history = [id for id in HISTORY if id < size]
        support = exact(params, logits, history) > 0
        sampler = Sampler(params, size)
        assert all(support[sampler.sample(logits, history)] for _ in range(50))


@pytest.mark.parametrize("size", [7, 300, 1281, 20_000])  # the last two find their bound by block maxima
@pytest.mark.parametrize("top_k", [1, 5])
def test_top_k_keeps_the_k_largest_and_the_lower_ids_of_equals(size: int, top_k: int) -> None:
    """At temperature 1000 all kept tokens are as likely, so 300 draws show each of them."""
    for seed in range(10):
        logits = np.random.default_rng(seed).normal(0, 2, size).astype(np.float32).round(1)
        sampler = Sampler(SamplingParams(**OFF | {"top_k": top_k, "temperature": 1000.0}, seed=seed), size)
        drawn = {sampler.sample(logits, ()) for _ in range(300)}
        assert drawn == set(np.argsort(-logits, kind="stable")[:top_k].tolist())


def test_mirostat_steers_to_its_surprise() -> None:
    """The mean surprise of what it draws comes to tau bits, from whatever it starts with."""
    logits = np.random.default_rng(1).normal(0, 3, 2000).astype(np.float32)
    for tau in (2.0, 4.0):
        params = SamplingParams(**OFF | {"mirostat": 2, "mirostat_tau": tau}, seed=3)
        sampler = Sampler(params, logits.size)
        ids = np.array([sampler.sample(logits, ()) for _ in range(4000)])[500:]
        kept = np.unique(ids)
        assert 1 < kept.size < logits.size
        weights = np.exp(logits[kept] - logits.max())
        surprise = -np.log2(np.exp(logits[ids] - logits.max()) / weights.sum())
        assert abs(surprise.mean() - tau) < 0.25


def test_mirostat_version_2_step_by_step() -> None:
    """Against the definition with the same random numbers."""
    logits = some_logits(40)
    params = SamplingParams(
        **OFF | {"mirostat": 2, "mirostat_tau": 3.0, "mirostat_eta": 0.3, "temperature": 0.9}, seed=5
    )
    sampler, random, mu = Sampler(params, 40), np.random.Generator(np.random.Philox(5)), 6.0
    for _ in range(200):
        p = np.exp((logits.astype(np.float64) - logits.max()) / 0.9)
        p /= p.sum()
        alive = [i for i in range(40) if p[i] >= 2.0**-mu] or [int(p.argmax())]
        q = p[alive] / p[alive].sum()
        index = int(np.searchsorted(np.cumsum(q), random.random(), side="right"))
        assert sampler.sample(logits, ()) == alive[index]
        mu -= 0.3 * (-math.log2(q[index]) - 3.0)


# ---- promises


def test_temperature_zero_takes_the_likeliest_and_the_lowest_of_equals() -> None:
    logits = np.array([0, 3, 1, 3, -np.inf], np.float32)
    sampler = Sampler(SamplingParams(temperature=0), 5)
    assert [sampler.sample(logits, ()) for _ in range(5)] == [1] * 5
    assert Sampler(SamplingParams(temperature=0, logit_bias={3: 0.5}), 5).sample(logits, ()) == 3
    assert Sampler(SamplingParams(temperature=0, presence_penalty=9.0), 5).sample(logits, [1]) == 3


@pytest.mark.parametrize("settings", [{}, {"mirostat": 2}, {"typical_p": 0.9}])
def test_the_same_seed_draws_the_same_tokens(settings: dict[str, Any]) -> None:
    rows = [some_logits(seed=seed) for seed in range(50)]

    def draw(seed: int | None, others: int) -> list[int]:
        """`others` more samplers take turns, as the requests of a batch do."""
        samplers = [Sampler(SamplingParams(seed=seed, **settings), 60)]
        samplers += [Sampler(SamplingParams(seed=1000 + i), 60) for i in range(others)]
        ids: list[int] = []
        for row in rows:
            for sampler in samplers[1:]:
                sampler.sample(row, ids)
            ids.append(samplers[0].sample(row, ids))
        return ids

    assert draw(7, 0) == draw(7, 3)
    assert draw(7, 0) != draw(8, 0)
    assert draw(None, 0) != draw(None, 0)
    unseeded = Sampler(SamplingParams(**settings), 60)
    first = [unseeded.sample(row, ()) for row in rows]
    again = Sampler(SamplingParams(seed=unseeded.seed, **settings), 60)
    assert first == [again.sample(row, ()) for row in rows]


def test_tokens_of_known_seeds_do_not_change_between_versions() -> None:
    sampler = Sampler(SamplingParams(seed=1), 60)
    assert [sampler.sample(some_logits(seed=i), ()) for i in range(8)] == [47, 33, 56, 9, 15, 58, 17, 49]


def test_ignore_eos_never_ends() -> None:
    logits = np.array([9, 0, 0, 8], np.float32)
    sampler = Sampler(SamplingParams(ignore_eos=True, seed=0), 4, eos_ids={0, 3})
    assert {sampler.sample(logits, ()) for _ in range(200)} == {1, 2}
    assert "no end of text" in sampler.order
    assert Sampler(SamplingParams(temperature=0), 4, eos_ids={0, 3}).sample(logits, ()) == 0


@pytest.mark.parametrize("temperature", [0, 1e-300, 1e-6, 1, 1000])
@pytest.mark.parametrize("scale", [1, 1e4, 1e38])
def test_extreme_temperatures_and_logits_draw_something_possible(temperature: float, scale: float) -> None:
    logits = (np.linspace(-3, 3, 50) * scale).astype(np.float32)
    logits[10:20] = -np.inf
    for settings in ({}, OFF, {"mirostat": 2}, {"typical_p": 0.5}):
        sampler = Sampler(SamplingParams(**settings | {"temperature": temperature, "seed": 0}), 50)
        ids = [sampler.sample(logits, ()) for _ in range(50)]
        assert np.isfinite(logits[ids]).all()
        if temperature < 1e-3 and not settings.get("typical_p"):
            assert set(ids) == {49}


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_logits_without_a_distribution_fail_with_a_name(wrong: float) -> None:
    for temperature in (0, 1):
        sampler = Sampler(SamplingParams(temperature=temperature), 60)
        logits = some_logits()
        logits[33] = wrong
        with pytest.raises(NumericsError, match="60 logits"):
            sampler.sample(logits, ())
        with pytest.raises(NumericsError):
            sampler.sample(np.full(60, -np.inf, np.float32), ())
        sampler.sample(some_logits(), ())  # the next request is not harmed


WRONG = {
    "max_tokens": (0, -1, 1.5, True, "5"),
    "temperature": (-0.1, math.nan, math.inf, 1001, "1", None),
    "top_k": (-1, 1.5, math.nan, True),
    "top_p": (0, -0.1, 1.01, math.nan, math.inf, None),
    "min_p": (-0.1, 1.1, math.nan),
    "typical_p": (0, 1.1, math.nan),
    "repetition_penalty": (0, -1, math.nan, math.inf, 1e-9, 1e9),
    "frequency_penalty": (math.nan, math.inf, -math.inf, 1e9),
    "presence_penalty": (math.nan, math.inf, "0"),
    "penalty_last_n": (-2, 0.5),
    "mirostat": (1, 3, -1, True, "2"),
    "mirostat_tau": (0, -1, math.nan),
    "mirostat_eta": (0, math.nan),
    "logit_bias": ({-1: 1.0}, {1: math.nan}, {1: math.inf}, {"1": 1.0}, {1.5: 1.0}, {1: 1e300}, [1]),
    "seed": (-1, 2**64, 1.5, "1"),
    "stop": ("", "stop", ("",), (1,), None),
    "ignore_eos": (1, None),
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_a_wrong_setting_is_named_with_what_is_allowed(name: str, value: Any) -> None:
    with pytest.raises(SettingError, match=rf"^{name} is .*; allowed: "):
        SamplingParams(**{name: value})


def test_every_setting_is_checked() -> None:
    assert set(WRONG) == set(SamplingParams.__dataclass_fields__)


def test_settings_are_kept_as_values() -> None:
    bias, stop = {np.int64(3): 1}, ["a", "b"]
    params = SamplingParams(logit_bias=bias, stop=stop)  # type: ignore[arg-type]
    bias[np.int64(4)] = 1
    stop.append("c")
    assert (dict(params.logit_bias), params.stop) == ({3: 1.0}, ("a", "b"))


def test_a_biased_id_beyond_the_vocabulary_is_refused() -> None:
    params = SamplingParams(logit_bias={59: 1.0, 60: 1.0})
    Sampler(params, 61)
    with pytest.raises(SettingError, match="token 60; this model has ids 0 to 59"):
        Sampler(params, 60)


def test_the_order_is_told() -> None:
    assert Sampler(SamplingParams(seed=1), 9).order == (
        "top-k 40 -> top-p 0.95 -> min-p 0.05 -> temperature 0.8 -> draw (seed 1)"
    )
    everything = SamplingParams(**FILTERS["everything"], seed=2)
    assert Sampler(everything, 60).order == (
        "logit bias on 1 ids -> penalties (repetition 1.2, frequency 0.3, presence -0.4; last 64 tokens) -> top-k 30 -> "
        "typical-p 0.9 -> top-p 0.85 -> min-p 0.02 -> temperature 0.7 -> draw (seed 2)"
    )
    assert Sampler(SamplingParams(temperature=0, top_k=3), 9).order == "likeliest token (temperature 0)"
    assert Sampler(SamplingParams(mirostat=2, seed=3), 9).order == (
        "temperature 0.8 -> mirostat 2 (tau 5.0, eta 0.1) -> draw (seed 3)"
    )


@pytest.mark.parametrize("settings", [{}, {"temperature": 0}, {"repetition_penalty": 1.1, "typical_p": 0.9}])
def test_a_full_vocabulary_is_sampled_in_a_millisecond(settings: dict[str, Any]) -> None:
    logits = np.random.default_rng(0).normal(0, 3, 129_280).astype(np.float32)
    sampler = Sampler(SamplingParams(**settings), logits.size)
    history = list(range(1000))
    times = []
    for _ in range(50):
        start = time.process_time()
        sampler.sample(logits, history)
        times.append(time.process_time() - start)
    assert sorted(times)[25] < 1e-3


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, False),
        ({"temperature": 0}, False),
        ({"top_k": 0, "top_p": 1.0, "repetition_penalty": 1.3, "penalty_last_n": 0}, False),
        ({"top_k": 0, "top_p": 0.9}, True),
        ({"top_k": MOST_TOP_K, "top_p": 0.9}, False),
        ({"top_k": MOST_TOP_K + 1, "top_p": 1.0}, True),
        ({"temperature": 0, "typical_p": 0.5, "mirostat": 2}, False),
        ({"typical_p": 0.5}, True),
        ({"mirostat": 2}, True),
        ({"temperature": 0, "logit_bias": {3: 1.0}}, True),
        ({"temperature": 0, "ignore_eos": True}, True),
        ({"presence_penalty": 0.5}, True),
    ],
)
def test_who_needs_the_logits_is_known(settings: dict[str, Any], expected: bool) -> None:
    assert Sampler(SamplingParams(**settings), 10, eos_ids=[2]).needs_logits is expected


def test_a_choice_in_numbers_is_what_sample_does() -> None:
    choice = Sampler(SamplingParams(seed=1), 60).choice(0)
    assert choice[:2] == (40, 0.95)
    assert choice[2:4] == (np.float32(math.log(0.05)), np.float32(1 / 0.8))
    assert Sampler(SamplingParams(min_p=0.0, seed=1), 60).choice(0).depth == -math.inf
    assert Sampler(SamplingParams(temperature=0, min_p=0.5), 60).choice(3) == LIKELIEST


def test_a_number_is_used_up_by_the_token_it_drew_alone() -> None:
    """However far ahead choices are asked for, and whether a token is sampled here or chosen elsewhere."""
    numbers = np.random.Generator(np.random.Philox(7)).random(9).tolist()
    sampler = Sampler(SamplingParams(seed=7), 60)
    assert [sampler.choice(ahead).point for ahead in (0, 1, 0, 2)] == [numbers[i] for i in (0, 1, 0, 2)]
    sampler.skip()
    assert sampler.choice(0).point == numbers[1]
    other = Sampler(SamplingParams(seed=7), 60)
    other.skip()
    assert sampler.sample(some_logits(), ()) == other.sample(some_logits(), ())
    sampler.skip()
    assert [sampler.choice(ahead).point for ahead in (0, 1)] == numbers[3:5]
