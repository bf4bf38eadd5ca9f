"""Hugging Face directories: every byte where the safetensors library finds it, nothing copied, every damage named."""

from __future__ import annotations

import json
import mmap
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from kit.tiny_models import tiny_model, write_hf_dir
from kvfold.errors import KvfoldError, ModelFileError, UnsupportedModel, UnsupportedType
from kvfold.formats.safetensors import open_hf_directory
from kvfold.quant.decode import decode
from kvfold.quant.types import by_name


@pytest.fixture
def directory(tmp_path):
    return write_hf_dir(tiny_model("v3"), tmp_path / "model", shards=3)


def rewrite_index(directory: Path, **changes: str | None) -> None:
    file = directory / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    for name, value in changes.items():
        index["weight_map"][name.replace("__", ".")] = value
    file.write_text(json.dumps(index))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("shards", [1, 3])
def test_bytes_are_those_the_library_reads(tmp_path, dtype, shards):
    path = write_hf_dir(tiny_model("v3-odd"), tmp_path, dtype=dtype, shards=shards)
    found = open_hf_directory(path)
    assert len(found.files) == shards
    names = set()
    for file in found.files:
        with safe_open(file, "np") as reference:
            for name in reference.keys():  # noqa: SIM118
                names.add(name)
                array, tensor = reference.get_tensor(name), found.tensors[name]
                assert tensor.shape == array.shape
                assert tensor.raw.tobytes() == array.tobytes()
                assert tensor.file == file
    assert set(found.tensors) == names


def test_nothing_is_copied(directory):
    for tensor in open_hf_directory(directory).tensors.values():
        base = tensor.raw
        while isinstance(base, np.ndarray):
            assert not base.flags.writeable and not base.flags.owndata
            base = base.base
        assert isinstance(base, memoryview) and isinstance(base.obj, mmap.mmap)
        assert tensor.raw.flags.c_contiguous
        assert tensor.raw.tobytes() == tensor.file.read_bytes()[tensor.offset :][: tensor.raw.nbytes]


def test_fp8_matrices_come_with_their_scales(tmp_path):
    tiny = tiny_model("v3", intermediate_size=300, hidden_size=160)  # blocks of 128 that do not fit
    tensors = open_hf_directory(write_hf_dir(tiny, tmp_path, dtype="float8_e4m3fn")).tensors
    assert not any(name.endswith("_scale_inv") for name in tensors)
    tensor = tensors["model.layers.0.mlp.gate_proj.weight"]
    assert (tensor.type.name, tensor.shape, tensor.scale.shape) == ("F8_E4M3", (300, 160), (3, 2))
    values = decode(tensor.type, tensor.raw).reshape(300, 160)
    values = values * np.repeat(np.repeat(tensor.scale, 128, 0), 128, 1)[:300, :160]
    original = tiny.weights["blk.0.ffn_gate.weight"]
    # e4m3 has 3 mantissa bits: half a step is 1/16 of the number, or of the smallest normal one
    assert np.all(np.abs(values - original) <= np.maximum(np.abs(original) / 16, np.abs(original).max() / 448 / 64))
    assert tensors["model.layers.1.mlp.gate.weight"].type is by_name("BF16")
    assert tensors["model.layers.1.mlp.gate.e_score_correction_bias"].type is by_name("F32")


