"""Both file layouts give the same weights, and absorbing is the same attention."""

from __future__ import annotations

import numpy as np

from kvfold.config import MlaConfig
from kvfold.mla.absorb import split_k_b_v_b, split_kv_b
from kvfold.mla.reference import attend

MLA = MlaConfig(5, 24, 8, 20, 96, None, 32**-0.5)


def _weights(rng: np.random.Generator) -> np.ndarray:
    return rng.standard_normal((MLA.num_heads * (24 + 20), 96), dtype=np.float32)


def test_both_layouts_split_into_the_same_weights() -> None:
    kv_b = _weights(np.random.default_rng(1))
    w_uk, w_uv = split_kv_b(kv_b, MLA)
    k_b = np.ascontiguousarray(w_uk.swapaxes(1, 2)).reshape(5 * 96, 24)
    v_b = np.ascontiguousarray(w_uv).reshape(5 * 20, 96)
    w_uk2, w_uv2 = split_k_b_v_b(k_b, v_b, MLA)
    np.testing.assert_array_equal(w_uk, w_uk2)
    np.testing.assert_array_equal(w_uv, w_uv2)
    assert np.shares_memory(w_uk, kv_b), "a view, never a copy"


def test_absorbed_attention_is_the_reference() -> None:
    rng = np.random.default_rng(2)
    rows, keys = 6, 17
    w_uk, w_uv = split_kv_b(_weights(rng), MLA)
    q = rng.standard_normal((rows, 5, 32), dtype=np.float32)
    c_kv = rng.standard_normal((keys, 96), dtype=np.float32)
    k_rope = rng.standard_normal((keys, 8), dtype=np.float32)

    q_latent = np.concatenate([np.einsum("rhn,hnc->rhc", q[..., :24], w_uk), q[..., 24:]], axis=-1)
    scores = np.einsum("rhc,lc->hrl", q_latent, np.concatenate([c_kv, k_rope], axis=-1)) * MLA.softmax_scale
    scores[:, np.arange(keys)[None, :] > keys - rows + np.arange(rows)[:, None]] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    absorbed = np.einsum("rhc,hvc->rhv", np.einsum("hrl,lc->rhc", weights, c_kv), w_uv)

    expected = attend(q, c_kv, k_rope, w_uk, w_uv, MLA)
    np.testing.assert_allclose(absorbed, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
