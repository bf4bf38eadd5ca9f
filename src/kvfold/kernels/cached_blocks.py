"""Cached rows in blocks on a GPU: q8_0 and fp8, rounded when they are appended, numbers again where they are read.

cache/latent.py defines both formats, and what is written here is equal to it bit for bit. A row is bytes:

    q8_0  [n / 32][float16 scale, 32 signed codes]                    any whole blocks of 32 numbers
    fp8   [codes of 128 g numbers | g float32 scales | bfloat16 ..]    whole groups of 128, and what is left over

Owns three ways to read and write them: append_blocks (float rows to slots), gather_rows (pages, of numbers too, to rows of the
compute type) and, for kernels that attend over a tile, load_coded and load_bfloat16. Codes of e4m3 are decoded by shifts, since
GPUs before sm_89 and Triton's interpreter know no such type.
"""

from __future__ import annotations

from typing import Literal

import triton
import triton.language as tl
from torch import Tensor

from kvfold.kernels.overlap import overlaps, wait_for_inputs

Blocks = Literal["q8_0", "fp8"]

PAGE_TOKENS = 64
TINY_Q8_0 = tl.constexpr(2.0**-120)  # a block below it is zero
TINY_FP8 = tl.constexpr(2.0**-118)  # and a group: its scale, 2^-126, is the least normal number
HALF_OF_SHIFT = tl.constexpr(
    2.0**60
)  # the exponents of e4m3 and float32 differ by 120: as one factor beside a scale it may overflow


@triton.jit
def e4m3_numbers(codes):
    """Bytes e4m3 to float32, 2^-120 of their value: sign, and exponent and mantissa on top of float32's mantissa."""
    bits = codes.to(tl.int32)
    return (((bits & 0x80) << 24) | ((bits & 0x7F) << 20)).to(tl.float32, bitcast=True)


