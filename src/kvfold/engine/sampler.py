"""From one row of logits to one token id.

SamplingParams is what a request asks for, checked when it is made; a Sampler is one request's dice: its own random
generator, so that the same seed gives the same tokens whatever else is in the batch. Filters, order and defaults are
llama.cpp's, so that its users' settings mean the same here. Only numpy; knows token ids, no text.
"""

from __future__ import annotations

import math
import operator
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvfold.errors import NumericsError, SettingError
from kvfold.model.step import LIKELIEST, MOST_TOP_K, Choice


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens, and when to stop. SettingError for a value that is not allowed.

    max_tokens:         tokens to generate, 1 or more
    temperature:        0 takes the likeliest token; applied after the filters below
    top_k:              keep the k likeliest, 0 keeps all
    typical_p:          keep the tokens of the most typical surprise that hold this much probability, 1 keeps all
    top_p:              keep the likeliest tokens that hold this much probability, 1 keeps all
    min_p:              keep tokens at least this share as likely as the likeliest, 0 keeps all
    repetition_penalty: logits of seen tokens are divided (positive) or multiplied (negative) by it, 1 changes nothing
    frequency_penalty:  subtracted from a seen token's logit once for each time it was seen
    presence_penalty:   subtracted from a seen token's logit once
    penalty_last_n:     how many last tokens, prompt included, count as seen; 0 none, -1 all
    mirostat:           2 replaces the four filters by one that steers towards mirostat_tau bits of surprise a token,
                        with learning rate mirostat_eta (arXiv 2007.14966, version 2); 0 is off
    logit_bias:         token id -> what is added to its logit
    seed:               same seed, same tokens; None takes a fresh one (Sampler.seed)
    stop:               strings that end the answer, not part of it
    ignore_eos:         never choose a token that ends the text
    """

    max_tokens: int = 128
    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    penalty_last_n: int = 64
    mirostat: int = 0
    mirostat_tau: float = 5.0
    mirostat_eta: float = 0.1
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        for name, check, allowed in _ALLOWED:
            value = getattr(self, name)
            if not check(value):
                raise SettingError(f"{name} is {value!r:.60}; allowed: {allowed}")
        object.__setattr__(self, "stop", tuple(self.stop))
        bias = {operator.index(id): float(value) for id, value in self.logit_bias.items()}
        object.__setattr__(self, "logit_bias", MappingProxyType(bias))


def _is_integer(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return (_is_integer(value) or isinstance(value, float | np.floating)) and math.isfinite(value)


def _is_bias(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        _is_integer(id) and id >= 0 and _is_number(bias) and abs(bias) <= 1e6 for id, bias in value.items()
    )


def _is_stop(value: Any) -> bool:
    return isinstance(value, tuple | list) and all(isinstance(text, str) and text for text in value)


_ALLOWED: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("max_tokens", lambda v: _is_integer(v) and v >= 1, "a whole number from 1"),
    ("temperature", lambda v: _is_number(v) and 0 <= v <= 1000, "a number from 0 to 1000"),
    ("top_k", lambda v: _is_integer(v) and v >= 0, "a whole number from 0 (0 keeps all)"),
    ("top_p", lambda v: _is_number(v) and 0 < v <= 1, "a number above 0, at most 1 (1 keeps all)"),
    ("min_p", lambda v: _is_number(v) and 0 <= v <= 1, "a number from 0 (keeps all) to 1"),
    ("typical_p", lambda v: _is_number(v) and 0 < v <= 1, "a number above 0, at most 1 (1 keeps all)"),
    ("repetition_penalty", lambda v: _is_number(v) and 1e-3 <= v <= 1e3, "0.001 to 1000 (1 changes nothing)"),
    ("frequency_penalty", lambda v: _is_number(v) and abs(v) <= 1e3, "-1000 to 1000 (0 changes nothing)"),
    ("presence_penalty", lambda v: _is_number(v) and abs(v) <= 1e3, "-1000 to 1000 (0 changes nothing)"),
    ("penalty_last_n", lambda v: _is_integer(v) and v >= -1, "a whole number from 0, or -1 for all tokens"),
    ("mirostat", lambda v: _is_integer(v) and v in (0, 2), "0 (off) or 2"),
    ("mirostat_tau", lambda v: _is_number(v) and v > 0, "a number above 0 (bits)"),
    ("mirostat_eta", lambda v: _is_number(v) and v > 0, "a number above 0"),
    ("logit_bias", _is_bias, "a mapping from token ids to -1000000 to 1000000"),
    (
        "seed",
        lambda v: v is None or (_is_integer(v) and 0 <= v < 2**64),
        "None or a whole number from 0 below 2^64",
    ),
    ("stop", _is_stop, "a tuple of strings, none of them empty"),
    ("ignore_eos", lambda v: isinstance(v, bool), "True or False"),
)


def no_distribution(found: str) -> NumericsError:
    return NumericsError(
        f"{found}: the model computed no usable distribution. "
        "The file may be damaged (kvfold inspect), or a kernel overflowed: try --dtype float32. --check-numerics names the "
        "layer and op"
    )


# From the scores of the tokens still in the race, the indices of those that stay.
_Filter = Callable[[NDArray[np.float32]], NDArray[np.intp]]


class Sampler:
    """The choices of one request. `seed` repeats them, `order` says what is done with the logits."""

    def __init__(self, params: SamplingParams, vocab_size: int, eos_ids: Collection[int] = ()) -> None:
        """eos_ids: what `ignore_eos` forbids. SettingError: a logit_bias id is not below vocab_size."""
        beyond = [id for id in params.logit_bias if id >= vocab_size]
        if beyond:
            raise SettingError(f"logit_bias names token {beyond[0]}; this model has ids 0 to {vocab_size - 1}")
        self._params = params
        self._vocab_size = vocab_size
        self._bias_ids = np.fromiter(params.logit_bias, np.int64)
        self._bias = np.fromiter(params.logit_bias.values(), np.float32)
        self._forbidden = np.fromiter(eos_ids if params.ignore_eos else (), np.int64)
        penalties = {
            "repetition": (params.repetition_penalty, 1),
            "frequency": (params.frequency_penalty, 0),
            "presence": (params.presence_penalty, 0),
        }
        self._penalties = [f"{name} {value}" for name, (value, neutral) in penalties.items() if value != neutral]
        self._filters = _filters(params)
        # 1 / temperature, finite in float32: at 1e-300 only the likeliest tokens keep any probability
        self._sharpness = np.float32(min(1 / params.temperature, 3e38)) if params.temperature else None
        self._mu = 2 * params.mirostat_tau  # bits: the most surprise a token may have, moved after every token
        self.seed: int = (
            int(np.random.SeedSequence().generate_state(1)[0]) if params.seed is None else int(params.seed)
        )
        self._random = np.random.Generator(np.random.Philox(self.seed))
        self._points: deque[float] = deque()  # thrown and not used yet

    @property
    def order(self) -> str:
        """What happens to the logits, in order; steps that change nothing are left out."""
        p = self._params
        last = "all tokens" if p.penalty_last_n == -1 else f"last {p.penalty_last_n} tokens"
        steps = [f"logit bias on {self._bias.size} ids"] if self._bias.size else []
        steps += ["no end of text"] if self._forbidden.size else []
        steps += (
            [f"penalties ({', '.join(self._penalties)}; {last})"] if self._penalties and p.penalty_last_n else []
        )
        if self._sharpness is None:
            return " -> ".join([*steps, "likeliest token (temperature 0)"])
        temperature = f"temperature {p.temperature}"
        if p.mirostat:
            steps += [temperature, f"mirostat 2 (tau {p.mirostat_tau}, eta {p.mirostat_eta})"]
        else:
            steps += [*self._filters, temperature]
        return " -> ".join([*steps, f"draw (seed {self.seed})"])

    @property
    def needs_logits(self) -> bool:
        """Whether `sample` alone can choose: it looks at the tokens so far (penalties, mirostat), or does what no Choice
        says: logit bias, ignore_eos, typical-p, a top-k above MOST_TOP_K, top-p of all tokens."""
        p = self._params
        if self._bias.size or self._forbidden.size or (self._penalties and p.penalty_last_n):
            return True
        if self._sharpness is None:
            return False
        is_bounded = 1 <= p.top_k <= MOST_TOP_K or (p.top_k == 0 and p.top_p == 1)
        return p.mirostat != 0 or p.typical_p < 1 or not is_bounded

    def choice(self, ahead: int) -> Choice:
        """What `sample` would do for the token behind the next `ahead`; asking uses no number of the generator up."""
        assert not self.needs_logits
        p = self._params
        if self._sharpness is None:
            return LIKELIEST
        depth = float(np.float32(math.log(p.min_p))) if p.min_p else -math.inf
        return Choice(p.top_k, p.top_p, depth, float(self._sharpness), self._point(ahead))

    def skip(self) -> None:
        """The next token was chosen by `choice(0)`: the one after it is drawn with the number after its."""
        if self._sharpness is not None:
            self._point(0)
            self._points.popleft()

    def sample(self, logits: NDArray[np.float32], history: Sequence[int]) -> int:
        """The next token id. logits: float32 [vocab], left as they are. history: the tokens so far, prompt included.

        NumericsError: a logit is NaN or +inf, or all are -inf.
        """
        assert logits.shape == (self._vocab_size,), (logits.shape, self._vocab_size)
        highest = float(logits.max())  # NaN if any logit is
        if not math.isfinite(highest):
            raise no_distribution(f"the highest of {logits.size} logits is {highest}")
        logits = self._adjusted(logits, history)
        if self._sharpness is None:
            return int(logits.argmax())  # the lowest id of equal ones
        with np.errstate(over="ignore"):  # logits far below the highest become -inf: probability 0
            if self._params.mirostat:
                return self._mirostat((logits - logits.max()) * self._sharpness)
            ids: NDArray[np.intp] | None = None  # None: all
            scores = logits
            for keep in self._filters.values():
                kept = keep(scores)
                ids = kept if ids is None else ids[kept]
                scores = scores[kept]
            index = self._draw(np.exp((scores - scores.max()) * self._sharpness))
            return index if ids is None else int(ids[index])

    def _adjusted(self, logits: NDArray[np.float32], history: Sequence[int]) -> NDArray[np.float32]:
        """Logits with bias, forbidden ids and penalties; a copy where anything changes."""
        p = self._params
        seen: Sequence[int] = ()
        if self._penalties and p.penalty_last_n:
            seen = history if p.penalty_last_n == -1 else history[-p.penalty_last_n :]
        if not (seen or self._bias.size or self._forbidden.size):
            return logits
        logits = logits.copy()
        logits[self._bias_ids] += self._bias
        logits[self._forbidden] = -np.inf
        if seen:
            ids, counts = np.unique(np.asarray(seen, np.int64), return_counts=True)
            values = logits[ids]
            values = np.where(values > 0, values / p.repetition_penalty, values * p.repetition_penalty)
            logits[ids] = values - counts * p.frequency_penalty - p.presence_penalty
        return logits

    def _mirostat(self, scores: NDArray[np.float32]) -> int:
        """Version 2: cut the tokens that would surprise by more than mu bits, draw, move mu by the error."""
        weights = _weights(scores)
        least = 2.0**-self._mu * weights.sum(dtype=np.float64)
        ids = np.flatnonzero(weights >= least)
        if not ids.size:
            ids = np.array([weights.argmax()])
        weights = weights[ids]
        index = self._draw(weights)
        surprise = -math.log2(weights[index] / weights.sum(dtype=np.float64))
        self._mu -= self._params.mirostat_eta * (surprise - self._params.mirostat_tau)
        return int(ids[index])

    def _point(self, ahead: int) -> float:
        """The generator's number, from 0 to below 1, for the draw behind the next `ahead`."""
        while len(self._points) <= ahead:
            self._points.append(self._random.random())
        return self._points[ahead]

    def _draw(self, weights: NDArray[np.float32]) -> int:
        """An index with probability in proportion to its weight; uses one number of the generator up."""
        cumulative = np.cumsum(weights, dtype=np.float64)
        total = cumulative[-1]
        point = min(self._point(0) * total, np.nextafter(total, 0))
        self._points.popleft()
        return int(np.searchsorted(cumulative, point, side="right"))


