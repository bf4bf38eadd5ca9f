"""Backend plain: its scratch is bounded, bfloat16 rounds and no more, what it cannot do it says."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from kit.harness import Harness, close
from kit.tiny_models import tiny_model, write_gguf
from kvfold.backends.plain import PlainOps
from kvfold.engine.batch import Work, build_batch
from kvfold.mla.plan import Fa, Mla, MlaPlan, choose

FORMS = [(mla, fa) for mla in ("0", "1", "2") for fa in ("0", "1")]


def ids(length: int, vocab: int, seed: int = 5) -> list[int]:
    return [int(i) for i in np.random.default_rng(seed).integers(0, vocab, length)]


@pytest.mark.parametrize(("mla", "fa"), FORMS)
@pytest.mark.parametrize("family", ["v2", "v3-odd"])
def test_bfloat16_rounds_and_no_more(family: str, mla: str, fa: str, tmp_path: Path) -> None:
    # Dense layers only: a router near a tie turns a rounding into another expert.
    path = write_gguf(tiny_model(family, first_k_dense_replace=3), tmp_path / "m.gguf")
    exact = Harness(path, mla=mla, fa=fa, threads=1)
    text = ids(100, exact.loaded.model.config.vocab_size)
    expected = exact.logits(text)
    rounded = Harness(path, mla=mla, fa=fa, dtype="bfloat16", threads=1).logits(text, [80, 20])
    # 8 significant bits: a rounding is off by at most 3.9e-3 of a value, by 3.9e-3 / sqrt(3) at random. Three layers
    # round about 50 values on a logit's way and 50 matrices beside them: sqrt(100 / 3) * 3.9e-3 = 5.8 * 3.9e-3 together.
    # Measured: 4.4 to 4.9, and 5.0 to 8.1 of the largest logit where it is worst.
    spread = np.sqrt(np.mean((rounded - expected) ** 2) / np.mean(expected**2)) / 3.9e-3
    assert 1 < spread < 5.8, f"root mean square of the error: {spread:.3g} roundings"
    close(rounded, expected, 2 * 5.8 * 3.9e-3)


@pytest.mark.parametrize(("mla", "fa"), [(mla, fa) for mla, fa in FORMS if mla != "1"])
def test_keys_are_gathered_within_the_workspace(
    mla: str, fa: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twenty heads over 200 keys, in a workspace for three of them: groups of heads, and the same logits."""
    path = write_gguf(tiny_model("v2", num_attention_heads=20, num_key_value_heads=20), tmp_path / "m.gguf")
    harness = Harness(path, mla=mla, fa=fa, threads=1)
    config = harness.loaded.model.config
    text = ids(200, config.vocab_size)
    expected = harness.logits(text)

    per_head = (config.mla.qk_head_dim + config.mla.v_head_dim) * 4
    tile = len(text) if fa == "0" else 512  # an online softmax plans for tiles of 512 keys
    workspace = 2 * 3 * tile * per_head
    harness.loaded.backend.workspace_bytes = workspace  # type: ignore[attr-defined]
    sizes = []
    attend = PlainOps._attend

    def watched(self: PlainOps, q: Tensor, keys_values: Callable[..., Any], *rest: Any) -> Tensor:
        def counted(start: int, stop: int) -> tuple[Tensor, Tensor]:
            k, v = keys_values(start, stop)
            sizes.append((len(k), (k.numel() + v.numel()) * 4))
            return k, v

        return attend(self, q, counted, *rest)

    monkeypatch.setattr(PlainOps, "_attend", watched)
    close(harness.logits(text), expected, 1e-5)
    assert {heads for heads, _ in sizes} == {3, 2}  # 6 groups of 3 and one of 2
    assert max(nbytes for _, nbytes in sizes) <= workspace // 2


@pytest.mark.parametrize("backend", ["plain", "native"])
def test_a_path_in_two_forms_is_refused(backend: str, tmp_path: Path) -> None:
    """Only the first of them would be computed."""
    path = write_gguf(tiny_model("v2-lite"), tmp_path / "m.gguf")
    harness = Harness(path, backend=backend, mla="1", threads=1)
    forms = iter((Fa.FUSED, Fa.UNFUSED))

    def planner(new: int, cached: int, is_prompt: bool) -> MlaPlan:
        return choose(
            harness.loaded.model.config.mla,
            new_rows=new,
            cached_rows=cached,
            is_prompt=is_prompt,
            setting=Mla.ABSORBED,
            fa=next(forms),
        )

    works = [Work(harness.sequence(), [1, 2, 3], is_prompt=True) for _ in range(2)]
    with pytest.raises(ValueError, match=r"^segments: path 1 twice, expected once\.$"):
        harness.loaded.backend.start(build_batch(works, planner).step)


WITHOUT_TORCH = """
import importlib.util, sys
sys.modules["torch"] = None
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "torch" else find_spec(name, *rest)
sys.argv = ["kvfold", "run", "--backend", "plain", "Once"]
from kvfold.cli.main import main
main()
"""


def test_without_torch_the_sentence_names_the_extra() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "kvfold: No backend can run this model: plain: torch is not installed: "
        "pip install -c constraints.txt '.[torch]' where kvfold was cloned.\n"
    )
