"""The Hopper kernels compile for sm_90a without a GPU, fit a multiprocessor, and keep their sums in registers.

What they compute is checked on the card: `bench/gpu_mla.py check few|many`, against float64.
"""

import pytest
import triton

from kit.hopper import HOPPER_SHARED_BYTES, compiled


def test_the_kernel_for_few_rows_spills_nothing() -> None:
    found = compiled("few")
    assert found["shared_bytes"] <= HOPPER_SHARED_BYTES
    assert found["wgmma"] >= 36 + 32, found  # 576 / 16 for the scores, 8 * 4 for the values
    assert found["spill_bytes"] == 0 and not found["serialized"], found


@pytest.mark.parametrize(
    ("kind", "spill_bytes"),
    [("fp8_16", 0), ("fp8_32", 36 if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7) else 4)],
)
def test_the_kernel_for_fp8_spills_nothing_of_its_loops(kind: str, spill_bytes: int) -> None:
    """With 32 rows one address, written and read once a sequence; by Triton 3.6 nine words."""
    found = compiled(kind)
    assert found["shared_bytes"] <= HOPPER_SHARED_BYTES
    assert found["wgmma"] == 36 + 32, found  # 576 / 16 for the scores, 8 * 4 for the values
    assert found["spill_bytes"] <= spill_bytes and not found["serialized"], found


@pytest.mark.parametrize(
    "kind", ["prefill_parted", "prefill_boxed", "prefill_merge", "prefill_parted_counted", "prefill_boxed_counted"]
)
def test_the_prefill_kernel_spills_nothing(kind: str) -> None:
    found = compiled(kind)
    assert found["shared_bytes"] <= HOPPER_SHARED_BYTES
    assert found["wgmma"] >= 2 * (12 + 8), found  # 192 / 16 for the scores, 128 / 16 for the values
    assert found["exponentials_beside_products"] >= 64, found  # all of a thread's, while values are multiplied
    assert found["spill_bytes"] == 0 and not found["serialized"], found


@pytest.mark.parametrize("kind", ["many", "many_halves"])
def test_the_kernel_for_many_rows_fits(kind: str) -> None:
    """Nothing of the loops is spilled: there is almost no L1 left to hold it."""
    found = compiled(kind)
    assert found["shared_bytes"] <= HOPPER_SHARED_BYTES
    assert found["wgmma"] >= 2 * (36 + 8), found
    assert found["spill_bytes"] < 32 and not found["serialized"], found
