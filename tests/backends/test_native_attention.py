"""Attention where products round, against its definition in quant/attention.py: every path, form, layout, cache type and
instruction set, through the production ops."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from backends.test_kernels import ISAS, random_weight
from backends.test_native_int8 import assert_op_by_op, wide_model
from backends.test_native_ops import Bench, hand_over
from kit.harness import Harness
from kit.tiny_models import tiny_model, write_gguf
from kvfold import _native
from kvfold.backends.native import CACHE_TYPES
from kvfold.cache.latent import CacheType, decode, encode
from kvfold.config import MlaConfig
from kvfold.errors import SettingError
from kvfold.formats.synthetic import synthesize
from kvfold.mla.absorb import KvUp
from kvfold.model.program import Recorder, Value
from kvfold.quant.activations import to_bf16
from kvfold.quant.attention import BLOCK_KEYS, Numbers, attend, expand_by_columns, expand_by_rows
from kvfold.quant.tensor import QuantTensor
from kvfold.quant.types import by_name

Array = NDArray[np.float32]

ODD = MlaConfig(5, 24, 12, 20, 96, None, 0.3)
ODDER = MlaConfig(3, 7, 5, 33, 32, None, 0.4)
RELEASED = MlaConfig(2, 128, 64, 128, 512, None, 0.1147)
BLOCKS = MlaConfig(5, 32, 32, 32, 96, None, 0.3)
CACHES = [cache.value for cache in CACHE_TYPES]
LENGTHS = (1, 17, 300)


@pytest.fixture
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    _native.force_isa(request.param)
    yield request.param
    _native.force_isa("auto")


every_isa = pytest.mark.parametrize("isa", ISAS, indirect=True)


def numbers() -> Numbers:
    return Numbers(_native.attention_numbers())


def cached(x: Array, cache_type: str) -> Array:
    return decode(encode(x, CacheType(cache_type)), CacheType(cache_type))


class Layer:
    """Queries, latents and up-projections of random numbers, and the three ops over them."""

    def __init__(self, mla: MlaConfig, layout: str, type: str, lengths: tuple[int, ...] = LENGTHS) -> None:
        self.mla, self.lengths = mla, lengths
        rng = np.random.default_rng(1)
        rows, lora = sum(lengths), mla.kv_lora_rank
        self.q = rng.standard_normal((rows, mla.num_heads * mla.qk_head_dim)).astype(np.float32)
        self.c_kv = rng.standard_normal((rows, lora)).astype(np.float32)
        self.k_rope = rng.standard_normal((rows, mla.qk_rope_head_dim)).astype(np.float32)
        heads = range(mla.num_heads)
        if layout == "kv_b":
            height = mla.qk_nope_head_dim + mla.v_head_dim
            parts = {"kv_b": tuple(random_weight(by_name(type), height, lora, seed=h) for h in heads)}
        else:
            nope = mla.qk_nope_head_dim
            k_type = type if nope % by_name(type).block_elements == 0 else "F32"
            parts = {
                "k_b": tuple(random_weight(by_name(k_type), lora, nope, seed=h) for h in heads),
                "v_b": tuple(random_weight(by_name(type), mla.v_head_dim, lora, seed=20 + h) for h in heads),
            }
        self.parts = parts
        self.up = KvUp(kv_b="kv_b") if layout == "kv_b" else KvUp(k_b="k_b", v_b="v_b")
        # Scores spread over about +-10, whatever the weights are.
        scores = [(self.heads_of(self.q, h) * self.keys(h)[0]).sum(1).std() for h in heads]
        self.q *= np.float32(10 / (2 * mla.softmax_scale * np.mean(scores)))

    def heads_of(self, x: Array, head: int) -> Array:
        width = x.shape[1] // self.mla.num_heads
        return x[:, head * width : (head + 1) * width]

    def keys(self, head: int) -> tuple[Array, Array]:
        """K [T, qk] and V [T, v] of a head, before they are rounded."""
        if "kv_b" in self.parts:
            both = expand_by_rows(self.c_kv, self.parts["kv_b"][head])
            k_nope, v = both[:, : self.mla.qk_nope_head_dim], both[:, self.mla.qk_nope_head_dim :]
        else:
            k_nope = expand_by_columns(self.c_kv, self.parts["k_b"][head], numbers())
            v = expand_by_rows(self.c_kv, self.parts["v_b"][head])
        return np.concatenate([k_nope, self.k_rope], axis=1).astype(np.float32), v.astype(np.float32)

    def definition(self, cache_type: str = "f32") -> NDArray[np.float64]:
        """[T, H * v]. A cache of keys and values rounds them first."""
        out = np.empty((sum(self.lengths), self.mla.num_heads * self.mla.v_head_dim))
        for head in range(self.mla.num_heads):
            k, v = (cached(x, cache_type) for x in self.keys(head))
            start = 0
            for length in self.lengths:
                rows = slice(start, start + length)
                self.heads_of(out, head)[rows] = attend(
                    self.heads_of(self.q, head)[rows], k[rows], v[rows], self.mla.softmax_scale, numbers()
                )
                start += length
        return out

    def network(self, path: int) -> tuple[Array, object]:
        mla = self.mla
        x = np.concatenate([self.q, self.c_kv, self.k_rope], axis=1)
        q_width, end = self.q.shape[1], self.q.shape[1] + mla.kv_lora_rank

        def record(ops: Recorder, value: Value) -> None:
            q, c_kv = ops.columns(value, 0, q_width), ops.columns(value, q_width, end)
            k_rope = ops.columns(value, end, value.width)
            if path == 0:
                ops.append_full("append", 0, c_kv, k_rope, self.up, mla)
                out = ops.attend_full("attend", 0, q, mla)
            else:
                ops.append_latent("append", 0, c_kv, k_rope)
                o_latent = ops.attend_latent("latent", 0, ops.fold_q("fold", q, self.up, mla), mla)
                out = ops.unfold_v("unfold", o_latent, self.up, mla)
                out = ops.attend_expanded("attend", 0, q, self.up, mla, into=out)
            hand_over(ops, "out", out)

        return x, record

    def run(self, path: int, fused: bool, **settings: object) -> Array:
        mla = self.mla
        x, record = self.network(path)
        widths = (
            (mla.num_heads * mla.qk_head_dim, mla.num_heads * mla.v_head_dim) if path == 0 else (mla.latent_dim,)
        )
        weights: dict[str, Array | tuple[QuantTensor, ...]] = dict(self.parts)
        defaults = {"workspace_bytes": 8 << 20}
        bench = Bench(
            x,
            record,  # type: ignore[arg-type]
            weights,
            cache_rows=widths,
            path=path,
            fused=fused,
            lengths=self.lengths,
            rounds_activations=True,
            **(defaults | settings),  # type: ignore[arg-type]
        )
        return bench.run()["out"]


STEPS = {Numbers.WHOLE: 2e-3, Numbers.BF16: 2e-2}
"""What one number may change, of a row's size, that is rounded the other way: a step of 2^-15 of one of the numbers of a
score, whose row is up to 30 long here; of 2^-8."""


def assert_follows(got: Array, want: NDArray[np.float64], what: str) -> None:
    """1e-5 of a row's size, but for numbers that agree to 1e-7 and lie on either side of the middle between two that 16
    bits hold."""
    size = np.sqrt((want**2).mean(1, keepdims=True)) + 1e-30
    off = np.abs(got - want) / size
    assert np.median(off) <= 1e-5 and np.isfinite(got).all(), f"{what}: median {np.median(off):.1e}"
    far = (off > 1e-4).mean()
    assert far <= 2e-2 and off.max() <= STEPS[numbers()], f"{what}: {far:.1e}, {off.max():.1e}"


@every_isa
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("path", [0, 2])
@pytest.mark.parametrize("layout", ["kv_b", "k_b, v_b"])
def test_attention_follows_the_definition(layout: str, path: int, fused: bool, isa: str) -> None:
    layer = Layer(ODD, layout, "Q8_0")
    assert_follows(layer.run(path, fused), layer.definition(), f"{layout} {path} {fused} {isa}")


@every_isa
@pytest.mark.parametrize("path", [0, 2])
@pytest.mark.parametrize("mla", [ODDER, RELEASED], ids=["odd halves of a word", "released"])
def test_head_sizes(mla: MlaConfig, path: int, isa: str) -> None:
    layer = Layer(mla, "kv_b", "IQ4_NL", lengths=(1, 17, 150))
    assert_follows(layer.run(path, True, workspace_bytes=16 << 20), layer.definition(), f"{mla} {path} {isa}")


@pytest.mark.parametrize("type", ["F32", "F16", "BF16", "Q4_0", "Q8_0", "Q5_1"])
@pytest.mark.parametrize("layout", ["kv_b", "k_b, v_b"])
def test_weights_of_every_kind(layout: str, type: str) -> None:
    """Floats, a type of vector code, one of signed codes, one with minimums; Q6_K needs more columns and comes below."""
    layer = Layer(ODD, layout, type)
    assert_follows(layer.run(2, True), layer.definition(), f"{layout} {type}")


@pytest.mark.parametrize("type", ["Q4_K", "Q6_K", "IQ2_S"])
def test_weights_in_large_blocks(type: str) -> None:
    layer = Layer(MlaConfig(2, 32, 8, 32, 256, None, 0.3), "kv_b", type, lengths=(40,))
    assert_follows(layer.run(2, True), layer.definition(), type)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("path", [0, 2])
def test_cache_types(path: int, fused: bool, cache: str) -> None:
    layer = Layer(BLOCKS, "kv_b", "Q8_0")
    got = layer.run(path, fused, cache_type=CACHES.index(cache))
    if path == 2:
        layer.c_kv, layer.k_rope = cached(layer.c_kv, cache), cached(layer.k_rope, cache)
    assert_follows(got, layer.definition(cache if path == 0 else "f32"), cache)


@every_isa
@pytest.mark.parametrize("path", [0, 2])
def test_a_row_that_sees_one_key_gets_its_value(path: int, isa: str) -> None:
    """To 16 bits: half a step of 32767 beside its largest number, or the bfloat16 next to the definition's."""
    layer = Layer(ODD, "k_b, v_b", "Q8_0", lengths=(1,) * 8)
    got = layer.run(path, True)
    for head in range(ODD.num_heads):
        want, of_head = layer.keys(head)[1], layer.heads_of(got, head)
        if numbers() is Numbers.BF16:
            assert (of_head == to_bf16(want)).mean() >= 0.99
        else:
            assert (np.abs(of_head - want) <= np.abs(want).max(1, keepdims=True) * 2.0**-15).all()