def test_scales_at_odd_offsets_are_read_right(tmp_path):
    """One byte in front of everything: the float32 scales are then unaligned in the map."""
    path = write_hf_dir(tiny_model("v3"), tmp_path / "aligned", dtype="float8_e4m3fn")
    aligned = open_hf_directory(path).tensors
    data = (path / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    odd = path.rename(tmp_path / "odd")
    (odd / "model.safetensors").unlink()  # the open map keeps the old file
    moved = struct.pack("<Q", length + 1) + data[8 : 8 + length] + b" " + data[8 + length :]
    (odd / "model.safetensors").write_bytes(moved)
    shifted = open_hf_directory(odd).tensors
    assert any(tensor.scale is not None and tensor.offset % 4 for tensor in shifted.values())
    for name, tensor in aligned.items():
        assert np.array_equal(tensor.raw, shifted[name].raw)
        if tensor.scale is not None:
            assert np.array_equal(tensor.scale, shifted[name].scale)
            assert shifted[name].scale.flags.aligned  # compiled kernels take its address


def write_file(path: Path, header: dict | bytes, data: bytes = b"") -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def entry(dtype: str = "F32", shape: tuple[int, ...] = (2, 2), offsets: tuple[int, int] = (0, 16)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


TWICE = b'{"a": %s, "a": %s}' % ((json.dumps(entry()).encode(),) * 2)


@pytest.mark.parametrize(
    ("header", "data", "named"),
    [
        (b"", b"", "damaged"),
        (b"[]", b"", "damaged"),
        (b"{", b"", "damaged"),
        (b"\xff\xfe{}", b"", "damaged"),
        (b"[" * 5000, b"", "damaged"),
        ({"a": entry()}, b"", "damaged"),
        ({"a": entry()}, b"0" * 17, "damaged"),
        ({"a": entry(shape=(3, 2))}, b"0" * 16, "damaged"),
        ({"a": entry(shape=(2**40, 2**40))}, b"0" * 16, "damaged"),
        ({"a": entry(offsets=(16, 0))}, b"0" * 16, "damaged"),
        ({"a": entry(), "b": entry(offsets=(8, 24))}, b"0" * 24, "damaged"),
        ({"a": entry() | {"dtype": "Q4_K"}}, b"0" * 16, "damaged"),
        ({"a": {"dtype": "F32"}}, b"0" * 16, "damaged"),
        (TWICE, b"0" * 16, "'a' is there twice"),
        ({"a": entry(shape=(0, 2), offsets=(0, 0))}, b"", "dimensions above 0"),
        ({"a": entry(shape=(), offsets=(0, 4))}, b"0" * 4, "1 to 3 dimensions"),
        ({"a": entry(shape=(1, 1, 2, 2))}, b"0" * 16, "1 to 3 dimensions"),
        ({"a": entry("I32")}, b"0" * 16, "dtype I32; kvfold reads BF16, F16, F32, F8_E4M3"),
        ({"a": entry("F8_E4M3", (4, 4))}, b"0" * 16, "scales of an fp8 matrix are missing: a_scale_inv"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, header, data, named):
    (tmp_path / "config.json").write_text("{}")
    write_file(tmp_path / "model.safetensors", header, data)
    with pytest.raises((ModelFileError, UnsupportedType), match=named) as caught:
        open_hf_directory(tmp_path)
    assert "model.safetensors" in str(caught.value)


def test_every_truncation_is_refused(tmp_path):
    path = write_hf_dir(tiny_model("v2-lite", num_hidden_layers=1, vocab_size=8), tmp_path)
    file = path / "model.safetensors"
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    cuts = [*range(0, 8 + length, 7), *range(8 + length, len(data), 1009), len(data) - 1]
    for cut in cuts:
        file.write_bytes(data[:cut])
        with pytest.raises(ModelFileError):
            open_hf_directory(path)


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 1 << 26])
def test_an_absurd_header_length_allocates_nothing(tmp_path, length):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", length) + b"{}")
    with pytest.raises(ModelFileError, match=f"a header of {length} bytes, expected at most 2"):
        open_hf_directory(tmp_path)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (None, "the file is missing"),
        ("", "cannot be read"),
        ("{", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ("\udcff", "cannot be read"),
        ("[1]", "expected a JSON object, got list"),
    ],
)
def test_config_json_must_be_an_object(directory, text, named):
    file = directory / "config.json"
    if text is None:
        file.unlink()
    else:
        file.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ModelFileError, match=named) as caught:
        open_hf_directory(directory)
    assert caught.value.file == str(file)


