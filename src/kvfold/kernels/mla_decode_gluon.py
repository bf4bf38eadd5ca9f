"""MLA decode for Hopper in Gluon: latents come by TMA, both products run on wgmma, heads share every tile.

Owns two kernels with the contract of mla_decode.py for 16-bit latents of 512 + 64, and nothing else: the schedule, the
buffers and the merge are the same, so the plain-Triton kernel is their judge.

`_few_rows_kernel`, up to 32 (row, head) pairs a sequence: S^T = K Q^T and O^T = V^T P^T. The pairs are wgmma's N, which
may be as small as 8, and not its M, which is 64: with 16 heads M would be three quarters padding. One warp loads, one
warpgroup computes, and reading the cache is what bounds it.

`_many_rows_kernel`, blocks of 64 pairs: arithmetic bounds it, so two warpgroups share the work on two tiles at a time.
Each computes the scores and softmax of its own tile and one half (256 columns) of the output over both tiles; while one
is at its exponentials the other keeps the tensor cores busy. The scheme is the one FlashMLA's authors call seesaw
scheduling (their blog post of 2025-04-22). No warp is given to loading: whoever last reads a piece of a tile orders the
next one into its place, so nothing waits for a loader's turn and each thread may have 255 registers.

    tile 0   kL0 [64, 0:256]   last read by warpgroup 0     kR0 [64, 256:512] + rope   by warpgroup 1
    tile 1   kL1 + rope        by warpgroup 0               kR1                        by warpgroup 1

The rope part of a tile is read once, for its scores; its 8 KB then carry the tile's weights P to the other warpgroup, and
the number they are relative to, a row, goes beside them. It is the row's highest score of some moment and moves where a
score lies more than 8 (log2) above it, so that what was summed is seldom rescaled. The second tile follows the first like
any tile of an online softmax: the first one's weights wait for nothing of the second's, so that its values are multiplied,
and its successor ordered, while the second one's scores are still under way. Warpgroup 0 queues the scores of its next
tile behind its last values, so that the tensor cores do not wait for it; the last pair of a sequence, or its last tile, if
their number is odd, has code of its own, and only there are keys masked.

Unused slots of a sequence's last page may hold anything, NaN included. Their scores are masked, and their rows are
zeroed in shared memory before they serve as values, since zero times NaN is NaN.
"""

# ruff: noqa: SIM102  an `if` the compiler decides around one the GPU decides
from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kvfold.kernels.gluon_names import cta_barrier, tma_load, tma_store
from kvfold.kernels.mla_decode_hopper import fresh_zero, hear, meet, num_stretches, stretch, tell
from kvfold.kernels.mla_schedule import FEW_ROWS
from kvfold.kernels.online_softmax import NO_SCORE

if TYPE_CHECKING:
    from kvfold.kernels.mla_decode import DecodeWorkspace

KV_LORA = 512
LATENT = 576
CHUNKS = gl.constexpr(2)  # of 128 columns, half a tile: each has a barrier, so that scores begin early
MOST_ABOVE = gl.constexpr(8.0)  # log2: weights of up to 256 before the number they are relative to moves


def _multiplication_registers(count: int) -> str:
    return ",".join([*["=f"] * count, *map(str, range(count)), *["f"] * count])


def _multiplication(count: int) -> str:
    """PTX: `count` accumulators, of whose rows a thread has two, times their rows' factors, left out where a warp's are all 1."""
    own, factors = count, 2 * count
    lines = [
        "{", ".reg .pred one, all;",
        f"setp.eq.f32 one, ${factors}, 0f3F800000;",
        f"setp.eq.and.f32 one, ${factors + 2}, 0f3F800000, one;",
        "vote.sync.all.pred all, one, 0xffffffff;",
        "@all bra.uni DONE;",
        *(f"mul.f32 ${i}, ${own + i}, ${factors + i};" for i in range(count)),
        "DONE:", "}",
    ]  # fmt: skip
    return "\n".join(lines)


# The default is 5: 1 to 4 % slower on an H200 from 4k to 64k keys (30 November 2026), and 0 to 3 give the same instructions.
PTXAS_OPTIONS = "--register-usage-level=0"

THREAD_ACCUMULATORS = gl.constexpr(128)  # of [64, 256] over a warpgroup
MULTIPLICATION = gl.constexpr(_multiplication(THREAD_ACCUMULATORS.value))
MULTIPLICATION_REGISTERS = gl.constexpr(_multiplication_registers(THREAD_ACCUMULATORS.value))

# Named barriers of the two warpgroups' 256 threads. mbarriers at which one thread arrives for its warpgroup did the same, behind
# a barrier of that warpgroup: 0.4 to 1.2 % slower, and a race to racecheck (docs/notes/gpu-right.md).
LEFT = gl.constexpr(8)
RIGHT = gl.constexpr(9)


@gluon.jit
def _zero_rows(piece, first_unused, num_columns: gl.constexpr):
    """Zeroes rows from first_unused on in a [64, columns] piece of a tile, before the tensor cores read it as values."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    row = gl.arange(0, 64, gl.SliceLayout(1, layout))
    for c in gl.static_range(num_columns // 64):
        columns = piece.slice(c * 64, 64, dim=1)
        values = columns.load(layout)
        columns.store(gl.where((row < first_unused)[:, None], values, gl.zeros_like(values)))
    fence_async_shared()
    cta_barrier()


@gluon.jit
def _power_below(x):
    """The power of two at or below each x > 0, not far from float32's ends, and 1 over it; of 0 and NaN some power."""
    exponent = gl.minimum(gl.maximum(x.to(gl.int32, bitcast=True) >> 23, 27), 227)
    return (exponent << 23).to(gl.float32, bitcast=True), ((254 - exponent) << 23).to(gl.float32, bitcast=True)


