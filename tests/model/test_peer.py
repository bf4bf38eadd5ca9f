"""The same small GGUF in llama.cpp, through llama-cpp-python."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from backends.test_native import WIDE
from backends.test_native_int8 import Watched
from kit.harness import Harness
from kit.tiny_models import tiny_model, write_gguf
from kvfold.backends.native import NativeBackend
from kvfold.config import ModelConfig
from kvfold.engine.batch import Work, build_batch
from kvfold.formats.synthetic import synthesize
from kvfold.formats.tensor_names import KvLayout
from kvfold.load import embedded_model

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
_F32, _F16 = 0, 1  # ggml's numbers: in its default F16 cache llama.cpp is up to 1e-3 away from itself


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


# --- quantized files ----------------------------------------------------------------------------------------------------

_PROMPTS, _LENGTH = 4, 500


class _Native:
    """A file on native, with what its routers chose."""

    def __init__(self, path: Path, dtype: str, cache_type: str) -> None:
        self._harness = Harness(path, backend="native", dtype=dtype, cache_type=cache_type)
        loaded = self._harness.loaded
        self._backend = NativeBackend(
            Watched(loaded.model),  # type: ignore[arg-type]
            loaded.checkpoint.tensors,
            loaded.cache,
            threads=2,
            workspace_bytes=64 << 20,
            rounds_activations=dtype == "int8",
        )

    def run(self, ids: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """Log probabilities [T, vocabulary]; experts of each layer and token in ascending order [layers, T, k]."""
        sequence = self._harness.sequence()
        batch = build_batch([Work(sequence, ids, True, outputs=len(ids))], self._harness.loaded.plan)
        run = self._backend.start(batch.step)
        run.run()
        sequence.release()
        chosen = [made.view(np.int32) for name, made in run.outputs.items() if name.endswith(".route.ids")]
        return _log_softmax(run.outputs["logits"]), np.sort(np.stack(chosen), -1)


def _quantized(name: str, folder: Path) -> Path:
    """The embedded model, which was trained and is IQ4_NL; else random weights in the blocks of a type."""
    if name == "storyteller":
        return embedded_model()
    config = tiny_model("v3", **(WIDE | {"num_hidden_layers": 4})).config
    synthesize(ModelConfig.from_hf(config), folder / f"{name}.gguf", type=name)
    return folder / f"{name}.gguf"


@pytest.mark.parametrize("name", ["storyteller", "IQ4_NL", "Q4_K", "Q8_0"])
def test_rounding_activations_costs_no_more_than_in_llama_cpp(name: str, tmp_path: Path) -> None:
    """KL from the same file in float32, of 2000 positions, both with an F16 cache. The difference of two means over the
    same positions is known to its standard error, for a few positions where a router flipped are most of either."""
    path = _quantized(name, tmp_path)
    exact, rounded = _Native(path, "float32", "f32"), _Native(path, "int8", "f16")
    peer = llama_cpp.Llama(
        str(path), n_ctx=512, n_batch=512, logits_all=True, verbose=False, n_threads=2, type_k=_F16, type_v=_F16
    )
    ours, theirs, flips = [], [], []
    for seed in range(_PROMPTS):
        ids = [int(i) for i in np.random.default_rng(seed).integers(0, 256, _LENGTH)]
        want, experts = exact.run(ids)
        got, chosen = rounded.run(ids)
        peer.reset()
        peer.eval(ids)
        their = _log_softmax(np.asarray(peer.scores[:_LENGTH]))
        ours.append((np.exp(want) * (want - got)).sum(-1))
        theirs.append((np.exp(want) * (want - their)).sum(-1))
        flips.append((experts != chosen).any(-1).mean())
    mine, other = np.concatenate(ours), np.concatenate(theirs)
    error = (mine - other).std() / np.sqrt(len(mine))
    print(
        f"{name}: mean KL {mine.mean():.3e}, llama.cpp {other.mean():.3e} (difference known to {error:.1e}), medians "
        f"{np.median(mine):.2e} and {np.median(other):.2e}; another expert in {np.mean(flips):.2%} of layers and tokens"
    )
    assert mine.mean() <= other.mean() + 2 * error
    assert np.median(mine) <= np.median(other)
