"""quant/decode.py against gguf-py and, where that decodes nothing, against encoders written here; the compiled decoder
against quant/decode.py. Blocks are random bytes: scales take every bit pattern, infinities and NaN included."""

from collections.abc import Callable, Iterator

import gguf
import ml_dtypes
import numpy as np
import pytest
from gguf.quants import dequantize
from numpy.typing import NDArray

from kvfold import _native
from kvfold.errors import UnsupportedType
from kvfold.quant.decode import decode, decode_tensor
from kvfold.quant.tensor import QuantTensor
from kvfold.quant.types import TYPES, BlockType, by_name

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

CHUNK_BLOCKS = 10_000  # at most 10 MB of float32 at a time
DECODED = [t.name for t in TYPES if t.decodes]
# Those without a decoder in gguf-py 0.19. The tests below cover them.
NO_ORACLE = {"Q8_1", "Q8_K", "Q1_0", "I8", "I16", "I32", "I64", "F64"}
GGUF = [q.name for q in gguf.GGMLQuantizationType if q.name not in NO_ORACLE]


def random_rows(t: BlockType, blocks: int, seed: int) -> Iterator[Bytes]:
    """About `blocks` random blocks as matrices [rows, row_bytes] of 25 blocks a row, in whole groups of rows."""
    rng = np.random.default_rng([seed, t.id & 0xFFFF])
    per_row, group = 25, t.interleaved_rows
    for _ in range(0, blocks, CHUNK_BLOCKS):
        rows = max(min(blocks, CHUNK_BLOCKS) // per_row // group, 1) * group
        yield rng.integers(0, 256, (rows, t.row_bytes(per_row * t.block_elements)), np.uint8)


def assert_same_bits(got: Floats, want: Floats, where: str) -> None:
    """Equal bit for bit, NaN where NaN whatever its payload."""
    assert got.shape == want.shape and got.dtype == want.dtype == np.float32
    differ = got.view(np.uint32) != want.view(np.uint32)
    if differ.any():
        differ &= ~(np.isnan(got) & np.isnan(want))
        place = np.unravel_index(int(differ.argmax()), differ.shape)
        assert not differ.any(), f"{where}{[int(i) for i in place]}: got {got[place]!r}, expected {want[place]!r}"


def native(t: BlockType, raw: Bytes, threads: int = 1) -> Floats:
    cols = (raw.shape[1] - t.row_meta_bytes) // t.block_bytes * t.block_elements
    out = np.full((len(raw), cols), np.nan, np.float32)
    _native.decode(t.id, raw, out, threads)
    return out


def compare_with_gguf(name: str, blocks: int) -> None:
    t = by_name(name)
    special = 0
    for raw in random_rows(t, blocks, seed=1):
        with np.errstate(all="ignore"):
            want = dequantize(raw, gguf.GGMLQuantizationType[name])
        assert_same_bits(decode(t, raw), want, name)
        assert_same_bits(native(t, raw), want, f"native {name}")
        special += int(want.size - np.isfinite(want).sum())
    assert special > 0 or name in ("MXFP4", "NVFP4"), "no infinite scale was drawn"


@pytest.mark.parametrize("name", GGUF)
def test_equal_to_gguf_bit_for_bit_on_1e5_blocks(name: str) -> None:
    compare_with_gguf(name, 100_000)


@pytest.mark.full
@pytest.mark.parametrize("name", GGUF)
def test_equal_to_gguf_bit_for_bit_on_1e6_blocks(name: str) -> None:
    compare_with_gguf(name, 1_000_000)


def test_gguf_is_the_oracle_of_all_it_decodes() -> None:
    for name in NO_ORACLE:
        t = by_name(name)
        with pytest.raises(NotImplementedError):
            dequantize(np.zeros((1, t.block_bytes), np.uint8), gguf.GGMLQuantizationType[name])


@pytest.mark.parametrize("name", [name for name in DECODED if name not in GGUF])
def test_native_equals_numpy_bit_for_bit(name: str) -> None:
    t = by_name(name)
    for raw in random_rows(t, 20_000, seed=2):
        assert_same_bits(native(t, raw), decode(t, raw), name)


# Encoders for what gguf-py does not decode: levels are drawn, packed as the format says, and must come back.


def scales(rng: np.random.Generator, n: int) -> NDArray[np.float16]:
    return rng.integers(0, 1 << 16, n, np.uint16).view(np.float16)


def check_encoded(name: str, blocks: Bytes, d: NDArray[np.floating], levels: NDArray[np.int64]) -> None:
    """Blocks [n, block_bytes] must decode to d[n] * levels[n, elements]."""
    with np.errstate(invalid="ignore"):
        want = d.astype(np.float32)[:, None] * levels.astype(np.float32)
    assert_same_bits(decode(by_name(name), blocks), want, name)


def as_bytes(*fields: NDArray[np.generic]) -> Bytes:
    return np.concatenate([np.ascontiguousarray(f).reshape(len(f), -1).view(np.uint8) for f in fields], axis=1)


def test_q6_0() -> None:
    rng = np.random.default_rng(3)
    n = 2_000
    d, q = scales(rng, n), rng.integers(0, 64, (n, 32))
    low, high = np.zeros((n, 16), np.int64), np.zeros((n, 8), np.int64)
    for w in range(32):
        low[:, w % 16] |= (q[:, w] & 15) << (4 if w >= 16 else 0)
        high[:, w % 8] |= (q[:, w] >> 4) << ((2 if w >= 16 else 0) + (4 if w % 16 >= 8 else 0))
    check_encoded("Q6_0", as_bytes(d, high.astype(np.uint8), low.astype(np.uint8)), d, q - 32)


def test_q8_1_and_q8_k() -> None:
    rng = np.random.default_rng(4)
    n = 2_000
    d, q = scales(rng, n), rng.integers(-128, 128, (n, 32))
    check_encoded("Q8_1", as_bytes(d, scales(rng, n), q.astype(np.int8)), d, q)
    d32, q = rng.integers(0, 1 << 32, n, np.uint32).view(np.float32), rng.integers(-128, 128, (n, 256))
    sums = q.reshape(n, 16, 16).sum(axis=2)
    with np.errstate(over="ignore"):
        check_encoded("Q8_K", as_bytes(d32, q.astype(np.int8), sums.astype(np.int16)), d32, q)


def test_q1_0_and_q2_0() -> None:
    rng = np.random.default_rng(5)
    n = 2_000
    d, q = scales(rng, n), rng.integers(0, 2, (n, 128))
    bits = sum(q[:, i::8] << i for i in range(8))
    check_encoded("Q1_0", as_bytes(d, np.asarray(bits, np.uint8)), d, 2 * q - 1)
    q = rng.integers(0, 4, (n, 64))
    pairs = sum(q[:, i::4] << 2 * i for i in range(4))
    check_encoded("Q2_0", as_bytes(d, np.asarray(pairs, np.uint8)), d, q - 1)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("I8", np.int8),
        ("I16", np.int16),
        ("I32", np.int32),
        ("I64", np.int64),
        ("F64", np.float64),
        ("F32", np.float32),
    ],
)
def test_plain_numbers(name: str, dtype: type) -> None:
    values = np.random.default_rng(6).integers(0, 256, (7, 8 * 300), np.uint8).view(dtype)
    with np.errstate(over="ignore"):
        want = values.astype(np.float32)
    assert_same_bits(decode(by_name(name), values.view(np.uint8)), want, name)


