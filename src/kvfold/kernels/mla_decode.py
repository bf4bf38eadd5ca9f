"""MLA decode over the paged latent cache: any lengths, any head count, one to a few query rows a sequence.

Owns the launches of one decode attention and their buffers. A tile of 64 latent rows is read once for all heads and
serves twice: 576 numbers as keys, the first 512 of them as values. Which part of the grid reads which tiles is
mla_schedule.py's; a sequence that several parts read is merged by its log-sum-exps in a second launch.

The kernel of this file is plain Triton: right on any GPU from sm_80 on and in Triton's CPU interpreter, and the judge of
the Hopper kernels in mla_decode_gluon.py and mla_decode_fp8_gluon.py, which `mla_decode` takes where they apply.

Every exponential is a power of two: scores carry scale * log2(e), and log-sum-exps are in base 2.
"""

from __future__ import annotations

from typing import Literal

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kvfold.kernels.cached_blocks import Blocks, load_bfloat16, load_coded
from kvfold.kernels.mla_schedule import (
    BATCH_BLOCK,
    EVEN_SHARE,
    FEW_ROWS,
    MIN_TILES,
    MOST_SPLITS,
    SEQUENCE_COST,
    TILE_TOKENS,
    part_bounds,
    schedule_kernel,
    stretch,
)
from kvfold.kernels.online_softmax import LOG2_E, NO_SCORE

Form = Literal["triton", "gluon"]
GLUON_BLOCKS: tuple[Blocks | None, ...] = (None, "fp8")  # pools that the Hopper kernels read

COMBINE_PROGRAMS = 1056  # 8 on each of 132 multiprocessors: one wave
MANY_COMBINED_ROWS = 128  # of a batch, from which on a row's partials are added one by one
ROW_PROGRAMS = 2112  # that then share its rows: 16 on each of 132 multiprocessors, one wave
INTERPRETER_PARTS = 5  # parts without a GPU: few programs, and splits at odd places


