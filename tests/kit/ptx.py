"""Evaluates straight-line PTX on arrays: the few instructions that kernels/block_ptx.py is written in."""

from __future__ import annotations

import re

import numpy as np

U32 = np.uint32


def float_of(bits: np.ndarray) -> np.ndarray:
    return bits.astype(U32).view(np.float32)


def bits_of(x: np.ndarray) -> np.ndarray:
    return np.asarray(x, np.float32).view(U32)


def to_bfloat16(x: np.ndarray) -> np.ndarray:
    """Bits, the nearest with ties to even."""
    bits = bits_of(x).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(U32)


def _pairs(sources: list[np.ndarray]) -> np.ndarray:
    """a * b, or a * b + c, of both bfloat16 of each word, rounded once: 8 by 8 bits and a sum are exact in float64, or as good."""
    low, high = (
        [float_of((word >> U32(at) & U32(0xFFFF)) << U32(16)).astype(np.float64) for word in sources]
        for at in (0, 16)
    )
    a, b = (to_bfloat16((x[0] * x[1] + (x[2] if len(x) == 3 else 0)).astype(np.float32)) for x in (low, high))
    return a | b << U32(16)


def _permuted(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    table = np.stack([word >> U32(8 * i) & U32(255) for word in (a, b) for i in range(4)])
    picked = [selector >> U32(4 * i) & U32(15) for i in range(4)]
    assert all((p < 8).all() for p in picked), "signs are not looked up"
    return np.bitwise_or.reduce([table[p, np.arange(len(a))] << U32(8 * i) for i, p in enumerate(picked)])


def evaluate(text: str, registers: dict[str, np.ndarray]) -> None:
    """Runs `text`, one block, where registers have uint32 [N] each; what it writes is there afterwards."""
    count = len(next(iter(registers.values())))

    def value(name: str) -> np.ndarray:
        if name in registers:
            return registers[name]
        return np.full(count, int(name[2:], 16) if name.startswith("0f") else int(name, 0), U32)

    for line in text.strip()[1:-1].split(";"):
        if not line.strip() or line.strip().startswith(".reg"):
            continue
        operation, rest = line.split(None, 1)
        to, *names = re.findall(r"\{[^}]*\}|[^,\s]+", rest)
        if to.startswith("{"):
            low, high = (half.strip() for half in to[1:-1].split(","))
            word = value(names[0])
            registers[low], registers[high] = word & U32(0xFFFF), word >> U32(16)
            continue
        if operation == "selp.b32":
            registers[to] = np.where(registers[names[2]], value(names[0]), value(names[1]))
            continue
        x = [value(name) for name in names]
        match operation:
            case "mov.b32":
                result = x[0]
            case "and.b32":
                result = x[0] & x[1]
            case "or.b32":
                result = x[0] | x[1]
            case "xor.b32":
                result = x[0] ^ x[1]
            case "shr.u32":
                result = x[0] >> x[1]
            case "shl.b32":
                result = x[0] << x[1]
            case "bfe.u32":
                result = x[0] >> x[1] & (U32(1) << x[2]) - U32(1)
            case "bfe.s32":
                assert (x[2] == 8).all()
                result = (x[0] >> x[1] & U32(255)).astype(np.uint8).view(np.int8).astype(np.int32).view(U32)
            case "mul.lo.u32":
                result = x[0] * x[1]
            case "lop3.b32":
                assert names[3] == "0xEA"
                result = x[0] & x[1] | x[2]
            case "prmt.b32":
                result = _permuted(*x)
            case "setp.ne.s32":
                result = x[0] != x[1]
            case "cvt.f32.f16":
                result = bits_of(x[0].astype(np.uint16).view(np.float16).astype(np.float32))
            case "cvt.rn.f32.s32":
                result = bits_of(x[0].view(np.int32).astype(np.float32))
            case "cvt.rn.bf16x2.f32":
                result = to_bfloat16(float_of(x[0])) << U32(16) | to_bfloat16(float_of(x[1]))
            case "sub.f32":
                result = bits_of(float_of(x[0]) - float_of(x[1]))
            case "mul.f32":
                result = bits_of(float_of(x[0]) * float_of(x[1]))
            case "mul.rn.bf16x2" | "fma.rn.bf16x2":
                result = _pairs(x)
            case _:
                raise NotImplementedError(operation)
        registers[to] = result