def _filters(params: SamplingParams) -> dict[str, _Filter]:
    """The filters that change anything, in order, each under what `Sampler.order` calls it."""
    filters: dict[str, _Filter] = {}
    if params.top_k:
        filters[f"top-k {params.top_k}"] = lambda scores: _largest(scores, params.top_k)
    if params.typical_p < 1:
        filters[f"typical-p {params.typical_p}"] = lambda scores: _typical(scores, params.typical_p)
    if params.top_p < 1:
        filters[f"top-p {params.top_p}"] = lambda scores: _nucleus(scores, _weights(scores), params.top_p)
    if params.min_p:
        depth = np.float32(math.log(params.min_p))
        filters[f"min-p {params.min_p}"] = lambda scores: np.flatnonzero(scores >= scores.max() + depth)
    return filters


def _weights(scores: NDArray[np.float32]) -> NDArray[np.float32]:
    """Probabilities up to one factor; the largest is 1."""
    weights: NDArray[np.float32] = np.exp(scores - scores.max())
    return weights


def _typical(scores: NDArray[np.float32], share: float) -> NDArray[np.intp]:
    """Locally typical sampling (arXiv 2202.00666): the tokens whose surprise is nearest to the mean surprise."""
    weights = _weights(scores)
    total = weights.sum(dtype=np.float64)
    surprise = math.log(total) - (scores - scores.max())  # nats; inf where a logit is -inf
    likely = weights > 0
    entropy = float((weights[likely] * surprise[likely]).sum(dtype=np.float64) / total)
    return _nucleus(-np.abs(surprise - entropy), weights, share)


