"""Block types of the exported file, once: encode, decode, and the straight-through fake quantizer for training.

A block is 32 weights along the last axis with one float16 scale d. The element of largest magnitude m (sign kept)
sets d = m / -extreme, so that it is represented by the code with the largest reach:

    IQ4_NL  18 bytes  d, 16 bytes of nibbles     value = d * KVALUES[q]     extreme 127
    Q5_0    22 bytes  d, 32 high bits, nibbles   value = d * (q - 16)       extreme  16
    Q8_0    34 bytes  d, 32 signed bytes         value = d * q              extreme 127 (largest magnitude, no sign)

Nibble i of a byte row holds element i (low half) and i + 16 (high half), as ggml stores them. `fake_quant` returns
exactly decode(encode(w)), so the file holds the very weights the loss was computed with.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

BLOCK = 32
BLOCK_BYTES = {"IQ4_NL": 18, "Q5_0": 22, "Q8_0": 34}
KVALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)  # ggml: kvalues_iq4nl

THRESHOLDS = tuple((below + above) / 2 for below, above in pairwise(KVALUES))


def _codes(weight: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Scales [..., n/32, 1] (float32 holding float16 values) and integer codes [..., n/32, 32]."""
    blocks = weight.float().unflatten(-1, (-1, BLOCK))
    high, low = blocks.amax(-1, keepdim=True), blocks.amin(-1, keepdim=True)
    if kind == "Q8_0":
        scale = (torch.maximum(high, -low) / 127.0).half().float()
    else:
        extreme = torch.where(high > -low, high, low)
        scale = (extreme / (-127.0 if kind == "IQ4_NL" else -16.0)).half().float()
    inverse = torch.where(scale == 0, 0.0, 1.0 / torch.where(scale == 0, 1.0, scale))
    scaled = blocks * inverse
    if kind == "Q8_0":
        return scale, scaled.round().clamp(-127, 127)
    if kind == "Q5_0":
        return scale, (scaled.round() + 16).clamp(0, 31)
    if not scaled.is_cuda:
        return scale, torch.bucketize(scaled, torch.tensor(THRESHOLDS), out_int32=True)
    code = torch.zeros_like(scaled)  # the same count; comparisons fuse into one kernel under torch.compile
    for threshold in THRESHOLDS:
        code = code + (scaled > threshold)  # 15 thresholds: the nearest of 16 values
    return scale, code


def _values(scale: Tensor, codes: Tensor, kind: str) -> Tensor:
    if kind == "IQ4_NL" and not codes.is_cuda:
        return (scale * torch.tensor(KVALUES, dtype=torch.float32)[codes.int()]).flatten(-2)
    if kind == "IQ4_NL":
        # the sum of the steps below the code: the same integer as a table look-up, and fuses into one kernel
        levels = torch.full_like(codes, float(KVALUES[0]))
        for index, (below, above) in enumerate(pairwise(KVALUES)):
            levels = levels + (above - below) * (codes > index)
        return (scale * levels).flatten(-2)
    return (scale * (codes - 16 if kind == "Q5_0" else codes)).flatten(-2)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, kind: str) -> Tensor:
        return _values(*_codes(weight, kind), kind)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad, None


def fake_quant(weight: Tensor, kind: str) -> Tensor:
    """The weights as the file will hold them, float32; the gradient passes unchanged."""
    return weight if kind in ("F32", "none") else _StraightThrough.apply(weight, kind)


def encode(weight: Tensor, kind: str) -> Tensor:
    """uint8 [..., n/32 * block bytes]: the blocks as ggml stores them."""
    scale, codes = _codes(weight, kind)
    parts = [scale.half().view(torch.uint8)]
    if kind == "Q8_0":
        parts.append(codes.to(torch.int8).view(torch.uint8))
    else:
        q = codes.to(torch.int64)
        if kind == "Q5_0":
            bits = (q >> 4).unflatten(-1, (4, 8)) << torch.arange(8, device=q.device)
            parts.append(bits.sum(-1).to(torch.uint8))
        nibbles = q & 15
        parts.append((nibbles[..., :16] | nibbles[..., 16:] << 4).to(torch.uint8))
    return torch.cat(parts, dim=-1).flatten(-2)


def decode(blocks: Tensor, kind: str) -> Tensor:
    """float32 [..., n] from `encode`'s blocks."""
    rows = blocks.unflatten(-1, (-1, BLOCK_BYTES[kind]))
    scale = rows[..., :2].contiguous().view(torch.float16).float()
    if kind == "Q8_0":
        return _values(scale, rows[..., 2:].contiguous().view(torch.int8).float(), kind)
    packed = rows[..., -16:].long()
    codes = torch.cat([packed & 15, packed >> 4], dim=-1)
    if kind == "Q5_0":
        bits = rows[..., 2:6].long().unsqueeze(-1) >> torch.arange(8, device=rows.device) & 1
        codes = codes | bits.flatten(-2) << 4
    return _values(scale, codes.float(), kind)
