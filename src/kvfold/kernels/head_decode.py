"""Decode over keys and values of heads: mla=0's cache of both, or (mla=2) latents that become both tile by tile.

Owns the launches of attention of one to four generated rows a sequence on the paths that do not fold. The grid is fixed, and
lengths and page lists are read on the device, so a launch can be captured: mla_schedule.py deals tiles of 64 keys to parts,
as it does for mla_decode.py, whose buffers and merge this shares. A program is one head and one part: a tile is read, or
expanded, for that head alone.

Expanding: a tile's latents times the head's W_UK and W_UV, chunk by chunk of kv_lora, on matrix units. Keys and values never
leave the multiprocessor, so no workspace grows with the context; W_UK and W_UV come from L2 for every tile (256 KB of
8.4 million multiply-adds at 128/128/512).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kvfold.kernels.cached_blocks import Blocks, load_bfloat16, load_coded
from kvfold.kernels.mla_decode import DecodeWorkspace, combine, shared_memory_bytes
from kvfold.kernels.mla_schedule import TILE_TOKENS, part_bounds, stretch
from kvfold.kernels.online_softmax import LOG2_E, NO_SCORE
from kvfold.kernels.overlap import overlaps, wait_for_inputs

MOST_ROWS = 4  # of a sequence
ROW_BLOCK = 16  # the fewest rows of a product on matrix units
# Over 4096 keys, H200: 16 heads of 16 sequences at 2, 4 and 8 programs a multiprocessor 164, 174 and 176 us, 128 heads of one
# sequence 118, 107 and 100.
PROGRAMS = 8
# Keys of a tile, warps, stages: of 8 and 5 forms. (64, 4, 2) expands long contexts 1.13 times as fast and 300 keys 0.7 times.
# Numbers of 32 bits: half of the keys in one stage, or shared memory is too small.
CACHED = (64, 4, 3)
EXPANDING = (64, 8, 3)
OTHER_BYTES = 8 << 10  # of shared memory: queries, a rope part, sums
INTERPRETER_PARTS = 5  # parts without a GPU: few programs, and splits at odd places


def head_workspace(
    batch: int,
    rows_per_sequence: int,
    num_heads: int,
    v_dim: int,
    device: torch.device | str,
    num_parts: int | None = None,
    beside: DecodeWorkspace | None = None,
) -> DecodeWorkspace:
    """Schedule and partial results of both launches below; lengths are free. num_parts: programs along the keys of a head.
    beside: as DecodeWorkspace has it."""
    device = torch.device(device)
    if num_parts is None:
        num_parts = INTERPRETER_PARTS
        if device.type == "cuda":
            multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
            num_parts = triton.cdiv(PROGRAMS * multiprocessors, num_heads)
    return DecodeWorkspace(batch, rows_per_sequence, num_heads, v_dim, device, num_parts, beside)


def attend_cached(
    q: torch.Tensor,  # [B * s_q, H, qk]    rows of a sequence are neighbours
    keys: torch.Tensor,  # [num_pages, 64, H * qk]    one layer; numbers, or bytes of `blocks`
    values: torch.Tensor,  # [num_pages, 64, H * v]
    pages: torch.Tensor,  # int32 [..]
    page_starts: torch.Tensor,  # int32 [B + 1]
    kv_lens: torch.Tensor,  # int32 [B]  row i of s_q sees kv_len - s_q + 1 + i keys
    out: torch.Tensor,  # [B * s_q, H, v]    written whole
    workspace: DecodeWorkspace,
    *,
    scale: float,
    blocks: Blocks | None = None,
) -> None:
    """Softmax attention of every query row over its sequence's cached keys and values. Queries, keys, values and weights are
    rounded to the type of `out`; sums are float32. A row that sees no key gets zeros."""
    # 192 numbers are loaded as 128 and 64; both begin where a block of q8_0 does
    first = 1 << (q.shape[2].bit_length() - 1)
    _launch(
        q, keys, values, keys, keys, pages, page_starts, kv_lens, out, workspace, scale, first, 0, blocks,
        expands=False,
    )  # fmt: skip


def attend_expanding(
    q: torch.Tensor,  # [B * s_q, H, nope + rope]
    latents: torch.Tensor,  # [num_pages, 64, kv_lora + rope]    one layer; numbers, or bytes of `blocks`
    w_uk: torch.Tensor,  # [H, nope, kv_lora]    contiguous, of the type of `out`
    w_uv: torch.Tensor,  # [H, v, kv_lora]
    pages: torch.Tensor,
    page_starts: torch.Tensor,
    kv_lens: torch.Tensor,
    out: torch.Tensor,  # [B * s_q, H, v]    written whole
    workspace: DecodeWorkspace,
    *,
    scale: float,
    blocks: Blocks | None = None,
) -> None:
    """The same over latents, which become keys and values (rounded to the type of `out`) where they are needed."""
    _launch(
        q, latents, latents, w_uk, w_uv, pages, page_starts, kv_lens, out, workspace, scale, w_uk.shape[1],
        w_uk.shape[2], blocks, expands=True,
    )  # fmt: skip


def _launch(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, w_uk: torch.Tensor, w_uv: torch.Tensor,
    pages: torch.Tensor, page_starts: torch.Tensor, kv_lens: torch.Tensor, out: torch.Tensor,
    workspace: DecodeWorkspace, scale: float, first: int, kv_lora: int, blocks: Blocks | None, *, expands: bool,
) -> None:  # fmt: skip
    second, v_dim = q.shape[2] - first, out.shape[2]
    early = overlaps(q)
    least = 32 if blocks else 16
    block_first, block_second, block_v = (max(triton.next_power_of_2(n), least) for n in (first, second, v_dim))
    chunk = min(128 if blocks == "fp8" else 64, max(triton.next_power_of_2(kv_lora), least))
    block_keys, num_warps, num_stages = EXPANDING if expands else CACHED
    if out.element_size() == 4:
        block_keys, num_stages = block_keys // 2, 1
    # A tile of keys and values, and what is under way: 129 KB at three stages of 16-bit numbers where it is expanded.
    tile_bytes = block_keys * (block_first + block_second + block_v) * out.element_size()
    stage_bytes = chunk * (block_keys + block_first + block_v) * out.element_size() if expands else tile_bytes
    while num_stages > 1 and tile_bytes + (num_stages - 1) * stage_bytes + OTHER_BYTES > shared_memory_bytes(q):
        num_stages -= 1
    _head_decode_kernel[(workspace.num_heads, workspace.num_parts)](
        q, keys, values, w_uk, w_uv, pages, page_starts, kv_lens, workspace.part_starts, out, workspace.partial,
        workspace.partial_lse, scale * LOG2_E,
        q.stride(0), q.stride(1), keys.stride(0), keys.stride(1), values.stride(0), values.stride(1), out.stride(0),
        out.stride(1),
        S_Q=workspace.rows_per_sequence, HEADS=workspace.num_heads, FIRST=first, SECOND=second, V=v_dim,
        KV_LORA=kv_lora, BLOCK_ROWS=ROW_BLOCK,
        BLOCK_KEYS=block_keys,
        BLOCK_FIRST=block_first, BLOCK_SECOND=block_second, BLOCK_V=block_v, CHUNK=chunk, TILE=TILE_TOKENS, BLOCKS=blocks,
        EXPANDS=expands, EARLY=early, launch_pdl=early, num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    combine(out, workspace, early)


@triton.jit
def _load_numbers(
    row, held, at, COUNT: tl.constexpr, BLOCK: tl.constexpr, NUMBER: tl.constexpr, BLOCKS: tl.constexpr
):
    """Numbers [at, at + COUNT) of the rows at pointers `row` [K], as [K, BLOCK] of type NUMBER; zeros elsewhere."""
    if BLOCKS == "q8_0":
        x = load_coded(row, held, at, at + COUNT, BLOCK, NUMBER, False)
    else:
        i = tl.arange(0, BLOCK)[None, :]
        x = tl.load(row[:, None] + at + i, mask=held[:, None] & (i < COUNT), other=0)
        if x.dtype != NUMBER:
            x = x.to(tl.float32).to(NUMBER)
    return x


@triton.jit
def _expand_tile(
    row, held, w_uk, w_uv, NOPE: tl.constexpr, V: tl.constexpr, KV_LORA: tl.constexpr, BLOCK_NOPE: tl.constexpr,
    BLOCK_V: tl.constexpr, CHUNK: tl.constexpr, NUMBER: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """k_nope [K, BLOCK_NOPE] and v [K, BLOCK_V] of the latents at pointers `row` [K], for the head whose W_UK and W_UV these are."""
    KEYS: tl.constexpr = row.shape[0]
    nope = tl.arange(0, BLOCK_NOPE)[None, :]
    value = tl.arange(0, BLOCK_V)[None, :]
    k_nope = tl.zeros([KEYS, BLOCK_NOPE], tl.float32)
    v = tl.zeros([KEYS, BLOCK_V], tl.float32)
    for at in range(0, KV_LORA, CHUNK):
        if BLOCKS == "fp8":
            c_kv = load_coded(row, held, at, KV_LORA, CHUNK, NUMBER, True)
        elif BLOCKS == "q8_0":
            c_kv = load_coded(row, held, at, KV_LORA, CHUNK, NUMBER, False)
        else:
            i = at + tl.arange(0, CHUNK)[None, :]
            c_kv = tl.load(row[:, None] + i, mask=held[:, None] & (i < KV_LORA), other=0)
            if c_kv.dtype != NUMBER:
                c_kv = c_kv.to(tl.float32).to(NUMBER)
        i = (at + tl.arange(0, CHUNK))[:, None]
        w = tl.load(w_uk + nope * KV_LORA + i, mask=(i < KV_LORA) & (nope < NOPE), other=0).to(NUMBER)
        k_nope = tl.dot(c_kv, w, k_nope, input_precision="ieee")
        w = tl.load(w_uv + value * KV_LORA + i, mask=(i < KV_LORA) & (value < V), other=0).to(NUMBER)
        v = tl.dot(c_kv, w, v, input_precision="ieee")
    return k_nope.to(NUMBER), v.to(NUMBER)


@triton.jit
def _head_decode_kernel(
    q, keys, values, w_uk, w_uv, pages, page_starts, kv_lens, part_starts,
    out,
    partial,  # float32 [2 * parts, S_Q * HEADS, V]
    partial_lse,  # float32 [2 * parts, S_Q * HEADS], base 2
    scale_log2,
    q_stride, q_head_stride, key_page_stride, key_stride, value_page_stride, value_stride, out_stride, out_head_stride,
    S_Q: tl.constexpr, HEADS: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, V: tl.constexpr,
    KV_LORA: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr, BLOCK_FIRST: tl.constexpr,
    BLOCK_SECOND: tl.constexpr, BLOCK_V: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr, BLOCKS: tl.constexpr,
    EXPANDS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Program (head, part): the part's tiles of every sequence it crosses. A head's queries and keys are FIRST numbers, of
    which latents hold none, and SECOND behind them."""
    if EARLY:
        wait_for_inputs()
    head = tl.program_id(0)
    part = tl.program_id(1)
    first_sequence, first_tile, end_sequence, end_tile = part_bounds(part_starts, part)
    dtype = out.dtype.element_ty
    if EXPANDS:
        w_uk += head.to(tl.int64) * FIRST * KV_LORA
        w_uv += head.to(tl.int64) * V * KV_LORA

    r = tl.arange(0, BLOCK_ROWS)
    real_row = r < S_Q
    first = tl.arange(0, BLOCK_FIRST)[None, :]
    second = tl.arange(0, BLOCK_SECOND)[None, :]
    value = tl.arange(0, BLOCK_V)[None, :]
    key = tl.arange(0, BLOCK_KEYS)

    for step in range(0, end_sequence + (end_tile > 0).to(tl.int32) - first_sequence):
        sequence, kv_len, lo, hi, num_tiles = stretch(
            kv_lens, first_sequence, first_tile, end_sequence, end_tile, step, TILE
        )
        page_list = pages + tl.load(page_starts + sequence)

        row = sequence.to(tl.int64) * S_Q + r
        q_row = (q + row * q_stride + head * q_head_stride)[:, None]
        q_first = tl.load(q_row + first, mask=real_row[:, None] & (first < FIRST), other=0).to(tl.float32).to(dtype)
        q_second = tl.load(q_row + FIRST + second, mask=real_row[:, None] & (second < SECOND), other=0)
        q_second = q_second.to(tl.float32).to(dtype)
        sees = kv_len - S_Q + 1 + r  # keys of each row

        highest = tl.full([BLOCK_ROWS], NO_SCORE, tl.float32)
        weight = tl.zeros([BLOCK_ROWS], tl.float32)
        summed = tl.zeros([BLOCK_ROWS, BLOCK_V], tl.float32)
        for start in range(lo * TILE, tl.minimum(hi * TILE, kv_len), BLOCK_KEYS):
            page = tl.load(page_list + start // TILE).to(tl.int64)
            held = start + key < kv_len  # unused slots may hold NaN: a zero weight would keep it
            key_row = keys + page * key_page_stride + (start % TILE + key) * key_stride
            if EXPANDS:
                k_first, v = _expand_tile(
                    key_row, held, w_uk, w_uv, FIRST, V, KV_LORA, BLOCK_FIRST, BLOCK_V, CHUNK, dtype, BLOCKS
                )
                if BLOCKS == "fp8":
                    rope_row = key_row[:, None] + KV_LORA + KV_LORA // 32
                    k_second = load_bfloat16(rope_row + 2 * second, held[:, None] & (second < SECOND)).to(dtype)
                else:
                    k_second = _load_numbers(key_row, held, KV_LORA, SECOND, BLOCK_SECOND, dtype, BLOCKS)
            else:
                at = head * (FIRST + SECOND)
                k_first = _load_numbers(key_row, held, at, FIRST, BLOCK_FIRST, dtype, BLOCKS)
                k_second = _load_numbers(key_row, held, at + FIRST, SECOND, BLOCK_SECOND, dtype, BLOCKS)
                value_row = values + page * value_page_stride + (start % TILE + key) * value_stride
                v = _load_numbers(value_row, held, head * V, V, BLOCK_V, dtype, BLOCKS)

            score = tl.dot(q_first, tl.trans(k_first), input_precision="ieee")
            score = tl.dot(q_second, tl.trans(k_second), score, input_precision="ieee")
            score = tl.where((start + key)[None, :] < sees[:, None], score * scale_log2, float("-inf"))
            higher = tl.maximum(highest, tl.max(score, 1))
            p = tl.exp2(score - higher[:, None])
            shrink = tl.exp2(highest - higher)
            weight = weight * shrink + tl.sum(p, 1)
            summed = tl.dot(p.to(dtype), v, summed * shrink[:, None], input_precision="ieee")
            highest = higher

        some = weight > 0
        summed = summed / tl.where(some, weight, 1.0)[:, None]
        kept = real_row[:, None] & (value < V)
        if (lo == 0) & (hi == num_tiles):
            out_row = (out + row * out_stride + head * out_head_stride)[:, None]
            tl.store(out_row + value, summed.to(dtype), mask=kept)
        else:
            slot_row = (2 * part + (lo == 0).to(tl.int32)).to(tl.int64) * (S_Q * HEADS) + r * HEADS + head
            tl.store(partial + slot_row[:, None] * V + value, summed, mask=kept)
            lse = tl.where(some, highest + tl.log2(tl.where(some, weight, 1.0)), float("-inf"))
            tl.store(partial_lse + slot_row, lse, mask=real_row)