def _largest(values: NDArray[np.float32], count: int) -> NDArray[np.intp]:
    """Indices of the `count` largest values, largest first, the lower index first among equals.

    A bound below which none of them lies comes from block maxima: the count-th largest maximum is such a bound, and
    partitioning 2,020 maxima instead of 129,280 logits takes 0.16 ms instead of 1.3 ms.
    """
    block = 64
    if count >= values.size:
        return np.argsort(-values, kind="stable")
    blocks = values.size // block
    pool = values if blocks < 4 * count else values[: blocks * block].reshape(blocks, block).max(axis=1)
    bound = np.partition(pool, pool.size - count)[pool.size - count]
    candidates = np.flatnonzero(values >= bound)
    return candidates[np.argsort(-values[candidates], kind="stable")[:count]]


def _nucleus(values: NDArray[np.float32], weights: NDArray[np.float32], share: float) -> NDArray[np.intp]:
    """Indices in the order of `values`, largest first, until their weights reach `share` of the whole; at least one."""
    target = share * weights.sum(dtype=np.float64)
    count = 64
    while True:
        order = _largest(values, count)
        cumulative = np.cumsum(weights[order], dtype=np.float64)
        if cumulative[-1] >= target or count >= values.size:
            return order[: int(np.searchsorted(cumulative, target)) + 1]
        count *= 8
