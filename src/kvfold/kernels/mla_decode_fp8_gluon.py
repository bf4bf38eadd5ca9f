"""MLA decode for Hopper over an fp8 cache: the bytes come by TMA and are numbers once, for scores and for values.

Owns a kernel with the contract of mla_decode.py for rows of cache/latent.py's fp8 (512 codes e4m3, a float32 scale for each
128 of them, 64 bfloat16: 656 bytes) and bfloat16 queries, and nothing else: schedule, buffers and merge are the same, and the
plain-Triton kernel is its judge.

Reading the cache is what should bound it, 42 KB a tile of 64 keys, so everything else has to fit beside 2,400 cycles a tile
(4.5 TB/s over 132 multiprocessors at 1.98 GHz). Shared memory moves 128 B a cycle, and a tile that was decoded into it, read
for scores and read again for values would take all of them. Four groups of warps share a tile:

    loader            one warp: codes, scales and rope parts of each page, in order, into a ring
    decoder           four warps: groups 0 and 2 of the 128 columns that share a scale, the scores, the softmax down the keys
    second decoder    four warps: groups 1 and 3, and their share of the scores
    summer            four warps: the values' product O^T = V^T P^T, and the results

A decoder loads codes into registers and has them as numbers there: times their scale they are an operand of the scores'
product S^T = K Q^T, whose rows are the keys, without going through shared memory, and then they are stored as values.

A thread loads 16 neighbouring codes, where the product's operand would have it hold pairs of numbers 8 columns apart. A sum
over columns does not mind their order, so the queries lie in shared memory in the order in which a thread's numbers become an
operand as they are (`_operand_order`).

There is room for the numbers of one tile, so a group is stored when the summer has read the one of the tile before. Hand-offs
are named barriers, as in mla_decode_gluon.py: who tells does not wait.

More rows than 32 are blocks of 32, each of which decodes for itself.

Unused slots of a sequence's last page may hold anything: their codes and scales are zeroed before they are decoded.
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
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kvfold.kernels.gluon_names import cta_barrier, tma_load
from kvfold.kernels.mla_decode_hopper import fresh_zero, hear, meet, num_stretches, stretch, tell
from kvfold.kernels.online_softmax import NO_SCORE

if TYPE_CHECKING:
    from kvfold.kernels.mla_decode import DecodeWorkspace

KV_LORA = gl.constexpr(512)
ROPE = 64
CODES_SWIZZLE = 128  # bytes; with 64 threads of a quarter meet in no bank, which gained nothing and spilled
MOST_BLOCK_ROWS = 32
STAGES = {16: 3, 32: 2}  # of 41,984 B, by the rows of a block
# Of the second decoder and of the summer, by the rows of a block; the loader has 24, the decoder the rest.
REGISTERS = {16: (168, 112), 32: (120, 200)}
GROUP = gl.constexpr(128)  # columns that share a scale
GROUPS = gl.constexpr(4)
PIECE = gl.constexpr(64)  # columns that are decoded at once
ROW_BYTES = 656
ROW_BYTES_ = gl.constexpr(ROW_BYTES)

# Named barriers of the decoder's and the summer's 256 threads; Triton has those from 0 on.
WEIGHTS = gl.constexpr(8)
TOTAL = gl.constexpr(9)
FREE = gl.constexpr(10)  # and the three after it: a group of columns each
SCORES = gl.constexpr(14)
QUERIES = gl.constexpr(15)


@triton.constexpr_function
def _column(first: int, piece: int) -> int:
    """First column of the piece-th piece of groups first and first + 2."""
    return (first + piece * 64 // 128 * 2) * 128 + piece * 64 % 128


# Four codes e4m3 of one register, times the scale of each one's row, as two pairs of bfloat16: exact, since scales are powers of two.
DECODING = gl.constexpr("""{
.reg .b16 lo, hi, h0, h1, h2, h3;
.reg .b32 a, b;
.reg .f32 f0, f1, f2, f3;
mov.b32 {lo, hi}, $2;
cvt.rn.f16x2.e4m3x2 a, lo;
cvt.rn.f16x2.e4m3x2 b, hi;
mov.b32 {h0, h1}, a;
mov.b32 {h2, h3}, b;
cvt.f32.f16 f0, h0;
cvt.f32.f16 f1, h1;
cvt.f32.f16 f2, h2;
cvt.f32.f16 f3, h3;
mul.f32 f0, f0, $3;
mul.f32 f1, f1, $4;
mul.f32 f2, f2, $5;
mul.f32 f3, f3, $6;
cvt.rn.bf16x2.f32 $0, f1, f0;
cvt.rn.bf16x2.f32 $1, f3, f2;
}""")


@gluon.jit
def _numbers(codes, scale):
    """codes uint8 [64, 128] and a scale float32 a row -> bfloat16 numbers."""
    factors, codes = gl.broadcast(scale[:, None], codes)
    return gl.inline_asm_elementwise(
        DECODING, "=r,=r,r,r,r,r,r", [codes, factors], dtype=gl.bfloat16, is_pure=True, pack=4
    )


@gluon.jit
def _operand_order(x):
    """Columns of [rows, 64 n] in the order in which a thread's 16 neighbouring numbers are operands of four products.

    Of 64 columns thread t of a row has 16 t to 16 t + 15. The j-th product of 16 wants columns 2 t, 2 t + 1, 2 t + 8 and
    2 t + 9 of it there, and gets 16 t + 4 j and the three after it.
    """
    ROWS: gl.constexpr = x.shape[0]
    SPANS: gl.constexpr = x.shape[1] // 64
    by_thread = x.reshape((ROWS, SPANS, 4, 4, 2, 2))  # span, thread, product, half, pair
    return by_thread.permute((0, 1, 3, 4, 2, 5)).reshape((ROWS, SPANS * 64))


@gluon.jit
def _zero_codes(codes, first_unused):
    """Zeroes the codes of rows from first_unused on in a group: a code may be NaN, and NaN times zero is NaN."""
    CODES: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [4, 1], [1, 0])
    row = gl.arange(0, 64, gl.SliceLayout(1, CODES))
    values = codes.load(CODES)
    codes.store(gl.where((row < first_unused)[:, None], values, gl.zeros_like(values)))


@gluon.jit
def _loader(
    codes_desc, scales_desc, rope_desc, pages, page_starts, kv_lens, part_starts, part, codes, scales, ropes, full, empty,
    S_Q: gl.constexpr, STAGES: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """One warp: every tile of the part, in order, into a ring of STAGES. What earlier steps appended is there before the
    kernel before this one has ended; it may be the one that appends this step's rows."""
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
            mbarrier.expect(full.index(stage), 64 * ROW_BYTES_)
            tma_load(codes_desc, [page * 64, 0], full.index(stage), codes.index(stage))
            tma_load(scales_desc, [page * 64, 128], full.index(stage), scales.index(stage))  # in units of 4 bytes
            tma_load(rope_desc, [page * 64, 264], full.index(stage), ropes.index(stage))  # in units of 2 bytes
            it += 1


