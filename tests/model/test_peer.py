"""The same small GGUF in llama.cpp, through llama-cpp-python."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kit.harness import Harness
from kit.routing import Undecided
from kit.tiny_models import tiny_model, write_gguf
from kvfold.formats.tensor_names import KvLayout

llama_cpp = pytest.importorskip("llama_cpp")

pytestmark = pytest.mark.peer


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(-1, keepdims=True))


# llama.cpp ranks the groups of V2 as those of V3, so V2 is compared without groups. It wants q_lora_rank.
_NO_GROUPS = {"n_group": 1, "topk_group": 1, "topk_method": "greedy"}
_FAMILIES = {"v2": _NO_GROUPS, "v3": {}, "v3-yarn": {}, "v3-odd": {}, "v3-tied": {}}
# llama.cpp rounds activations to F16 before it multiplies: router logits of order 4 move by a few 1e-3.
_ROUTER_MARGIN = 1e-2
_F32 = 0  # ggml's number: in its default F16 cache llama.cpp is up to 1e-3 away from itself


@pytest.mark.parametrize("layout", list(KvLayout))
@pytest.mark.parametrize("family", _FAMILIES)
@pytest.mark.parametrize("length", [17, 130])
def test_llama_cpp_has_the_same_logits(family: str, layout: KvLayout, length: int, tmp_path: Path) -> None:
    tiny = tiny_model(family, **_FAMILIES[family])
    path = write_gguf(tiny, tmp_path / "m.gguf", layout=layout, ftype="F16")
    ids = [int(i) for i in np.random.default_rng(length).integers(0, 256, length)]
    peer = llama_cpp.Llama(
        str(path), n_ctx=512, n_batch=512, logits_all=True, verbose=False, n_threads=2, type_k=_F32, type_v=_F32
    )
    peer.eval(ids)
    expected = _log_softmax(np.asarray(peer.scores[:length]))
    harness = Harness(path, cache_type="f32")
    moe = harness.loaded.model.config.moe
    assert moe is not None
    undecided = Undecided(moe, _ROUTER_MARGIN)
    harness.tap(undecided)
    actual = _log_softmax(harness.logits(ids))
    sure = ~undecided.positions.numpy()
    divergence = (np.exp(expected) * (expected - actual)).sum(-1)[sure]
    print(f"{family} {layout.value} {length}: {(~sure).sum()} undecided, mean KL {divergence.mean():.2e}")
    assert sure.mean() > 0.7
    assert divergence.mean() < 1e-4
