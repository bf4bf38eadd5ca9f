"""Kernels run compiled where there is a GPU, else in Triton's CPU interpreter."""

import pytest

from kit.interpreter import torch


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
