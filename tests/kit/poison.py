"""Memory that nobody wrote is NaN: a kernel that leaves a hole in its output, or reads one, cannot pass by luck."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch.empty, which every launcher takes its outputs and scratch from, gives NaN, and bytes of 0xFF."""
    empty = torch.empty

    def poisoned(*size: Any, **settings: Any) -> torch.Tensor:
        x = empty(*size, **settings)
        if x.is_floating_point():
            x.fill_(torch.nan)
        elif x.dtype == torch.uint8:
            x.fill_(0xFF)
        return x

    monkeypatch.setattr(torch, "empty", poisoned)
    yield
