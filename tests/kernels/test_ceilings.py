"""What a GPU does at most is measured in memory that is there, and given back."""

from __future__ import annotations

import pytest

from kit.interpreter import torch  # before any kernel
from kvfold.kernels import ceilings


@pytest.mark.parametrize("free", [0, 1 << 20, (1 << 30) - 1])
def test_too_little_memory_is_said_with_what_is_missing(free: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 141 << 30))
    device = torch.device("cuda", 0)
    with pytest.raises(MemoryError, match=r"measured in 1\.07 GB of its memory and .* GB are missing"):
        ceilings.read_rate(device)
    with pytest.raises(MemoryError, match="use a smaller context"):
        ceilings.multiply_adds(device, torch.float32)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_measurement_keeps_no_memory() -> None:
    device = torch.device("cuda", 0)
    torch.ones(1, device=device)
    held = torch.cuda.memory_reserved(device)
    assert ceilings.read_rate(device) > 0
    assert ceilings.multiply_adds(device, torch.bfloat16) > 0
    assert torch.cuda.memory_reserved(device) <= held + (64 << 20)  # what the library keeps for its products
