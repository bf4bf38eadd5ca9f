"""One transformer layer: attention and feed-forward, each normed before and added after."""

from __future__ import annotations

from kvfold.config import ModelConfig
from kvfold.mla.absorb import KvUp
from kvfold.mla.attention import attention
from kvfold.model.moe import dense, mixture
from kvfold.model.ops import Ops, V


def block(ops: Ops[V], layer: int, x: V, config: ModelConfig, kv_up: KvUp, *, standard: bool, is_last: bool) -> V:
    """[T, hidden] -> [T, hidden]; the last layer -> [R, hidden], for behind its attention nobody reads another row."""
    blk = f"blk.{layer}"
    h = ops.norm(f"{blk}.attn_norm", x, f"{blk}.attn_norm.weight", config.rms_norm_eps)
    attended = attention(ops, layer, h, config, kv_up, standard=standard)
    if is_last:
        x, attended = ops.take_outputs("take_hidden", x), ops.take_outputs("take_attended", attended)
    x = ops.add(f"{blk}.add_attn", x, ops.linear(f"{blk}.attn_output", attended, f"{blk}.attn_output.weight"))
    h = ops.norm(f"{blk}.ffn_norm", x, f"{blk}.ffn_norm.weight", config.rms_norm_eps)
    if config.moe is not None and config.is_moe_layer(layer):
        return ops.add(f"{blk}.add_ffn", x, mixture(ops, blk, h, config.moe))
    return ops.add(f"{blk}.add_ffn", x, dense(ops, blk, h))
