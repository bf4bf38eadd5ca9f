"""Runs a loaded model step by step through the production functions, with unused memory poisoned."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvfold.cache.pages import Sequence
from kvfold.engine.batch import Work, build_batch
from kvfold.load import Loaded, Settings, load
from kvfold.mla.plan import MlaPlan

Logits = NDArray[np.float32]  # or float64, of a harness in it


class Harness:
    """A model whose cache is full of NaN and whose pages come in scrambled order. dtype may be float64 as well, with
    plain: the cache is then float64, whatever its type."""

    def __init__(self, path: Path, *, seed: int = 0, **settings: Any) -> None:
        is_float64 = settings.get("dtype") == "float64"
        if is_float64:
            settings["dtype"] = "float32"
        defaults: dict[str, Any] = {
            "cache_type": "f32", "dtype": "float32", "backend": "plain", "threads": 2, "n_ctx": 2048
        }  # fmt: skip
        self.loaded: Loaded = load(path, Settings.parse(**(defaults | settings)))
        if is_float64:
            self._widen()
        for array in self.loaded.cache.arrays:
            array.fill({"uint16": 0x7FC0, "uint8": 0xFF}.get(array.dtype.name, np.nan))  # q8_0: every scale is NaN
        pool = self.loaded.pool
        pool._cold = np.random.default_rng(seed).permutation(pool.num_pages).tolist()

    def _widen(self) -> None:
        import torch

        self.loaded.backend.dtype = torch.float64  # type: ignore[attr-defined]
        cache = self.loaded.cache
        cache.arrays = tuple(np.empty(array.shape, np.float64) for array in cache.arrays)

    def tap(self, watch: Callable[[str, Any], None] | None) -> None:
        """plain only: hand every op's name and value to `watch`."""
        self.loaded.backend.tap = watch  # type: ignore[attr-defined]

    def sequence(self) -> Sequence:
        return Sequence(self.loaded.pool)

    def step(self, works: list[Work], planner: Callable[[int, int, bool], MlaPlan] | None = None) -> list[Logits]:
        """Runs one step; the logits of each work's output rows."""
        batch = build_batch(works, planner or self.loaded.plan)
        run = self.loaded.backend.start(batch.step)
        run.run()
        batch.commit()
        return [run.outputs["logits"][rows] for rows in batch.output_slices]

    def logits(self, ids: list[int], chunks: list[int] | None = None, *, is_prompt: bool = True) -> Logits:
        """Logits at every position, the prompt fed in chunks of these lengths (None: whole)."""
        sequence = self.sequence()
        parts = []
        start = 0
        for length in chunks or [len(ids)]:
            work = Work(sequence, ids[start : start + length], is_prompt=is_prompt, outputs=length)
            parts += self.step([work])
            start += length
        assert start == len(ids)
        sequence.release()
        return np.concatenate(parts)

    def cached_rows(self, sequence: Sequence, layer: int) -> NDArray[np.float32]:
        """The latent rows of a sequence: [length, latent_dim]."""
        array = self.loaded.cache.arrays[0][layer]
        return array[sequence.pages].reshape(-1, array.shape[-1])[: sequence.length].astype(np.float32)


def close(actual: Logits, expected: Logits, relative: float) -> None:
    """max |delta| <= relative * max |expected|; says where it is worst."""
    assert actual.shape == expected.shape
    delta = np.abs(actual - expected)
    assert np.isfinite(actual).all(), f"not finite at {np.argwhere(~np.isfinite(actual))[0].tolist()}"
    worst = np.unravel_index(delta.argmax(), delta.shape)
    bound = relative * np.abs(expected).max()
    assert delta[worst] <= bound, (
        f"at {[int(i) for i in worst]}: expected {expected[worst]:.7g}, got {actual[worst]:.7g}, "
        f"off by {delta[worst]:.3g} > {bound:.3g}"
    )