def test_a_missing_shard_is_named(directory):
    (directory / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ModelFileError, match=r"1 of 3 weight files are missing: model-00002-of-00003\.safetensors"):
        open_hf_directory(directory)


def test_an_index_that_names_an_absent_tensor(directory):
    rewrite_index(directory, model__layers__9__x="model-00001-of-00003.safetensors")
    with pytest.raises(ModelFileError, match=r"model\.layers\.9\.x: the index places this tensor in model-00001"):
        open_hf_directory(directory)


def test_an_index_that_names_the_wrong_shard(directory):
    rewrite_index(directory, model__embed_tokens__weight="model-00003-of-00003.safetensors")
    with pytest.raises(ModelFileError, match="which does not hold it"):
        open_hf_directory(directory)


@pytest.mark.parametrize("target", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "", "a\0b", None, 3])
def test_an_index_cannot_reach_outside_its_directory(directory, target):
    rewrite_index(directory, model__norm__weight=target)
    with pytest.raises(ModelFileError, match=r"expected the name of a file beside it"):
        open_hf_directory(directory)


def test_a_tensor_in_two_shards(directory):
    name = "model.norm.weight"
    save_file({name: np.ones(64, np.float32)}, directory / "model-00004.safetensors")
    rewrite_index(directory, extra="model-00004.safetensors")
    with pytest.raises(ModelFileError, match=rf"{name}: this tensor is in model-0000\d-of-00003.safetensors too"):
        open_hf_directory(directory)


def test_one_whole_file_goes_before_an_index(directory):
    save_file({"alone": np.ones(4, np.float32)}, directory / "model.safetensors")
    assert set(open_hf_directory(directory).tensors) == {"alone"}


def test_shards_without_an_index(directory):
    (directory / "model.safetensors.index.json").unlink()
    with pytest.raises(ModelFileError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"):
        open_hf_directory(directory)


@pytest.mark.parametrize(
    "settings", [{"quant_method": "gptq", "bits": 4}, {"quant_method": "compressed-tensors"}, "x"]
)
def test_other_quantizers_are_named(directory, settings):
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    with pytest.raises(UnsupportedModel, match=r"quant_method is .*GGUF"):
        open_hf_directory(directory)


def test_other_fp8_blocks_are_refused(directory):
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [64, 128]}
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModel, match=r"weight_block_size is \[64, 128\]"):
        open_hf_directory(directory)


@pytest.mark.parametrize("scale", [np.ones((1, 1), np.float32), np.ones((2, 1), np.float16)])
def test_scales_of_the_wrong_form(tmp_path, scale):
    (tmp_path / "config.json").write_text("{}")
    weight = np.ones((129, 8), ml_dtypes.float8_e4m3fn)
    save_file({"w": weight, "w_scale_inv": scale}, tmp_path / "model.safetensors")
    with pytest.raises(ModelFileError, match=r"w_scale_inv: .*expected F32 of shape \(2, 1\)"):
        open_hf_directory(tmp_path)


def test_fused_fp8_experts_are_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    save_file({"w": np.ones((2, 8, 8), ml_dtypes.float8_e4m3fn)}, tmp_path / "model.safetensors")
    with pytest.raises(UnsupportedType, match="fp8 as matrices only"):
        open_hf_directory(tmp_path)


def test_single_byte_damage_never_escapes_as_another_error(tmp_path):
    """400 mutants of a header: each is refused in words or read as what it says."""
    path = write_hf_dir(tiny_model("v2-lite", num_hidden_layers=1, vocab_size=8), tmp_path)
    file = path / "model.safetensors"
    data = bytearray(file.read_bytes())
    (length,) = struct.unpack("<Q", data[:8])
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(400):
        mutant = bytearray(data)
        for at in rng.integers(0, 8 + length, rng.integers(1, 4)):
            mutant[at] = rng.integers(0, 256)
        file.write_bytes(mutant)
        try:
            open_hf_directory(path)
        except KvfoldError:
            refused += 1
    assert refused > 200
