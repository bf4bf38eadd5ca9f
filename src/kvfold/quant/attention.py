"""What the native kernels make of queries, keys and values where products round: the definition, in numpy.

In mode `int8`; quant/activations.py defines the products before and after.

Ordinary attention multiplies whole numbers of 16 bits (`Numbers.WHOLE`) and adds them up in 32:

    keys, values   rows of W_UK, W_UV (kv_b, v_b) times latents rounded as the type of the weights asks;
                   columns of W_UK (k_b) times latents, both in the numbers of the scores
    code[x, i] =   round(f[x] x[i]),  f a power of two for each x, the largest with which
                   the length of a query or key (a row of latents, a column of W_UK) is at most 32767, so that any two have
                   a product of 31 bits; the largest number of a value is
    score[q, k] =  scale log2(e)  sum over i of  code[q, i] code[k, i]  / (f[q] f[k])
    p[q, k] =      2^(score[q, k] - M),  M = ceil(the largest score of the row)

Of each 128 keys from the first on, with T = sum over k of  p[q, k] / f[k],  f that of the value:

    whole[q, k] =  round(32767 p[q, k] / (f[k] T))
    out[q] +=      T / 32767  sum over k of  whole[q, k] code[k]                     divided by the sum of p in the end

Where tiles multiply bfloat16 and no int16 (`Numbers.BF16`: AMX), everything that is multiplied is a bfloat16 instead:

    score[q, k] =  scale log2(e)  sum over i of  bf16(query[q, i]) bf16(key[k, i])
    weight[q, k] = bf16(2^(score[q, k] - M))
    out[q] =       sum over k of  weight[q, k] bf16(value[k])  /  sum over k of  weight[q, k]

The absorbed path attends in the second way, its keys the cached rows and its values their first kv_lora numbers, with the
products around it per head:

    W_UK^T q       by rows (k_b) on activations rounded as the type asks; by columns (kv_b) exactly, in float32
    W_UV o         on activations rounded as the type asks

Where the cache is q8_0 it is multiplied as it lies there, in whole numbers: a query is rounded as activations are, and a
weight to an int16 for each head, key and 32 columns, in which the key's scale is (`attend_codes`).

M is a whole number, so another M (the largest score so far, say) multiplies what is rounded to 16 bits by a power of two: but
for float32's own last bit in 2^x the result depends on no order in which keys are met. p below 2^-126 is zero, and a
block whose T is below 2^-110 adds nothing.

A query, key, value or column that is smaller than 2^-60 counts as zeros; one that is larger than 2^60 or not finite makes NaN
of what it takes part in.
"""

from __future__ import annotations

from enum import Enum

import numpy as np
from numpy.typing import NDArray

from kvfold.quant.activations import BLOCK, Rounding, product, rounded, to_bf16
from kvfold.quant.decode import decode_tensor
from kvfold.quant.tensor import QuantTensor

Floats = NDArray[np.float32]
Wide = NDArray[np.float64]

_LOG2_E = np.log2(np.e)


class Numbers(Enum):
    """What ordinary attention multiplies."""

    WHOLE = "int16"
    BF16 = "bf16"


BLOCK_KEYS = 128
"""Keys whose weights are whole numbers of the same size."""

_ONE = 32767.0
_SMALLEST, _LARGEST = 2.0**-60, 2.0**60


def expand_by_rows(latents: Floats, weight: QuantTensor) -> Wide:
    """Latents [L, kv_lora] and kv_b or v_b [N, kv_lora]: [L, N]."""
    return product(latents, weight)


def expand_by_columns(latents: Floats, weight: QuantTensor, numbers: Numbers = Numbers.WHOLE) -> Wide:
    """Latents [L, kv_lora] and the k_b of one head [kv_lora, nope]: its keys [L, nope]."""
    return dots(latents, decode_tensor(weight).T, numbers)


def dots(x: Floats, y: Floats, numbers: Numbers) -> Wide:
    """Of every row of x [R, d] with every row of y [L, d]: [R, L]."""
    if numbers is Numbers.BF16:
        return to_bf16(x).astype(np.float64) @ to_bf16(y).astype(np.float64).T
    (x_codes, x_factors), (y_codes, y_factors) = whole_rows(x), whole_rows(y)
    products: Wide = x_codes @ y_codes.T / x_factors[:, None] / y_factors
    return products


def whole_rows(x: Floats) -> tuple[Wide, Wide]:
    """Whole numbers [L, d] and the powers of two [L] that they are of rows of x: as long as 32767 holds."""
    return _whole(x, np.sqrt((x.astype(np.float64) ** 2).sum(1)))


def _whole(x: Floats, size: Wide) -> tuple[Wide, Wide]:
    """Rows of x [L, d] so large that `size` [L] stays within 32767. Of none: infinity, and NaN beside any; both with zeros."""
    used = (size >= _SMALLEST) & (size <= _LARGEST)
    factors = np.exp2(np.frexp(_ONE / np.where(used, size, 1))[1] - 1)
    codes = np.rint(np.where(used[:, None], x, 0) * factors[:, None])
    return codes, np.where(used, factors, np.where(size < _SMALLEST, np.inf, np.nan))