@gluon.jit
def _store_boxed(values, staging, desc, first, row0, half):
    """Writes [64, 256] numbers through shared memory as a box of [first dimensions, rows, 512], what lies beyond the rows left out."""
    BOX: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=3)
    staging._reinterpret(values.dtype, [64, 256], staging.type.layout).store(values)
    fence_async_shared()
    cta_barrier()
    tma_store(desc, [first, row0, half * 256], staging._reinterpret(values.dtype, [1, 64, 256], BOX))


@gluon.jit
def _store_runs(values, partial, slot, row0, rows, half):
    """Writes [64, 256] float32 numbers of a partial: a row's four threads trade them first, so that each then stores 16 bytes, and
    the four of them 64 in a run."""
    PARTIAL: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [8, 0], [0, 16], [0, 32], [0, 64], [0, 128]],
        [[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [], [64, 256],
    )  # fmt: skip
    row = row0 + gl.arange(0, 64, gl.SliceLayout(1, PARTIAL))
    column = half * 256 + gl.arange(0, 256, gl.SliceLayout(0, PARTIAL))
    at = (slot.to(gl.int64) * rows + row)[:, None] * 512 + column[None, :]
    gl.store(partial + at, gl.convert_layout(values, PARTIAL), mask=(row < rows)[:, None])


@gluon.jit
def _store_rows(
    values, m, weight, top, half, out_desc, partial_desc, partial, partial_lse, partial_scale, staging, part, sequence,
    row0, rows, whole, lo, M_LAYOUT: gl.constexpr, LAYOUT: gl.constexpr, OUT: gl.constexpr,
):  # fmt: skip
    """Writes the normalized [64, 256] half of the result, as the result itself or as a partial with its lse.

    Partials of 16 bits are relative to a power of two for each row, of which `top` is the largest number before it is
    normalized: then float16 holds whatever float32 does, to 11 bits of the row's largest.
    Numbers of 16 bits leave by TMA from `staging` [64, 256], which is free again on return.
    """
    HALVES: gl.constexpr = partial.dtype.element_ty == gl.float16
    some = weight > 0
    share = gl.where(some, 1.0 / gl.where(some, weight, 1.0), 0.0)
    values = values * gl.convert_layout(share, gl.SliceLayout(1, LAYOUT))[:, None]
    if whole:
        _store_boxed(values.to(OUT), staging, out_desc, sequence, row0, half)
    else:
        slot = 2 * part + (lo == 0).to(gl.int32)
        scale, inverse = _power_below(top * share)
        if HALVES:
            values = values * gl.convert_layout(inverse, gl.SliceLayout(1, LAYOUT))[:, None]
            _store_boxed(values.to(gl.float16), staging, partial_desc, slot, row0, half)
        else:
            _store_runs(values, partial, slot, row0, rows, half)
        if half == 0:
            m_row = row0 + gl.arange(0, 64, M_LAYOUT)
            at = slot.to(gl.int64) * rows + m_row
            lse = gl.where(some, m + gl.log2(gl.where(some, weight, 1.0)), float("-inf"))
            gl.store(partial_lse + at, lse, mask=m_row < rows)
            if HALVES:
                gl.store(partial_scale + at, scale, mask=m_row < rows)
    tma.store_wait(0)


@gluon.jit
def _following(part_starts, kv_lens, page_starts, part, step, count, sequence):
    """(are there keys, is there a second tile, place of the first page, of the second) of the part's next sequence."""
    has = step + 1 < count
    kv_len = gl.load(kv_lens + sequence + 1, mask=has, other=0)
    at = gl.load(page_starts + sequence + 1, mask=has, other=0)
    ends_here = sequence + 1 == gl.load(part_starts + 2 * part + 2)
    hi = gl.where(ends_here, gl.load(part_starts + 2 * part + 3), (kv_len + 63) // 64)
    second = ((kv_len > 0) & (hi > 1)).to(gl.int32)
    return (kv_len > 0).to(gl.int32), second, at, at + second


@gluon.jit
def _order_left_queries(q_desc, q_rope_desc, qb, qL, qr, row):
    mbarrier.expect(qb.index(0), 73728)  # with the right half's, which the other warpgroup orders
    tma_load(q_desc, [row, 0], qb.index(0), qL.index(0))
    tma_load(q_rope_desc, [row, 512], qb.index(0), qr.index(0))


@gluon.jit
def _order_half(k_desc, k_rope_desc, page, column0, bars, piece, rope, there, ROPE: gl.constexpr):
    """Orders one half of a tile, 256 columns, in chunks with a barrier each, and with ROPE the rope part.

    The barriers were told beforehand what to expect: then nothing but the loads is left here, one after another.
    """
    WIDTH: gl.constexpr = 256 // CHUNKS
    for c in gl.static_range(CHUNKS):
        columns = piece.slice(c * WIDTH, WIDTH, dim=1)
        tma_load(k_desc, [page * 64, column0 + c * WIDTH], bars[c], columns, pred=there > 0)
    if ROPE:
        tma_load(k_rope_desc, [page * 64, 512], bars[CHUNKS - 1], rope, pred=there > 0)


@gluon.jit
def _expect_half(bars, there, ROPE: gl.constexpr):
    for c in gl.static_range(CHUNKS):
        if ROPE and c == CHUNKS - 1:
            mbarrier.expect(bars[c], 32768 // CHUNKS + 8192, pred=there > 0)
        else:
            mbarrier.expect(bars[c], 32768 // CHUNKS, pred=there > 0)


@gluon.jit
def _scores_of_half(q_half, k_half, bars, phase, s, FIRST: gl.constexpr):
    """s + q_half k_half^T, begun chunk by chunk as they arrive; not waited for."""
    WIDTH: gl.constexpr = 256 // CHUNKS
    for c in gl.static_range(CHUNKS):
        mbarrier.wait(bars[c], phase)
        q_part = q_half.slice(c * WIDTH, WIDTH, dim=1)
        k_part = k_half.slice(c * WIDTH, WIDTH, dim=1)
        s = warpgroup_mma(q_part, k_part.permute((1, 0)), s, use_acc=(not FIRST) or c > 0, is_async=True)
    return s


@gluon.jit
def _highest(s):
    """Each row's highest score, as a tree: one after another, the maxima of a row are 15 steps before anything else begins."""
    pairs = gl.max(s.reshape((64, 2, 2, 2, 4, 2)), 5)
    threads = gl.max(gl.max(gl.max(pairs, 3), 2), 1)
    return gl.convert_layout(gl.max(threads, 1), gl.SliceLayout(1, s.type.layout))


@gluon.jit
def _top(acc, VL: gl.constexpr):
    """Each row's largest magnitude."""
    return gl.convert_layout(gl.max(gl.abs(acc), 1), VL)


@gluon.jit
def _sums(p):
    """What each of a row's four threads has of the sum of its weights: [64, 4]. They are joined once a sequence."""
    return gl.sum(gl.sum(gl.sum(gl.sum(p.reshape((64, 2, 2, 2, 4, 2)), 5), 3), 2), 1)


@gluon.jit
def _raised(m, highest):
    """What a row's weights are relative to: its highest score of some moment, which later ones may exceed by MOST_ABOVE."""
    return gl.where(highest > m + MOST_ABOVE, highest, m)


@gluon.jit
def _rescaled(acc, shrink):
    """[64, 256] rows times their factors. Almost always all of them are 1, and a warp then does nothing."""
    factors = gl.convert_layout(shrink, gl.SliceLayout(1, acc.type.layout))[:, None]
    factors, acc = gl.broadcast(factors, acc)
    return gl.inline_asm_elementwise(
        MULTIPLICATION,
        MULTIPLICATION_REGISTERS,
        [acc, factors],
        dtype=gl.float32,
        is_pure=True,
        pack=THREAD_ACCUMULATORS,
    )


@gluon.jit
def _shrunk(weight, shrink):
    return weight * gl.convert_layout(shrink, gl.SliceLayout(1, weight.type.layout))[:, None]


@gluon.jit
def _masked(score, first_key, key, end, sees, S_Q: gl.constexpr):
    """Scores of one tile with the keys beyond its stretch, or beyond what a row may see, at minus infinity."""
    position = first_key + key
    score = gl.where((position < end)[None, :], score, float("-inf"))
    if S_Q > 1:
        score = gl.where(position[None, :] < sees[:, None], score, float("-inf"))
    return score


@gluon.jit
def _left_pair(
    s, acc, m, weight, it0, it1, k_desc, k_rope_desc, pages, at0, at1, there0, there1,
    first_key, end, free_keys, sees, key, scale_log2, nothing,
    qL, qR, qr, kL0, kL1, kR0, kR1, kr0, kr1, fL0, fL1, fR0, fR1, M0, M1,
    SECOND: gl.constexpr, LAST: gl.constexpr, S_Q: gl.constexpr, dtype: gl.constexpr,
    SL: gl.constexpr, AL: gl.constexpr,
):  # fmt: skip
    """One pair of tiles, or a first tile alone, of which `s` holds the scores; unless LAST, those of the next are returned.

    it0, it1: first and second tiles before these, which give the parity of their barriers. at0, at1: where the pages of the
    tiles that follow these stand in the list.
    """
    zero = fresh_zero(nothing)
    qL, qR, qr = qL.index(zero), qR.index(zero), qr.index(zero)
    kL0, kL1, kR0, kR1 = kL0.index(zero), kL1.index(zero), kR0.index(zero), kR1.index(zero)
    kr0, kr1 = kr0.index(zero), kr1.index(zero)
    DL: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=AL, k_width=2)
    VL: gl.constexpr = gl.SliceLayout(1, SL)
    if S_Q > 1 or not SECOND:
        if first_key + 64 > free_keys:
            s = _masked(s, first_key, key, end, sees, S_Q)
    mx0 = _raised(m, _highest(s) * scale_log2)
    p = gl.exp2(s * scale_log2 - mx0[:, None])
    pq = p.to(dtype)
    M0.store(mx0)
    kr0.store(pq)
    fence_async_shared()
    meet(tell(LEFT), nothing)
    page0 = gl.load(pages + at0, mask=there0 > 0, other=0)  # not before: the fence above would wait for them
    page1 = gl.load(pages + at1, mask=there0 > 0, other=0)
    a0 = gl.exp2(m - mx0)
    acc = _rescaled(acc, a0)
    if not SECOND:
        if first_key + 64 > end:
            _zero_rows(kL0, end - first_key, 256)
    pb = gl.convert_layout(pq, DL)
    acc = warpgroup_mma(pb, kL0, acc, is_async=True)
    _expect_half(fL0, there0, False)
    weight = _shrunk(weight, a0) + _sums(p)
    acc, pb = warpgroup_mma_wait(0, (acc, pb))
    cta_barrier()
    _order_half(k_desc, k_rope_desc, page0, 0, fL0, kL0, kr0, there0, False)
    meet(hear(RIGHT), nothing)
    mx1 = mx0
    if SECOND:
        mx1 = M1.load(VL)
        a1 = gl.exp2(mx0 - mx1)
        weight = _shrunk(weight, a1)
        acc = _rescaled(acc, a1)
        if LAST:
            if first_key + 128 > end:
                _zero_rows(kL1, end - first_key - 64, 256)
        acc = warpgroup_mma(kr1, kL1, acc, is_async=True)
    _expect_half(fL1, there1, True)
    if LAST:
        if SECOND:
            acc = warpgroup_mma_wait(0, (acc,))
            cta_barrier()
    else:  # scores queue up behind the last values, whose end is then waited for
        s = gl.zeros([64, 64], gl.float32, SL)
        s = _scores_of_half(qL, kL0, fL0, (it0 + 1) & 1, s, True)
        acc = warpgroup_mma_wait(CHUNKS, (acc,))
        cta_barrier()
    _order_half(k_desc, k_rope_desc, page1, 0, fL1, kL1, kr1, there1, True)
    if not LAST:
        s = _scores_of_half(qR, kR0, fR0, (it0 + 1) & 1, s, False)
        s = warpgroup_mma(qr, kr0.permute((1, 0)), s, is_async=True)
        s = warpgroup_mma_wait(0, (s,))
    return s, acc, mx1, weight


@gluon.jit
def _left_warpgroup(
    q_desc, q_rope_desc, k_desc, k_rope_desc, pages, page_starts, kv_lens, part_starts, out_desc, partial_desc, partial,
    partial_lse, partial_scale, scale_log2, rows, qL, qR, qr, kL0, kL1, kR0, kR1, kr0, kr1, fL0, fL1, fR0, fR1, qb, M0, M1, T0, T1, part, row0, nothing,
    S_Q: gl.constexpr, HEADS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    SL: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
    AL: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 256, 16])
    VL: gl.constexpr = gl.SliceLayout(1, SL)
    key = gl.arange(0, 64, gl.SliceLayout(0, SL))
    token = (row0 + gl.arange(0, 64, VL)) // HEADS
    dtype: gl.constexpr = q_desc.dtype
    count = num_stretches(part_starts, part)
    it0 = 0  # first tiles of pairs so far
    it1 = 0  # second tiles of pairs so far
    asked = 0  # loads of queries so far
    ordered = 0  # the first pair and the queries of the coming sequence are under way
    for step in range(0, count):
        sequence, kv_len, lo, hi, num_tiles = stretch(part_starts, kv_lens, part, step)
        tiles = hi - lo
        end = gl.minimum(kv_len, hi * 64)
        sees = kv_len - S_Q + 1 + token
        free_keys = gl.minimum(end, kv_len - S_Q + 1)  # keys up to here need no mask
        start = gl.load(page_starts + sequence)
        m = gl.full([64], NO_SCORE, gl.float32, VL)
        weight = _sums(gl.zeros([64, 64], gl.float32, SL))
        total = gl.full([64], 0.0, gl.float32, VL)
        top = total
        acc = gl.zeros([64, 256], gl.float32, AL)
        if tiles > 0:
            if ordered == 0:
                page0 = gl.load(pages + start + lo)
                second = (tiles > 1).to(gl.int32)
                page1 = gl.load(pages + start + lo + second)
                if PDL:
                    gdc_wait()
                _order_left_queries(q_desc, q_rope_desc, qb, qL, qr, sequence * rows + row0)
                _expect_half(fL0, 1, False)
                _expect_half(fL1, second, True)
                _order_half(k_desc, k_rope_desc, page0, 0, fL0, kL0.index(0), kr0.index(0), 1, False)
                _order_half(k_desc, k_rope_desc, page1, 0, fL1, kL1.index(0), kr1.index(0), second, True)
            mbarrier.wait(qb.index(0), asked & 1)
            asked += 1
            s = gl.zeros([64, 64], gl.float32, SL)
            s = _scores_of_half(qL.index(0), kL0.index(0), fL0, it0 & 1, s, True)
            s = _scores_of_half(qR.index(0), kR0.index(0), fR0, it0 & 1, s, False)
            s = warpgroup_mma(qr.index(0), kr0.index(0).permute((1, 0)), s, is_async=True)
            s = warpgroup_mma_wait(0, (s,))
            before_last = (tiles - 1) // 2  # pairs that another pair of the sequence follows
            for j in range(0, before_last):
                second = (2 * j + 3 < tiles).to(gl.int32)
                next_at = start + lo + 2 * j + 2
                s, acc, m, weight = _left_pair(
                    s, acc, m, weight, it0, it1, k_desc, k_rope_desc, pages, next_at, next_at + second, 1, second,
                    (lo + 2 * j) * 64, end, free_keys, sees, key, scale_log2, nothing,
                    qL, qR, qr, kL0, kL1, kR0, kR1, kr0, kr1, fL0, fL1, fR0, fR1, M0, M1,
                    True, False, S_Q, dtype, SL, AL,
                )  # fmt: skip
                it0 += 1
                it1 += 1
            follows, second, following0, following1 = _following(
                part_starts, kv_lens, page_starts, part, step, count, sequence
            )
            if tiles % 2 == 0:
                s, acc, m, weight = _left_pair(
                    s, acc, m, weight, it0, it1, k_desc, k_rope_desc, pages, following0, following1, follows, second,
                    (lo + 2 * before_last) * 64, end, free_keys, sees, key, scale_log2, nothing,
                    qL, qR, qr, kL0, kL1, kR0, kR1, kr0, kr1, fL0, fL1, fR0, fR1, M0, M1,
                    True, True, S_Q, dtype, SL, AL,
                )  # fmt: skip
                it1 += 1
            else:
                s, acc, m, weight = _left_pair(
                    s, acc, m, weight, it0, it1, k_desc, k_rope_desc, pages, following0, following1, follows, second,
                    (lo + 2 * before_last) * 64, end, free_keys, sees, key, scale_log2, nothing,
                    qL, qR, qr, kL0, kL1, kR0, kR1, kr0, kr1, fL0, fL1, fR0, fR1, M0, M1,
                    False, True, S_Q, dtype, SL, AL,
                )  # fmt: skip
            it0 += 1
            total = gl.convert_layout(gl.sum(weight, 1), VL)
            M0.store(total)
            top = _top(acc, VL)
            T0.store(top)
            meet(tell(LEFT), nothing)
            meet(hear(RIGHT), nothing)
            total = total + M1.load(VL)
            top = gl.maximum(top, T1.load(VL))
            ordered = follows
        else:
            ordered = 0
        if PDL:
            gdc_wait()
        whole = (lo == 0) & (hi == num_tiles)
        _store_rows(
            acc, m, total, top, 0, out_desc, partial_desc, partial, partial_lse, partial_scale, qL.index(0), part,
            sequence, row0, rows, whole, lo, VL, AL, dtype,
        )  # fmt: skip
        if ordered > 0:
            _order_left_queries(q_desc, q_rope_desc, qb, qL, qr, (sequence + 1) * rows + row0)


@gluon.jit
def _right_pair(
    acc, m, weight, it0, it1, k_desc, k_rope_desc, page0, page1, there0, there1,
    first_key, end, free_keys, sees, key, scale_log2, nothing,
    qL, qR, qr, kL0, kL1, kR0, kR1, kr0, kr1, fL0, fL1, fR0, fR1, M0, M1,
    SECOND: gl.constexpr, LAST: gl.constexpr, S_Q: gl.constexpr, dtype: gl.constexpr,
    SL: gl.constexpr, AL: gl.constexpr,
):  # fmt: skip
    """One pair of tiles, or a first tile alone: the scores of the second one, the right half of the values of both."""
    zero = fresh_zero(nothing)
    qL, qR, qr = qL.index(zero), qR.index(zero), qr.index(zero)
    kL0, kL1, kR0, kR1 = kL0.index(zero), kL1.index(zero), kR0.index(zero), kR1.index(zero)
    kr0, kr1 = kr0.index(zero), kr1.index(zero)
    DL: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=AL, k_width=2)
    VL: gl.constexpr = gl.SliceLayout(1, SL)
    if SECOND:
        s = gl.zeros([64, 64], gl.float32, SL)
        s = _scores_of_half(qR, kR1, fR1, it1 & 1, s, True)
        s = _scores_of_half(qL, kL1, fL1, it1 & 1, s, False)
        s = warpgroup_mma(qr, kr1.permute((1, 0)), s, is_async=True)
    meet(hear(LEFT), nothing)  # the other warpgroup has waited for this pair's loads of the first tile
    mx1 = M0.load(VL)
    a0 = gl.exp2(m - mx1)
    weight = _shrunk(weight, a0)
    acc = _rescaled(acc, a0)
    if not SECOND:
        if first_key + 64 > end:
            _zero_rows(kR0, end - first_key, 256)
    acc = warpgroup_mma(kr0, kR0, acc, is_async=True)
    _expect_half(fR0, there0, True)
    if SECOND:
        s = warpgroup_mma_wait(1, (s,))
        if LAST or S_Q > 1:
            if first_key + 128 > free_keys:
                s = _masked(s, first_key + 64, key, end, sees, S_Q)
        mx0 = mx1
        mx1 = _raised(mx0, _highest(s) * scale_log2)
        p = gl.exp2(s * scale_log2 - mx1[:, None])
        pq = p.to(dtype)
        M1.store(mx1)
        kr1.store(pq)
        fence_async_shared()
        meet(tell(RIGHT), nothing)
        a1 = gl.exp2(mx0 - mx1)
        weight = _shrunk(weight, a1) + _sums(p)
        pb = gl.convert_layout(pq, DL)
        acc = warpgroup_mma_wait(0, (acc,))
        cta_barrier()
        _order_half(k_desc, k_rope_desc, page0, 256, fR0, kR0, kr0, there0, True)
        if LAST:
            if first_key + 128 > end:
                _zero_rows(kR1, end - first_key - 64, 256)
        acc = _rescaled(acc, a1)
        acc = warpgroup_mma(pb, kR1, acc, is_async=True)
        _expect_half(fR1, there1, False)
        acc, pb = warpgroup_mma_wait(0, (acc, pb))
        cta_barrier()
    else:
        _expect_half(fR1, there1, False)
        meet(tell(RIGHT), nothing)
        acc = warpgroup_mma_wait(0, (acc,))
        cta_barrier()
        _order_half(k_desc, k_rope_desc, page0, 256, fR0, kR0, kr0, there0, True)
    _order_half(k_desc, k_rope_desc, page1, 256, fR1, kR1, kr1, there1, False)
    return acc, mx1, weight


@gluon.jit
def _right_warpgroup(
    q_desc, q_rope_desc, k_desc, k_rope_desc, pages, page_starts, kv_lens, part_starts, out_desc, partial_desc, partial,
    partial_lse, partial_scale, scale_log2, rows, qL, qR, qr, kL0, kL1, kR0, kR1, kr0, kr1, fL0, fL1, fR0, fR1, qb, M0, M1, T0, T1, part, row0, nothing,
    S_Q: gl.constexpr, HEADS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    SL: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
    AL: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 256, 16])
    VL: gl.constexpr = gl.SliceLayout(1, SL)
    key = gl.arange(0, 64, gl.SliceLayout(0, SL))
    token = (row0 + gl.arange(0, 64, VL)) // HEADS
    dtype: gl.constexpr = q_desc.dtype
    count = num_stretches(part_starts, part)
    it0 = 0
    it1 = 0
    asked = 0
    ordered = 0
    for step in range(0, count):
        sequence, kv_len, lo, hi, num_tiles = stretch(part_starts, kv_lens, part, step)
        tiles = hi - lo
        end = gl.minimum(kv_len, hi * 64)
        sees = kv_len - S_Q + 1 + token
        free_keys = gl.minimum(end, kv_len - S_Q + 1)
        start = gl.load(page_starts + sequence)
        m = gl.full([64], NO_SCORE, gl.float32, VL)
        weight = _sums(gl.zeros([64, 64], gl.float32, SL))
        total = gl.full([64], 0.0, gl.float32, VL)
        top = total
        acc = gl.zeros([64, 256], gl.float32, AL)
        if tiles > 0:
            if ordered == 0:
                page0 = gl.load(pages + start + lo)
                second = (tiles > 1).to(gl.int32)
                page1 = gl.load(pages + start + lo + second)
                if PDL:
                    gdc_wait()
                tma_load(q_desc, [sequence * rows + row0, 256], qb.index(0), qR.index(0))
                _expect_half(fR1, second, False)
                _expect_half(fR0, 1, True)
                _order_half(k_desc, k_rope_desc, page1, 256, fR1, kR1.index(0), kr1.index(0), second, False)
                _order_half(k_desc, k_rope_desc, page0, 256, fR0, kR0.index(0), kr0.index(0), 1, True)
            mbarrier.wait(qb.index(0), asked & 1)
            asked += 1
            before_last = (tiles - 1) // 2  # pairs that another pair of the sequence follows
            for j in range(0, before_last):
                second = (2 * j + 3 < tiles).to(gl.int32)
                page0 = gl.load(pages + start + lo + 2 * j + 2)
                page1 = gl.load(pages + start + lo + 2 * j + 2 + second)
                acc, m, weight = _right_pair(
                    acc, m, weight, it0, it1, k_desc, k_rope_desc, page0, page1, 1, second,
                    (lo + 2 * j) * 64, end, free_keys, sees, key, scale_log2, nothing,
                    qL, qR, qr, kL0, kL1, kR0, kR1, kr0, kr1, fL0, fL1, fR0, fR1, M0, M1,
                    True, False, S_Q, dtype, SL, AL,
                )  # fmt: skip
                it0 += 1
                it1 += 1
            follows, second, following0, following1 = _following(
                part_starts, kv_lens, page_starts, part, step, count, sequence
            )
            page0 = gl.load(pages + following0, mask=follows > 0, other=0)
            page1 = gl.load(pages + following1, mask=follows > 0, other=0)
            if tiles % 2 == 0:
                acc, m, weight = _right_pair(
                    acc, m, weight, it0, it1, k_desc, k_rope_desc, page0, page1, follows, second,
                    (lo + 2 * before_last) * 64, end, free_keys, sees, key, scale_log2, nothing,
                    qL, qR, qr, kL0, kL1, kR0, kR1, kr0, kr1, fL0, fL1, fR0, fR1, M0, M1,
                    True, True, S_Q, dtype, SL, AL,
                )  # fmt: skip
                it1 += 1
            else:
                acc, m, weight = _right_pair(
                    acc, m, weight, it0, it1, k_desc, k_rope_desc, page0, page1, follows, second,
                    (lo + 2 * before_last) * 64, end, free_keys, sees, key, scale_log2, nothing,
                    qL, qR, qr, kL0, kL1, kR0, kR1, kr0, kr1, fL0, fL1, fR0, fR1, M0, M1,
                    False, True, S_Q, dtype, SL, AL,
                )  # fmt: skip
            it0 += 1
            meet(hear(LEFT), nothing)
            theirs = M0.load(VL)
            total = gl.convert_layout(gl.sum(weight, 1), VL)
            M1.store(total)
            top = _top(acc, VL)
            T1.store(top)
            their_top = T0.load(VL)
            meet(tell(RIGHT), nothing)
            total = total + theirs
            top = gl.maximum(top, their_top)
            ordered = follows
        else:
            ordered = 0
        if PDL:
            gdc_wait()
        whole = (lo == 0) & (hi == num_tiles)
        _store_rows(
            acc, m, total, top, 1, out_desc, partial_desc, partial, partial_lse, partial_scale, qR.index(0), part,
            sequence, row0, rows, whole, lo, VL, AL, dtype,
        )  # fmt: skip
        if ordered > 0:
            tma_load(q_desc, [(sequence + 1) * rows + row0, 256], qb.index(0), qR.index(0))
    if PDL:
        if count == 0:
            gdc_wait()  # what follows waits for this launch alone


