"""The absorbed path where products round, against its definition in quant/attention.py: every layout, form, cache type and
instruction set, through the production ops. The cache around a sequence's rows is NaN."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from backends.test_kernels import ISAS, random_weight
from backends.test_native import WIDE
from backends.test_native_ops import Bench, hand_over
from kit.harness import Harness
from kit.tiny_models import tiny_model
from kvfold import _native
from kvfold.backends.native import CACHE_TYPES
from kvfold.cache.latent import CacheType, codes_and_scales, decode, encode
from kvfold.config import MlaConfig, ModelConfig
from kvfold.errors import SettingError
from kvfold.formats.synthetic import synthesize
from kvfold.mla.absorb import KvUp, split_k_b_v_b, split_kv_b
from kvfold.model.program import Recorder, Value
from kvfold.quant.activations import rounded, rounding_for
from kvfold.quant.attention import attend_codes, attend_latents
from kvfold.quant.decode import decode_tensor
from kvfold.quant.tensor import QuantTensor
from kvfold.quant.types import by_name

Array = NDArray[np.float32]

BLOCKS = MlaConfig(5, 32, 32, 32, 96, None, 0.3)
ODD = MlaConfig(3, 7, 5, 33, 35, None, 0.4)
MANY_HEADS = MlaConfig(70, 32, 32, 32, 64, None, 0.2)  # a group of four tiles, and one of 6 heads
RELEASED = MlaConfig(16, 128, 64, 128, 512, None, 0.1147)
LENGTHS = (1, 17, 100)


@pytest.fixture
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    _native.force_isa(request.param)
    yield request.param
    _native.force_isa("auto")


every_isa = pytest.mark.parametrize("isa", ISAS, indirect=True)


def assert_follows(got: Array, want: NDArray[np.float64], what: str) -> None:
    """1e-5 of a row's size, but for numbers that agree to 1e-7 and lie on either side of the middle between two
    bfloat16 or two codes. A step of a query's code, 1/127 of the largest of 32, moves scores of this spread by up to
    0.03, and a step of an output's code is 1/127 of its largest of 32."""
    size = np.sqrt((want**2).mean(1, keepdims=True)) + 1e-30
    off = np.abs(got - want) / size
    assert np.median(off) <= 1e-5 and np.isfinite(got).all(), f"{what}: median {np.median(off):.1e}"
    assert (off > 1e-4).mean() <= 2e-2 and off.max() <= 6e-2, f"{what}: {(off > 1e-4).mean():.1e}, {off.max():.1e}"


