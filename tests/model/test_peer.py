"""The same small GGUF in llama.cpp, through llama-cpp-python."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kit.harness import Harness
from kit.tiny_models import tiny_model, write_gguf
from kvfold.formats.tensor_names import KvLayout

llama_cpp = pytest.importorskip("llama_cpp")

pytestmark = pytest.mark.peer


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(-1, keepdims=True))


@pytest.mark.parametrize("layout", list(KvLayout))
@pytest.mark.parametrize("family", ["v2", "v3", "v3-yarn"])
@pytest.mark.parametrize("length", [17, 130])
def test_llama_cpp_has_the_same_logits(family: str, layout: KvLayout, length: int, tmp_path: Path) -> None:
    path = write_gguf(tiny_model(family), tmp_path / "m.gguf", layout=layout, ftype="F16")
    ids = [int(i) for i in np.random.default_rng(length).integers(0, 256, length)]
    peer = llama_cpp.Llama(str(path), n_ctx=512, n_batch=512, logits_all=True, verbose=False, n_threads=2)
    peer.eval(ids)
    expected = _log_softmax(np.asarray(peer.scores[:length]))
    actual = _log_softmax(Harness(path, cache_type="f16").logits(ids))
    divergence = (np.exp(expected) * (expected - actual)).sum(-1)
    print(f"{family} {layout.value} {length}: mean KL {divergence.mean():.2e}, worst {divergence.max():.2e}")
    assert divergence.mean() < 1e-4