@gluon.jit
def _two_barriers():
    BL: gl.constexpr = mbarrier.MBarrierLayout()
    b0 = gl.allocate_shared_memory(gl.int64, [1], BL)
    b1 = gl.allocate_shared_memory(gl.int64, [1], BL)
    mbarrier.init(b0, count=1)
    mbarrier.init(b1, count=1)
    return b0, b1


@gluon.jit
def _many_rows_kernel(
    q_desc, q_rope_desc,  # boxes [64, 256] and [64, 64] over [B * rows, 576]
    k_desc, k_rope_desc,  # boxes [64, 256 / CHUNKS] and [64, 64] over the pool as [num_pages * 64, 576]
    out_desc, partial_desc,  # boxes [1, 64, 256] over [B, rows, 512] and half_partial
    pages, page_starts, kv_lens, part_starts, partial, partial_lse, partial_scale, scale_log2, rows,
    nothing,  # 0, for fresh_zero
    S_Q: gl.constexpr, HEADS: gl.constexpr, WORKER_REGISTERS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Program (block of 64 rows, part)."""
    row0 = gl.program_id(0) * 64
    part = gl.program_id(1)
    dtype: gl.constexpr = q_desc.dtype
    TL: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    ML: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    BL: gl.constexpr = mbarrier.MBarrierLayout()
    kL0 = gl.allocate_shared_memory(dtype, [1, 64, 256], TL)
    kL1 = gl.allocate_shared_memory(dtype, [1, 64, 256], TL)
    kR0 = gl.allocate_shared_memory(dtype, [1, 64, 256], TL)
    kR1 = gl.allocate_shared_memory(dtype, [1, 64, 256], TL)
    kr0 = gl.allocate_shared_memory(dtype, [1, 64, 64], TL)
    kr1 = gl.allocate_shared_memory(dtype, [1, 64, 64], TL)
    qL = gl.allocate_shared_memory(dtype, [1, 64, 256], TL)
    qR = gl.allocate_shared_memory(dtype, [1, 64, 256], TL)
    qr = gl.allocate_shared_memory(dtype, [1, 64, 64], TL)
    M0 = gl.allocate_shared_memory(gl.float32, [64], ML)
    M1 = gl.allocate_shared_memory(gl.float32, [64], ML)
    T0 = gl.allocate_shared_memory(gl.float32, [64], ML)
    T1 = gl.allocate_shared_memory(gl.float32, [64], ML)
    fL0 = _two_barriers()
    fL1 = _two_barriers()
    fR0 = _two_barriers()
    fR1 = _two_barriers()
    qb = gl.allocate_shared_memory(gl.int64, [1, 1], BL)
    mbarrier.init(qb.index(0), count=1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_left_warpgroup, (
                q_desc, q_rope_desc, k_desc, k_rope_desc, pages, page_starts, kv_lens, part_starts,
                out_desc, partial_desc, partial, partial_lse, partial_scale, scale_log2, rows, qL, qR, qr, kL0, kL1, kR0, kR1, kr0, kr1, fL0, fL1, fR0, fR1, qb, M0, M1, T0, T1, part, row0, nothing,
                S_Q, HEADS, PDL,
            )),
            (_right_warpgroup, (
                q_desc, q_rope_desc, k_desc, k_rope_desc, pages, page_starts, kv_lens, part_starts,
                out_desc, partial_desc, partial, partial_lse, partial_scale, scale_log2, rows, qL, qR, qr, kL0, kL1, kR0, kR1, kr0, kr1, fL0, fL1, fR0, fR1, qb, M0, M1, T0, T1, part, row0, nothing,
                S_Q, HEADS, PDL,
            )),
        ],
        [4],
        [WORKER_REGISTERS],
    )  # fmt: skip
    if PDL:
        gdc_launch_dependents()


@gluon.jit
def _few_rows_loader(
    k_desc, k_rope_desc, pages, page_starts, kv_lens, part_starts, part, kn, kr, full, empty,
    S_Q: gl.constexpr, STAGES: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """One warp: every tile of the part, in order, into a ring of STAGES. What earlier steps appended is there before the
    kernel before this one has ended; it may be the one that appends this step's rows (a prompt decoded as pieces of four
    rows has more of them: its folding has waited for what appends before it lets this kernel start)."""
    it = 0
    for step in range(0, num_stretches(part_starts, part)):
        sequence, kv_len, lo, hi, _ = stretch(part_starts, kv_lens, part, step)
        page_list = pages + gl.load(page_starts + sequence)
        for i in range(lo, hi):
            page = gl.load(page_list + i)
            stage = it % STAGES
            if PDL:
                if i * 64 + 64 > kv_len - S_Q:
                    gdc_wait()
            mbarrier.wait(empty.index(stage), ((it // STAGES) & 1) ^ 1)
            mbarrier.expect(full.index(stage), 73728)
            tma_load(k_desc, [page * 64, 0], full.index(stage), kn.index(stage))
            tma_load(k_rope_desc, [page * 64, 512], full.index(stage), kr.index(stage))
            it += 1


@gluon.jit
def _few_rows_worker(
    q, pages, page_starts, kv_lens, part_starts, out, partial, partial_lse, scale_log2, rows, part,
    qn, qr, kn, kr, ps, full, empty,
    S_Q: gl.constexpr, HEADS: gl.constexpr, BLOCK_ROWS: gl.constexpr, STAGES: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """One warpgroup: scores [64 keys, rows], softmax down the keys, values [512, rows]."""
    SL: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_ROWS, 16]
    )
    RL: gl.constexpr = gl.SliceLayout(0, SL)
    QL: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [4, 1], [1, 0])
    QR: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    dtype: gl.constexpr = out.dtype.element_ty
    key = gl.arange(0, 64, gl.SliceLayout(1, SL))
    row = gl.arange(0, BLOCK_ROWS, RL)
    row_l = gl.arange(0, BLOCK_ROWS, gl.SliceLayout(1, QL))
    row_r = gl.arange(0, BLOCK_ROWS, gl.SliceLayout(1, QR))
    at_l = row_l[:, None] * 576 + gl.arange(0, 512, gl.SliceLayout(0, QL))[None, :]
    at_r = row_r[:, None] * 576 + 512 + gl.arange(0, 64, gl.SliceLayout(0, QR))[None, :]
    it = 0
    for step in range(0, num_stretches(part_starts, part)):
        sequence, kv_len, lo, hi, num_tiles = stretch(part_starts, kv_lens, part, step)
        end = gl.minimum(kv_len, hi * 64)
        sees = kv_len - S_Q + 1 + row // HEADS
        free_keys = gl.minimum(end, kv_len - S_Q + 1)
        if PDL:
            gdc_wait()  # only now: the schedule is older, and its loads wait for one another
        first_q = q + sequence.to(gl.int64) * rows * 576
        q_lora = gl.load(first_q + at_l, mask=(row_l < rows)[:, None], other=0)
        q_rope = gl.load(first_q + at_r, mask=(row_r < rows)[:, None], other=0)
        cta_barrier()  # every warp is done with the queries before
        qn.store(q_lora)
        qr.store(q_rope)
        fence_async_shared()
        cta_barrier()
        m = gl.full([BLOCK_ROWS], NO_SCORE, gl.float32, RL)
        weight = gl.zeros([64, BLOCK_ROWS], gl.float32, SL)  # per thread; summed once a sequence
        acc = gl.zeros([512, BLOCK_ROWS], gl.float32, SL)
        for i in range(lo, hi):
            stage = it % STAGES
            mbarrier.wait(full.index(stage), (it // STAGES) & 1)
            s = gl.zeros([64, BLOCK_ROWS], gl.float32, SL)
            s = warpgroup_mma(kn.index(stage), qn.permute((1, 0)), s, is_async=True)
            s = warpgroup_mma(kr.index(stage), qr.permute((1, 0)), s, is_async=True)
            s = warpgroup_mma_wait(0, (s,))
            s = s * scale_log2
            if i * 64 + 64 > free_keys:
                s = gl.where((i * 64 + key < end)[:, None], s, float("-inf"))
                if S_Q > 1:
                    s = gl.where((i * 64 + key)[:, None] < sees[None, :], s, float("-inf"))
            higher = gl.maximum(m, gl.max(s, 0))
            p = gl.exp2(s - higher[None, :])
            shrink = gl.exp2(m - higher)
            m = higher
            weight = weight * shrink[None, :] + p
            ps.store(p.to(dtype))
            if i * 64 + 64 > end:
                _zero_rows(kn.index(stage), end - i * 64, 512)
            fence_async_shared()
            cta_barrier()
            acc = acc * shrink[None, :]
            acc = warpgroup_mma(kn.index(stage).permute((1, 0)), ps, acc, is_async=True)
            acc = warpgroup_mma_wait(0, (acc,))
            cta_barrier()
            mbarrier.arrive(empty.index(stage), count=1)
            it += 1
        total = gl.sum(weight, 0)
        some = total > 0
        acc = acc * gl.where(some, 1.0 / gl.where(some, total, 1.0), 0.0)[None, :]
        d = gl.arange(0, 512, gl.SliceLayout(1, SL))
        kept = (row < rows)[None, :] & (d < 512)[:, None]
        if (lo == 0) & (hi == num_tiles):
            out_row = sequence.to(gl.int64) * rows + row
            gl.store(out + out_row[None, :] * 512 + d[:, None], acc.to(dtype), mask=kept)
        else:
            slot_row = (2 * part + (lo == 0).to(gl.int32)).to(gl.int64) * rows + row
            gl.store(partial + slot_row[None, :] * 512 + d[:, None], acc, mask=kept)
            lse = gl.where(some, m + gl.log2(gl.where(some, total, 1.0)), float("-inf"))
            gl.store(partial_lse + slot_row, lse, mask=row < rows)
    if PDL:
        gdc_wait()  # without tiles, too: what follows waits for this launch alone


@gluon.jit
def _few_rows_kernel(
    q,  # [B * rows, 576]
    k_desc, k_rope_desc,  # boxes [64, 512] and [64, 64] over the pool as [num_pages * 64, 576]
    pages, page_starts, kv_lens, part_starts, out, partial, partial_lse, scale_log2, rows,
    S_Q: gl.constexpr, HEADS: gl.constexpr, BLOCK_ROWS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Program (0, part)."""
    part = gl.program_id(1)
    dtype: gl.constexpr = out.dtype.element_ty
    STAGES: gl.constexpr = 2  # of 73,728 B
    TL: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    PL: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=BLOCK_ROWS * 2, element_bitwidth=16, rank=2)
    BL: gl.constexpr = mbarrier.MBarrierLayout()
    kn = gl.allocate_shared_memory(dtype, [STAGES, 64, 512], TL)
    kr = gl.allocate_shared_memory(dtype, [STAGES, 64, 64], TL)
    qn = gl.allocate_shared_memory(dtype, [BLOCK_ROWS, 512], TL)
    qr = gl.allocate_shared_memory(dtype, [BLOCK_ROWS, 64], TL)
    ps = gl.allocate_shared_memory(dtype, [64, BLOCK_ROWS], PL)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BL)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BL)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    fence_async_shared()
    if PDL:
        gdc_launch_dependents()
    gl.warp_specialize(
        [
            (_few_rows_worker, (
                q, pages, page_starts, kv_lens, part_starts, out, partial, partial_lse, scale_log2, rows, part,
                qn, qr, kn, kr, ps, full, empty, S_Q, HEADS, BLOCK_ROWS, STAGES, PDL,
            )),
            (_few_rows_loader, (
                k_desc, k_rope_desc, pages, page_starts, kv_lens, part_starts, part, kn, kr, full, empty, S_Q, STAGES,
                PDL,
            )),
        ],
        [1],
        [40],
    )  # fmt: skip


