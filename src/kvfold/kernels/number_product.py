"""Products of up to four rows with matrices of numbers (float32, float16, bfloat16), and what a step does around them.

The kernels of generated rows whose weights are not in blocks: bounded by the bytes of the weights, each of which is read
once for all rows. Norms, additions and routing are part of a product, because a launch between two products costs as much
as 10 MB of weights. A program owns a few output features, asks for their weights before its inputs are there, and sums
within itself, so the same input gives the same bits.

A product takes its rows normed where `norm` says so: every program norms them again, which are 8 KB a row from L2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvfold.kernels.matrix import Matrix
from kvfold.kernels.overlap import let_next_start, overlaps, wait_for_inputs
from kvfold.kernels.rounding import RoundedRows, code, mixed_place, scale_of
from kvfold.kernels.rows import RoutingRule, choose_experts, silu

MOST_ROWS = 4
TYPES = frozenset(["F32", "F16", "BF16"])

# Numbers of a weight row in one pass, and what a program may hold of them while it waits: 128 registers of a thread.
PASS = 2048
THREADS = 128
HELD_BYTES = 4 * 128 * THREADS


@dataclass(frozen=True, eq=False)
class Norm:
    """RMS norm: weight float32 [width]."""

    weight: Tensor
    eps: float


@triton.jit
def _held(w, at, COLS: tl.constexpr, WIDTH: tl.constexpr, HELD: tl.constexpr):
    """The first HELD passes of rows that begin at `at` int64 [ROWS]: tiles [ROWS, WIDTH]."""
    tiles = ()
    col = tl.arange(0, WIDTH)
    for i in tl.static_range(HELD):
        c = i * WIDTH + col
        tile = tl.load(w + at[:, None] + c[None, :], mask=(c < COLS)[None, :], other=0.0)
        tiles += (tile,)  # type: ignore[assignment]
    return tiles


@triton.jit
def one_over_rms(x, eps, COLS: tl.constexpr, PADDED: tl.constexpr):
    i = tl.arange(0, PADDED)
    v = tl.load(x + i, mask=i < COLS, other=0.0).to(tl.float32)
    return tl.rsqrt(tl.sum(v * v, 0) / COLS + eps)


@triton.jit
def _row_products(
    x, norm, tiles, w, at, COLS: tl.constexpr, WIDTH: tl.constexpr, HELD: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Products [ROWS, WIDTH] of x [COLS] with rows at `at`, not summed yet; x times norm where NORM."""
    col = tl.arange(0, WIDTH)
    y = tl.zeros([at.shape[0], WIDTH], tl.float32)
    for i in tl.static_range((COLS + WIDTH - 1) // WIDTH):
        c = i * WIDTH + col
        v = tl.load(x + c, mask=c < COLS, other=0.0).to(tl.float32)
        if NORM:
            v *= tl.load(norm + c, mask=c < COLS, other=0.0)
        if i < HELD:  # noqa: SIM108 (a constant to Triton, which a conditional expression is not)
            tile = tiles[i]
        else:
            tile = tl.load(w + at[:, None] + c[None, :], mask=(c < COLS)[None, :], other=0.0)
        y += tile.to(tl.float32) * v[None, :]
    return y


@triton.jit
def _linear(
    x, x_stride, norm, eps, add, w, out, out_stride, rows, head_rows,
    COLS: tl.constexpr, TOKENS: tl.constexpr, NORM: tl.constexpr, ADD: tl.constexpr, PADDED: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, HELD: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Feature f takes COLS numbers of x from f // head_rows * COLS on."""
    if EARLY:
        let_next_start()
    first = tl.program_id(0) * ROWS
    feature = first + tl.arange(0, ROWS)
    at = tl.minimum(feature, rows - 1).to(tl.int64) * COLS
    tiles = _held(w, at, COLS, WIDTH, HELD)
    if EARLY:
        wait_for_inputs()
    x += first // head_rows * COLS
    for t in tl.static_range(TOKENS):
        y = tl.sum(_row_products(x + t * x_stride, norm, tiles, w, at, COLS, WIDTH, HELD, NORM), 1)
        if NORM:
            y *= one_over_rms(x + t * x_stride, eps, COLS, PADDED)
        if ADD:
            y += tl.load(add + t * rows + feature, mask=feature < rows, other=0.0)
        tl.store(out + t * out_stride + feature, y, mask=feature < rows)


@triton.jit
def _gate_up_features(
    x, x_stride, norm, eps, gate, up, out, rows, first,
    COLS: tl.constexpr, TOKENS: tl.constexpr, NORM: tl.constexpr, PADDED: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, HELD: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Features [first, first + ROWS) of silu(gate x) * (up x) for every row."""
    feature = first + tl.arange(0, ROWS)
    at = tl.minimum(feature, rows - 1).to(tl.int64) * COLS
    gates = _held(gate, at, COLS, WIDTH, HELD)
    ups = _held(up, at, COLS, WIDTH, HELD)
    if EARLY:
        wait_for_inputs()
    for t in tl.static_range(TOKENS):
        x_t = x + t * x_stride
        g = tl.sum(_row_products(x_t, norm, gates, gate, at, COLS, WIDTH, HELD, NORM), 1)
        u = tl.sum(_row_products(x_t, norm, ups, up, at, COLS, WIDTH, HELD, NORM), 1)
        if NORM:
            scale = one_over_rms(x_t, eps, COLS, PADDED)
            g *= scale
            u *= scale
        tl.store(out + t * rows + feature, silu(g) * u, mask=feature < rows)


@triton.jit
def _gate_up(
    x, x_stride, norm, eps, gate, up, out, rows,
    COLS: tl.constexpr, TOKENS: tl.constexpr, NORM: tl.constexpr, PADDED: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, HELD: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        let_next_start()
    _gate_up_features(x, x_stride, norm, eps, gate, up, out, rows, tl.program_id(0) * ROWS, COLS, TOKENS, NORM, PADDED,
                      ROWS, WIDTH, HELD, EARLY)  # fmt: skip


@triton.jit
def _route_gate_up(
    x, x_stride, norm, eps, router, logits, bias, ids, weights, arrived, normed, scales, gate, up, out, rows,
    num_experts, per_group, num_groups, groups_kept, per_row, factor,
    COLS: tl.constexpr, TOKENS: tl.constexpr, PADDED: tl.constexpr, WIDTH: tl.constexpr,
    ROUTER_HELD: tl.constexpr, ROWS: tl.constexpr, HELD: tl.constexpr, ROUNDS: tl.constexpr, MIXED: tl.constexpr,
    SIGMOID: tl.constexpr, BIAS: tl.constexpr, TOP2: tl.constexpr, NORM: tl.constexpr,
    GROUPS: tl.constexpr, EACH: tl.constexpr, PLACES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Programs 0 .. num_experts - 1: one expert's logit each, and the last of them to end chooses the experts of every
    row. The next one writes the normed rows, in codes and scales where ROUNDS. The others own ROWS features of the shared
    experts' gate and up."""
    if EARLY:
        let_next_start()
    program = tl.program_id(0)
    if program < num_experts:
        at = program.to(tl.int64) * COLS + tl.arange(0, 1)
        tiles = _held(router, at, COLS, WIDTH, ROUTER_HELD)
        if EARLY:
            wait_for_inputs()
        for t in tl.static_range(TOKENS):
            x_t = x + t * x_stride
            y = tl.sum(_row_products(x_t, norm, tiles, router, at, COLS, WIDTH, ROUTER_HELD, True), 1)
            y *= one_over_rms(x_t, eps, COLS, PADDED)
            tl.store(logits + t * num_experts + program + tl.arange(0, 1), y)
        tl.debug_barrier()  # every thread has stored before one of them counts
        if tl.atomic_add(arrived, 1, sem="acq_rel") == num_experts - 1:
            tl.store(arrived, 0)
            for t in tl.static_range(TOKENS):
                choose_experts(t, logits, bias, ids, weights, num_experts, per_group, num_groups, groups_kept, per_row,
                               factor, SIGMOID, BIAS, TOP2, NORM, GROUPS, EACH, PLACES)  # fmt: skip
    elif program == num_experts:
        block = tl.arange(0, PADDED // 32)
        i = tl.arange(0, 32)
        at = block[:, None] * 32 + i[None, :]
        g = tl.load(norm + at, mask=at < COLS, other=0.0)
        if EARLY:
            wait_for_inputs()
        for t in tl.static_range(TOKENS):
            x_t = x + t * x_stride
            v = tl.load(x_t + at, mask=at < COLS, other=0.0).to(tl.float32)
            v = v * one_over_rms(x_t, eps, COLS, PADDED) * g
            if ROUNDS:
                inverse, scale = scale_of(tl.max(v.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1))
                place = block[:, None] * 32 + (mixed_place(i) if MIXED else i)[None, :]
                tl.store(normed + t * COLS + place, code(v, inverse[:, None]).to(tl.int8), mask=at < COLS)
                tl.store(scales + t * (COLS // 32) + block, scale, mask=block < COLS // 32)
            else:
                tl.store(normed + t * COLS + at, v, mask=at < COLS)
    else:
        first = (program - num_experts - 1) * ROWS
        _gate_up_features(x, x_stride, norm, eps, gate, up, out, rows, first, COLS, TOKENS, True, PADDED, ROWS, WIDTH,
                          HELD, EARLY)  # fmt: skip


@triton.jit
def _chosen_gate_up(
    x, gate, up, ids, out, rows,
    COLS: tl.constexpr, PER_ROW: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, HELD: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """Program (features, pair): pair p is row p // PER_ROW of x with expert ids[p]."""
    if EARLY:
        wait_for_inputs()
    feature = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    pair = tl.program_id(1).to(tl.int64)
    expert = tl.load(ids + pair).to(tl.int64)
    at = (expert * rows + tl.minimum(feature, rows - 1)) * COLS
    gates = _held(gate, at, COLS, WIDTH, HELD)
    ups = _held(up, at, COLS, WIDTH, HELD)
    x += pair // PER_ROW * COLS
    g = _row_products(x, x, gates, gate, at, COLS, WIDTH, HELD, False)
    u = _row_products(x, x, ups, up, at, COLS, WIDTH, HELD, False)
    y = silu(tl.sum(g, 1)) * tl.sum(u, 1)  # both after all loads: a sum across threads waits for all of them
    tl.store(out + pair * rows + feature, y, mask=feature < rows)


@triton.jit
def _chosen_down(
    hidden, w, ids, weights, shared_hidden, shared, add, out, rows,
    COLS: tl.constexpr, SHARED_COLS: tl.constexpr, PER_ROW: tl.constexpr, ROWS: tl.constexpr,
    WIDTH: tl.constexpr, HELD: tl.constexpr, SHARED_HELD: tl.constexpr, HELD_CHOICES: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """Program (features, row). ids and weights are of two kernels ago, so they may be read before the wait."""
    if EARLY:
        let_next_start()
    feature = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    t = tl.program_id(1).to(tl.int64)
    row = tl.minimum(feature, rows - 1).to(tl.int64)
    shared_at = row * SHARED_COLS
    shared_tiles = _held(shared, shared_at, SHARED_COLS, WIDTH, SHARED_HELD)
    tiles = ()
    for choice in tl.static_range(HELD_CHOICES):
        at = (tl.load(ids + t * PER_ROW + choice).to(tl.int64) * rows + row) * COLS
        tiles += (_held(w, at, COLS, WIDTH, HELD),)  # type: ignore[assignment]
    if EARLY:
        wait_for_inputs()
    y = tl.zeros([ROWS, WIDTH], tl.float32)
    if SHARED_COLS > 0:
        y += _row_products(shared_hidden + t * SHARED_COLS, add, shared_tiles, shared, shared_at, SHARED_COLS, WIDTH,
                           SHARED_HELD, False)  # fmt: skip
    for choice in tl.static_range(PER_ROW):
        pair = t * PER_ROW + choice
        at = (tl.load(ids + pair).to(tl.int64) * rows + row) * COLS
        x = hidden + pair * COLS
        if choice < HELD_CHOICES:
            products = _row_products(x, add, tiles[choice], w, at, COLS, WIDTH, HELD, False)
        else:
            products = _row_products(x, add, (), w, at, COLS, WIDTH, 0, False)
        y += tl.load(weights + pair) * products
    total = tl.load(add + t * rows + feature, mask=feature < rows, other=0.0) + tl.sum(y, 1)
    tl.store(out + t * rows + feature, total, mask=feature < rows)


def serves(num_rows: int, *weights: Matrix) -> bool:
    return num_rows <= MOST_ROWS and all(w.type in TYPES for w in weights)


def _width(cols: int) -> int:
    return min(PASS, int(triton.next_power_of_2(cols)))


def _rows(w: Matrix) -> int:
    """Features of a program: 8 KB of weights."""
    return max(1, 8192 // (_width(w.cols) * w.plain().element_size()))


def _held_passes(w: Matrix, rows: int, share: int = 1) -> int:
    """Passes of `rows` features that fit a share of the registers, of those there are."""
    each = rows * _width(w.cols) * w.plain().element_size()
    return min(-(-w.cols // _width(w.cols)), max(1, HELD_BYTES // share // each))


def linear(x: Tensor, w: Matrix, out: Tensor, *, norm: Norm | None = None, add: Tensor | None = None) -> None:
    """out [T, rows] = (norm of) x [T, cols] @ w^T, plus add float32 [T, rows].

    x [T, heads * cols] with w.rows / heads features a head multiplies each head by itself.
    """
    rows = _rows(w)
    head_rows = w.rows // (x.shape[1] // w.cols)
    while head_rows % rows:
        rows //= 2
    early = overlaps(x)
    _linear[(triton.cdiv(w.rows, rows),)](
        x, x.stride(0), x if norm is None else norm.weight, 0.0 if norm is None else norm.eps, x if add is None else add,
        w.plain(), out, out.stride(0), w.rows, head_rows,
        COLS=w.cols, TOKENS=len(x), NORM=norm is not None, ADD=add is not None, PADDED=triton.next_power_of_2(w.cols),
        ROWS=rows, WIDTH=_width(w.cols), HELD=_held_passes(w, rows), EARLY=early, launch_pdl=early,
    )  # fmt: skip


def gate_up(x: Tensor, gate: Matrix, up: Matrix, out: Tensor, norm: Norm | None = None) -> None:
    """out [T, rows] = silu(gate x) * (up x) of (normed) x [T, cols]."""
    rows = max(1, _rows(gate) // 2)
    early = overlaps(x)
    _gate_up[(triton.cdiv(gate.rows, rows),)](
        x, x.stride(0), x if norm is None else norm.weight, 0.0 if norm is None else norm.eps, gate.plain(), up.plain(),
        out, gate.rows,
        COLS=gate.cols, TOKENS=len(x), NORM=norm is not None, PADDED=triton.next_power_of_2(gate.cols), ROWS=rows,
        WIDTH=_width(gate.cols), HELD=_held_passes(gate, rows, 2), EARLY=early, launch_pdl=early,
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Routed:
    """normed [T, cols] of the compute type, or of width 0 and `rounded` instead; ids int32 and weights float32 [T, k];
    shared [T, rows] hidden numbers of the shared experts, of width 0 where there are none."""

    normed: Tensor
    ids: Tensor
    weights: Tensor
    shared: Tensor
    rounded: RoundedRows | None = None


def route_gate_up(
    x: Tensor,
    norm: Norm,
    router: Matrix,
    bias: Tensor | None,
    rule: RoutingRule,
    shared: tuple[Matrix, Matrix] | None,
    arrived: Tensor,
    dtype: torch.dtype,
    rounds_for: str | None = None,
) -> Routed:
    """Norm, routing and the shared experts' gate and up of x float32 [T, cols] in one launch. rounds_for: the type of the
    matrices that the normed rows meet, rounded, next. arrived: int32 [1], zero before and after; launches that share it run
    one after another."""
    num_rows, device = len(x), x.device
    gate, up = shared or (router, router)
    rounded = None if rounds_for is None else RoundedRows.empty(num_rows, x.shape[1], rounds_for, device)
    out = Routed(
        torch.empty(num_rows, 0 if rounded else x.shape[1], dtype=dtype, device=device),
        torch.empty(num_rows, rule.per_row, dtype=torch.int32, device=device),
        torch.empty(num_rows, rule.per_row, dtype=torch.float32, device=device),
        torch.empty(num_rows, gate.rows if shared else 0, dtype=dtype, device=device),
        rounded,
    )
    logits = torch.empty(num_rows, router.rows, device=device)
    rows = max(1, _rows(gate) // 2)
    early = overlaps(x)
    _route_gate_up[(router.rows + 1 + triton.cdiv(out.shared.shape[1], rows),)](
        x, x.stride(0), norm.weight, norm.eps, router.plain(), logits, x if bias is None else bias, out.ids, out.weights,
        arrived, rounded.codes if rounded else out.normed, rounded.scales if rounded else out.normed, gate.plain(),
        up.plain(), out.shared, gate.rows, *rule.arguments(router.rows),
        COLS=router.cols, TOKENS=num_rows, PADDED=triton.next_power_of_2(router.cols), WIDTH=_width(router.cols),
        ROUTER_HELD=_held_passes(router, 1), ROWS=rows, HELD=_held_passes(gate, rows, 2),
        ROUNDS=rounded is not None, MIXED=rounded is not None and rounded.is_mixed,
        **rule.constants(router.rows, bias is not None), EARLY=early, launch_pdl=early,
    )  # fmt: skip
    return out


def experts(
    x: Tensor, routed: Routed, gate: Matrix, up: Matrix, down: Matrix, shared_down: Matrix | None, out: Tensor
) -> None:
    """out float32 [T, rows] = x plus the chosen experts' weighted and the shared experts' plain sum."""
    pairs, per_row = routed.ids.numel(), routed.ids.shape[1]
    hidden = torch.empty(pairs, gate.rows, dtype=routed.normed.dtype, device=x.device)
    rows = max(1, _rows(gate) // 2)
    early = overlaps(x)
    _chosen_gate_up[(triton.cdiv(gate.rows, rows), pairs)](
        routed.normed, gate.plain(), up.plain(), routed.ids, hidden, gate.rows,
        COLS=gate.cols, PER_ROW=per_row, ROWS=rows, WIDTH=_width(gate.cols), HELD=_held_passes(gate, rows, 2),
        EARLY=early, launch_pdl=early,
    )  # fmt: skip
    width = _width(down.cols)
    rows = 1
    passes = triton.cdiv(down.cols, width)
    shared_cols = 0 if shared_down is None else shared_down.cols
    each = rows * width * down.plain().element_size()
    budget = HELD_BYTES // each
    shared_held = min(budget, triton.cdiv(shared_cols, width))
    held_choices = min(per_row, (budget - shared_held) // passes)
    _chosen_down[(triton.cdiv(down.rows, rows), len(x))](
        hidden, down.plain(), routed.ids, routed.weights, routed.shared,
        down.plain() if shared_down is None else shared_down.plain(), x, out, down.rows,
        COLS=down.cols, SHARED_COLS=shared_cols, PER_ROW=per_row, ROWS=rows, WIDTH=width, HELD=passes,
        SHARED_HELD=shared_held, HELD_CHOICES=held_choices, EARLY=early, launch_pdl=early,
    )  # fmt: skip