class DecodeWorkspace:
    """Buffers of one captured graph, shared by its layers: the step's tile schedule and partial results.

    Its shape fixes the grid: `batch` sequences of `rows_per_sequence` query rows. Lengths are free.
    """

    def __init__(
        self, batch: int, rows_per_sequence: int, num_heads: int, kv_lora: int, device: torch.device | str,
        num_parts: int | None = None, beside: DecodeWorkspace | None = None,
    ) -> None:  # fmt: skip
        """`num_parts`: programs along the keys; None deals one to each multiprocessor and block of query rows. `beside`: of as many
        rows a sequence, for another batch; partial results lie where it has them, so launches of the two follow one another."""
        device = torch.device(device)
        self.batch = batch
        self.rows_per_sequence = rows_per_sequence
        self.num_heads = num_heads
        self.kv_lora = kv_lora
        rows = rows_per_sequence * num_heads
        self.row_block = min(max(triton.next_power_of_2(rows), 16), 64)
        if num_parts is None:
            num_parts = INTERPRETER_PARTS
            if device.type == "cuda":
                multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
                num_parts = max(multiprocessors // triton.cdiv(rows, self.row_block), 1)
        self.num_parts = num_parts
        self.part_starts = torch.empty((num_parts + 1, 2), dtype=torch.int32, device=device)
        self.splits = torch.empty((batch, 2), dtype=torch.int32, device=device)
        # 132 parts * 2 slots * 16 rows * 512 * 4 B = 8.7 MB; at most 35 MB, when rows fill blocks of 64
        self.partial: torch.Tensor
        self.partial_lse: torch.Tensor
        if beside is None:
            self.partial = torch.empty((num_parts * 2, rows, kv_lora), dtype=torch.float32, device=device)
            self.partial_lse = torch.empty((num_parts * 2, rows), dtype=torch.float32, device=device)
        else:
            self.partial, self.partial_lse = beside.partial, beside.partial_lse

    @property
    def half_partial(self) -> torch.Tensor:
        """The first half of `partial` as float16 [2 * parts, rows, kv_lora], each row times a number of partial_scale."""
        return self.partial.view(-1)[: self.partial.numel() // 2].view(torch.float16).view(self.partial.shape)

    @property
    def partial_scale(self) -> torch.Tensor:
        """float32 [2 * parts, rows] behind half_partial."""
        first = self.partial.numel() // 2
        return self.partial.view(-1)[first : first + self.partial_lse.numel()].view(self.partial_lse.shape)


def schedule_decode(kv_lens: torch.Tensor, workspace: DecodeWorkspace) -> None:
    """Once a step, before its layers: deals the tiles of kv_lens int32 [B] to the workspace's parts, on the device. Another launch
    has to come between it and `mla_decode`, which reads the schedule before it waits for the launch before."""
    schedule_kernel[(1,)](
        kv_lens,
        workspace.part_starts,
        workspace.splits,
        workspace.batch,
        workspace.num_parts,
        SEQUENCE_COST=SEQUENCE_COST,
        EVEN_SHARE=EVEN_SHARE,
        MIN_TILES=MIN_TILES,
        MOST_SPLITS=MOST_SPLITS,
        IS_FEW=workspace.row_block <= FEW_ROWS,
        BATCH_BLOCK=BATCH_BLOCK,
        PART_BLOCK=triton.next_power_of_2(workspace.num_parts + 1),
        num_warps=8,
    )


def mla_decode(
    q: torch.Tensor,  # [B * s_q, H, latent]      rows of a sequence are neighbours
    pool: torch.Tensor,  # [num_pages, 64, latent]   one layer; rows [c_kv | k_rope], or bytes of `blocks`
    pages: torch.Tensor,  # int32 [..]
    page_starts: torch.Tensor,  # int32 [B + 1]
    kv_lens: torch.Tensor,  # int32 [B]  row i of s_q sees kv_len - s_q + 1 + i keys
    out: torch.Tensor,  # [B * s_q, H, kv_lora]     written whole
    workspace: DecodeWorkspace,
    *,
    scale: float,
    kv_lora: int,
    blocks: Blocks | None = None,
    form: Form | None = None,
    merges: bool = True,
) -> None:
    """Softmax attention of every query row over its sequence's latents: [B * s_q, H, kv_lora] into `out`.

    merges: False leaves sequences that several parts read in the workspace, for merged_unfold.py.

    Queries and the weights of values are rounded to the type of `out`; cached rows are converted to it; sums are
    float32. A row that sees no key (kv_len 0: padding) gets zeros. `blocks` is the format of a pool of bytes
    (kernels/cached_blocks.py). `form` forces a kernel; ValueError where it cannot read such a pool.
    """
    hopper = q.is_cuda and torch.cuda.get_device_capability(q.device) == (9, 0)
    missing = _gluon_lacks(q, pool, out, workspace, blocks)
    if form == "gluon" and missing:
        raise ValueError(f"form=gluon: {missing}: leave form out, or use form=triton.")
    if form is None:
        form = "gluon" if hopper and not missing else "triton"
    # Names of Triton's experimental room, which move, are imported where they are needed.
    halves = False
    if form == "gluon" and blocks is not None:
        from kvfold.kernels import mla_decode_fp8_gluon

        mla_decode_fp8_gluon.launch(q, pool, pages, page_starts, kv_lens, out, workspace, scale * LOG2_E, hopper)
    elif form == "gluon":
        from kvfold.kernels import mla_decode_gluon

        halves = merges and workspace.row_block > FEW_ROWS
        mla_decode_gluon.launch(
            q, pool, pages, page_starts, kv_lens, out, workspace, scale * LOG2_E, hopper, halves
        )
    else:
        _launch_triton(q, pool, pages, page_starts, kv_lens, out, workspace, scale * LOG2_E, hopper, blocks)
    if merges:
        combine(out, workspace, hopper, halves)


def _gluon_lacks(
    q: torch.Tensor, pool: torch.Tensor, out: torch.Tensor, workspace: DecodeWorkspace, blocks: Blocks | None
) -> str:
    """What of these the Hopper kernels cannot read or write, in words; empty where they serve."""
    if not (q.is_contiguous() and pool.is_contiguous() and out.is_contiguous()):
        return "required are strided tensors, supported are contiguous ones"
    if (workspace.kv_lora, q.shape[-1]) != (512, 576):
        return f"required are {workspace.kv_lora} of {q.shape[-1]} numbers a row, supported are 512 of 576"
    if blocks is None:
        if q.dtype == pool.dtype == out.dtype and q.dtype in (torch.bfloat16, torch.float16):
            return ""
        return f"required are queries in {q.dtype}, latents in {pool.dtype}, results in {out.dtype}, supported is one 16-bit type"
    if blocks not in GLUON_BLOCKS:
        return f"required is a pool of {blocks}, supported are bfloat16, float16 and fp8, missing is {blocks}"
    if not (q.dtype == out.dtype == torch.bfloat16):
        return f"required are queries in {q.dtype} over fp8, supported is bfloat16"
    return ""


def shared_memory_bytes(x: torch.Tensor) -> int:
    """What a program may have on x's device; without a GPU whatever it asks for."""
    if not x.is_cuda:
        return 1 << 20
    properties = triton.runtime.driver.active.utils.get_device_properties(x.device.index)
    return int(properties["max_shared_mem"])


def _launch_triton(
    q: torch.Tensor, pool: torch.Tensor, pages: torch.Tensor, page_starts: torch.Tensor, kv_lens: torch.Tensor,
    out: torch.Tensor, workspace: DecodeWorkspace, scale_log2: float, pdl: bool,
    blocks: Blocks | None,
) -> None:  # fmt: skip
    rows = workspace.rows_per_sequence * workspace.num_heads
    latent, kv_lora = q.shape[-1], workspace.kv_lora
    block_lora = max(triton.next_power_of_2(kv_lora), 16)
    block_rope = max(triton.next_power_of_2(latent - kv_lora), 16)
    # Queries and one tile of keys wait in shared memory: 110 KB for 64 rows and 32 keys of 576 16-bit numbers, 55 KB for
    # 16 and 32. A card of sm_90 has 227 KB, sm_80 163 KB, sm_86 and sm_89 99 KB.
    # Latents of another type pass through it as they are cached, too.
    number_bytes = out.element_size() + (pool.element_size() if pool.element_size() > out.element_size() else 0)
    shared_bytes = shared_memory_bytes(q)
    block_rows, block_keys = max(workspace.row_block, 16), TILE_TOKENS
    while block_keys > 16 and (block_rows + block_keys) * (block_lora + block_rope) * number_bytes > shared_bytes:
        block_rows, block_keys = max(block_rows // 2, 16), block_keys // 2
    _decode_kernel[(triton.cdiv(rows, block_rows), workspace.num_parts)](
        q, pool, pages, page_starts, kv_lens, workspace.part_starts, out, workspace.partial, workspace.partial_lse,
        scale_log2, rows, q.stride(0), q.stride(1), pool.stride(0), pool.stride(1), out.stride(0), out.stride(1),
        S_Q=workspace.rows_per_sequence,
        HEADS=workspace.num_heads,
        KV_LORA=kv_lora,
        ROPE=latent - kv_lora,
        BLOCK_ROWS=block_rows,
        BLOCK_KEYS=block_keys,
        BLOCK_LORA=block_lora,
        BLOCK_ROPE=block_rope,
        TILE=TILE_TOKENS,
        BLOCKS=blocks,
        PDL=pdl,
        num_warps=8 if block_rows > 32 or blocks else 4,
        num_stages=1,
        **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip


def combine(out: torch.Tensor, workspace: DecodeWorkspace, pdl: bool, halves: bool = False) -> None:
    """Merges the partials of the sequences that were cut, those of 16 bits if `halves`.

    Many rows share one wave of programs, whatever sequence they belong to, so that those of the one long sequence of a batch are
    not one program's. A program orders some partials of a row together and adds them one by one, some 30 instructions a warp and
    partial: 11 where there are many, which is 6, 3 and 2 times for the 66, 33 and 22 of 128 heads at batch 1 to 3, else 4.
    Partials side by side take four times the instructions.

    Of few rows nothing waits long but for memory, so a program loads several partials of them together: as many as an even
    batch has per sequence, some 4096 numbers. A large batch has few or none, and programs that take several rows, since most end
    at once. Up to 16 partials, rows are whole, and so they are with more of 16 bits, 16 at a time, where that makes 128 programs.
    """
    rows = workspace.rows_per_sequence * workspace.num_heads
    likely_splits = workspace.num_parts // workspace.batch
    common = (
        workspace.splits, workspace.half_partial if halves else workspace.partial, workspace.partial_lse,
        workspace.partial_scale, out, rows, out.stride(0), out.stride(1),
    )  # fmt: skip
    sizes = {
        "S_Q": workspace.rows_per_sequence,
        "HEADS": workspace.num_heads,
        "KV_LORA": workspace.kv_lora,
        "PDL": pdl,
    }
    if pdl:
        sizes["launch_pdl"] = True
    num_rows = workspace.batch * rows
    if workspace.row_block > FEW_ROWS and num_rows >= MANY_COMBINED_ROWS:
        programs = min(num_rows, ROW_PROGRAMS)
        _combine_rows_kernel[(programs,)](
            *common,
            num_rows,
            BLOCK_COLUMNS=triton.next_power_of_2(workspace.kv_lora),
            AT_ONCE=11 if likely_splits > 4 else 4,
            TURNS=triton.next_power_of_2(triton.cdiv(num_rows, programs)),
            num_warps=2,
            **sizes,
        )
        return
    block_splits = min(max(triton.next_power_of_2(likely_splits), 4), MOST_SPLITS)
    block_columns = triton.next_power_of_2(workspace.kv_lora)
    if block_splits > 16 and halves:
        while block_columns > 128 and workspace.batch * rows * workspace.kv_lora < 128 * block_columns:
            block_columns //= 2
        block_splits = min(8192 // block_columns, MOST_SPLITS)
    elif block_splits > 16:
        block_columns = min(block_columns, 4096 // block_splits)
    block_rows = max(4096 // (block_splits * block_columns), 1)
    column_blocks = triton.cdiv(workspace.kv_lora, block_columns)
    turns = max(workspace.batch * triton.cdiv(rows, block_rows) * column_blocks // COMBINE_PROGRAMS, 1)
    grid = (workspace.batch, triton.cdiv(rows, block_rows * turns), column_blocks)
    _combine_kernel[grid](
        *common,
        turns,
        BLOCK_ROWS=block_rows,
        BLOCK_COLUMNS=block_columns,
        BLOCK_SPLITS=block_splits,
        num_warps=4,
        **sizes,
    )


@triton.jit
def _load_latents(
    row, held, KV_LORA: tl.constexpr, ROPE: tl.constexpr, BLOCK_LORA: tl.constexpr, BLOCK_ROPE: tl.constexpr,
    NUMBER: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """c_kv [K, BLOCK_LORA] and k_rope [K, BLOCK_ROPE] of the rows at pointers `row` [K], as numbers of the compute type;
    zeros where a row is not held."""
    rope = tl.arange(0, BLOCK_ROPE)[None, :]
    rope_held = held[:, None] & (rope < ROPE)
    if BLOCKS == "fp8":
        c_kv = load_coded(row, held, 0, KV_LORA, BLOCK_LORA, NUMBER, True)
        k_rope = load_bfloat16(row[:, None] + KV_LORA + KV_LORA // 32 + 2 * rope, rope_held).to(NUMBER)
    elif BLOCKS == "q8_0":
        c_kv = load_coded(row, held, 0, KV_LORA, BLOCK_LORA, NUMBER, False)
        k_rope = load_coded(row, held, KV_LORA, KV_LORA + ROPE, BLOCK_ROPE, NUMBER, False)
    else:
        lora = tl.arange(0, BLOCK_LORA)[None, :]
        c_kv = tl.load(row[:, None] + lora, mask=held[:, None] & (lora < KV_LORA), other=0)
        k_rope = tl.load(row[:, None] + KV_LORA + rope, mask=rope_held, other=0)
        if c_kv.dtype != NUMBER:
            c_kv = c_kv.to(tl.float32).to(NUMBER)
            k_rope = k_rope.to(tl.float32).to(NUMBER)
    return c_kv, k_rope


@triton.jit
def _decode_kernel(
    q, pool, pages, page_starts, kv_lens, part_starts,
    out,
    partial,  # float32 [2 * parts, rows, KV_LORA]
    partial_lse,  # float32 [2 * parts, rows], base 2
    scale_log2,
    rows,  # S_Q * HEADS
    q_stride, q_head_stride, page_stride, slot_stride, out_stride, out_head_stride,
    S_Q: tl.constexpr, HEADS: tl.constexpr, KV_LORA: tl.constexpr, ROPE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr, BLOCK_LORA: tl.constexpr, BLOCK_ROPE: tl.constexpr,
    TILE: tl.constexpr, BLOCKS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (row block, part): the part's tiles of every sequence it crosses, for BLOCK_ROWS (row, head) pairs."""
    if PDL:
        gdc_wait()
    part = tl.program_id(1)
    first_sequence, first_tile, end_sequence, end_tile = part_bounds(part_starts, part)
    dtype = out.dtype.element_ty

    r = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    real_row = (r < rows)[:, None]
    lora = tl.arange(0, BLOCK_LORA)
    rope = tl.arange(0, BLOCK_ROPE)
    key = tl.arange(0, BLOCK_KEYS)

    for step in range(0, end_sequence + (end_tile > 0).to(tl.int32) - first_sequence):
        sequence, kv_len, lo, hi, num_tiles = stretch(
            kv_lens, first_sequence, first_tile, end_sequence, end_tile, step, TILE
        )
        page_list = pages + tl.load(page_starts + sequence)

        row = sequence.to(tl.int64) * S_Q + r // HEADS
        q_row = (q + row * q_stride + (r % HEADS) * q_head_stride)[:, None]
        q_lora = tl.load(q_row + lora[None, :], mask=real_row & (lora < KV_LORA)[None, :], other=0).to(tl.float32)
        q_rope = tl.load(q_row + KV_LORA + rope[None, :], mask=real_row & (rope < ROPE)[None, :], other=0)
        q_lora = q_lora.to(dtype)
        q_rope = q_rope.to(tl.float32).to(dtype)
        sees = kv_len - S_Q + 1 + r // HEADS  # keys of each row

        highest = tl.full([BLOCK_ROWS], NO_SCORE, tl.float32)
        weight = tl.zeros([BLOCK_ROWS], tl.float32)
        values = tl.zeros([BLOCK_ROWS, BLOCK_LORA], tl.float32)
        for start in range(lo * TILE, tl.minimum(hi * TILE, kv_len), BLOCK_KEYS):
            page = tl.load(page_list + start // TILE).to(tl.int64)
            in_length = start + key < kv_len  # unused slots may hold NaN: a zero weight would keep it
            latent_row = pool + page * page_stride + (start % TILE + key) * slot_stride
            c_kv, k_rope = _load_latents(
                latent_row, in_length, KV_LORA, ROPE, BLOCK_LORA, BLOCK_ROPE, NUMBER=dtype, BLOCKS=BLOCKS
            )

            score = tl.dot(q_lora, tl.trans(c_kv), input_precision="ieee")
            score = tl.dot(q_rope, tl.trans(k_rope), score, input_precision="ieee")
            visible = (start + key)[None, :] < sees[:, None]
            score = tl.where(visible, score * scale_log2, float("-inf"))
            higher = tl.maximum(highest, tl.max(score, 1))
            p = tl.exp2(score - higher[:, None])
            shrink = tl.exp2(highest - higher)
            weight = weight * shrink + tl.sum(p, 1)
            values = tl.dot(p.to(dtype), c_kv, values * shrink[:, None], input_precision="ieee")
            highest = higher

        some = weight > 0
        values = values / tl.where(some, weight, 1.0)[:, None]
        kept = real_row & (lora < KV_LORA)[None, :]
        if (lo == 0) & (hi == num_tiles):
            out_row = (out + row * out_stride + (r % HEADS) * out_head_stride)[:, None]
            tl.store(out_row + lora[None, :], values.to(dtype), mask=kept)
        else:
            slot_row = (2 * part + (lo == 0).to(tl.int32)).to(tl.int64) * rows + r
            tl.store(partial + slot_row[:, None] * KV_LORA + lora[None, :], values, mask=kept)
            lse = tl.where(some, highest + tl.log2(tl.where(some, weight, 1.0)), float("-inf"))
            tl.store(partial_lse + slot_row, lse, mask=r < rows)
    if PDL:
        gdc_launch_dependents()


@triton.jit
def _combine_kernel(
    splits, partial, partial_lse, partial_scale, out, rows, out_stride, out_head_stride, turns,
    S_Q: tl.constexpr, HEADS: tl.constexpr, KV_LORA: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_SPLITS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (sequence, `turns` blocks of rows, columns): merges the partial results of a sequence that was cut."""
    sequence = tl.program_id(0)
    if PDL:
        gdc_launch_dependents()
    first_part = tl.load(splits + 2 * sequence)  # the schedule is older than the launch before
    num_splits = tl.load(splits + 2 * sequence + 1)
    if PDL:
        gdc_wait()
    if num_splits > 1:
        lane = tl.arange(0, BLOCK_SPLITS)[:, None, None]
        column = tl.program_id(2) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)[None, None, :]
        for turn in range(0, turns):
            r = (tl.program_id(1) * turns + turn) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[None, :, None]
            highest = tl.full([1, BLOCK_ROWS, 1], NO_SCORE, tl.float32)
            weight = tl.zeros([1, BLOCK_ROWS, 1], tl.float32)
            values = tl.zeros([1, BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
            for start in range(0, num_splits, BLOCK_SPLITS):
                split = start + lane
                slot_row = (2 * (first_part + split) + (split == 0).to(tl.int32)).to(tl.int64) * rows + r
                real = (split < num_splits) & (r < rows)
                lse = tl.load(partial_lse + slot_row, mask=real, other=float("-inf"))
                part = tl.load(partial + slot_row * KV_LORA + column, mask=real & (column < KV_LORA), other=0).to(
                    tl.float32
                )
                higher = tl.maximum(highest, tl.max(lse, 0, keep_dims=True))
                share = tl.exp2(lse - higher)
                shrink = tl.exp2(highest - higher)
                weight = weight * shrink + tl.sum(share, 0, keep_dims=True)
                if partial.dtype.element_ty == tl.float16:
                    share *= tl.load(partial_scale + slot_row, mask=real, other=0.0)
                values = values * shrink + tl.sum(part * share, 0, keep_dims=True)
                highest = higher
            values = values / tl.where(weight > 0, weight, 1.0)
            row = sequence.to(tl.int64) * S_Q + r // HEADS
            out_row = out + row * out_stride + (r % HEADS) * out_head_stride
            tl.store(out_row + column, values.to(out.dtype.element_ty), mask=(r < rows) & (column < KV_LORA))


@triton.jit
def _with_partials(
    highest, weight, values, start, num_splits, first_slot_row, rows, column, partial, partial_lse, partial_scale,
    KV_LORA: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """A row's highest log-sum-exp, sum of weights and values [columns], relative to it, with its partials start .. start + AT_ONCE."""
    parts, lses, scales = (), (), ()
    for i in tl.static_range(AT_ONCE):
        split = start + i
        real = split < num_splits
        slot_row = first_slot_row + (2 * split + (split == 0).to(tl.int32)) * rows
        at = slot_row.to(tl.int64) * KV_LORA + column
        parts += (tl.load(partial + at, mask=real & (column < KV_LORA), other=0),)  # type: ignore[assignment]
        lses += (tl.load(partial_lse + slot_row, mask=real, other=float("-inf")),)  # type: ignore[assignment]
        if partial.dtype.element_ty == tl.float16:
            scales += (tl.load(partial_scale + slot_row, mask=real, other=0.0),)  # type: ignore[assignment]
    higher = highest
    for i in tl.static_range(AT_ONCE):
        higher = tl.maximum(higher, lses[i])
    shrink = tl.exp2(highest - higher)
    weight *= shrink
    values *= shrink
    for i in tl.static_range(AT_ONCE):
        share = tl.exp2(lses[i] - higher)
        weight += share
        if partial.dtype.element_ty == tl.float16:
            share *= scales[i]
        values += parts[i].to(tl.float32) * share
    return higher, weight, values


@triton.jit
def _combine_rows_kernel(
    splits, partial, partial_lse, partial_scale, out, rows, out_stride, out_head_stride, num_rows,
    S_Q: tl.constexpr, HEADS: tl.constexpr, KV_LORA: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    AT_ONCE: tl.constexpr,  # partials of a row, all ordered before the first one is waited for
    TURNS: tl.constexpr,  # a power of two, rows of a program or more
    PDL: tl.constexpr,
):  # fmt: skip
    """Program p of P: merges rows p, p + P, .. of all of the batch, where their sequence was cut."""
    if PDL:
        gdc_launch_dependents()
    first_row = tl.program_id(0)
    num_programs = tl.num_programs(0)
    own = first_row + num_programs * tl.arange(0, TURNS)
    most_splits = tl.max(tl.load(splits + 2 * (own // rows) + 1, mask=own < num_rows, other=1), 0)
    if PDL:
        gdc_wait()  # the schedule is older than the launch before
    if most_splits > 1:
        column = tl.arange(0, BLOCK_COLUMNS)
        for row in range(first_row, num_rows, num_programs):
            sequence = row // rows
            first_part = tl.load(splits + 2 * sequence)
            num_splits = tl.load(splits + 2 * sequence + 1)
            if num_splits > 1:
                r = row % rows
                highest = tl.full([], NO_SCORE, tl.float32)
                weight = tl.full([], 0, tl.float32)
                values = tl.zeros([BLOCK_COLUMNS], tl.float32)
                for start in range(0, num_splits, AT_ONCE):
                    highest, weight, values = _with_partials(
                        highest, weight, values, start, num_splits, 2 * first_part * rows + r, rows, column,
                        partial, partial_lse, partial_scale, KV_LORA, AT_ONCE,
                    )  # fmt: skip
                merged = values / tl.where(weight > 0, weight, 1.0)
                token = sequence.to(tl.int64) * S_Q + r // HEADS
                out_row = out + token * out_stride + (r % HEADS) * out_head_stride
                tl.store(out_row + column, merged.to(out.dtype.element_ty), mask=column < KV_LORA)