def plain_layer(c_kv: Array, q: Array, k_rope: Array) -> Layer:
    """One sequence whose heads' keys and values are the numbers of c_kv themselves."""
    layer = Layer(ODD, "kv_b", "F32", lengths=(len(c_kv),))
    height = ODD.qk_nope_head_dim + ODD.v_head_dim
    raw = np.eye(height, ODD.kv_lora_rank, dtype=np.float32).view(np.uint8)
    layer.parts = {
        "kv_b": tuple(
            QuantTensor(f"kv_b.{h}", by_name("F32"), (height, ODD.kv_lora_rank), raw) for h in range(ODD.num_heads)
        )
    }
    layer.c_kv, layer.q, layer.k_rope = c_kv, q, k_rope
    return layer


@every_isa
@pytest.mark.parametrize("path", [0, 2])
@pytest.mark.parametrize("above", [False, True], ids=["as large as fits", "and one step more"])
@pytest.mark.parametrize("alone", [False, True], ids=["numbers alike", "a number alone"])
def test_sums_reach_what_32_bits_hold(alone: bool, above: bool, path: int, isa: str) -> None:
    """Queries that are their keys, and 300 equal weights over values of one sign, all as large as their power of two lets
    them be: 32767 of it, or half of that where it is a step more."""
    rows, width = 300, ODD.qk_head_dim
    size = np.float32(32767 / 2**9)
    if above:
        size = np.nextafter(size, np.float32(np.inf))
    c_kv = np.zeros((rows, ODD.kv_lora_rank), np.float32)
    c_kv[:, ODD.qk_nope_head_dim :] = size
    k_rope = np.zeros((rows, ODD.qk_rope_head_dim), np.float32)
    if alone:
        c_kv[:, 0] = size
    else:
        c_kv[:, : ODD.qk_nope_head_dim] = k_rope[:] = size / np.float32(np.sqrt(width))
    key = np.concatenate([c_kv[:, : ODD.qk_nope_head_dim], k_rope], 1)
    layer = plain_layer(c_kv, np.tile(key, (1, ODD.num_heads)), k_rope)
    got, want = layer.run(path, True), layer.definition()
    assert np.abs(want - size).max() <= size / 2**8  # bfloat16; 2^-14 of whole numbers
    assert_follows(got, want, f"{alone} {above} {path} {isa}")


