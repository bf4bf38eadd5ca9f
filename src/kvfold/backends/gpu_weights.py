"""Bytes that each weight takes in the memory of a GPU, said before a byte is copied: no torch.

Owns which weights lie there in another form than in the file; cuda_weights.py, which uploads them, asks the same functions.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from kvfold.kernels import weight_types
from kvfold.quant.tensor import QuantTensor, Weight, Weights, matrices
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


def keeps_blocks(type: BlockType) -> bool:
    """Other types are decoded to the compute type when they are uploaded."""
    return type.name in weight_types.TYPES


def compute_type(dtype: str) -> tuple[str, int]:
    """Name and bytes of a number of the compute type under a setting, one of choose.DTYPES."""
    return ("float32", 4) if dtype == "float32" else ("bf16", 2)


def is_decoded(name: str, weight: Weight) -> bool:
    """Of a type that no kernel reads, in a place where others keep their blocks."""
    return not (is_vector(weight) or is_router(name) or is_up(name) or keeps_blocks(matrices(weight)[0].type))


def row_bytes(type: BlockType, stored: int) -> int:
    """Of a row that takes `stored` bytes in its file: those of blocks begin at multiples of 16 (kernels/matrix.ROW_ALIGN)."""
    return -(-stored // 16) * 16 if type.block_elements > 1 else stored


def device_bytes(name: str, weight: Weight, dtype: str) -> int:
    """Of one weight, or of the equal ones below each other. dtype: one of choose.DTYPES."""
    parts = matrices(weight)
    if is_vector(weight) or is_router(name):
        number_bytes = 4
    elif is_up(name) or is_decoded(name, weight):
        _, number_bytes = compute_type(dtype)
    else:
        padding: int = sum((row_bytes(p.type, p.raw.shape[1]) - p.raw.shape[1]) * p.rows for p in parts)
        return padding + sum(part.nbytes for part in parts)
    return number_bytes * sum(part.rows * part.cols for part in parts)


@dataclass(frozen=True)
class Grown:
    """Weights that the GPU decodes when they are uploaded, and that are larger there than in the file.

    types: their names. into: the compute type. stored_bytes: in the file
    """

    types: tuple[str, ...]
    into: str
    stored_bytes: int
    device_bytes: int

    @property
    def in_words(self) -> str:
        return (
            f"{self.device_bytes / 1e9:.3g} GB of it for {self.stored_bytes / 1e9:.3g} GB in {', '.join(self.types)}, "
            f"which the GPU has as {self.into}"
        )


def grown_weights(weights: Weights, dtype: str) -> Grown | None:
    """dtype: one of choose.DTYPES. None: every matrix takes the bytes it has in the file."""
    stored: dict[str, int] = defaultdict(int)
    on_device: dict[str, int] = defaultdict(int)
    for name, weight in weights.items():
        if is_decoded(name, weight):
            type = matrices(weight)[0].type.name
            stored[type] += sum(part.nbytes for part in matrices(weight))
            on_device[type] += device_bytes(name, weight, dtype)
    types = tuple(sorted(type for type in stored if on_device[type] > stored[type]))
    if not types:
        return None
    into, _ = compute_type(dtype)
    return Grown(types, into, sum(stored[t] for t in types), sum(on_device[t] for t in types))