@triton.jit
def load_coded(row, held, first, last, COUNT: tl.constexpr, NUMBER: tl.constexpr, FP8: tl.constexpr):
    """Numbers [first, first + COUNT) of rows as [K, COUNT] of type NUMBER; zeros from `last` on and in rows not held.

    row: pointers to bytes [K]. first, last: whole blocks; of fp8, `last` is the end of the coded numbers.
    """
    K: tl.constexpr = row.shape[0]
    if FP8:
        GROUPS: tl.constexpr = (COUNT + 127) // 128
        EACH: tl.constexpr = COUNT // GROUPS
        group = first // 128 + tl.arange(0, GROUPS)
        mask = held[:, None] & (group < last // 128)[None, :]
        at = row[:, None] + last + group[None, :] * 4
        scale = tl.load(at.to(tl.pointer_type(tl.float32)), mask=mask, other=0.0)
        at = row[:, None, None] + (group[:, None] * 128 + tl.arange(0, EACH)[None, :])[None, :, :]
        x = e4m3_numbers(tl.load(at, mask=mask[:, :, None], other=0))
        x = x * (scale * HALF_OF_SHIFT)[:, :, None] * HALF_OF_SHIFT
        return tl.reshape(x.to(NUMBER), [K, COUNT])
    else:
        BLOCKS: tl.constexpr = COUNT // 32
        block = first // 32 + tl.arange(0, BLOCKS)
        mask = held[:, None] & (block < last // 32)[None, :]
        at = row[:, None] + block[None, :] * 34
        scale = tl.load(at.to(tl.pointer_type(tl.float16)), mask=mask, other=0.0).to(tl.float32)
        # two codes a load: blocks of 34 bytes lie at even addresses
        at = at[:, :, None] + 2 + 2 * tl.arange(0, 16)[None, None, :]
        words = tl.load(at.to(tl.pointer_type(tl.int16)), mask=mask[:, :, None], other=0).to(tl.int32)
        codes = tl.reshape(tl.join((words << 24) >> 24, words >> 8), [K, BLOCKS, 32])
        x = codes.to(tl.float32) * scale[:, :, None]
        return tl.reshape(x.to(NUMBER), [K, COUNT])


@triton.jit
def load_bfloat16(at, mask):
    """Numbers of bfloat16 at pointers to bytes, as float32."""
    bits = tl.load(at.to(tl.pointer_type(tl.uint16)), mask=mask, other=0).to(tl.int32)
    return (bits << 16).to(tl.float32, bitcast=True)


@triton.jit
def _largest(x, TINY: tl.constexpr):
    """Of each row of x [B, N]: the largest magnitude, whether every number is finite, and whether it reaches TINY."""
    largest = tl.max(tl.abs(x), 1)
    finite = tl.max((tl.abs(x) < float("inf")).to(tl.int32) ^ 1, 1) == 0
    return largest, finite, finite & (largest >= TINY)


@triton.jit
def _append_q8_0(x, x_stride, slots, pool, row_bytes, num_blocks, BLOCKS: tl.constexpr, EARLY: tl.constexpr):
    if EARLY:
        wait_for_inputs()
    t = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + t).to(tl.int64)
    if slot >= 0:  # padding has none
        block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
        real = block < num_blocks
        i = tl.arange(0, 32)
        v = tl.load(x + t * x_stride + block[:, None] * 32 + i[None, :], mask=real[:, None], other=0.0).to(
            tl.float32
        )
        largest, finite, used = _largest(v, TINY_Q8_0)
        scale = tl.div_rn(tl.where(used, largest, 127.0), tl.full([BLOCKS], 127.0, tl.float32))
        inverse = tl.div_rn(tl.full([BLOCKS], 1.0, tl.float32), scale)
        exact = tl.where(used[:, None], v, 0.0) * inverse[:, None]
        code = (tl.abs(exact) + 0.5).to(tl.int32)  # a half away from zero
        code = tl.where(exact < 0, -code, code)
        bits = tl.where(used, scale, 0.0).to(tl.float16).to(tl.int16, bitcast=True)
        bits = tl.where(finite, bits, 0x7E00).to(tl.int16)  # NaN
        at = pool + slot * row_bytes + block * 34
        tl.store(at.to(tl.pointer_type(tl.int16)), bits, mask=real)
        tl.store(at[:, None] + 2 + i[None, :], code.to(tl.uint8), mask=real[:, None])


@triton.jit
def _round_group(x, codes, scale_at):
    i = tl.arange(0, 128)
    v = tl.load(x + i).to(tl.float32)[None, :]
    largest, finite, used = _largest(v, TINY_FP8)
    # 448 = 1.75 * 2^8, so scale = 2^(e - 8) up to a mantissa of 1.75, twice that above
    bits = tl.where(used, largest, 448.0).to(tl.int32, bitcast=True)
    exponent = (bits >> 23) - 8 + ((bits & 0x7FFFFF) > 0x600000).to(tl.int32)
    scale = (exponent << 23).to(tl.float32, bitcast=True)
    inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    exact = tl.where(used[:, None], v, 0.0) * inverse[:, None]
    sign = (exact.to(tl.int32, bitcast=True) >> 24) & 0x80
    size = tl.abs(exact)
    size_bits = size.to(tl.int32, bitcast=True)
    normal = ((size_bits + 0x7FFFF + ((size_bits >> 20) & 1)) >> 20) - (120 << 3)
    # below 2^-6: added to 2^14, a number's last bit is worth 2^-9, as in e4m3
    small = (size + 16384.0).to(tl.int32, bitcast=True) & 0xFF
    code = tl.where(size < 0.015625, small, normal) | sign
    tl.store(codes + i[None, :], code.to(tl.uint8))
    scale = tl.where(finite, tl.where(used, scale, 0.0), float("nan"))
    tl.store((scale_at + tl.arange(0, 1)).to(tl.pointer_type(tl.float32)), scale)


@triton.jit
def _append_fp8(x, x_stride, slots, pool, row_bytes, coded, left, LEFT: tl.constexpr, EARLY: tl.constexpr):
    """A program a group; one more for what is left over."""
    if EARLY:
        wait_for_inputs()
    t = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + t).to(tl.int64)
    group = tl.program_id(1)
    if slot >= 0:
        x += t * x_stride
        pool += slot * row_bytes
        if group * 128 < coded:
            _round_group(x + group * 128, pool + group * 128, pool + coded + group * 4)
        else:
            i = tl.arange(0, LEFT)
            v = tl.load(x + coded + i, mask=i < left, other=0.0).to(tl.float32)
            bits = v.to(tl.int32, bitcast=True)
            rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
            rounded = tl.where(tl.abs(v) <= float("inf"), rounded, (bits >> 16) | 0x40)  # NaN stays NaN
            at = pool + coded + coded // 32 + 2 * i
            tl.store(at.to(tl.pointer_type(tl.int16)), rounded.to(tl.int16), mask=i < left)