def launch(
    q: torch.Tensor, pool: torch.Tensor, pages: torch.Tensor, page_starts: torch.Tensor, kv_lens: torch.Tensor,
    out: torch.Tensor, workspace: DecodeWorkspace, scale_log2: float, pdl: bool, halves: bool,
) -> None:  # fmt: skip
    """Writes `out` for sequences one part holds whole, and the workspace's partials for the others, as half_partial if `halves`."""
    rows = workspace.rows_per_sequence * workspace.num_heads
    element = gl.bfloat16 if q.dtype == torch.bfloat16 else gl.float16
    layout = gl.NVMMASharedLayout.get_default_for([64, 64], element)
    tokens = pool.view(-1, LATENT)
    k_rope = TensorDescriptor.from_tensor(tokens, [64, 64], layout)
    schedule = (pages, page_starts, kv_lens, workspace.part_starts)
    sizes = {"S_Q": workspace.rows_per_sequence, "HEADS": workspace.num_heads, "PDL": pdl, "num_warps": 4}
    if pdl:
        sizes["launch_pdl"] = True
    if workspace.row_block <= FEW_ROWS:
        k_lora = TensorDescriptor.from_tensor(tokens, [64, KV_LORA], layout)
        _few_rows_kernel[(1, workspace.num_parts)](
            q,
            k_lora,
            k_rope,
            *schedule,
            out,
            workspace.partial,
            workspace.partial_lse,
            scale_log2,
            rows,
            BLOCK_ROWS=workspace.row_block,
            **sizes,
        )
        return
    flat_q = q.view(-1, LATENT)
    result = out.view(workspace.batch, rows, KV_LORA)
    box = [1, 64, 256]
    _many_rows_kernel[(triton.cdiv(rows, 64), workspace.num_parts)](
        TensorDescriptor.from_tensor(flat_q, [64, 256], layout),
        TensorDescriptor.from_tensor(flat_q, [64, 64], layout),
        TensorDescriptor.from_tensor(tokens, [64, 256 // CHUNKS.value], layout),
        k_rope,
        TensorDescriptor.from_tensor(result, box, gl.NVMMASharedLayout.get_default_for(box, element)),
        TensorDescriptor.from_tensor(workspace.half_partial, box, gl.NVMMASharedLayout.get_default_for(box, gl.float16)),
        *schedule, workspace.half_partial if halves else workspace.partial, workspace.partial_lse,
        workspace.partial_scale, scale_log2, rows, 0, WORKER_REGISTERS=256, ptx_options=PTXAS_OPTIONS, **sizes,
    )  # fmt: skip
