"""Row-wise kernels: norms with the additions before them, rotation, the append to the cache, routing, folding.

One program a row. Hidden rows stay float32 from layer to layer; what a product reads is of the compute type.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvfold.kernels.overlap import let_next_start, overlaps, wait_for_inputs


@triton.jit
def _add_norm(
    x, y0, y1, weight, out_x, out, width, x_stride, eps, ADDS: tl.constexpr, WIDTH: tl.constexpr, NORM: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        wait_for_inputs()
    t = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, WIDTH)
    inside = i < width
    v = tl.load(x + t * x_stride + i, mask=inside, other=0.0).to(tl.float32)
    if ADDS > 0:
        v += tl.load(y0 + t * width + i, mask=inside, other=0.0).to(tl.float32)
        if ADDS > 1:
            v += tl.load(y1 + t * width + i, mask=inside, other=0.0).to(tl.float32)
        tl.store(out_x + t * width + i, v, mask=inside)
    if NORM:
        v *= tl.rsqrt(tl.sum(v * v, 0) / width + eps)
        w = tl.load(weight + i, mask=inside, other=0.0)
        tl.store(out + t * width + i, v * w, mask=inside)


@triton.jit
def _rotate(x, at, pairs, cos, sin, mask, FIRST: tl.constexpr, SECOND: tl.constexpr):
    """Both numbers of the pairs at x + at, rotated: float32."""
    a = tl.load(x + at + pairs * FIRST, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(x + at + pairs * FIRST + SECOND, mask=mask, other=0.0).to(tl.float32)
    return a * cos - b * sin, a * sin + b * cos


@triton.jit
def _append(
    slot, c, s, pair, is_pair, w, kv_a, eps, kv_lora, pool, latent,
    FIRST: tl.constexpr, SECOND: tl.constexpr, LORA: tl.constexpr,
):  # fmt: skip
    """[norm(c_kv) times w | k_rope rotated by c and s] of the row at kv_a to its slot."""
    i = tl.arange(0, LORA)
    v = tl.load(kv_a + i, mask=i < kv_lora, other=0.0).to(tl.float32)
    k_a, k_b = _rotate(kv_a, kv_lora, pair, c, s, is_pair, FIRST, SECOND)
    v *= tl.rsqrt(tl.sum(v * v, 0) / kv_lora + eps)
    is_there = slot >= 0  # padding has none
    to = pool + slot * latent
    tl.store(to + i, v * w, mask=(i < kv_lora) & is_there)
    tl.store(to + kv_lora + pair * FIRST, k_a, mask=is_pair & is_there)
    tl.store(to + kv_lora + pair * FIRST + SECOND, k_b, mask=is_pair & is_there)


@triton.jit
def _norm_weight(weight, kv_lora, LORA: tl.constexpr):
    i = tl.arange(0, LORA)
    return tl.load(weight + i, mask=i < kv_lora, other=0.0)


@triton.jit
def _angles(t, positions, cos, sin, ROPE: tl.constexpr, PAIRS: tl.constexpr):
    """cos and sin of row t's pairs, the pairs, and which of them there are."""
    position = tl.load(positions + t).to(tl.int64)
    pair = tl.arange(0, PAIRS)
    is_pair = pair < ROPE // 2
    c = tl.load(cos + position * (ROPE // 2) + pair, mask=is_pair, other=0.0)
    s = tl.load(sin + position * (ROPE // 2) + pair, mask=is_pair, other=0.0)
    return c, s, pair, is_pair


@triton.jit
def _rope_append(
    q, q_stride, num_heads, head_dim, kv_a, kv_stride, weight, eps, kv_lora, positions, slots, cos, sin, pool, latent,
    ROPE: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, HEADS: tl.constexpr, PAIRS: tl.constexpr,
    LORA: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """FIRST, SECOND: steps from pair to pair, and from its first number to its second."""
    if EARLY:
        wait_for_inputs()
    t = tl.program_id(0).to(tl.int64)
    c, s, pair, is_pair = _angles(t, positions, cos, sin, ROPE, PAIRS)
    head = tl.arange(0, HEADS)
    mask = (head < num_heads)[:, None] & is_pair[None, :]
    at = t * q_stride + (head * head_dim + head_dim - ROPE)[:, None] + 0 * pair[None, :]
    a, b = _rotate(q, at, pair[None, :], c[None, :], s[None, :], mask, FIRST, SECOND)
    tl.store(q + at + pair[None, :] * FIRST, a, mask=mask)
    tl.store(q + at + pair[None, :] * FIRST + SECOND, b, mask=mask)
    slot = tl.load(slots + t).to(tl.int64)
    w = _norm_weight(weight, kv_lora, LORA)
    _append(slot, c, s, pair, is_pair, w, kv_a + t * kv_stride, eps, kv_lora, pool, latent, FIRST, SECOND, LORA)


@triton.jit
def _append_heads(
    k_nope, k_rope, k_rope_stride, v, slots, key_pool, value_pool, num_heads, nope, rope, v_dim,
    NOPE: tl.constexpr, ROPE: tl.constexpr, V: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Program (row, head)."""
    if EARLY:
        wait_for_inputs()
    t = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    slot = tl.load(slots + t).to(tl.int64)
    if slot >= 0:  # padding has none
        at = t * num_heads + head
        to = slot * num_heads + head
        i = tl.arange(0, NOPE)
        x = tl.load(k_nope + at * nope + i, mask=i < nope, other=0.0).to(tl.float32)
        tl.store(key_pool + to * (nope + rope) + i, x, mask=i < nope)
        i = tl.arange(0, ROPE)
        x = tl.load(k_rope + t * k_rope_stride + i, mask=i < rope, other=0.0).to(tl.float32)
        tl.store(key_pool + to * (nope + rope) + nope + i, x, mask=i < rope)
        i = tl.arange(0, V)
        x = tl.load(v + at * v_dim + i, mask=i < v_dim, other=0.0).to(tl.float32)
        tl.store(value_pool + to * v_dim + i, x, mask=i < v_dim)


@triton.jit
def _fold_append(
    q, q_stride, num_heads, head_dim, w, out, kv_a, kv_stride, weight, eps, kv_lora, positions, slots, cos, sin, pool,
    latent,
    NOPE: tl.constexpr, PADDED: tl.constexpr, WIDTH: tl.constexpr, TOKENS: tl.constexpr,
    ROPE: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, PAIRS: tl.constexpr, LORA: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """Program (head, WIDTH columns of W_UK): folds q_nope of every row; the first of a head rotates its q_rope. Behind
    the heads: programs that append a row's latent each. Positions and slots are older than the kernel before this one."""
    if EARLY:
        let_next_start()
    head = tl.program_id(0)
    angles = ()
    for t in tl.static_range(TOKENS):
        angles += (_angles(t, positions, cos, sin, ROPE, PAIRS),)  # type: ignore[assignment]
    if head < num_heads:
        k = tl.arange(0, PADDED)
        n = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
        mask = (k < NOPE)[:, None] & (n < kv_lora)[None, :]
        at = head.to(tl.int64) * NOPE * kv_lora
        tile = tl.load(w + at + k[:, None] * kv_lora + n[None, :], mask=mask, other=0.0).to(tl.float32)
        if EARLY:
            wait_for_inputs()
        for t in tl.static_range(TOKENS):
            x = tl.load(q + t * q_stride + head * head_dim + k, mask=k < NOPE, other=0.0).to(tl.float32)
            to = out + (t * num_heads + head) * latent
            if tl.program_id(1) == 0:
                c, s, pair, is_pair = angles[t]  # type: ignore[var-annotated]
                a, b = _rotate(q, t * q_stride + head * head_dim + NOPE, pair, c, s, is_pair, FIRST, SECOND)
                tl.store(to + kv_lora + pair * FIRST, a, mask=is_pair)
                tl.store(to + kv_lora + pair * FIRST + SECOND, b, mask=is_pair)
            tl.store(to + n, tl.sum(tile * x[:, None], 0), mask=n < kv_lora)
    else:
        norm = _norm_weight(weight, kv_lora, LORA)
        to_slots = ()
        for t in tl.static_range(TOKENS):
            to_slots += (tl.load(slots + t).to(tl.int64),)  # type: ignore[assignment]
        if EARLY:
            wait_for_inputs()
        for t in tl.static_range(TOKENS):
            if tl.program_id(1) == t % tl.num_programs(1):
                c, s, pair, is_pair = angles[t]
                _append(to_slots[t], c, s, pair, is_pair, norm, kv_a + t * kv_stride, eps, kv_lora, pool, latent, FIRST,
                        SECOND, LORA)  # fmt: skip


@triton.jit
def choose_experts(
    t, logits, bias, ids, weights, num_experts, per_group, num_groups, groups_kept, per_row, factor,
    SIGMOID: tl.constexpr, BIAS: tl.constexpr, TOP2: tl.constexpr, NORM: tl.constexpr,
    GROUPS: tl.constexpr, EACH: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    """ids and weights of row t by its logits."""
    group = tl.arange(0, GROUPS)
    each = tl.arange(0, EACH)
    expert = group[:, None] * per_group + each[None, :]
    inside = (group < num_groups)[:, None] & (each < per_group)[None, :]
    low = float("-inf")
    # volatile: other programs of the same launch may have written them (number_product.py)
    x = tl.load(logits + t * num_experts + expert, mask=inside, other=low, volatile=True)
    if SIGMOID:
        scores = 1.0 / (1.0 + tl.exp(-x))
    else:
        scores = tl.exp(x - tl.max(tl.max(x, 1), 0))
        scores = scores / tl.sum(tl.sum(scores, 1), 0)
    choice = scores
    if BIAS:
        choice += tl.load(bias + expert, mask=inside, other=0.0)
    choice = tl.where(inside, choice, low)

    if num_groups > 1:
        best = tl.max(choice, 1)
        rank = best
        if TOP2:
            first = tl.min(tl.where(choice == best[:, None], each[None, :], EACH), 1)
            rank += tl.max(tl.where(each[None, :] == first[:, None], low, choice), 1)
        rank = tl.where(group < num_groups, rank, low)
        kept = group < 0
        for _ in range(groups_kept):
            top = tl.max(rank, 0)
            chosen = tl.min(tl.where(rank == top, group, GROUPS - 1), 0)
            kept = kept | (group == chosen)
            rank = tl.where(group == chosen, low, rank)
        # the released V2 code ranks refused experts at 0, V3 below all
        choice = tl.where(kept[:, None] | (inside == 0), choice, low if TOP2 else 0.0)

    # Choices as whole numbers that order alike, NaN included, above the expert's place from the end: one search finds the
    # largest and the first expert that has it, where each search crosses the program's warps.
    bits = choice.to(tl.int32, bitcast=True)
    order = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)
    order = tl.where(inside, (order << 32) | (num_experts - 1 - expert), -0x8000000000000000)
    place = tl.arange(0, PLACES)
    chosen_ids = tl.zeros([PLACES], tl.int32)
    chosen_weights = tl.zeros([PLACES], tl.float32)
    for i in range(per_row):
        top = tl.max(tl.max(order, 1), 0)
        chosen = num_experts - 1 - (top & 0x7FFFFFFF).to(tl.int32)
        if BIAS or GROUPS > 1:
            weight = tl.sum(tl.sum(tl.where((expert == chosen) & inside, scores, 0.0), 1), 0)
        else:  # the score itself, which is not negative
            weight = (top >> 32).to(tl.int32).to(tl.float32, bitcast=True)
        chosen_ids = tl.where(place == i, chosen, chosen_ids)
        chosen_weights = tl.where(place == i, weight, chosen_weights)
        order = tl.where(order == top, -0x8000000000000000, order)
    if NORM:
        chosen_weights = chosen_weights / (tl.sum(chosen_weights, 0) + 1e-20)
    tl.store(ids + t * per_row + place, chosen_ids, mask=place < per_row)
    tl.store(weights + t * per_row + place, chosen_weights * factor, mask=place < per_row)


@triton.jit
def _route(
    logits, bias, ids, weights, num_experts, per_group, num_groups, groups_kept, per_row, factor,
    SIGMOID: tl.constexpr, BIAS: tl.constexpr, TOP2: tl.constexpr, NORM: tl.constexpr,
    GROUPS: tl.constexpr, EACH: tl.constexpr, PLACES: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        wait_for_inputs()
    choose_experts(
        tl.program_id(0).to(tl.int64), logits, bias, ids, weights, num_experts, per_group, num_groups, groups_kept,
        per_row, factor, SIGMOID, BIAS, TOP2, NORM, GROUPS, EACH, PLACES,
    )  # fmt: skip


@triton.jit
def silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit
def _swiglu(gate, up, out, width, gate_stride, up_stride, WIDTH: tl.constexpr, EARLY: tl.constexpr):
    if EARLY:
        wait_for_inputs()
    t = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    g = tl.load(gate + t * gate_stride + i, mask=i < width, other=0.0).to(tl.float32)
    u = tl.load(up + t * up_stride + i, mask=i < width, other=0.0).to(tl.float32)
    tl.store(out + t * width + i, silu(g) * u, mask=i < width)


@triton.jit
def _per_head(
    a, a_row, a_head, w, w_head, w_k, w_n, out, out_row, out_head, num_rows, depth, width, extra,
    NUMBER: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """out[t, h, :width] = a[t, h, :depth] @ w[h]; then `extra` numbers of a copied behind them."""
    if EARLY:
        wait_for_inputs()
    head = tl.program_id(0).to(tl.int64)
    m = (tl.program_id(2) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    n = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    a += head * a_head
    w += head * w_head
    out += head * out_head
    y = tl.zeros([ROWS, WIDTH], tl.float32)
    for first in range(0, depth, DEPTH):
        k = first + tl.arange(0, DEPTH)
        mask = (m < num_rows)[:, None] & (k < depth)[None, :]
        x = tl.load(a + m[:, None] * a_row + k[None, :], mask=mask, other=0.0).to(NUMBER)
        mask = (k < depth)[:, None] & (n < width)[None, :]
        b = tl.load(w + k[:, None] * w_k + n[None, :] * w_n, mask=mask, other=0.0).to(NUMBER)
        y = tl.dot(x, b, y, input_precision="ieee")
    tl.store(out + m[:, None] * out_row + n[None, :], y, mask=(m < num_rows)[:, None] & (n < width)[None, :])
    if tl.program_id(1) == 0:
        mask = (m < num_rows)[:, None] & (n < extra)[None, :]
        x = tl.load(a + m[:, None] * a_row + depth + n[None, :], mask=mask, other=0.0)
        tl.store(out + m[:, None] * out_row + width + n[None, :], x, mask=mask)


def add_norm(
    x: Tensor, adds: tuple[Tensor, ...], weight: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """x [T, width] plus up to two others, float32 (x itself without any), and its RMS norm times weight of `dtype`
    (the first again where weight is None)."""
    width = x.shape[1]
    total = torch.empty(x.shape, dtype=torch.float32, device=x.device) if adds else x
    normed = total if weight is None else torch.empty(x.shape, dtype=dtype, device=x.device)
    padded = (*adds, x, x)[:2]
    early = overlaps(x)
    _add_norm[(len(x),)](
        x, *padded, x if weight is None else weight, total, normed, width, x.stride(0), eps,
        ADDS=len(adds), WIDTH=triton.next_power_of_2(width), NORM=weight is not None,
        num_warps=8 if width > 2048 else 4, EARLY=early, launch_pdl=early,
    )  # fmt: skip
    return total, normed


def rope_append(
    q: Tensor,
    kv_a: Tensor,
    weight: Tensor,
    eps: float,
    positions: Tensor,
    slots: Tensor,
    cos: Tensor,
    sin: Tensor,
    pool: Tensor,
    *,
    num_heads: int,
    head_dim: int,
    is_half_split: bool,
) -> None:
    """Rotates the last numbers of q's heads IN PLACE and writes [norm(c_kv) | rotated k_rope] to the rows' slots.

    q [T, H * head_dim], kv_a [T, kv_lora + rope], positions int32 [T], slots int64 [T] (-1: none), cos and sin
    float32 [all positions, rope / 2], pool [slots, kv_lora + rope] of one layer.
    """
    rope = 2 * cos.shape[1]
    latent = pool.shape[1]
    early = overlaps(q)
    _rope_append[(len(q),)](
        q, q.stride(0), num_heads, head_dim, kv_a, kv_a.stride(0), weight, eps, latent - rope, positions, slots, cos,
        sin, pool, latent,
        ROPE=rope, FIRST=1 if is_half_split else 2, SECOND=rope // 2 if is_half_split else 1,
        HEADS=triton.next_power_of_2(num_heads), PAIRS=triton.next_power_of_2(rope // 2),
        LORA=triton.next_power_of_2(latent - rope), EARLY=early, launch_pdl=early,
    )  # fmt: skip


def append_heads(
    k_nope: Tensor, k_rope: Tensor, v: Tensor, slots: Tensor, key_pool: Tensor, value_pool: Tensor
) -> None:
    """Writes [k_nope | k_rope] of every head, and v, to the rows' slots, rounded to the pools' type.

    k_nope [T, H, nope] and v [T, H, v] contiguous, k_rope [T, rope] shared by the heads, slots int64 [T] (-1: none), pools
    [slots, H * (nope + rope)] and [slots, H * v] of one layer.
    """
    num_rows, num_heads, nope = k_nope.shape
    rope, v_dim = k_rope.shape[1], v.shape[2]
    early = overlaps(v)
    _append_heads[(num_rows, num_heads)](
        k_nope, k_rope, k_rope.stride(0), v, slots, key_pool, value_pool, num_heads, nope, rope, v_dim,
        NOPE=triton.next_power_of_2(nope), ROPE=triton.next_power_of_2(rope), V=triton.next_power_of_2(v_dim),
        num_warps=1, EARLY=early, launch_pdl=early,
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class LatentRow:
    """What generated rows append: [norm(c_kv) | rotated k_rope], rounded to the pool's type."""

    kv_a: Tensor  # [T, kv_lora + rope]
    weight: Tensor  # float32 [kv_lora], of the norm
    eps: float
    positions: Tensor  # int32 [T]
    slots: Tensor  # int64 [T]; -1: none
    cos: Tensor  # float32 [all positions, rope / 2]
    sin: Tensor
    pool: Tensor  # [slots, kv_lora + rope] of one layer
    is_half_split: bool


def fold_append(q: Tensor, w_uk: Tensor, out: Tensor, new: LatentRow) -> None:
    """Of a few rows: out [T, H, latent] = [q_nope @ w_uk | rotated q_rope], and the append of `rope_append`.

    q [T, H * (nope + rope)] stays as it is; w_uk [H, nope, kv_lora] contiguous.
    """
    num_heads, nope, kv_lora = w_uk.shape
    rope = 2 * new.cos.shape[1]
    # 8 KB of bfloat16 weights: 256 programs for 16 heads of 128 x 512.
    padded, width = triton.next_power_of_2(nope), 32
    early = overlaps(q)
    _fold_append[(num_heads + 1, triton.cdiv(kv_lora, width))](
        q, q.stride(0), num_heads, nope + rope, w_uk, out, new.kv_a, new.kv_a.stride(0), new.weight, new.eps, kv_lora,
        new.positions, new.slots, new.cos, new.sin, new.pool, kv_lora + rope,
        NOPE=nope, PADDED=padded, WIDTH=width, TOKENS=len(q), ROPE=rope, FIRST=1 if new.is_half_split else 2,
        SECOND=rope // 2 if new.is_half_split else 1, PAIRS=triton.next_power_of_2(rope // 2),
        LORA=triton.next_power_of_2(kv_lora), EARLY=early, launch_pdl=early,
    )  # fmt: skip


@dataclass(frozen=True)
class RoutingRule:
    """per_row experts a row, of the groups_kept best of num_groups groups; is_top2: a group ranks by its two best
    experts' sum, else by the best. factor: of the weights."""

    per_row: int
    num_groups: int
    groups_kept: int
    is_sigmoid: bool
    is_top2: bool
    is_normed: bool
    factor: float

    def arguments(self, num_experts: int) -> tuple[int, int, int, int, int, float]:
        """Of choose_experts, behind `weights`."""
        per_group = num_experts // self.num_groups
        return num_experts, per_group, self.num_groups, self.groups_kept, self.per_row, self.factor

    def constants(self, num_experts: int, has_bias: bool) -> dict[str, Any]:
        return {
            "SIGMOID": self.is_sigmoid,
            "BIAS": has_bias,
            "TOP2": self.is_top2,
            "NORM": self.is_normed,
            "GROUPS": triton.next_power_of_2(self.num_groups),
            "EACH": triton.next_power_of_2(num_experts // self.num_groups),
            "PLACES": triton.next_power_of_2(self.per_row),
        }


def route(logits: Tensor, bias: Tensor | None, rule: RoutingRule) -> tuple[Tensor, Tensor]:
    """Expert ids int32 [T, k], the lowest where two are equal, and weights float32 [T, k] of logits float32 [T, E]."""
    num_rows, num_experts = logits.shape
    ids = torch.empty(num_rows, rule.per_row, dtype=torch.int32, device=logits.device)
    weights = torch.empty(num_rows, rule.per_row, dtype=torch.float32, device=logits.device)
    early = overlaps(logits)
    _route[(num_rows,)](
        logits, logits if bias is None else bias, ids, weights, *rule.arguments(num_experts),
        **rule.constants(num_experts, bias is not None), num_warps=1, EARLY=early, launch_pdl=early,
    )  # fmt: skip
    return ids, weights


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, [T, width] each with any row stride."""
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    width = 1024
    early = overlaps(gate)
    _swiglu[(len(gate), triton.cdiv(gate.shape[1], width))](
        gate, up, out, gate.shape[1], gate.stride(0), up.stride(0), WIDTH=width, EARLY=early, launch_pdl=early
    )
    return out


def per_head(a: Tensor, w: Tensor, out: Tensor, *, depth: int, width: int, extra: int = 0) -> None:
    """out[t, h, :width] = a[t, h, :depth] @ w[h] for a [T, H, ..], w [H, depth, width] with any strides, out [T, H, ..];
    out[t, h, width : width + extra] = a[t, h, depth : depth + extra]."""
    rows = min(64, max(16, triton.next_power_of_2(len(a))))
    block = max(64, triton.next_power_of_2(extra))
    early = overlaps(a)
    _per_head[(a.shape[1], triton.cdiv(width, block), triton.cdiv(len(a), rows))](
        a, a.stride(0), a.stride(1), w, w.stride(0), w.stride(1), w.stride(2), out, out.stride(0), out.stride(1),
        len(a), depth, width, extra,
        NUMBER={torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[a.dtype],
        ROWS=rows, WIDTH=block, DEPTH=64, EARLY=early, launch_pdl=early,
    )  # fmt: skip