@triton.jit
def _gather(
    pool, row_size, pages, num_held, out, num_rows, width, coded, PAGE: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, BLOCKS: tl.constexpr, COUNTED: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Program (rows, columns). row_size: bytes or numbers; width: numbers of a row; coded: those that lie in blocks."""
    if EARLY:
        wait_for_inputs()
    start = tl.program_id(0) * ROWS  # ROWS divides a page
    i = tl.arange(0, ROWS)
    t = start + i
    real = t < num_rows
    held = real
    count = num_rows
    if COUNTED:
        count = tl.load(num_held)
        held = t < count
    page = tl.load(pages + start // PAGE, mask=start < count, other=0).to(tl.int64)
    row = pool + (page * PAGE + start % PAGE + i) * row_size
    first = tl.program_id(1) * COLUMNS
    column = first + tl.arange(0, COLUMNS)
    at = t.to(tl.int64)[:, None] * width + column[None, :]
    inside = column < width
    if BLOCKS == "fp8":
        if first >= coded:
            left = column - coded
            x = load_bfloat16(
                row[:, None] + coded + coded // 32 + 2 * left[None, :], held[:, None] & inside[None, :]
            )
        else:
            x = load_coded(row, held, first, coded, COLUMNS, tl.float32, True)
            inside = column < coded
    elif BLOCKS == "q8_0":
        x = load_coded(row, held, first, coded, COLUMNS, tl.float32, False)
    else:
        x = tl.load(row[:, None] + column[None, :], mask=held[:, None] & inside[None, :], other=0).to(tl.float32)
    tl.store(out + at, x, mask=real[:, None] & inside[None, :])


def coded_numbers(width: int, blocks: Blocks) -> int:
    """How many of a row's numbers lie in blocks; the rest is bfloat16."""
    return width // 128 * 128 if blocks == "fp8" else width


def append_blocks(x: Tensor, slots: Tensor, pool: Tensor, blocks: Blocks) -> None:
    """Rounds x [T, n], any float type, to rows of pool uint8 [slots, row_bytes]; slots int64 [T], -1: none."""
    num_rows, width = x.shape
    early = overlaps(x)
    if blocks == "q8_0":
        group = min(16, triton.next_power_of_2(width // 32))
        _append_q8_0[(num_rows, triton.cdiv(width // 32, group))](
            x, x.stride(0), slots, pool, pool.shape[1], width // 32, BLOCKS=group, num_warps=4, enable_fp_fusion=False, EARLY=early,
            launch_pdl=early,
        )  # fmt: skip
        return
    coded = coded_numbers(width, blocks)
    _append_fp8[(num_rows, coded // 128 + (width > coded))](
        x, x.stride(0), slots, pool, pool.shape[1], coded, width - coded, LEFT=triton.next_power_of_2(max(width - coded, 1)),
        num_warps=1, enable_fp_fusion=False, EARLY=early, launch_pdl=early,
    )  # fmt: skip


def gather_rows(
    pool: Tensor, pages: Tensor, out: Tensor, blocks: Blocks | None, num_held: Tensor | None = None
) -> None:
    """The first len(out) rows of pages int32 of pool [P, 64, columns], numbers or bytes of `blocks`, into out [rows, n] of any float
    type; zeros from num_held int32 [1] on, whose pages need not be listed."""
    num_rows, width = out.shape
    early = overlaps(out)
    _gather[(triton.cdiv(num_rows, 16), triton.cdiv(width, 128))](
        pool, pool.shape[2], pages, pages if num_held is None else num_held, out, num_rows, width,
        width if blocks is None else coded_numbers(width, blocks), PAGE=PAGE_TOKENS, ROWS=16, COLUMNS=128, BLOCKS=blocks,
        COUNTED=num_held is not None, num_warps=4, EARLY=early, launch_pdl=early,
    )  # fmt: skip
