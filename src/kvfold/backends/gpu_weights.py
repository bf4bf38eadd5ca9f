"""Bytes that each weight takes in the memory of a GPU, said before a byte is copied: no torch.

Owns which weights lie there in another form than in the file; cuda_weights.py, which uploads them, asks the same functions.
"""

from __future__ import annotations

from kvfold.quant.tensor import QuantTensor, Weight, matrices
from kvfold.quant.types import BlockType


def is_vector(weight: Weight) -> bool:
    """Norms and biases: float32."""
    return isinstance(weight, QuantTensor) and len(weight.shape) == 1


def is_router(name: str) -> bool:
    """float32."""
    return name.endswith("ffn_gate_inp.weight")


def is_up(name: str) -> bool:
    """Of an up-projection: the compute type, whatever the file has."""
    return name.endswith(("attn_kv_b.weight", "attn_k_b.weight", "attn_v_b.weight"))


def row_bytes(type: BlockType, stored: int) -> int:
    """Of a row that takes `stored` bytes in its file: those of blocks begin at multiples of 16 (kernels/matrix.ROW_ALIGN), but for
    types whose rows have a scale of their own, whose blocks are counted by a row's bytes."""
    is_of_blocks = type.block_elements > 1 and type.standard != "BF16" and not type.row_meta_bytes
    return -(-stored // 16) * 16 if is_of_blocks else stored


def device_bytes(name: str, weight: Weight, dtype: str) -> int:
    """Of one weight, or of the equal ones below each other. dtype: one of choose.DTYPES."""
    parts = matrices(weight)
    if is_vector(weight) or is_router(name):
        number_bytes = 4
    elif is_up(name):
        number_bytes = 4 if dtype == "float32" else 2
    else:
        padding: int = sum((row_bytes(p.type, p.raw.shape[1]) - p.raw.shape[1]) * p.rows for p in parts)
        return padding + sum(part.nbytes for part in parts)
    return number_bytes * sum(part.rows * part.cols for part in parts)
