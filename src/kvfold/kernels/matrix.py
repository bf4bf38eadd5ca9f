"""A weight in the memory of a GPU, in the blocks of its file."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_TORCH = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, eq=False)
class Matrix:
    """`parts` equal matrices below each other: the experts of a layer, or one.

    type:  a name of block_weights.TYPES
    raw:   uint8 [parts * rows, row_bytes]
    scale: float32 [parts, ceil(rows / 128), ceil(cols / 128)] of F8_E4M3, else None
    """

    type: str
    rows: int
    cols: int
    raw: Tensor
    scale: Tensor | None = None
    parts: int = 1

    @property
    def row_bytes(self) -> int:
        return self.raw.shape[1]

    @property
    def scale_rows(self) -> int:
        return 0 if self.scale is None else self.scale.shape[1]

    @property
    def scale_cols(self) -> int:
        return 0 if self.scale is None else self.scale.shape[2]

    @property
    def scale_or_raw(self) -> Tensor:
        """What a kernel takes for `scale`: any pointer where the type has none."""
        return self.raw if self.scale is None else self.scale

    def is_plain(self, dtype: torch.dtype) -> bool:
        """Whether the bytes are numbers of this type as they stand."""
        return _TORCH.get(self.type) == dtype

    def plain(self) -> Tensor:
        """[parts * rows, cols] of a type of numbers, sharing memory."""
        return self.raw.view(_TORCH[self.type])

    def part(self, start: int, stop: int) -> Matrix:
        """Parts [start, stop), sharing memory."""
        scale = None if self.scale is None else self.scale[start:stop]
        return Matrix(
            self.type, self.rows, self.cols, self.raw[start * self.rows : stop * self.rows], scale, stop - start
        )
