"""The Hopper kernel of experts compiles for sm_90a without a GPU, fits a multiprocessor, and keeps its weights in registers.

What it computes is checked on the card, by test_linear.py, and what its decoders are made of by test_block_ptx.py.
"""

import pytest

from kit.hopper import HOPPER_SHARED_BYTES, compiled


@pytest.mark.parametrize(
    "kind",
    [
        "Q4_0_16_gated",
        "Q4_0_128_gated",
        "IQ4_NL_64_gated",
        "Q4_K_16_gated",
        "Q5_0_64_down",
        "Q5_1_16_down",
        "Q6_K_64_gated",
        "Q8_0_16_down",
    ],
)
def test_the_kernel_of_experts_spills_nothing(kind: str) -> None:
    found = compiled(f"experts_{kind}")
    assert found["shared_bytes"] <= HOPPER_SHARED_BYTES
    assert found["wgmma"] == 2 * 8, found  # a pass of 128 weights of both strips, 16 at a time
    assert found["spill_bytes"] == 0 and not found["serialized"], found
