"""The operations that attention asks of a machine: the first half of the protocol in model/ops.py.

Values are float32 matrices [rows, width]. An op never changes its inputs, except where it says so. Weights are named
handles, never pointers: an implementation may move them while a recording lives. Every op has a stable name such as
`blk.3.fold_q`; profiles, taps and guards go by it.
"""

from __future__ import annotations

from typing import Protocol, TypeVar

from kvfold.config import MlaConfig, RopeConfig
from kvfold.mla.absorb import KvUp

V = TypeVar("V")


class AttentionOps(Protocol[V]):
    def norm(self, name: str, x: V, weight: str, eps: float) -> V:
        """RMSNorm over the width: x / sqrt(mean(x^2) + eps) * weight."""

    def linear(self, name: str, x: V, weight: str) -> V:
        """x @ W^T for W [out, in]: [rows, out]."""

    def columns(self, x: V, start: int, stop: int) -> V:
        """A view of columns [start, stop); no work."""

    def rope(self, name: str, x: V, rope: RopeConfig, *, head_dim: int) -> V:
        """Rotates the last `rope.dim` numbers of each head of `head_dim` numbers by the row's position, IN PLACE,
        and returns x."""

    def append_latent(self, name: str, layer: int, c_kv: V, k_rope: V) -> None:
        """Writes [c_kv | k_rope] of every row to its slot of the latent cache."""

    def fold_q(self, name: str, q: V, kv_up: KvUp, mla: MlaConfig) -> V:
        """Rows of the absorbed segment: per head [W_UK^T q_nope | q_rope], [T, H * latent_dim]."""

    def attend_latent(self, name: str, layer: int, q_latent: V, mla: MlaConfig) -> V:
        """Rows of the absorbed segment: causal attention over latents, values are their first kv_lora numbers:
        [T, H * kv_lora]."""

    def unfold_v(self, name: str, o_latent: V, kv_up: KvUp, mla: MlaConfig) -> V:
        """Rows of the absorbed segment: per head W_UV o, [T, H * v]; the other rows are not written."""

    def attend_expanded(self, name: str, layer: int, q: V, kv_up: KvUp, mla: MlaConfig, into: V) -> V:
        """Rows of the decompressed segment: latents of their sequences expanded to K and V per head group and key
        tile in bounded workspace, and attended. Writes those rows of `into` [T, H * v] IN PLACE and returns it."""

    def append_full(self, name: str, layer: int, c_kv: V, k_rope: V, kv_up: KvUp, mla: MlaConfig) -> None:
        """mla=0: expands the rows' latents and writes per-head K [nope | rope] and V to their slots."""

    def attend_full(self, name: str, layer: int, q: V, mla: MlaConfig) -> V:
        """mla=0: causal attention over the per-head K and V of the standard cache: [T, H * v]."""
