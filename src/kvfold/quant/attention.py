"""What the native kernels make of queries, keys and values where products round: the definition, in numpy.

In mode `int8`; quant/activations.py defines the products before and after.

Everything attention multiplies is a bfloat16, everything it adds up is a float32:

    keys, values   rows of W_UK, W_UV (kv_b, v_b) times latents rounded as the type of the weights asks;
                   columns of W_UK (k_b) as bfloat16 times latents as bfloat16
    score[q, k] =  scale log2(e)  sum over i of  bf16(query[q, i]) bf16(key[k, i])
    weight[q, k] = bf16(2^(score[q, k] - M)),  M = ceil(the largest score of the row)
    out[q] =       sum over k of  weight[q, k] bf16(value[k])  /  sum over k of  weight[q, k]

The absorbed path attends in the same way, its keys the cached rows and its values their first kv_lora numbers, with the
products around it per head:

    W_UK^T q       by rows (k_b) on activations rounded as the type asks; by columns (kv_b) exactly, in float32
    score[q, k]    where the cache is q8_0: the query in whole numbers as activations are, the key as it is cached
    W_UV o         on activations rounded as the type asks

M is a whole number, so another M (the largest score so far, say) multiplies a weight by a power of two and rounds it to
the same bits: the result does not depend on the order in which keys are met, nor on how they are cut into tiles.
Weights below 2^-126 are zero.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kvfold.quant.activations import Rounding, product, rounded, to_bf16
from kvfold.quant.decode import decode_tensor
from kvfold.quant.tensor import QuantTensor

Floats = NDArray[np.float32]
Wide = NDArray[np.float64]

_LOG2_E = np.log2(np.e)


def expand_by_rows(latents: Floats, weight: QuantTensor) -> Wide:
    """Latents [L, kv_lora] and kv_b or v_b [N, kv_lora]: [L, N]."""
    return product(latents, weight)


def expand_by_columns(latents: Floats, weight: QuantTensor) -> Wide:
    """Latents [L, kv_lora] and the k_b of one head [kv_lora, nope]: its keys [L, nope]."""
    return to_bf16(latents).astype(np.float64) @ to_bf16(decode_tensor(weight)).astype(np.float64)


def fold_by_rows(q_nope: Floats, weight: QuantTensor) -> Wide:
    """Queries [R, nope] and the k_b of one head [kv_lora, nope]: [R, kv_lora]."""
    return product(q_nope, weight)


def attend_latents(q: Floats, latents: Floats, kv_lora: int, scale: float, *, in_codes: bool) -> Wide:
    """All heads of a row over the latents it sees: q [H, latent], latents [L, latent] as cached: [H, kv_lora].

    in_codes: the cache is q8_0.
    """
    q64 = rounded(q, Rounding.INT8 if in_codes else Rounding.BF16)
    scores = q64 @ (latents if in_codes else to_bf16(latents)).astype(np.float64).T
    return _mean(scores * (scale * _LOG2_E), to_bf16(latents[:, :kv_lora]).astype(np.float64))


def attend(q: Floats, k: Floats, v: Floats, scale: float) -> Wide:
    """One head of a sequence's last R tokens: q [R, d], k [L, d], v [L, dv], before rounding. [R, dv].

    Row i sees the first L - R + i + 1 keys.
    """
    rows, keys = len(q), len(k)
    q64, k64, v64 = (to_bf16(x).astype(np.float64) for x in (q, k, v))
    scores = q64 @ k64.T * (scale * _LOG2_E)
    scores[np.arange(keys)[None, :] > (np.arange(rows) + keys - rows)[:, None]] = -np.inf
    return _mean(scores, v64)


def _mean(scores: Wide, values: Wide) -> Wide:
    """scores [R, L] in powers of two, values [L, dv]: [R, dv]."""
    weights = np.exp2(scores - np.ceil(scores.max(1, keepdims=True)))
    weights = np.where(weights < 2.0**-126, 0, to_bf16(weights.astype(np.float32)).astype(np.float64))
    mean: Wide = weights @ values / weights.sum(1, keepdims=True)
    return mean
