"""The network, read first: embedding, layers, head, as segments with a cut between each two.

A step normally runs all segments; it may stop at any cut with x, the hidden rows [T, hidden], in hand, and go on
later. Behind the last layer x is the step's output rows alone, [R, hidden]. Cancelling, progress, streamed weights and
several devices attach at cuts.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvfold.config import ModelConfig
from kvfold.mla.absorb import KvUp
from kvfold.model.block import block
from kvfold.model.ops import Ops, V


@dataclass(frozen=True)
class DeepseekModel:
    config: ModelConfig
    splits_kv_b: bool  # the file holds attn_k_b and attn_v_b instead of attn_kv_b
    standard: bool  # loaded with mla=0: the cache holds per-head K and V

    @property
    def num_segments(self) -> int:
        return self.config.num_layers + 2

    def segment_name(self, index: int) -> str:
        if index == 0:
            return "embed"
        return "head" if index == self.num_segments - 1 else f"blk.{index - 1}"

    def run_segment(self, ops: Ops[V], index: int, x: V | None) -> V | None:
        """Segment 0 takes None; the head returns None and hands over "hidden" and "logits"."""
        if index == 0:
            return ops.embed("embed", "token_embd.weight")
        assert x is not None
        if index < self.num_segments - 1:
            layer = index - 1
            is_last = index == self.num_segments - 2
            return block(ops, layer, x, self.config, self.kv_up(layer), standard=self.standard, is_last=is_last)
        hidden = ops.norm("output_norm", x, "output_norm.weight", self.config.rms_norm_eps)
        ops.output("hidden", hidden)
        tied = self.config.tie_word_embeddings
        ops.output("logits", ops.linear("head", hidden, "token_embd.weight" if tied else "output.weight"))
        return None

    def kv_up(self, layer: int) -> KvUp:
        blk = f"blk.{layer}"
        if self.splits_kv_b:
            return KvUp(k_b=f"{blk}.attn_k_b.weight", v_b=f"{blk}.attn_v_b.weight")
        return KvUp(kv_b=f"{blk}.attn_kv_b.weight")
