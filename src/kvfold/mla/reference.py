"""The definition of Multi-head Latent Attention: per-head keys and values, float32, no options, no cache.

Every path and every kernel is judged by this file (DeepSeek-V2, arXiv 2405.04434, equations 9 to 19 and 37 to 47).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kvfold.config import MlaConfig

Array = NDArray[np.float32]


def attend(
    q: Array,  # [R, H, nope + rope]   queries, rope part rotated
    c_kv: Array,  # [L, kv_lora]       normed latents of every key
    k_rope: Array,  # [L, rope]        rotated keys, shared by all heads
    w_uk: Array,  # [H, nope, kv_lora]
    w_uv: Array,  # [H, v, kv_lora]
    mla: MlaConfig,
) -> Array:
    """Causal attention of the last R of L tokens over all L. Returns [R, H, v]."""
    num_rows, num_keys = q.shape[0], c_kv.shape[0]
    q_nope, q_rope = q[..., : mla.qk_nope_head_dim], q[..., mla.qk_nope_head_dim :]

    k_nope = np.einsum("lc,hnc->lhn", c_kv, w_uk, optimize=True)  # [L, H, nope]
    v = np.einsum("lc,hvc->lhv", c_kv, w_uv, optimize=True)  # [L, H, v]

    scores = np.einsum("rhn,lhn->hrl", q_nope, k_nope) + np.einsum("rhd,ld->hrl", q_rope, k_rope)
    scores *= np.float32(mla.softmax_scale)
    first_row = num_keys - num_rows
    future = np.arange(num_keys)[None, :] > first_row + np.arange(num_rows)[:, None]
    scores = np.where(future, np.float32(-np.inf), scores)

    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    out: Array = np.einsum("hrl,lhv->rhv", weights, v)
    return out
