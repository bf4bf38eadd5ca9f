"""Logits and cached latents against transformers in float32, for every family, random weights.

Bounds of the project: max |delta logit| <= 1e-4 of max |logit|, top-1 equal at every position but those where the
router could go either way (margin below 1e-5), which are counted and stay below 0.1 %; latents equal to 1e-5. Such a
position takes the experts that transformers took, so that the positions that attend to it stay comparable.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kit.harness import Harness, close
from kit.routing import Undecided
from kit.tiny_models import CONFIGS, hf_model, write_hf_dir
from kvfold.engine.batch import Work

FAMILIES = tuple(CONFIGS)
PROMPT_LENGTHS = (17, 300)


def _prompt(length: int, seed: int, vocab: int) -> list[int]:
    return [int(i) for i in np.random.default_rng([seed, length]).integers(0, vocab, length)]


def _with_expert_ids(model: Any, ids: list[int]) -> tuple[Any, list[torch.Tensor]]:
    """The output of a transformers model, and the experts its routers chose."""
    chosen: list[torch.Tensor] = []
    gates = [module for name, module in model.named_modules() if name.endswith("mlp.gate")]
    hooks = [g.register_forward_hook(lambda module, inputs, out: chosen.append(out[2])) for g in gates]
    with torch.no_grad():
        output = model(torch.tensor([ids]), use_cache=True)
    for hook in hooks:
        hook.remove()
    return output, chosen


def _check(family: str, seed: int, tmp_path: Path) -> tuple[int, int]:
    """(positions checked, positions left out)."""
    model = hf_model(family, seed)
    harness = Harness(write_hf_dir(model, tmp_path / f"{family}-{seed}"), seed=seed)
    config = harness.loaded.model.config
    assert config.moe is not None
    left_out = 0
    for length in PROMPT_LENGTHS:
        ids = _prompt(length, seed, config.vocab_size)
        expected, expert_ids = _with_expert_ids(model, ids)
        undecided = Undecided(config.moe, 1e-5, expert_ids)
        harness.tap(undecided)
        sequence = harness.sequence()
        (actual,) = harness.step([Work(sequence, ids, is_prompt=True, outputs=length)])
        sure = ~undecided.positions.numpy()
        left_out += int((~sure).sum())
        logits = expected.logits[0].numpy()
        close(actual[sure], logits[sure], 1e-4)
        assert (actual[sure].argmax(-1) == logits[sure].argmax(-1)).all()

        for layer in range(config.num_layers):
            cached = expected.past_key_values.layers[layer]
            latent = np.concatenate(
                [cached.keys[0, 0].numpy(), _interleaved(cached.values[0, 0].numpy(), family)], -1
            )
            close(harness.cached_rows(sequence, layer)[sure], latent[sure], 1e-5)
        sequence.release()
    return sum(PROMPT_LENGTHS), left_out


def _interleaved(k_rope: np.ndarray, family: str) -> np.ndarray:
    """transformers keeps the rotated key of V3 with its halves apart; kvfold keeps pairs side by side."""
    if family.startswith("v2") or CONFIGS[family].get("rope_interleave") is False:
        return k_rope
    half = k_rope.shape[-1] // 2
    return np.stack([k_rope[:, :half], k_rope[:, half:]], -1).reshape(k_rope.shape)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_latents_equal_transformers(family: str, tmp_path: Path) -> None:
    """0.1 % of the positions may be left out, where a router is undecided. Of the 317 of one seed that would be none, so
    one is allowed here; the 20 seeds below, 6,340 positions, hold to 0.1 %."""
    checked, left_out = _check(family, 0, tmp_path)
    assert left_out <= max(1, checked // 1000)


@pytest.mark.full
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_latents_equal_transformers_over_20_seeds(family: str, tmp_path: Path) -> None:
    results = [_check(family, seed, tmp_path) for seed in range(20)]
    checked, left_out = (sum(column) for column in zip(*results, strict=True))
    print(f"{family}: {checked} positions, {left_out} left out")
    assert left_out < checked / 1000
