"""Tokens chosen on the device: the lowest of equal ids, and none where a logit is no number."""

from __future__ import annotations

import numpy as np
import torch

from kvfold.kernels.likeliest import likeliest, take_chosen


def test_the_lowest_id_of_the_highest_logit(device: str) -> None:
    logits = np.random.default_rng(0).standard_normal((6, 9001)).astype(np.float32)
    logits[1, [7000, 4500, 8999]] = 9  # equal, in three blocks
    logits[2, 3] = np.nan
    logits[3, 8000] = np.inf
    logits[4] = -np.inf
    logits[5, :9000] = -np.inf
    arrived = torch.zeros(6, dtype=torch.int32, device=device)
    out = torch.full((6,), 77, dtype=torch.int32, device=device)
    for _ in range(2):
        likeliest(torch.from_numpy(logits).to(device), arrived, out)
        assert out.tolist() == [int(logits[0].argmax()), 4500, -1, -1, -1, 9000]
        out.fill_(77)


def test_steps_take_what_was_chosen(device: str) -> None:
    tokens = torch.tensor([5, -1, -3, 0, -2], dtype=torch.int32, device=device)
    take_chosen(tokens, torch.tensor([11, -1, 13], dtype=torch.int32, device=device))
    assert tokens.tolist() == [5, 11, 13, 0, 0]