@pytest.mark.parametrize(
    ("name", "dtype", "width"),
    [("F16", np.float16, 2), ("BF16", ml_dtypes.bfloat16, 2), ("F8_E4M3", ml_dtypes.float8_e4m3fn, 1)],
)
def test_every_short_float(name: str, dtype: type, width: int) -> None:
    codes = np.arange(256**width, dtype=f"<u{width}")[None]
    want = codes.view(dtype).astype(np.float32)
    raw = codes.view(np.uint8)
    assert_same_bits(decode(by_name(name), raw), want, name)
    assert_same_bits(native(by_name(name), raw), want, f"native {name}")


# Shapes, scales of fp8, refusals.


def fp8_tensor(rows: int, cols: int) -> tuple[QuantTensor, Floats]:
    """An fp8 matrix with block scales, one of them infinite, and its float32 values one by one."""
    rng = np.random.default_rng(7)
    raw = rng.integers(0, 256, (rows, cols), np.uint8)
    scale = rng.standard_normal((-(-rows // 128), -(-cols // 128))).astype(np.float32)
    scale[-1, 0] = np.inf
    want = np.empty((rows, cols), np.float32)
    values = raw.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    with np.errstate(invalid="ignore"):
        for r in range(rows):
            for c in range(cols):
                want[r, c] = values[r, c] * scale[r // 128, c // 128]
    return QuantTensor("w", by_name("F8_E4M3"), (rows, cols), raw, scale), want


def test_fp8_block_scales_at_odd_sizes() -> None:
    tensor, want = fp8_tensor(300, 141)
    assert_same_bits(decode_tensor(tensor), want, "fp8")
    for threads in (1, 2, 7):
        out = np.full((300, 141), np.nan, np.float32)
        _native.decode_fp8(tensor.raw, tensor.scale, out, threads)
        assert_same_bits(out, want, f"native fp8, {threads} threads")
    part = tensor.row_slice(128, 300)
    assert_same_bits(decode_tensor(part), want[128:], "rows 128 to 300")


def test_a_vector_keeps_its_shape() -> None:
    values = np.arange(5, dtype=np.float32)
    tensor = QuantTensor("norm", by_name("F32"), (5,), values.view(np.uint8)[None])
    assert_same_bits(decode_tensor(tensor), values, "norm")


@pytest.mark.parametrize("name", ["Q4_K", "BF16", "IQ2_XS_R4"])
def test_leading_axes_and_rows_beyond_a_chunk(name: str) -> None:
    t = by_name(name)
    cols = 2048  # 96 rows: chunks of 128 rows split [5, 96]
    raw = np.random.default_rng(8).integers(0, 256, (5, 96, t.row_bytes(cols)), np.uint8)
    whole = decode(t, raw)
    assert whole.shape == (5, 96, cols)
    for expert in range(5):
        assert_same_bits(whole[expert], decode(t, raw[expert]), f"expert {expert}")
    assert decode(t, raw[:, :0]).shape == (5, 0, cols)


def test_what_cannot_be_decoded_is_refused() -> None:
    with pytest.raises(UnsupportedType, match=r"IQ4_K .number 139. is not decoded.*IQ4_NL"):
        decode(by_name("IQ4_K"), np.zeros((1, 144), np.uint8))
    with pytest.raises(UnsupportedType, match=r"rows of 143 uint8.*multiple of 144"):
        decode(by_name("Q4_K"), np.zeros((1, 143), np.uint8))
    with pytest.raises(UnsupportedType, match=r"rows of 144 int8"):
        decode(by_name("Q4_K"), np.zeros((1, 144), np.int8))
    with pytest.raises(UnsupportedType, match=r"\(6, 144\), expected whole groups of 4"):
        decode(by_name("Q4_K_R4"), np.zeros((6, 144), np.uint8))


# The compiled decoder: what it is given, and what it must leave alone.


def test_native_knows_the_types_that_decode_and_their_sizes() -> None:
    table = {
        t.id: (t.block_elements, t.block_bytes, t.interleaved_rows, t.row_meta_bytes) for t in TYPES if t.decodes
    }
    assert _native.decodable_types() == table


@pytest.mark.parametrize("name", ["Q4_0", "Q6_K", "IQ4_NL_R4", "F16"])
@pytest.mark.parametrize("threads", [1, 2, 3, 64])
def test_threads_and_addresses_change_nothing_and_neighbours_stay(name: str, threads: int) -> None:
    t = by_name(name)
    cols, rows = 3 * t.block_elements, 68
    raw = next(random_rows(t, CHUNK_BLOCKS, seed=9))[:rows, : t.row_bytes(cols)].copy()
    odd = np.empty(raw.nbytes + 1, np.uint8)[1:].reshape(raw.shape)
    odd[:] = raw
    odd.flags.writeable = False
    memory = np.full((rows + 2, cols), 7, np.float32)
    _native.decode(t.id, odd, memory[1:-1], threads)
    assert_same_bits(memory[1:-1], decode(t, raw), name)
    assert (memory[[0, -1]] == 7).all()


@pytest.mark.parametrize("name", DECODED)
def test_native_rows_by_number(name: str) -> None:
    t = by_name(name)
    raw = next(random_rows(t, 1_200, seed=10))
    whole = native(t, raw)
    rows = np.array([0, len(raw) - 1, 5, 5, 2], np.int32)
    out = np.full((len(rows), whole.shape[1]), np.nan, np.float32)
    _native.decode_rows(t.id, raw, rows, out)
    assert_same_bits(out, whole[rows], name)


def bad_calls() -> dict[str, tuple[type[Exception], str, Callable[[], None]]]:
    q4_k, r4 = by_name("Q4_K").id, by_name("Q4_K_R4").id
    raw, out = np.zeros((4, 144), np.uint8), np.zeros((4, 256), np.float32)
    scale = np.zeros((1, 2), np.float32)
    fp8 = np.zeros((4, 256), np.uint8)
    locked = out.copy()
    locked.flags.writeable = False
    rows = np.zeros(4, np.int32)
    run, rows_of, run_fp8 = _native.decode, _native.decode_rows, _native.decode_fp8
    return {
        "refused type": (ValueError, "139 has no decoder", lambda: run(139, raw, out)),
        "columns": (ValueError, r"\(4, 255\), expected columns in blocks of 256", lambda: run(q4_k, raw, out[:, 1:].copy())),
        "row bytes": (ValueError, r"\(4, 143\), expected rows of 144", lambda: run(q4_k, raw[:, 1:].copy(), out)),
        "rows": (ValueError, r"\(3, 144\), out \(4, 256\)", lambda: run(q4_k, raw[:3], out)),
        "groups": (ValueError, "whole groups of 4", lambda: run(r4, raw[:3], out[:3])),
        "threads": (ValueError, "threads is 0", lambda: run(q4_k, raw, out, 0)),
        "float64 out": (TypeError, "incompatible function arguments", lambda: run(q4_k, raw, out.astype(np.float64))),
        "int8 raw": (TypeError, "incompatible function arguments", lambda: run(q4_k, raw.view(np.int8), out)),
        "strided out": (TypeError, "incompatible function arguments", lambda: run(q4_k, raw, np.zeros((4, 512), np.float32)[:, ::2])),
        "strided raw": (TypeError, "incompatible function arguments", lambda: run(q4_k, np.zeros((8, 144), np.uint8)[::2], out)),
        "locked out": (TypeError, "incompatible function arguments", lambda: run(q4_k, raw, locked)),
        "row below": (ValueError, "row -1", lambda: rows_of(q4_k, raw, rows - 1, out)),
        "row beyond": (ValueError, "row 4 ", lambda: rows_of(q4_k, raw, rows + 4, out)),
        "row count": (ValueError, "3 rows", lambda: rows_of(q4_k, raw, rows[:3], out)),
        "int64 rows": (TypeError, "incompatible function arguments", lambda: rows_of(q4_k, raw, rows.astype(np.int64), out)),
        "scale": (ValueError, r"scale \(1, 1\), expected \(1, 2\)", lambda: run_fp8(fp8, scale[:, :1].copy(), out)),
        "fp8 shape": (ValueError, "expected the same shape", lambda: run_fp8(fp8[:3], scale, out)),
    }  # fmt: skip


@pytest.mark.parametrize("case", bad_calls())
def test_native_checks_what_it_is_given(case: str) -> None:
    error, message, call = bad_calls()[case]
    with pytest.raises(error, match=message):
        call()
