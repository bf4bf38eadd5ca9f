"""What the plan knows of a GPU: how fast attention's products run there, by the cache and the kernels that serve it.

Owns the rates that were measured on one card (bench/gpu_profile.py), and how those of other cards follow from what the driver
says of them. mla/plan.py has the arithmetic.
"""

from __future__ import annotations

import math
from dataclasses import replace

from kvfold.backends.gpu import Gpu
from kvfold.cache.latent import CacheType
from kvfold.mla.plan import ARITHMETIC, MachineProfile

# The card that was measured, as its driver describes it.
H200 = Gpu("NVIDIA H200", (9, 0), 150_109_880_320, 132, 1_980_000, 4814.304)

# 10^9 multiply-adds and numbers a second, and ns, fitted to 168 times of both paths: 16 and 128 heads, 1 to 512 rows over 0 to 64k
# keys (bench/gpu_profile.py, 29 November 2026). The single row of a sequence has launches of its own.
NUMBERS = MachineProfile(
    "H200", latents=347e3, folding=21.6e3, expansion=203e3, heads=410e3, cached=2460, absorbed_start=28_600,
    decompressed_start=22_500, few_rows=1, few_start=16_500, origin="measured",
)  # fmt: skip
# Plain Triton, which serves every card and all other caches: decode over 64 x 32k and 1 x 32k keys beside Hopper's kernels
# (bench/results/2026-11-28-h200-cache-types.json: 0.34 and 0.6 of their speed), prompts 0.64 of a peer.
TRITON = replace(NUMBERS, latents=118e3, cached=1480, heads=190e3, origin="estimated from single kernels")
# Caches of bytes decode in plain Triton at 0.27 and 0.47; prompts expand a copy in numbers, so go by Hopper's kernel there.
BYTES = replace(NUMBERS, latents=94e3, cached=1160, origin="estimated from single kernels")
# Hopper's kernel over fp8 does 0.34 of the products of that over numbers (128 heads, 64 x 4k) and reads one sequence's keys as fast
# (16 heads, 1 x 32k): docs/notes/gpu-mla.md.
FP8 = replace(NUMBERS, latents=118e3, origin="estimated from single kernels")

# Dense multiply-adds of 16-bit numbers that a multiprocessor does in a clock, as published; GeForce cards do half of 512.
PER_CLOCK = {(8, 0): 1024, (8, 6): 512, (8, 9): 512, (9, 0): 2048, (10, 0): 4096, (11, 0): 4096, (12, 0): 512}


def gpu_profile(gpu: Gpu, cache_type: CacheType, dtype: str) -> MachineProfile:
    """Of this card under these settings (dtype: one of choose.DTYPES). A card that does not tell its clock has none."""
    is_hopper = gpu.capability == H200.capability
    if dtype == "float32" or not _products(gpu):
        return ARITHMETIC  # kernels of which nobody measured a rate
    if cache_type is CacheType.FP8 and is_hopper:
        measured = FP8
    elif cache_type in (CacheType.Q8_0, CacheType.FP8):
        measured = BYTES if is_hopper else replace(BYTES, heads=TRITON.heads)
    elif not is_hopper:
        measured = TRITON
    elif cache_type is CacheType.BF16:
        measured = NUMBERS
    else:  # prompts read a converted copy
        measured = replace(TRITON, heads=NUMBERS.heads)
    if gpu.name == H200.name:
        return measured
    products = _products(gpu) / _products(H200)
    return replace(
        measured,
        name=gpu.name,
        origin="scaled from an H200's by multiprocessors, clock and memory",
        latents=measured.latents * products,
        folding=measured.folding * products,
        expansion=measured.expansion * products,
        heads=measured.heads * products,
        cached=measured.cached * gpu.memory_gbps / H200.memory_gbps if gpu.memory_gbps else math.inf,
    )


def _products(gpu: Gpu) -> int:
    """Multiply-adds of 16-bit numbers a millisecond on matrix units, at the highest clock."""
    per_clock = PER_CLOCK[max(capability for capability in PER_CLOCK if capability <= gpu.capability)]
    return gpu.num_multiprocessors * gpu.clock_khz * per_clock
