"""What the native kernels make of queries, keys and values where products round: the definition, in numpy.

For the decompressed path and mla=0 in mode `int8`; quant/activations.py defines the products before and after.

Everything attention multiplies is a bfloat16, everything it adds up is a float32:

    keys, values   rows of W_UK, W_UV (kv_b, v_b) times latents rounded as the type of the weights asks;
                   columns of W_UK (k_b) as bfloat16 times latents as bfloat16
    score[q, k] =  scale log2(e)  sum over i of  bf16(query[q, i]) bf16(key[k, i])
    weight[q, k] = bf16(2^(score[q, k] - M)),  M = ceil(the largest score of the row)
    out[q] =       sum over k of  weight[q, k] bf16(value[k])  /  sum over k of  weight[q, k]

M is a whole number, so another M (the largest score so far, say) multiplies a weight by a power of two and rounds it to
the same bits: the result does not depend on the order in which keys are met, nor on how they are cut into tiles.
Weights below 2^-126 are zero.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kvfold.quant.activations import product, to_bf16
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


def attend(q: Floats, k: Floats, v: Floats, scale: float) -> Wide:
    """One head of a sequence's last R tokens: q [R, d], k [L, d], v [L, dv], before rounding. [R, dv].

    Row i sees the first L - R + i + 1 keys.
    """
    rows, keys = len(q), len(k)
    q64, k64, v64 = (to_bf16(x).astype(np.float64) for x in (q, k, v))
    scores = q64 @ k64.T * (scale * _LOG2_E)
    scores[np.arange(keys)[None, :] > (np.arange(rows) + keys - rows)[:, None]] = -np.inf
    weights = np.exp2(scores - np.ceil(scores.max(1, keepdims=True)))
    weights = np.where(weights < 2.0**-126, 0, to_bf16(weights.astype(np.float32)).astype(np.float64))
    mean: Wide = weights @ v64 / weights.sum(1, keepdims=True)
    return mean
