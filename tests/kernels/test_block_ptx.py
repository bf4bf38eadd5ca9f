"""The PTX that decodes blocks in registers against quant/decode.py, evaluated on arrays: a GPU only runs it."""

from __future__ import annotations

import numpy as np
import pytest

from kernels.test_linear import blocks
from kit.interpreter import torch
from kit.ptx import evaluate, float_of, to_bfloat16
from kvfold.kernels.block_ptx import ORDERS, decoder
from kvfold.kernels.matrix import PLANES, planes
from kvfold.quant.decode import decode
from kvfold.quant.types import by_name


def operands(name: str, laid: np.ndarray, cols: int, step: int, thread: int) -> dict[str, np.ndarray]:
    """What the thread of four has of a pass: 4 or 8 words of codes, words beside them and a scale."""
    words = np.ascontiguousarray(laid[:, : laid.shape[1] // 4 * 4]).view(np.uint32)

    def byte(at: int) -> np.ndarray:
        return laid[:, at].astype(np.uint32)

    width = 32 if name == "Q8_0" else 16
    first = step // 2 * 36 + step % 2 * 16 + 4 if name == "Q4_K" else step * width
    codes = words[:, first + thread * width // 4 :][:, : width // 4]
    beside, scale = codes[:, 4:] if name == "Q8_0" else codes, np.zeros(len(laid), np.uint32)
    if name == "Q4_K":
        beside = words[:, step // 2 * 36 :][:, :4]
        scale = scale + (thread // 2 * 16 | step % 2)
    elif name == "Q6_K":
        beside = words[:, cols // 8 + step * 8 + thread % 2 * 4 :][:, :4] >> np.uint32(thread // 2 * 2)
        level, d = cols // 4 * 3 + step * 8 + thread, cols // 256 * 208 + step // 2 * 2
        scale = byte(level) | byte(level + 4) << 8 | byte(d) << 16 | byte(d + 1) << 24
    elif name in ("Q5_0", "Q5_1"):
        beside = words[:, cols // 8 + step * 4 + thread][:, None].repeat(4, 1)
        size = 2 if name == "Q5_0" else 4
        at = cols // 8 * 5 + (step * 4 + thread) * size
        scale = sum(byte(at + i) << np.uint32(8 * i) for i in range(size))
    else:
        at = (cols if name == "Q8_0" else cols // 2) + step * 8 + thread * 2
        scale = byte(at) | byte(at + 1) << 8
    found = {f"${8 + i}": codes[:, i] for i in range(4)} | {f"${12 + i}": beside[:, i] for i in range(4)}
    return found | {"$16": scale.astype(np.uint32)}


@pytest.mark.parametrize("name", sorted(ORDERS))
def test_decoding_in_registers_is_the_definition_rounded_once(name: str) -> None:
    rows, cols = 48, 1024
    raw = blocks(name, rows, cols, seed=7)
    dense = decode(by_name(name), raw).reshape(rows, cols)
    laid = planes(name, torch.from_numpy(raw)).numpy() if name in PLANES else raw
    place = np.arange(128)
    col = sum((place >> bit & 1) << ORDERS[name][bit] for bit in range(7))
    wrong = 0
    for step in range(cols // 128):
        got = np.zeros((rows, 128), np.uint32)
        for thread in range(4):
            for half in range(2):
                registers = operands(name, laid, cols, step, thread)
                evaluate(decoder(name, half), registers)
                for i in range(8):
                    # A product's 16 columns: pairs of the four threads, then those of the other register.
                    at = 64 * half + 8 * i + 2 * thread
                    both = registers[f"${i}"]
                    got[:, at], got[:, at + 1] = both & 0xFFFF, both >> 16
        exact = dense[:, step * 128 + col]
        off = np.abs(float_of(got << 16) - float_of(to_bfloat16(exact) << 16))
        # One step of bfloat16, or where a minimum is added of either term.
        assert (off <= 2.0**-7 * np.abs(exact) + 2.0**-14 * np.abs(dense).max()).all(), step
        wrong += (off > 0).sum()
    assert wrong <= (0.3 if name in ("Q4_K", "Q5_1") else 4e-3) * dense.size, (
        f"{wrong} of {dense.size} lie beside the nearest"
    )
