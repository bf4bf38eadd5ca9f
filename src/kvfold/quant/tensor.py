"""One tensor as the checkpoint stores it: a block type, a logical shape and views of the file's own bytes.

Owns nothing and copies nothing: `raw` is usually a view of a memory map. Decoding is quant/decode.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvfold.quant.types import BlockType


@dataclass(frozen=True, eq=False)
class QuantTensor:
    """A matrix (or vector) in the blocks of its file.

    name:  canonical name (the GGUF name, e.g. `blk.3.attn_q_a.weight`)
    type:  how a row's bytes are read
    shape: (rows, cols), or (cols,) for a vector; cols is the contiguous, blocked dimension
    raw:   uint8 [rows, row_bytes] (a vector: [1, row_bytes]), C-contiguous, read-only
    scale: float32 [ceil(rows / 128), ceil(cols / 128)] multipliers for fp8 checkpoints (`weight_scale_inv`), else None
    """

    name: str
    type: BlockType
    shape: tuple[int, ...]
    raw: NDArray[np.uint8]
    scale: NDArray[np.float32] | None = None

    @property
    def rows(self) -> int:
        return self.shape[0] if len(self.shape) == 2 else 1

    @property
    def cols(self) -> int:
        return self.shape[-1]

    @property
    def nbytes(self) -> int:
        return self.raw.nbytes + (0 if self.scale is None else self.scale.nbytes)

    def row_slice(self, start: int, stop: int) -> QuantTensor:
        """Rows [start, stop) without copying: whole groups of an interleaved type, and from a multiple of 128 with a
        scale."""
        group = self.type.interleaved_rows
        assert start % group == 0 and stop % group == 0, "interleaved rows come in whole groups"
        scale = self.scale
        if scale is not None:
            assert start % 128 == 0, "fp8 block scales cover 128 rows"
            scale = scale[start // 128 : (stop + 127) // 128]
        return QuantTensor(self.name, self.type, (stop - start, self.cols), self.raw[start:stop], scale)


Weight = QuantTensor | tuple[QuantTensor, ...]
"""One matrix, or equal ones below each other: the experts of a layer, the heads of an up-projection."""

Weights = Mapping[str, Weight]
"""By name, as a model's ops ask for them."""


def matrices(weight: Weight) -> tuple[QuantTensor, ...]:
    """Its matrices, one or many."""
    return weight if isinstance(weight, tuple) else (weight,)


def changed(weight: Weight, change: Callable[[QuantTensor], QuantTensor]) -> Weight:
    """The weight with each of its matrices changed."""
    return tuple(change(part) for part in weight) if isinstance(weight, tuple) else change(weight)