def attend_latents(q: Floats, latents: Floats, kv_lora: int, scale: float) -> Wide:
    """All heads of a row over the latents it sees, where they are no q8_0: q [H, latent], latents [L, latent] as cached.

    [H, kv_lora].
    """
    scores = rounded(q, Rounding.BF16) @ to_bf16(latents).astype(np.float64).T
    return _mean(scores * (scale * _LOG2_E), to_bf16(latents[:, :kv_lora]).astype(np.float64))


PAGE_KEYS = 64
"""Keys whose weights share a scale: a page of the cache."""


def attend_codes(q: Floats, codes: NDArray[np.int8], scales: Floats, kv_lora: int, scale: float) -> Wide:
    """The same over q8_0: q [H, latent], codes [L, latent], their scales [L, latent / 32]. [H, kv_lora].

    Of each page, with E = round(largest score + 1/2) for each head and D = largest scale for each 32 columns:

        whole[q, k] = round(32767 * 2^(score[q, k] - E))           exactly 2^(score - E) in the sum of weights
        share[k, b] = round(32767 * scale[k, b] / D[b])
        sum[q, c]   = sum over k of  ((whole[q, k] share[k, b] + 2^14) >> 15) code[k, c]       fits 32 bits
        out[q, c]  += 2^E D[b] 2^15 / 32767^2 sum[q, c]
    """
    keys = codes.astype(np.float64) * scales.astype(np.float64).repeat(BLOCK, axis=1)
    scores = rounded(q, Rounding.INT8) @ keys.T * (scale * _LOG2_E)
    highest = np.rint(scores.max(1) + 0.5)
    total, out = np.zeros(len(q)), np.zeros((len(q), kv_lora // BLOCK, BLOCK))
    for start in range(0, len(codes), PAGE_KEYS):
        page = slice(start, start + PAGE_KEYS)
        exponent = np.rint(scores[:, page].max(1) + 0.5)
        weights = np.exp2(scores[:, page] - exponent[:, None])
        page_scales = scales[page, : kv_lora // BLOCK].astype(np.float64)
        largest = page_scales.max(0)
        shares = np.rint(_ONE * page_scales / np.where(largest > 0, largest, 1))
        products = np.floor((np.rint(_ONE * weights)[:, :, None] * shares + 2**14) / 2**15)
        values = codes[page, :kv_lora].reshape(len(shares), -1, BLOCK).astype(np.float64)
        share_of_page = np.exp2(exponent - highest)
        sums = np.einsum("hkb,kbc->hbc", products, values)
        out += share_of_page[:, None, None] * (largest * 2**15 / _ONE**2)[:, None] * sums
        total += share_of_page * weights.sum(1)
    return out.reshape(len(q), kv_lora) / total[:, None]


def attend(q: Floats, k: Floats, v: Floats, scale: float, numbers: Numbers = Numbers.WHOLE) -> Wide:
    """One head of a sequence's last R tokens: q [R, d], k [L, d], v [L, dv], before rounding. [R, dv].

    Row i sees the first L - R + i + 1 keys.
    """
    rows, keys = len(q), len(k)
    hidden = np.arange(keys)[None, :] > (np.arange(rows) + keys - rows)[:, None]
    scores = np.where(hidden, -np.inf, dots(q, k, numbers) * (scale * _LOG2_E))
    if numbers is Numbers.BF16:
        return _mean(scores, to_bf16(v).astype(np.float64))
    return _whole_mean(scores, v)


def _whole_mean(scores: Wide, values: Floats) -> Wide:
    """scores [R, L] in powers of two, values [L, dv]: [R, dv]."""
    codes, factors = _whole(values, np.abs(values).max(1).astype(np.float64))
    shares = _shares(scores)
    scaled = np.where(np.isneginf(scores), 0, shares / factors)
    out = np.zeros((len(scores), values.shape[1]))
    for start in range(0, len(values), BLOCK_KEYS):
        block = slice(start, start + BLOCK_KEYS)
        total = scaled[:, block].sum(1, keepdims=True)
        weights = np.rint(_ONE / np.where(total > 0, total, 1) * scaled[:, block])
        out += total / _ONE * (weights @ codes[block])
    mean: Wide = out / shares.sum(1, keepdims=True)
    return mean


def _shares(scores: Wide) -> Wide:
    shares = np.exp2(scores - np.ceil(scores.max(1, keepdims=True)))
    return np.where(shares < 2.0**-126, 0, shares)


def _mean(scores: Wide, values: Wide) -> Wide:
    """scores [R, L] in powers of two, values [L, dv]: [R, dv]."""
    weights = to_bf16(_shares(scores).astype(np.float32)).astype(np.float64)
    mean: Wide = weights @ values / weights.sum(1, keepdims=True)
    return mean
