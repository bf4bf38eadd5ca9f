"""One attention layer, written once: project, rotate, append the latent, run the plan.

All latent paths stand side by side: each op works on the rows the step's plan gives it and nothing else, so one
recording serves absorbed, decompressed and mixed steps.
"""

from __future__ import annotations

from kvfold.config import ModelConfig
from kvfold.mla.absorb import KvUp
from kvfold.mla.ops import AttentionOps, V


def attention(ops: AttentionOps[V], layer: int, x: V, config: ModelConfig, kv_up: KvUp, *, standard: bool) -> V:
    """x [T, hidden], already normed -> values of all heads [T, H * v]. `standard`: the model was loaded with mla=0."""
    mla, blk = config.mla, f"blk.{layer}"
    q = query(ops, blk, x, config)  # [T, H * (nope + rope)]
    kv_a = ops.linear(f"{blk}.kv_a", x, f"{blk}.attn_kv_a_mqa.weight")  # [T, kv_lora + rope]
    c_kv = ops.norm(
        f"{blk}.kv_a_norm",
        ops.columns(kv_a, 0, mla.kv_lora_rank),
        f"{blk}.attn_kv_a_norm.weight",
        mla.lora_norm_eps,
    )
    k_rope = ops.rope(
        f"{blk}.k_rope",
        ops.columns(kv_a, mla.kv_lora_rank, mla.latent_dim),
        config.rope,
        head_dim=mla.qk_rope_head_dim,
    )

    if standard:
        ops.append_full(f"{blk}.append_full", layer, c_kv, k_rope, kv_up, mla)
        return ops.attend_full(f"{blk}.attend_full", layer, q, mla)
    ops.append_latent(f"{blk}.append_latent", layer, c_kv, k_rope)
    q_latent = ops.fold_q(f"{blk}.fold_q", q, kv_up, mla)
    o_latent = ops.attend_latent(f"{blk}.attend_latent", layer, q_latent, mla)
    out = ops.unfold_v(f"{blk}.unfold_v", o_latent, kv_up, mla)
    return ops.attend_expanded(f"{blk}.attend_expanded", layer, q, kv_up, mla, into=out)


def query(ops: AttentionOps[V], blk: str, x: V, config: ModelConfig) -> V:
    """Queries of all heads, rope part rotated: [T, H * (nope + rope)]."""
    mla = config.mla
    if mla.q_lora_rank is None:
        q = ops.linear(f"{blk}.q", x, f"{blk}.attn_q.weight")
    else:
        q_a = ops.linear(f"{blk}.q_a", x, f"{blk}.attn_q_a.weight")
        q_a = ops.norm(f"{blk}.q_a_norm", q_a, f"{blk}.attn_q_a_norm.weight", mla.lora_norm_eps)
        q = ops.linear(f"{blk}.q_b", q_a, f"{blk}.attn_q_b.weight")
    return ops.rope(f"{blk}.q_rope", q, config.rope, head_dim=mla.qk_head_dim)
