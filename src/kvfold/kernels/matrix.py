"""A weight in the memory of a GPU: the bytes of its file, fields of odd blocks apart."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

_TORCH = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn}
_NAMES = {dtype: name for name, dtype in _TORCH.items()}


ROW_ALIGN = 16  # bytes at which rows of blocks begin: TMA has no others. V2-Lite's rows of 1408 in 4 bits are 1 % longer by it
SCALE_ROWS = 128  # that share scales of F8_E4M3


@dataclass(frozen=True, eq=False)
class Matrix:
    """`parts` equal matrices below each other: the experts of a layer, or one.

    type:   a name of quant/types.py, of interleaved ones those without a standard type, their rows put apart
    raw:    uint8 [parts * rows, row_bytes], rows as `planes` lays them, those of blocks from multiples of 16 bytes on
    scale:  float32 [parts, ceil(rows / 128), ceil(cols / 128)] of F8_E4M3, else None
    codebook: int32, as codebooks.py lays it, of a type in codebooks.OF_TYPE, else None
    rounds: rows that meet it are rounded to 8 bits, as quant/activations.py says: few of them to whole numbers, by
            rounded_product.py, many of them to F8_E4M3 where the weights are, by tile_product.py
    """

    type: str
    rows: int
    cols: int
    raw: Tensor
    scale: Tensor | None = None
    parts: int = 1
    rounds: bool = False
    codebook: Tensor | None = None

    @staticmethod
    def of(numbers: Tensor) -> Matrix:
        """These numbers [rows, cols], sharing memory."""
        rows, cols = numbers.shape
        return Matrix(_NAMES[numbers.dtype], rows, cols, numbers.view(torch.uint8))

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
        """What a kernel takes for `scale`: that, or the codebook, or any pointer where the type has neither."""
        if self.codebook is not None:
            return self.codebook
        return self.raw if self.scale is None else self.scale

    def is_plain(self, dtype: torch.dtype) -> bool:
        """Whether the bytes are numbers of this type as they stand."""
        return _TORCH.get(self.type) == dtype

    def plain(self) -> Tensor:
        """[parts * rows, cols] of a type of numbers, sharing memory."""
        return self.raw.view(_TORCH[self.type])

    def some(self, start: int, stop: int) -> Matrix:
        """Rows [start, stop) of one part, start a multiple of SCALE_ROWS; sharing memory."""
        scale = None if self.scale is None else self.scale[:, start // SCALE_ROWS : -(-stop // SCALE_ROWS)]
        return replace(self, rows=stop - start, raw=self.raw[start:stop], scale=scale)

    def part(self, start: int, stop: int) -> Matrix:
        """Parts [start, stop), sharing memory."""
        scale = None if self.scale is None else self.scale[start:stop]
        raw = self.raw[start * self.rows : stop * self.rows]
        return replace(self, raw=raw, scale=scale, parts=stop - start)


# Fields (first byte, bytes) of a block, in the order in which a row has them, each for all of its blocks: loads of 8 or 16
# bytes, which blocks of 17, 18, 34 and 210 bytes do not have. A row keeps its size.
PLANES = {
    "Q4_0": ((2, 16), (0, 2)),
    "IQ4_NL": ((2, 16), (0, 2)),
    "Q5_0": ((6, 16), (2, 4), (0, 2)),
    "Q5_1": ((8, 16), (4, 4), (0, 4)),
    "Q8_0": ((2, 32), (0, 2)),
    "Q3_K": ((32, 64), (0, 32), (96, 12), (108, 2)),
    "Q6_K": ((0, 128), (128, 64), (192, 16), (208, 2)),
    "Q6_0": ((10, 16), (2, 8), (0, 2)),
    "Q1_0": ((2, 16), (0, 2)),
    "Q2_0": ((2, 16), (0, 2)),
    "TQ1_0": ((0, 48), (48, 4), (52, 2)),
    "TQ2_0": ((0, 64), (64, 2)),
    "MXFP4": ((1, 16), (0, 1)),
    "NVFP4": ((4, 32), (0, 4)),
    "IQ2_XXS": ((2, 64), (0, 2)),
    "IQ2_XS": ((2, 64), (66, 8), (0, 2)),
    "IQ2_S": ((2, 32), (34, 32), (66, 8), (74, 8), (0, 2)),
    "IQ3_XXS": ((2, 64), (66, 32), (0, 2)),
    "IQ3_S": ((2, 64), (74, 32), (66, 8), (106, 4), (0, 2)),
    "IQ1_S": ((2, 32), (34, 16), (0, 2)),
}


def padded(raw: Tensor) -> Tensor:
    """Rows of blocks from multiples of ROW_ALIGN bytes on."""
    return torch.nn.functional.pad(raw, (0, -raw.shape[1] % ROW_ALIGN))


def planes(type: str, raw: Tensor) -> Tensor:
    """Rows [rows, row_bytes] of blocks of a type in PLANES, as a Matrix has them."""
    fields = PLANES[type]
    blocks = raw.view(len(raw), -1, sum(size for _, size in fields))
    return torch.cat([blocks[:, :, at : at + size].flatten(1) for at, size in fields], dim=1)