@dataclass
class Layer:
    """Queries, latents and up-projections of random numbers, and the four ops over them."""

    mla: MlaConfig
    layout: str = "kv_b"
    type: str = "Q8_0"
    cache: CacheType = CacheType.F16
    lengths: tuple[int, ...] = LENGTHS

    def __post_init__(self) -> None:
        mla, rng = self.mla, np.random.default_rng(1)
        rows, heads, lora, nope = sum(self.lengths), mla.num_heads, mla.kv_lora_rank, mla.qk_nope_head_dim
        self.q = rng.standard_normal((rows, heads * mla.qk_head_dim)).astype(np.float32)
        self.latents = rng.standard_normal((rows, mla.latent_dim)).astype(np.float32)
        t = by_name(self.type)
        if self.layout == "kv_b":
            kv_b = random_weight(t, heads * (nope + mla.v_head_dim), lora, seed=1)
            self.parts: dict[str, Array | tuple[QuantTensor, ...]] = {"kv_b": (kv_b,)}
            self.up = KvUp(kv_b="kv_b")
            self.w_uk, self.w_uv = split_kv_b(decode_tensor(kv_b).astype(np.float64), mla)
        else:
            k_b = tuple(random_weight(t, lora, nope, seed=h) for h in range(heads))
            v_b = tuple(random_weight(t, mla.v_head_dim, lora, seed=90 + h) for h in range(heads))
            self.parts, self.up = {"k_b": k_b, "v_b": v_b}, KvUp(k_b="k_b", v_b="v_b")
            both = (np.stack([decode_tensor(w).astype(np.float64) for w in part]) for part in (k_b, v_b))
            self.w_uk, self.w_uv = split_k_b_v_b(*both, mla)
        # Scores spread over about +-10, whatever the weights are.
        folded = self.folded(self.q[-1])
        self.q *= np.float32(10 / (2 * mla.softmax_scale * (folded @ self.latents.T).std()))

    def folded(self, q: Array) -> Array:
        mla, per_head = self.mla, q.reshape(self.mla.num_heads, -1)
        q_nope = np.ascontiguousarray(per_head[:, : mla.qk_nope_head_dim])
        if self.layout != "kv_b":
            q_nope = rounded(q_nope, rounding_for(by_name(self.type)))
        folded = np.einsum("hn,hnc->hc", q_nope, self.w_uk)
        return np.concatenate([folded, per_head[:, mla.qk_nope_head_dim :]], axis=1).astype(np.float32)

    def definition(self) -> NDArray[np.float64]:
        mla, out, start = self.mla, [], 0
        stored = encode(self.latents, self.cache)
        for length in self.lengths:
            for row in range(start, start + length):
                folded, seen = self.folded(self.q[row]), stored[start : row + 1]
                if self.cache is CacheType.Q8_0:
                    o_latent = attend_codes(folded, *codes_and_scales(seen), mla.kv_lora_rank, mla.softmax_scale)
                else:
                    latents = decode(seen, self.cache)
                    o_latent = attend_latents(folded, latents, mla.kv_lora_rank, mla.softmax_scale)
                o_rounded = rounded(o_latent.astype(np.float32), rounding_for(by_name(self.type)))
                out.append(np.einsum("hc,hvc->hv", o_rounded, self.w_uv).reshape(-1))
            start += length
        return np.stack(out)

    def run(self, *, fused: bool = True, threads: int = 2, workspace_bytes: int = 8 << 20) -> Array:
        mla, q_width = self.mla, self.q.shape[1]

        def record(ops: Recorder, value: Value) -> None:
            end = q_width + mla.kv_lora_rank
            ops.append_latent("append", 0, ops.columns(value, q_width, end), ops.columns(value, end, value.width))
            q = ops.fold_q("fold", ops.columns(value, 0, q_width), self.up, mla)
            o_latent = ops.attend_latent("attend", 0, q, mla)
            hand_over(ops, "out", ops.unfold_v("unfold", o_latent, self.up, mla))

        bench = Bench(
            np.concatenate([self.q, self.latents], axis=1),
            record,
            self.parts,
            cache_rows=(mla.latent_dim,),
            cache_type=list(CacheType).index(self.cache),
            fused=fused,
            lengths=self.lengths,
            threads=threads,
            workspace_bytes=workspace_bytes,
            rounds_activations=True,
        )
        return bench.run()["out"]


@every_isa
@pytest.mark.parametrize("cache", list(CACHE_TYPES))
@pytest.mark.parametrize("layout", ["kv_b", "k_b, v_b"])
def test_attention_follows_the_definition(layout: str, cache: CacheType, isa: str) -> None:
    layer = Layer(BLOCKS, layout, cache=cache)
    assert_follows(layer.run(fused=layout == "kv_b"), layer.definition(), f"{layout} {cache} {isa}")


@every_isa
@pytest.mark.parametrize("cache", [CacheType.F32, CacheType.F16, CacheType.BF16])
def test_odd_dimensions(cache: CacheType, isa: str) -> None:
    layer = Layer(ODD, "k_b, v_b", "F16", cache, lengths=(3, 70))
    for fused in (True, False):
        assert_follows(layer.run(fused=fused), layer.definition(), f"{cache} {fused} {isa}")


@every_isa
@pytest.mark.parametrize("type", ["F16", "BF16"])
def test_an_odd_number_of_columns_is_folded(type: str, isa: str) -> None:
    layer = Layer(ODD, "kv_b", type, lengths=(3, 7))
    assert_follows(layer.run(), layer.definition(), f"{type} {isa}")