@every_isa
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("path", [0, 2])
def test_a_key_that_is_nan_reaches_those_who_see_it_alone(path: int, fused: bool, isa: str) -> None:
    """In bfloat16 it reaches neighbours in its block too: a weight of zero times NaN."""
    layer = Layer(ODD, "kv_b", "Q8_0", lengths=(150,))
    want = layer.run(path, fused)
    layer.c_kv[131] = np.nan
    got = layer.run(path, fused)
    before = 131 if numbers() is Numbers.WHOLE else BLOCK_KEYS
    assert np.array_equal(got[:before], want[:before]) and np.isnan(got[131:]).all()


@every_isa
@pytest.mark.parametrize("path", [0, 2])
def test_sizes_that_sixteen_bits_must_follow(path: int, isa: str) -> None:
    """Values of keys that differ by 2^20, one that is all zeros, and a number that outweighs its row."""
    layer = Layer(ODD, "kv_b", "F32", lengths=(200,))
    layer.c_kv *= np.exp2(np.random.default_rng(5).integers(-20, 1, (200, 1))).astype(np.float32)
    layer.c_kv[17] = 0
    layer.q[:, ::24] *= 30
    assert_follows(layer.run(path, True), layer.definition(), f"{path} {isa}")


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("path", [0, 2])
def test_bits_do_not_depend_on_threads_or_workspace(path: int, fused: bool) -> None:
    """The smallest workspace expands a head and 128 keys at a time."""
    layer = Layer(ODD, "kv_b", "Q8_0", lengths=(17, 300))
    whole = layer.run(path, fused)
    for threads in (1, 3):
        assert np.array_equal(whole, layer.run(path, fused, threads=threads)), threads
    size, runs = 600_000, 0
    while True:
        try:
            assert np.array_equal(whole, layer.run(path, fused, threads=1, workspace_bytes=size)), size
        except SettingError:
            break
        size, runs = size * 9 // 10, runs + 1
    assert runs >= 4