@gluon.jit
def _scores(
    codes, scales, first_unused, qn, values, nothing, s,
    FIRST: gl.constexpr, BLOCK_ROWS: gl.constexpr, SL: gl.constexpr,
):  # fmt: skip
    """Decodes groups FIRST and FIRST + 2 of a tile into `values` and begins to add their scores to s; not waited for.

    Returns s and the last operand in registers, which has to stay until the scores are there.
    """
    DL: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=SL, k_width=2)
    CODES: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [0, 4], [0, 8], [8, 0]],
        [[0, 16], [0, 32], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [], [64, 64],
    )  # fmt: skip
    SCALES: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [8, 0]], [[0, 0], [0, 0], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [], [64, 4]
    )
    PIECES: gl.constexpr = 2 * GROUP // PIECE
    group = gl.arange(0, GROUPS, gl.SliceLayout(0, SCALES))[None, :]
    key = gl.arange(0, 64, gl.SliceLayout(1, SCALES))[:, None]
    if first_unused < 64:
        _zero_codes(codes.slice(FIRST * GROUP, GROUP, dim=1), first_unused)
        _zero_codes(codes.slice((FIRST + 2) * GROUP, GROUP, dim=1), first_unused)
        cta_barrier()
    factors = gl.where(key < first_unused, scales.load(SCALES), 0.0)
    coming = codes.slice(FIRST * GROUP, PIECE, dim=1).load(CODES)
    before = gl.zeros([64, PIECE], gl.bfloat16, DL)
    for c in gl.static_range(PIECES):
        if c % (GROUP // PIECE) == 0:
            scale = gl.sum(gl.where(group == FIRST + c * PIECE // GROUP * 2, factors, 0.0), 1)
            scale = gl.convert_layout(scale, gl.SliceLayout(1, CODES))
        numbers = _numbers(coming, scale)
        if c + 1 < PIECES:
            coming = codes.slice(_column(FIRST, c + 1), PIECE, dim=1).load(CODES)
        if c % (GROUP // PIECE) == 0:
            meet(hear(FREE + FIRST + c * PIECE // GROUP * 2), nothing)
        values[FIRST + c * PIECE // GROUP * 2].index(0).slice(c * PIECE % GROUP, PIECE, dim=1).store(numbers)
        operand = gl.convert_layout(_operand_order(numbers), DL)
        q_part = qn.slice(_column(FIRST, c), PIECE, dim=1)
        s = warpgroup_mma(operand, q_part.permute((1, 0)), s, is_async=True)
        if c > 0:
            warpgroup_mma_wait(1, (before,))  # two operands in registers at a time
        before = operand
    return s, before


@gluon.jit
def _second_decoder(
    kv_lens, part_starts, part, nothing, qn, codes, scales, values, others, full, empty,
    BLOCK_ROWS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Groups 1 and 3 of every tile, and their share of the scores."""
    SL: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_ROWS, 16]
    )
    it = 0
    for step in range(0, num_stretches(part_starts, part)):
        _, kv_len, lo, hi, _ = stretch(part_starts, kv_lens, part, step)
        end = gl.minimum(kv_len, hi * 64)
        if hi > lo:
            meet(hear(QUERIES), nothing)
        for i in range(lo, hi):
            stage = it % STAGES
            mbarrier.wait(full.index(stage), (it // STAGES) & 1)
            s = gl.zeros([64, BLOCK_ROWS], gl.float32, SL)
            s, before = _scores(
                codes.index(stage), scales.index(stage), end - i * 64, qn, values, nothing, s, 1, BLOCK_ROWS, SL
            )
            s, before = warpgroup_mma_wait(0, (s, before))
            others.store(s)
            fence_async_shared()  # the numbers, for the summer; what was zeroed, before the next tile comes there
            cta_barrier()
            mbarrier.arrive(empty.index(stage), count=1)
            meet(tell(SCORES), nothing)
            it += 1
    for g in gl.static_range(2):
        meet(hear(FREE + 1 + 2 * g), nothing)


@gluon.jit
def _decoder(
    q, page_starts, kv_lens, part_starts, out, partial_lse, scale_log2, rows, part, nothing,
    qn, qr, codes, scales, ropes, values, others, ps, shrinks, totals, full, empty,
    S_Q: gl.constexpr, HEADS: gl.constexpr, BLOCK_ROWS: gl.constexpr, STAGES: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Groups 0 and 2 of every tile, the scores and their softmax."""
    SL: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_ROWS, 16]
    )
    RL: gl.constexpr = gl.SliceLayout(0, SL)
    QL: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [4, 1], [1, 0])
    QR: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    dtype: gl.constexpr = out.dtype.element_ty
    key = gl.arange(0, 64, gl.SliceLayout(1, SL))
    row = gl.program_id(0) * BLOCK_ROWS + gl.arange(0, BLOCK_ROWS, RL)
    row_l = gl.program_id(0) * BLOCK_ROWS + gl.arange(0, BLOCK_ROWS, gl.SliceLayout(1, QL))
    row_r = gl.program_id(0) * BLOCK_ROWS + gl.arange(0, BLOCK_ROWS, gl.SliceLayout(1, QR))
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
        qn.store(_operand_order(q_lora))
        qr.store(q_rope)
        fence_async_shared()
        cta_barrier()
        if hi > lo:
            meet(tell(QUERIES), nothing)
        m = gl.full([BLOCK_ROWS], NO_SCORE, gl.float32, RL)
        weight = gl.zeros([64, BLOCK_ROWS], gl.float32, SL)  # per thread; summed once a sequence
        for i in range(lo, hi):
            stage = it % STAGES
            mbarrier.wait(full.index(stage), (it // STAGES) & 1)
            s = gl.zeros([64, BLOCK_ROWS], gl.float32, SL)
            s = warpgroup_mma(ropes.index(stage), qr.permute((1, 0)), s, is_async=True)
            s, before = _scores(
                codes.index(stage), scales.index(stage), end - i * 64, qn, values, nothing, s, 0, BLOCK_ROWS, SL
            )
            s, before = warpgroup_mma_wait(0, (s, before))
            fence_async_shared()  # what was zeroed, before the next tile comes there
            cta_barrier()
            mbarrier.arrive(empty.index(stage), count=1)
            meet(hear(SCORES), nothing)
            s = (s + others.load(SL)) * scale_log2
            if i * 64 + 64 > free_keys:
                s = gl.where((i * 64 + key < end)[:, None], s, float("-inf"))
                if S_Q > 1:
                    s = gl.where((i * 64 + key)[:, None] < sees[None, :], s, float("-inf"))
            higher = gl.maximum(m, gl.max(s, 0))
            p = gl.exp2(s - higher[None, :])
            shrink = gl.exp2(m - higher)
            m = higher
            ps.index(0).store(p.to(dtype))
            shrinks.store(shrink)
            fence_async_shared()
            meet(tell(WEIGHTS), nothing)
            weight = weight * shrink[None, :] + p
            it += 1
        if hi > lo:
            total = gl.sum(weight, 0)
            totals.store(total)
            meet(tell(TOTAL), nothing)
            if (lo > 0) | (hi < num_tiles):
                slot_row = (2 * part + (lo == 0).to(gl.int32)).to(gl.int64) * rows + row
                lse = gl.where(total > 0, m + gl.log2(gl.where(total > 0, total, 1.0)), float("-inf"))
                gl.store(partial_lse + slot_row, lse, mask=row < rows)
    for g in gl.static_range(2):
        meet(hear(FREE + 2 * g), nothing)
    if PDL:
        gdc_wait()  # without tiles, too: what follows waits for this launch alone


@gluon.jit
def _store_columns(
    acc, share, out, partial, part, sequence, row, rows, column0, whole, lo, nothing, SL: gl.constexpr
):
    """Writes [128, BLOCK_ROWS] normalized results from column0 on, as the result itself or as a partial."""
    acc = acc * share[None, :]
    row = row + fresh_zero(nothing)
    column = (
        column0 + fresh_zero(nothing) + gl.arange(0, GROUP, gl.SliceLayout(1, SL))
    )  # else kept in registers all along
    kept = (row < rows)[None, :] & (column < 512)[:, None]
    at = row[None, :] * 512 + column[:, None]
    if whole:
        gl.store(out + sequence.to(gl.int64) * rows * 512 + at, acc.to(out.dtype.element_ty), mask=kept)
    else:
        slot = (2 * part + (lo == 0).to(gl.int32)).to(gl.int64) * rows
        gl.store(partial + slot * 512 + at, acc, mask=kept)


@gluon.jit
def _summer(
    kv_lens, part_starts, out, partial, rows, part, nothing, values, ps, shrinks, totals,
    BLOCK_ROWS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    SL: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_ROWS, 16]
    )
    RL: gl.constexpr = gl.SliceLayout(0, SL)
    row = gl.program_id(0) * BLOCK_ROWS + gl.arange(0, BLOCK_ROWS, RL)
    for g in gl.static_range(GROUPS):
        meet(tell(FREE + g), nothing)
    if PDL:
        gdc_wait()  # the launch before may read what is written here
    for step in range(0, num_stretches(part_starts, part)):
        sequence, _, lo, hi, num_tiles = stretch(part_starts, kv_lens, part, step)
        acc0 = gl.zeros([GROUP, BLOCK_ROWS], gl.float32, SL)
        acc1 = gl.zeros([GROUP, BLOCK_ROWS], gl.float32, SL)
        acc2 = gl.zeros([GROUP, BLOCK_ROWS], gl.float32, SL)
        acc3 = gl.zeros([GROUP, BLOCK_ROWS], gl.float32, SL)
        total = gl.zeros([BLOCK_ROWS], gl.float32, RL)
        for i in range(lo, hi):
            meet(hear(WEIGHTS), nothing)
            zero = fresh_zero(nothing)  # else the descriptors of all 32 products are kept, some in local memory
            weights = ps.index(zero)
            shrink = shrinks.load(RL)[None, :]
            acc0, acc1, acc2, acc3 = acc0 * shrink, acc1 * shrink, acc2 * shrink, acc3 * shrink
            acc0 = warpgroup_mma(values[0].index(zero).permute((1, 0)), weights, acc0, is_async=True)
            acc1 = warpgroup_mma(values[1].index(zero).permute((1, 0)), weights, acc1, is_async=True)
            acc2 = warpgroup_mma(values[2].index(zero).permute((1, 0)), weights, acc2, is_async=True)
            acc3 = warpgroup_mma(values[3].index(zero).permute((1, 0)), weights, acc3, is_async=True)
            acc0 = warpgroup_mma_wait(3, (acc0,))
            meet(tell(FREE + 0), nothing)
            acc1 = warpgroup_mma_wait(2, (acc1,))
            meet(tell(FREE + 1), nothing)
            acc2 = warpgroup_mma_wait(1, (acc2,))
            meet(tell(FREE + 2), nothing)
            acc3 = warpgroup_mma_wait(0, (acc3,))
            if i == hi - 1:  # before the last pages are free, or a next stretch of one tile could say its totals
                meet(hear(TOTAL), nothing)
                total = totals.load(RL)
            meet(tell(FREE + 3), nothing)
        share = gl.where(total > 0, 1.0 / gl.where(total > 0, total, 1.0), 0.0)
        whole = (lo == 0) & (hi == num_tiles)
        _store_columns(acc0, share, out, partial, part, sequence, row, rows, 0, whole, lo, nothing, SL)
        _store_columns(acc1, share, out, partial, part, sequence, row, rows, 128, whole, lo, nothing, SL)
        _store_columns(acc2, share, out, partial, part, sequence, row, rows, 256, whole, lo, nothing, SL)
        _store_columns(acc3, share, out, partial, part, sequence, row, rows, 384, whole, lo, nothing, SL)


@gluon.jit
def _fp8_kernel(
    q,  # [B * rows, 576]
    codes_desc, scales_desc, rope_desc,  # the pool as [num_pages * 64] rows of 656 bytes, 164 float32 and 328 bfloat16
    pages, page_starts, kv_lens, part_starts, out, partial, partial_lse, scale_log2, rows,
    nothing,  # 0
    S_Q: gl.constexpr, HEADS: gl.constexpr, BLOCK_ROWS: gl.constexpr, STAGES: gl.constexpr, A_REGISTERS: gl.constexpr, B_REGISTERS: gl.constexpr,
    PDL: gl.constexpr,
):  # fmt: skip
    """Program (block of rows, part)."""
    part = gl.program_id(1)
    dtype: gl.constexpr = out.dtype.element_ty
    TL: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    PL: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=BLOCK_ROWS * 2, element_bitwidth=16, rank=2)
    ML: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    BL: gl.constexpr = mbarrier.MBarrierLayout()
    codes = gl.allocate_shared_memory(gl.uint8, [STAGES, 64, 512], codes_desc.layout)
    scales = gl.allocate_shared_memory(gl.float32, [STAGES, 64, 4], scales_desc.layout)
    ropes = gl.allocate_shared_memory(dtype, [STAGES, 64, 64], TL)
    values0 = gl.allocate_shared_memory(dtype, [1, 64, 128], TL)
    values1 = gl.allocate_shared_memory(dtype, [1, 64, 128], TL)
    values2 = gl.allocate_shared_memory(dtype, [1, 64, 128], TL)
    values3 = gl.allocate_shared_memory(dtype, [1, 64, 128], TL)
    values = (values0, values1, values2, values3)
    qn = gl.allocate_shared_memory(dtype, [BLOCK_ROWS, 512], TL)
    qr = gl.allocate_shared_memory(dtype, [BLOCK_ROWS, 64], TL)
    ps = gl.allocate_shared_memory(dtype, [1, 64, BLOCK_ROWS], PL)
    others = gl.allocate_shared_memory(gl.float32, [64, BLOCK_ROWS], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    shrinks = gl.allocate_shared_memory(gl.float32, [BLOCK_ROWS], ML)
    totals = gl.allocate_shared_memory(gl.float32, [BLOCK_ROWS], ML)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BL)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BL)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()
    if PDL:
        gdc_launch_dependents()
    gl.warp_specialize(
        [
            (_decoder, (
                q, page_starts, kv_lens, part_starts, out, partial_lse, scale_log2, rows, part, nothing,
                qn, qr, codes, scales, ropes, values, others, ps, shrinks, totals, full, empty,
                S_Q, HEADS, BLOCK_ROWS, STAGES, PDL,
            )),
            (_second_decoder, (
                kv_lens, part_starts, part, nothing, qn, codes, scales, values, others, full, empty, BLOCK_ROWS, STAGES,
            )),
            (_summer, (
                kv_lens, part_starts, out, partial, rows, part, nothing, values, ps, shrinks, totals, BLOCK_ROWS, PDL,
            )),
            (_loader, (
                codes_desc, scales_desc, rope_desc, pages, page_starts, kv_lens, part_starts, part,
                codes, scales, ropes, full, empty, S_Q, STAGES, PDL,
            )),
        ],
        [4, 4, 1],
        [A_REGISTERS, B_REGISTERS, 24],
    )  # fmt: skip


def launch(
    q: torch.Tensor, pool: torch.Tensor, pages: torch.Tensor, page_starts: torch.Tensor, kv_lens: torch.Tensor,
    out: torch.Tensor, workspace: DecodeWorkspace, scale_log2: float, pdl: bool,
) -> None:  # fmt: skip
    """Writes `out` for sequences one part holds whole, and the workspace's partials for the others."""
    tokens = pool.view(-1, ROW_BYTES)
    options = {"launch_pdl": True} if pdl else {}
    rows = workspace.rows_per_sequence * workspace.num_heads
    block_rows = min(workspace.row_block, MOST_BLOCK_ROWS)
    _fp8_kernel[(triton.cdiv(rows, block_rows), workspace.num_parts)](
        q,
        TensorDescriptor.from_tensor(tokens, [64, KV_LORA.value], gl.NVMMASharedLayout(CODES_SWIZZLE, 8, 2)),
        TensorDescriptor.from_tensor(tokens.view(torch.float32), [64, 4], gl.NVMMASharedLayout(0, 32, 2)),
        TensorDescriptor.from_tensor(tokens.view(torch.bfloat16), [64, ROPE], gl.NVMMASharedLayout(128, 16, 2)),
        pages, page_starts, kv_lens, workspace.part_starts, out, workspace.partial, workspace.partial_lse,
        scale_log2, rows, 0,
        S_Q=workspace.rows_per_sequence, HEADS=workspace.num_heads, BLOCK_ROWS=block_rows,
        STAGES=STAGES[block_rows], A_REGISTERS=REGISTERS[block_rows][0], B_REGISTERS=REGISTERS[block_rows][1],
        PDL=pdl, num_warps=4, **options,
    )  # fmt: skip
