"""Rotary position embedding with YaRN: the angles of a step, and the rotation they stand for.

Owns the arithmetic of frequencies; never holds a table. Angles are formed in float64 and rounded once, so position
100,000 is as exact as position 1 (a float32 product is off by 0.006 rad there).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from kvfold.config import Pairing, RopeConfig


def inverse_frequencies(rope: RopeConfig) -> NDArray[np.float64]:
    """Radians per position of each pair, [dim / 2] (YaRN, arXiv 2309.00071, section 3.2, 'NTK-by-parts').

    Pairs that turn more than beta_fast times within the original context keep their frequency, those that turn
    less than beta_slow times are slowed by `factor`, and a linear ramp over the pair index joins the two.
    """
    pair = np.arange(rope.dim // 2, dtype=np.float64)
    base = rope.theta ** (-2.0 * pair / rope.dim)
    yarn = rope.yarn
    if yarn is None:
        return base

    def pair_with_turns(turns: float) -> float:
        """The (fractional) pair index that turns this often over the original context."""
        wavelength = yarn.original_max_position / (turns * 2.0 * math.pi)
        return rope.dim * math.log(wavelength) / (2.0 * math.log(rope.theta))

    low = max(math.floor(pair_with_turns(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_with_turns(yarn.beta_slow)), rope.dim - 1)
    ramp = np.clip((pair - low) / max(high - low, 0.001), 0.0, 1.0)
    return base * (1.0 - ramp) + base / yarn.factor * ramp


def cos_sin(rope: RopeConfig, positions: NDArray[np.int32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """cos and sin of every (position, pair), each float32 [T, dim / 2], YaRN's factor included."""
    angles = positions.astype(np.float64)[:, None] * inverse_frequencies(rope)[None, :]
    factor = rope.yarn.cos_sin_factor if rope.yarn else 1.0
    return (np.cos(angles) * factor).astype(np.float32), (np.sin(angles) * factor).astype(np.float32)


def pair_columns(rope: RopeConfig) -> tuple[slice, slice]:
    """Where the first and the second number of each pair stand in a rope vector of `dim` numbers."""
    if rope.pairing is Pairing.INTERLEAVED:
        return slice(0, rope.dim, 2), slice(1, rope.dim, 2)
    return slice(0, rope.dim // 2), slice(rope.dim // 2, rope.dim)


def rotate(
    x: NDArray[np.float32],  # [T, ..., dim]
    cos: NDArray[np.float32],  # [T, dim / 2]
    sin: NDArray[np.float32],
    rope: RopeConfig,
) -> NDArray[np.float32]:
    """Each pair (a, b) becomes (a cos - b sin, a sin + b cos), in place of the pair: the definition for the backends.

    The released V3 code stores the rotated key with its halves apart; scores do not depend on that order, and one
    order everywhere keeps one cache layout.
    """
    first, second = pair_columns(rope)
    middle = (slice(None), *(None,) * (x.ndim - 2), slice(None))
    cos, sin = cos[middle], sin[middle]
    out = np.empty_like(x)
    out[..., first] = x[..., first] * cos - x[..., second] * sin
    out[..., second] = x[..., first] * sin + x[..., second] * cos
    return out
