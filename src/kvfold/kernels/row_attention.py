"""Attention of one generated row over a short context, from its projections to its heads' values, in one launch.

Owns what three launches do elsewhere: folding W_UK into the query beside the norm, the rotation and the append of the new
latent; attention; W_UV. At 128 keys those take 12 us a layer of V2-Lite on an H200 and read 4 MB, which is 1 us: latency
between launches. Here program (block of 64 columns of a latent row, head) has its columns of W_UK, W_UV and of the cached
rows in registers before q is there, and the programs of a head tell each other what is left in two exchanges:

    its columns of q_latent, their part of every score  -- scores -->  softmax, its columns' values, their share of v
                                                         -- shares -->  its features of v, summed

Each head reads the cache for itself, so more than MOST_KEYS keys are mla_decode.py's: at 1000 they took 16 us more.

An exchange is words of 8 bytes, a number and the turn of the launch it is of. So a word says itself that it has come, and
costs a store and a load through L2 where a barrier costs two of each. Whoever waits for words needs the others to be there,
too: no more programs than multiprocessors, and two of them fit one, so that launches of two streams cannot keep each other
waiting. Without a GPU, in the interpreter, each stage is a launch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvfold.kernels.online_softmax import LOG2_E
from kvfold.kernels.overlap import let_next_start, overlaps, wait_for_inputs
from kvfold.kernels.rows import LatentRow

MOST_KEYS = 256  # all of them are held before the wait
COLUMNS = 64  # of a latent row in one program, in pairs: 8 programs a head for 512
PAGE_TOKENS = tl.constexpr(64)
TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
WARPS = 4  # of up to 255 registers a thread, so that two programs fit a multiprocessor; 8 took 12 us more a step of V2-Lite
STAGES = 3


@triton.jit
def _send(words, numbers, turn, mask):
    word = (turn.to(tl.int64) << 32) | (numbers.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF)
    tl.store(words, word, mask=mask)


@triton.jit
def _missing(word, turn, mask):
    return tl.max(tl.max((mask & ((word >> 32).to(tl.int32) != turn)).to(tl.int32), 1), 0)


@triton.jit
def _receive(words, turn, mask):
    """Numbers [A, B] at words, once all are of this turn; zeros where masked. At least as many as threads: a word that two
    threads read may have come for one of them alone, and Triton asks only one."""
    word = tl.load(words, mask=mask, other=0, volatile=True)
    while _missing(word, turn, mask) > 0:
        word = tl.load(words, mask=mask, other=0, volatile=True)
    return tl.where(mask, word.to(tl.int32).to(tl.float32, bitcast=True), 0.0)


@triton.jit
def _even(pairs, NUMBER: tl.constexpr):
    return pairs.to(tl.int16).to(NUMBER, bitcast=True).to(tl.float32)


@triton.jit
def _odd(pairs, NUMBER: tl.constexpr):
    return (pairs >> 16).to(tl.int16).to(NUMBER, bitcast=True).to(tl.float32)


@triton.jit
def _sums(pairs, factors, NUMBER: tl.constexpr):
    """Of pairs [A, B] times factors [A]: [B] each."""
    even = tl.sum(_even(pairs, NUMBER) * factors[:, None], 0)
    return even, tl.sum(_odd(pairs, NUMBER) * factors[:, None], 0)


@triton.jit
def _dot(pairs, even, odd, NUMBER: tl.constexpr):
    """[A] of pairs [A, B] and numbers [B]."""
    return tl.sum(_even(pairs, NUMBER) * even[None, :] + _odd(pairs, NUMBER) * odd[None, :], 1)


@triton.jit
def _paired(even, odd, NUMBER: tl.constexpr):
    low = even.to(NUMBER).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return low | (odd.to(NUMBER).to(tl.int16, bitcast=True).to(tl.int32) << 16)


@triton.jit
def _rotated(x, pair, position, cos, sin, ROPE: tl.constexpr, IS_HALF_SPLIT: tl.constexpr):
    """Numbers 2 * pair and 2 * pair + 1 of the ROPE at x, rotated by the angles of this position."""
    is_there = pair < ROPE // 2
    even, odd = 2 * pair, 2 * pair + 1
    angles = position.to(tl.int64) * (ROPE // 2)
    a = tl.load(x + even, mask=is_there, other=0.0).to(tl.float32)
    b = tl.load(x + odd, mask=is_there, other=0.0).to(tl.float32)
    if IS_HALF_SPLIT:
        half: tl.constexpr = ROPE // 2
        to_even = tl.load(x + (even + half) % ROPE, mask=is_there, other=0.0).to(tl.float32)
        to_odd = tl.load(x + (odd + half) % ROPE, mask=is_there, other=0.0).to(tl.float32)
        cos_even = tl.load(cos + angles + even % half, mask=is_there, other=0.0)
        sin_even = tl.load(sin + angles + even % half, mask=is_there, other=0.0)
        cos_odd = tl.load(cos + angles + odd % half, mask=is_there, other=0.0)
        sin_odd = tl.load(sin + angles + odd % half, mask=is_there, other=0.0)
        even_turned = a * cos_even + tl.where(even >= half, to_even, -to_even) * sin_even
        odd_turned = b * cos_odd + tl.where(odd >= half, to_odd, -to_odd) * sin_odd
    else:
        c = tl.load(cos + angles + pair, mask=is_there, other=0.0)
        s = tl.load(sin + angles + pair, mask=is_there, other=0.0)
        even_turned, odd_turned = a * c - b * s, b * c + a * s
    return even_turned, odd_turned


@triton.jit
def _row_attention(
    q, kv_a, norm, eps, w_uk, w_uv, positions, slots, cos, sin, pool, pages, page_starts, kv_lens,
    scores, shares, turns, out, scale_log2, kv_lora, v_dim,
    FIRST: tl.constexpr, LAST: tl.constexpr, NUMBER: tl.constexpr, CACHED: tl.constexpr, NOPE: tl.constexpr, ROPE: tl.constexpr,
    IS_HALF_SPLIT: tl.constexpr, NOPE_PADDED: tl.constexpr, LORA_PADDED: tl.constexpr, V_PADDED: tl.constexpr,
    BLOCKS: tl.constexpr, BLOCKS_PADDED: tl.constexpr, ROPE_PAIRS: tl.constexpr, FEATURES: tl.constexpr,
    LANES: tl.constexpr, PAIRS: tl.constexpr, KEYS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Program (block of columns, head): stages FIRST to LAST of scores, shares, features.

    w_uk, w_uv and pool are int32, pairs of NUMBER and of CACHED. The row's own latent is not in the cache before the first
    stage ends, so that one takes it from kv_a, rounded as the cache has it.
    """
    if EARLY:
        let_next_start()
    block, head = tl.program_id(0), tl.program_id(1)
    pair = block * PAIRS + tl.arange(0, PAIRS)  # of its columns
    is_pair = pair < kv_lora // 2
    turned = block * ROPE_PAIRS + tl.arange(0, ROPE_PAIRS)  # of its rotated columns, which are keys and no values
    is_turned = turned < ROPE // 2
    latent_pairs = (kv_lora + ROPE) // 2
    k = tl.arange(0, NOPE_PADDED)
    f = tl.arange(0, V_PADDED)
    key = tl.arange(0, KEYS)
    kv_len = tl.load(kv_lens)
    newest = kv_len - 1
    if FIRST <= 1:
        end = newest if FIRST == 0 else kv_len
        page = tl.load(pages + tl.load(page_starts) + key // PAGE_TOKENS, mask=key < end, other=0).to(tl.int64)
        # Two products: Triton 3.6 takes a page's slots, added to its first, for multiples of 64, as the first one is, and then
        # loads 16 bytes where rows of 216 begin at any multiple of 8.
        row = pool + page * (PAGE_TOKENS * latent_pairs) + key % PAGE_TOKENS * latent_pairs
        held = tl.load(row[:, None] + pair[None, :], mask=(key < end)[:, None] & is_pair[None, :], other=0)
    if FIRST == 0:
        mask = (key < end)[:, None] & is_turned[None, :]
        held_turned = tl.load(row[:, None] + kv_lora // 2 + turned[None, :], mask=mask, other=0)
        at = (head.to(tl.int64) * NOPE + k)[:, None] * (kv_lora // 2) + pair[None, :]
        uk = tl.load(w_uk + at, mask=(k < NOPE)[:, None] & is_pair[None, :], other=0)
        even_weight = tl.load(norm + 2 * pair, mask=is_pair, other=0.0)
        odd_weight = tl.load(norm + 2 * pair + 1, mask=is_pair, other=0.0)
        position = tl.load(positions)
        slot = tl.load(slots)
    if FIRST <= 1 and LAST >= 1:
        at = (head.to(tl.int64) * v_dim + f)[:, None] * (kv_lora // 2) + pair[None, :]
        uv = tl.load(w_uv + at, mask=(f < v_dim)[:, None] & is_pair[None, :], other=0)
    if EARLY:
        wait_for_inputs()
    me = head * BLOCKS + block
    turn = tl.load(turns + me) + 1

    words = scores + head * BLOCKS * KEYS
    if FIRST == 0:
        row_q = q + head * (NOPE + ROPE)
        x = tl.load(row_q + k, mask=k < NOPE, other=0.0).to(tl.float32)
        j = tl.arange(0, LORA_PADDED)
        c_kv = tl.load(kv_a + j, mask=j < kv_lora, other=0.0).to(tl.float32)
        even_new = tl.load(kv_a + 2 * pair, mask=is_pair, other=0.0).to(tl.float32)
        odd_new = tl.load(kv_a + 2 * pair + 1, mask=is_pair, other=0.0).to(tl.float32)
        even_turned, odd_turned = _rotated(row_q + NOPE, turned, position, cos, sin, ROPE, IS_HALF_SPLIT)
        even_key, odd_key = _rotated(kv_a + kv_lora, turned, position, cos, sin, ROPE, IS_HALF_SPLIT)
        even_mine, odd_mine = _sums(uk, x, NUMBER)
        over_rms = tl.rsqrt(tl.sum(c_kv * c_kv, 0) / kv_lora + eps)
        new = _paired(even_new * over_rms * even_weight, odd_new * over_rms * odd_weight, CACHED)
        new_turned = _paired(even_key, odd_key, CACHED)
        if head == 0:
            tl.store(pool + slot * latent_pairs + pair, new, mask=is_pair & (slot >= 0))
            tl.store(pool + slot * latent_pairs + kv_lora // 2 + turned, new_turned, mask=is_turned & (slot >= 0))
        is_newest = (key == newest)[:, None]
        held = tl.where(is_newest, new[None, :], held)
        held_turned = tl.where(is_newest, new_turned[None, :], held_turned)
        s = _dot(held, even_mine, odd_mine, CACHED) + _dot(held_turned, even_turned, odd_turned, CACHED)
        _send(words + block * KEYS + key, s, turn, key < kv_len)
    b = tl.arange(0, BLOCKS_PADDED)
    is_block = (b < BLOCKS)[:, None]
    share_words = shares + head * BLOCKS * v_dim
    if FIRST <= 1 and LAST >= 1:
        mask = is_block & (key < kv_len)[None, :]
        s = tl.sum(_receive(words + b[:, None] * KEYS + key[None, :], turn, mask), 0) * scale_log2
        s = tl.where(key < kv_len, s, float("-inf"))
        p = tl.exp2(s - tl.max(s, 0))
        even_values, odd_values = _sums(held, p / tl.sum(p, 0), CACHED)
        y = _dot(uv, even_values, odd_values, NUMBER)
        _send(share_words + block * v_dim + f, y, turn, f < v_dim)
    if LAST == 2:
        i = tl.arange(0, LANES)
        feature = block * FEATURES + i
        is_mine = (i < FEATURES) & (feature < v_dim)
        mask = is_block & is_mine[None, :]
        y = tl.sum(_receive(share_words + b[:, None] * v_dim + feature[None, :], turn, mask), 0)
        tl.store(out + head * v_dim + feature, y, mask=is_mine)
        tl.store(turns + me, turn)


class Exchange:
    """Words of launches that run one after another: a model has one.

    scores int64 [H, blocks, MOST_KEYS]; shares int64 [H, blocks, v]; turns int32 [H, blocks], of each program
    """

    def __init__(self, num_heads: int, kv_lora: int, v_dim: int, device: torch.device | str) -> None:
        blocks = triton.cdiv(kv_lora, COLUMNS)
        self.scores = torch.zeros(num_heads, blocks, MOST_KEYS, dtype=torch.int64, device=device)
        self.shares = torch.zeros(num_heads, blocks, v_dim, dtype=torch.int64, device=device)
        self.turns = torch.zeros(num_heads, blocks, dtype=torch.int32, device=device)


def serves(num_rows: int, num_heads: int, kv_lora: int, dtype: torch.dtype, pool: Tensor) -> bool:
    """One row of pairs of 16-bit numbers, all of whose programs fit the device at once."""
    if num_rows != 1 or kv_lora % 2 or dtype not in TYPES or pool.dtype not in TYPES:
        return False
    programs = triton.cdiv(kv_lora, COLUMNS) * num_heads
    return not pool.is_cuda or programs <= torch.cuda.get_device_properties(pool.device).multi_processor_count


def attend(
    q: Tensor,
    new: LatentRow,
    w_uk: Tensor,
    w_uv: Tensor,
    pages: Tensor,
    page_starts: Tensor,
    kv_lens: Tensor,
    out: Tensor,
    exchange: Exchange,
    *,
    scale: float,
) -> None:
    """Appends the row's latent and writes out [1, H * v]: softmax attention of q [1, H * (nope + rope)], not yet rotated,
    over the kv_lens[0] <= MOST_KEYS latents of its sequence, this one included. w_uk [H, nope, kv_lora] and w_uv
    [H, v, kv_lora] contiguous."""
    num_heads, nope, kv_lora = w_uk.shape
    v_dim, rope = w_uv.shape[1], 2 * new.cos.shape[1]
    blocks, padded = triton.cdiv(kv_lora, COLUMNS), triton.next_power_of_2
    features = triton.cdiv(v_dim, blocks)
    early = overlaps(q)
    last = STAGES - 1
    for first, until in [(0, last)] if q.is_cuda else [(stage, stage) for stage in range(STAGES)]:
        _row_attention[(blocks, num_heads)](
            q, new.kv_a, new.weight, new.eps, w_uk.view(torch.int32), w_uv.view(torch.int32), new.positions, new.slots,
            new.cos, new.sin, new.pool.view(torch.int32), pages, page_starts, kv_lens, exchange.scores, exchange.shares,
            exchange.turns, out, scale * LOG2_E, kv_lora, v_dim,
            FIRST=first, LAST=until, NUMBER=TYPES[w_uk.dtype], CACHED=TYPES[new.pool.dtype], NOPE=nope, ROPE=rope,
            IS_HALF_SPLIT=new.is_half_split, NOPE_PADDED=padded(nope), LORA_PADDED=padded(kv_lora), V_PADDED=padded(v_dim),
            BLOCKS=blocks, BLOCKS_PADDED=padded(blocks), ROPE_PAIRS=padded(triton.cdiv(rope // 2, blocks)),
            FEATURES=features, LANES=max(padded(features), 32 * WARPS // padded(blocks)), PAIRS=COLUMNS // 2, KEYS=MOST_KEYS, EARLY=early,
            launch_pdl=early, num_warps=WARPS,
        )  # fmt: skip
