"""Kernels run compiled where there is a GPU, else in Triton's CPU interpreter."""

import pytest

from kit.interpreter import torch
from kit.poison import poisoned_memory  # noqa: F401


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
