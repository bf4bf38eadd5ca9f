"""Where a router could go either way: two correct engines may differ there by a whole expert."""

from __future__ import annotations

import torch

from kvfold.config import GroupScore, MoeConfig, Scoring


class Undecided:
    """A tap: finds the positions where a routing decision is closer than `margin`, and replays the experts of a
    reference there if they are given (one [T, k] per MoE layer).

    The distance is that between the last expert (or group) taken and the first left, in router logits where scores are
    a softmax of them, else in scores with their bias.
    """

    def __init__(self, moe: MoeConfig, margin: float, reference_ids: list[torch.Tensor] | None = None) -> None:
        self._moe = moe
        self._margin = margin
        self._reference_ids = iter(reference_ids or ())
        self._here = torch.zeros(0, dtype=torch.bool)
        self.positions = torch.zeros(1, dtype=torch.bool)  # [T] after the first layer

    def __call__(self, name: str, value: torch.Tensor) -> None:
        if name.endswith(".route.choice"):
            self._here = self._undecided(value)
            self.positions = self.positions | self._here
        elif name.endswith(".route.ids"):
            reference = next(self._reference_ids, value)
            value[self._here] = reference[self._here]

    def _undecided(self, choice: torch.Tensor) -> torch.Tensor:
        moe = self._moe
        scores = choice.log() if moe.scoring is Scoring.SOFTMAX else choice
        groups = scores.view(len(scores), moe.num_groups, -1)
        close_groups = torch.zeros(len(scores), dtype=torch.bool)
        if moe.num_groups > 1:
            top2 = moe.group_score is GroupScore.TOP2_SUM
            rank = groups.topk(2).values.sum(-1) if top2 else groups.amax(-1)
            close_groups = _margin(rank, moe.num_groups_per_tok) < self._margin
            kept = rank.topk(moe.num_groups_per_tok).indices
            scores = groups.gather(1, kept[..., None].expand(-1, -1, groups.shape[-1])).flatten(1)
        return close_groups | (_margin(scores, moe.num_experts_per_tok) < self._margin)


def _margin(scores: torch.Tensor, taken: int) -> torch.Tensor:
    """Between the last taken and the first left; infinite where all are taken."""
    if scores.shape[-1] == taken:
        return torch.full(scores.shape[:1], float("inf"))
    ordered = scores.sort(-1, descending=True).values
    return ordered[:, taken - 1] - ordered[:, taken]