def test_a_later_sequence_or_row_changes_no_bit() -> None:
    """NaN behind a row's keys reaches it in no block, and rows of another sequence never do."""
    layer = Layer(ODD, "kv_b", "Q8_0", lengths=(200,))
    whole = layer.run(2, True)
    layer.c_kv, layer.q, layer.k_rope = layer.c_kv[:130], layer.q[:130], layer.k_rope[:130]
    layer.lengths = (130,)
    assert np.array_equal(whole[:130], layer.run(2, True))


@pytest.mark.parametrize("mla", ["0", "2"])
@pytest.mark.parametrize("fa", ["0", "1"])
def test_a_prompt_in_parts_gives_the_bits_of_a_whole_one(mla: str, fa: str, tmp_path: Path) -> None:
    """Parts of more than eight rows: fewer take row dots. Dense layers, for experts count their rows."""
    model = tiny_model("v3", first_k_dense_replace=3, kv_lora_rank=96)
    path = write_gguf(model, tmp_path / "model.gguf")
    ids = [int(i) for i in np.random.default_rng(3).integers(0, 272, 300)]
    harness = Harness(path, backend="native", dtype="int8", mla=mla, fa=fa)
    whole = harness.logits(ids)
    parts = harness.logits(ids, [17, 100, 183])
    assert np.array_equal(whole, parts)


def test_few_rows_over_many_keys_join_runs_of_keys(tmp_path: Path) -> None:
    """mla=0: one row and seven rows over 600 cached keys, which are three runs, from the same inputs as plain."""
    path = tmp_path / "model.gguf"
    synthesize(wide_model(), path, type="Q8_0")
    judged = assert_op_by_op(path, [600, 1, 7], mla="0")
    assert "attend_full" in judged, judged


def test_deterministic_rows_over_many_keys_do_not_count_their_neighbours(tmp_path: Path) -> None:
    """mla=0: the last ten of 600 rows, alone and with the others."""
    path = tmp_path / "model.gguf"
    synthesize(wide_model(), path, type="Q8_0")
    harness = Harness(path, backend="native", dtype="int8", mla="0", deterministic=True)
    ids = [int(i) for i in np.random.default_rng(3).integers(0, 272, 600)]
    assert np.array_equal(harness.logits(ids), harness.logits(ids, [590, 10]))
