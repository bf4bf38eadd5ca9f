"""What the kernels with an online softmax agree on. Their exponentials are powers of two: scores carry scale * LOG2_E."""

from __future__ import annotations

import math

import triton.language as tl

LOG2_E = math.log2(math.e)
NO_SCORE = tl.constexpr(-1e30)  # a running maximum before any key: finite, so that differences stay numbers
