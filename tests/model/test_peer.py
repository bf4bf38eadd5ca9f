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


# llama.cpp ranks the groups of V2 as those of V3, so V2 is compared without groups. It wants q_lora_rank.
_NO_GROUPS = {"n_group": 1, "topk_group": 1}
_GREEDY = _NO_GROUPS | {"topk_method": "greedy"}
_FAMILIES = {"v2": _GREEDY, "v3": {}, "v3-yarn": {}, "v3-odd": {}, "v3-tied": {}}
_F32 = 0  # ggml's number: in its default F16 cache llama.cpp is up to 1e-3 away from itself


def _divergence(path: Path, length: int) -> float:
    """Mean KL of our logits from llama.cpp's."""
    ids = [int(i) for i in np.random.default_rng(length).integers(0, 256, length)]
    peer = llama_cpp.Llama(
        str(path), n_ctx=512, n_batch=512, logits_all=True, verbose=False, n_threads=2, type_k=_F32, type_v=_F32
    )
    peer.eval(ids)
    expected = _log_softmax(np.asarray(peer.scores[:length]))
    actual = _log_softmax(Harness(path, cache_type="f32").logits(ids))
    mean = float((np.exp(expected) * (expected - actual)).sum(-1).mean())
    print(f"{path.name}, {length} tokens: mean KL {mean:.2e}")
    return mean


@pytest.mark.parametrize("layout", list(KvLayout))
@pytest.mark.parametrize("family", _FAMILIES)
def test_llama_cpp_routes_as_we_do(family: str, layout: KvLayout, tmp_path: Path) -> None:
    """F32 files: nothing is rounded, so both engines choose the same experts."""
    tiny = tiny_model(family, **_FAMILIES[family])
    path = write_gguf(tiny, tmp_path / f"{family}-{layout.value}-f32.gguf", layout=layout)
    assert _divergence(path, 130) < 1e-6


@pytest.mark.parametrize("layout", list(KvLayout))
@pytest.mark.parametrize("family", ["v2", "v3", "v3-yarn"])
def test_llama_cpp_has_the_same_logits_in_f16(family: str, layout: KvLayout, tmp_path: Path) -> None:
    """Every expert is taken: llama.cpp rounds activations to F16, which moves a router near a tie to another expert."""
    everyone = _NO_GROUPS | {"num_experts_per_tok": 16}
    tiny = tiny_model(family, **(_FAMILIES[family] | everyone))
    path = write_gguf(tiny, tmp_path / f"{family}-{layout.value}-f16.gguf", layout=layout, ftype="F16")
    assert _divergence(path, 130) < 1e-4