@every_isa
@pytest.mark.parametrize("cache", [CacheType.F16, CacheType.Q8_0])
@pytest.mark.parametrize("mla", [MANY_HEADS, RELEASED], ids=["70 heads", "released"])
def test_head_counts(mla: MlaConfig, cache: CacheType, isa: str) -> None:
    layer = Layer(mla, "kv_b", "IQ4_NL", cache, lengths=(3,) if mla is RELEASED else (1, 9))
    assert_follows(layer.run(workspace_bytes=16 << 20), layer.definition(), f"{cache} {isa}")


@every_isa
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("length", [310, 600])
def test_runs_of_several_pages(length: int, fused: bool, isa: str) -> None:
    """Rows of up to five and ten pages, the last one not whole: runs of one page to three, of which two go at once."""
    layer = Layer(BLOCKS, cache=CacheType.Q8_0, lengths=(2, length))
    assert_follows(layer.run(fused=fused), layer.definition(), f"{length} {fused} {isa}")


@every_isa
@pytest.mark.parametrize("lengths", [(1, 2), (2, 25)], ids=["few rows", "many"])
@pytest.mark.parametrize(
    "type",
    [
        "F32",
        "F16",
        "BF16",
        "Q4_0",
        "Q4_1",
        "Q5_0",
        "Q5_1",
        "Q8_0",
        "IQ4_NL",
        "IQ4_XS",
        "Q2_K",
        "Q3_K",
        "Q4_K",
        "Q5_K",
        "Q6_K",
    ],
)
def test_folding_weights_of_every_kind(type: str, lengths: tuple[int, int], isa: str) -> None:
    """By columns and by rows, few of them without a panel, in vector code and in the common one, a head in one piece and in
    two of 256 columns."""
    layer = Layer(MlaConfig(3, 32, 32, 32, 512, None, 0.3), "kv_b", type, lengths=lengths)
    want = layer.definition()
    for threads in (1, 2):
        assert_follows(layer.run(threads=threads), want, f"{type} {lengths} {threads} {isa}")


@pytest.mark.parametrize("type", ["Q8_0", "IQ4_NL"])
def test_keys_folded_by_rows(type: str) -> None:
    layer = Layer(MlaConfig(3, 64, 32, 64, 96, None, 0.3), "k_b, v_b", type, lengths=(1, 7, 120))
    assert_follows(layer.run(), layer.definition(), type)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("cache", [CacheType.F16, CacheType.Q8_0])
def test_bits_do_not_depend_on_threads_or_workspace(cache: CacheType, fused: bool) -> None:
    """440 keys are four runs of pages, which several members share or one goes through alone."""
    layer = Layer(BLOCKS, cache=cache, lengths=(1, 440))
    whole = layer.run(fused=fused)
    for threads in (1, 3):
        assert np.array_equal(whole, layer.run(fused=fused, threads=threads)), threads
    size, runs = 1 << 20, 0
    while True:
        try:
            assert np.array_equal(whole, layer.run(fused=fused, threads=1, workspace_bytes=size)), size
        except SettingError:
            break
        size, runs = size * 8 // 10, runs + 1
    assert runs >= 2


@pytest.mark.parametrize("cache", [CacheType.F16, CacheType.Q8_0])
def test_nan_reaches_the_rows_that_see_it_and_no_other(cache: CacheType) -> None:
    layer = Layer(BLOCKS, cache=cache, lengths=(30, 9))
    clean = layer.run()
    layer.latents[20, 7] = np.nan
    got = layer.run()
    assert np.isnan(got[20:30]).any(axis=1).all()
    rest = np.r_[0:20, 30:39]
    assert np.array_equal(got[rest], clean[rest])


def test_deterministic_folding_by_columns_takes_each_row_alone(tmp_path: Path) -> None:
    """Without it up to four rows pass over a column together, and more over a panel."""
    file = tmp_path / "m.gguf"
    synthesize(ModelConfig.from_hf(tiny_model("v3", **WIDE).config), file, type="IQ4_NL", legacy_kv_b=True)
    harness = Harness(file, backend="native", dtype="int8", mla="1", deterministic=True)
    # Many rows: sums that differ in their last bit are the same bfloat16 but once in some ten thousand.
    text = [int(i) for i in np.random.default_rng(1).integers(0, 256, 240)]
    together = harness.logits(text, [120, 120], is_prompt=False)
    assert np.array_equal(together, harness.logits(text, [3, 1] * 60, is_prompt=False))
