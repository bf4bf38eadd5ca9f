"""The codebooks of quant/decode.py as kernels look them up: a word of int32 for each entry.

An entry of eight weights is eight digits of four bits, the first lowest: which of 8, 25 and 43 (IQ2), or the weight and 1 (IQ1).
So a byte permutation turns half a word into four weights, and 2048 entries take 8 KB. An entry of four weights (IQ3) is
their four bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Types whose blocks pick several weights at once: the name of the table of quant/decode.codebook.
OF_TYPE = {
    "IQ2_XXS": "IQ2_XXS",
    "IQ2_XS": "IQ2_XS",
    "IQ2_S": "IQ2_S",
    "IQ3_XXS": "IQ3_XXS",
    "IQ3_S": "IQ3_S",
    "IQ1_S": "IQ1_S",
    "IQ1_M": "IQ1_S",
    "IQ1_S_R4": "IQ1_S",
    "IQ1_M_R4": "IQ1_S",
}

_IQ2_SIZES = (8, 25, 43)


def words(grid: Tensor) -> Tensor:
    """grid: float32 [entries, 8 or 4] of quant/decode.codebook -> int32 [entries], on the same device."""
    fields = grid.to(torch.int64)
    if grid.shape[1] == 4:
        bits = 8
    elif int(fields.min()) < 0:
        bits, fields = 4, fields + 1
    else:
        sizes = torch.tensor(_IQ2_SIZES, device=grid.device)
        bits, fields = 4, torch.searchsorted(sizes, fields.contiguous())
    packed = (fields << torch.arange(0, 32, bits, device=grid.device)).sum(1)
    return torch.where(packed < 1 << 31, packed, packed - (1 << 32)).to(torch.int32)
