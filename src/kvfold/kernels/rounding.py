"""Rows rounded to 8 bits in Triton: quant/activations.py said once more.

Owns codes, scales and the order in which a kernel finds the codes of a block; which products ask for it is
rounded_product.py's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvfold.kernels.block_weights import COMPILED

# What kernels of rounded products prefer, routing that rounds among them (memory_split.py): L1. One row of V2-Lite on an H200 over
# 4096 keys 1389 us to 1189 in Q4_K, 1285 to 1219 in IQ4_NL, 1443 to 1328 in Q8_0, over 128 keys 1141 to 1128, 1132 to 1090, 1193 to
# 1202, before routing did. Products of numbers prefer nothing: 25 % of shared memory wins 1.4 % over 4096 keys and loses 4 % over 128.
SHARED_PERCENT = 0


def is_mixed(type: str) -> bool:
    """Whether kernels of this type want the codes of a block as `mixed_place` orders them."""
    return type in ("IQ4_NL", "MXFP4")


@dataclass(frozen=True, eq=False)
class RoundedRows:
    """codes int8 [T, cols] and scales float32 [T, cols / 32] of rows that meet a matrix of `type`, whose kernels want the
    codes of a block in an order of their own."""

    codes: Tensor
    scales: Tensor
    type: str

    @property
    def is_mixed(self) -> bool:
        return is_mixed(self.type)

    @classmethod
    def empty(cls, rows: int, cols: int, type: str, device: torch.device) -> RoundedRows:
        codes = torch.empty(rows, cols, dtype=torch.int8, device=device)
        return cls(codes, torch.empty(rows, cols // 32, device=device), type)


@triton.jit
def codes4(x0, x1, x2, x3, inverse):
    """x times inverse, to the nearest whole number, ties to even: four bytes of a word. |x * inverse| <= 127.

    Adding 1.5 * 2^23 leaves the number in the lowest byte; product and sum round each, as the definition does.
    """
    if COMPILED:
        return tl.inline_asm_elementwise(
            """{
            .reg .f32 a, b, c, d;
            .reg .b32 p, q;
            mul.rn.f32 a, $1, $5;
            mul.rn.f32 b, $2, $5;
            mul.rn.f32 c, $3, $5;
            mul.rn.f32 d, $4, $5;
            add.rn.f32 a, a, 0f4B400000;
            add.rn.f32 b, b, 0f4B400000;
            add.rn.f32 c, c, 0f4B400000;
            add.rn.f32 d, d, 0f4B400000;
            prmt.b32 p, a, b, 0x0040;
            prmt.b32 q, c, d, 0x0040;
            prmt.b32 $0, p, q, 0x5410;
            }""",
            "=r,f,f,f,f,f", [x0, x1, x2, x3, inverse], dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        a = (x0 * inverse + 12582912.0).to(tl.int32, bitcast=True) & 255
        b = (x1 * inverse + 12582912.0).to(tl.int32, bitcast=True) & 255
        c = (x2 * inverse + 12582912.0).to(tl.int32, bitcast=True) & 255
        return a | (b << 8) | (c << 16) | ((x3 * inverse + 12582912.0).to(tl.int32, bitcast=True) << 24)


@triton.jit
def code(x, inverse):
    """One number's code, a byte of int32."""
    return codes4(x, x, x, x, inverse) & 255


@triton.jit
def scale_of(largest):
    """(127 / largest, largest / 127) of the bits of a block's largest size, as quant/activations.py rounds them."""
    is_finite = largest < 0x7F800000
    is_used = is_finite & (largest >= 0x03800000)  # 2^-120
    size = tl.where(is_used, largest, 0x42FE0000).to(tl.float32, bitcast=True)  # 127
    most = tl.full(size.shape, 127.0, tl.float32)
    inverse = tl.where(is_used, tl.div_rn(most, size), 0.0)
    scale = tl.where(is_used, tl.div_rn(size, most), 0.0)
    return inverse, tl.where(is_finite, scale, float("nan"))


@triton.jit
def mixed_place(i):
    """Where number i of a block of 32 lies for the types of `is_mixed`: words of the numbers j, j + 16, j + 1, j + 17."""
    return i // 16 + i % 16 // 4 * 8 + i % 4 // 2 * 4 + i % 2 * 2
