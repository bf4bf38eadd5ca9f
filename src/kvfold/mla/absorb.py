"""The up-projections W_UK and W_UV: how files store them, and the algebra that moves them between key and query.

Files have one of two layouts, and both are used as they are. Neither is ever transposed: blocks run along the rows
of the file, so a transposed copy would have to be quantized again.

| layout | tensor | rows x cols per head | blocks run along |
|---|---|---|---|
| kv_b | attn_kv_b | (nope + v) x kv_lora, k_nope rows first | kv_lora |
| k_b, v_b | attn_k_b / attn_v_b | kv_lora x nope / v x kv_lora | nope / kv_lora |

    k_nope = W_UK c_kv,  v = W_UV c_kv              expansion: 131,072 multiply-adds per key and head (128/128/512)
    q . k_nope = (W_UK^T q) . c_kv                  fold_q: the same work once per query row instead
    sum_j p_j v_j = W_UV (sum_j p_j c_kv_j)         unfold_v

The products W_UQ W_UK and W_UV W_O are never formed: three times the elements of their factors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeVar

from kvfold.config import MlaConfig


class _Sliceable(Protocol):
    """What numpy arrays and torch tensors share here: no copies, no arithmetic."""

    def reshape(self: A, *shape: int) -> A: ...
    def swapaxes(self: A, axis0: int, axis1: int) -> A: ...
    def __getitem__(self: A, key: tuple[slice, ...]) -> A: ...


A = TypeVar("A", bound=_Sliceable)


@dataclass(frozen=True)
class KvUp:
    """The weight handles of one layer's up-projection: either kv_b, or k_b and v_b."""

    kv_b: str | None = None
    k_b: str | None = None
    v_b: str | None = None

    def __post_init__(self) -> None:
        assert (self.kv_b is None) == (self.k_b is not None) == (self.v_b is not None), "one layout, whole"


def split_kv_b(kv_b: A, mla: MlaConfig) -> tuple[A, A]:
    """[H * (nope + v), kv_lora] -> views w_uk [H, nope, kv_lora], w_uv [H, v, kv_lora]."""
    per_head = kv_b.reshape(mla.num_heads, mla.qk_nope_head_dim + mla.v_head_dim, mla.kv_lora_rank)
    nope = mla.qk_nope_head_dim
    return per_head[:, :nope, :], per_head[:, nope:, :]


def split_k_b_v_b(k_b: A, v_b: A, mla: MlaConfig) -> tuple[A, A]:
    """[H * kv_lora, nope] and [H * v, kv_lora] -> views w_uk [H, nope, kv_lora], w_uv [H, v, kv_lora]."""
    w_uk = k_b.reshape(mla.num_heads, mla.kv_lora_rank, mla.qk_nope_head_dim).swapaxes(1, 2)
    return w_uk, v_b.reshape(mla.num_heads, mla.v_head_dim, mla.kv_lora_rank)
