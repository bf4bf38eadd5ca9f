"""The feed-forward half of a layer: one dense network, or routed experts beside a shared one."""

from __future__ import annotations

from kvfold.config import MoeConfig
from kvfold.model.ops import Ops, V


def dense(ops: Ops[V], blk: str, x: V, suffix: str = "") -> V:
    """down(silu(gate x) * up x); `suffix` is "_shexp" for the shared experts, which are one wide network."""
    gate = ops.linear(f"{blk}.ffn_gate{suffix}", x, f"{blk}.ffn_gate{suffix}.weight")
    up = ops.linear(f"{blk}.ffn_up{suffix}", x, f"{blk}.ffn_up{suffix}.weight")
    hidden = ops.swiglu(f"{blk}.swiglu{suffix}", gate, up)
    return ops.linear(f"{blk}.ffn_down{suffix}", hidden, f"{blk}.ffn_down{suffix}.weight")


def mixture(ops: Ops[V], blk: str, x: V, moe: MoeConfig) -> V:
    """Routed experts plus the shared ones."""
    bias = f"{blk}.exp_probs_b.bias" if moe.has_choice_bias else None
    ids, weights = ops.route(f"{blk}.route", x, f"{blk}.ffn_gate_inp.weight", bias, moe)
    out = ops.experts(
        f"{blk}.experts",
        x,
        ids,
        weights,
        f"{blk}.ffn_gate_exps.weight",
        f"{blk}.ffn_up_exps.weight",
        f"{blk}.ffn_down_exps.weight",
    )
    if moe.shared_intermediate_size:
        out = ops.add(f"{blk}.add_shared", out, dense(ops, blk, x, "_shexp"))
    return out
