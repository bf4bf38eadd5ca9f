"""Good GGUF files: the reader agrees with the gguf package, opens splits from any shard, and is lazy and quick."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFValueType

from kit.bad_gguf import (
    FLOAT32,
    INT32,
    UINT8,
    document,
    key,
    model_file,
    numbers,
    tensor,
    vocabulary,
)
from kvfold.errors import ModelFileError
from kvfold.formats.gguf import GgufFile, StringArray, get, open_gguf
from kvfold.quant.types import by_id

# gguf-py gives Q8_1 the 40 bytes it had in 2023; ggml has 36
TYPES = [type for type in GGMLQuantizationType if type is not GGMLQuantizationType.Q8_1]
VALUES: dict[GGUFValueType, list[Any]] = {
    GGUFValueType.UINT8: [0, 255],
    GGUFValueType.INT8: [-128, 127],
    GGUFValueType.UINT16: [0, 65_535],
    GGUFValueType.INT16: [-32_768, 32_767],
    GGUFValueType.UINT32: [0, 2**32 - 1],
    GGUFValueType.INT32: [-(2**31), 2**31 - 1],
    GGUFValueType.FLOAT32: [-0.0, 1.5, float("inf")],
    GGUFValueType.BOOL: [False, True],
    GGUFValueType.STRING: ["one", "zwölf 🙂", "a\0b"],
    GGUFValueType.UINT64: [0, 2**64 - 1],
    GGUFValueType.INT64: [-(2**63), 2**63 - 1],
    GGUFValueType.FLOAT64: [1e300, -2.5],
}


def write_random(path: Path, seed: int, *, alignment: int = 32, **split: int) -> gguf.GGUFWriter:
    """A file of every value type, every array type and every tensor type, in 1 to 4 dimensions."""
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, "deepseek2", **split)
    if alignment != 32:
        writer.add_custom_alignment(alignment)
    for kind, values in VALUES.items():
        for index, value in enumerate(values):
            writer.add_key_value(f"scalar.{kind.name.lower()}.{index}", value, kind)
        many = [values[i] for i in rng.integers(0, len(values), rng.integers(1, 40))]
        writer.add_key_value(f"array.{kind.name.lower()}", many, GGUFValueType.ARRAY, sub_type=kind)
    for type in TYPES:
        _, block_bytes = gguf.GGML_QUANT_SIZES[type]
        outer = tuple(int(n) for n in rng.integers(1, 4, rng.integers(0, 4)))
        raw = rng.integers(0, 256, (*outer, int(rng.integers(1, 4)) * block_bytes), np.uint8)
        writer.add_tensor(f"{type.name.lower()}.weight", raw, raw_dtype=type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return writer


def assert_equal_to_gguf_py(file: GgufFile) -> None:
    """Every tensor and every key of all files, against gguf.GGUFReader."""
    readers = [gguf.GGUFReader(path) for path in file.files]
    expected = [(path, t) for path, reader in zip(file.files, readers, strict=True) for t in reader.tensors]
    assert [t.name for _, t in expected] == list(file.tensors)
    for path, theirs in expected:
        ours = file.tensors[theirs.name]
        assert ours.file == path
        assert ours.type is by_id(int(theirs.tensor_type)), theirs.name
        assert ours.shape == tuple(reversed(theirs.shape.tolist())), theirs.name
        assert ours.offset == theirs.data_offset, theirs.name
        assert ours.nbytes == theirs.n_bytes, theirs.name
        assert ours.raw.tobytes() == theirs.data.tobytes(), theirs.name
        assert ours.raw.shape == (*(ours.shape[:-1] or (1,)), ours.type.row_bytes(ours.shape[-1])), theirs.name
        assert not ours.raw.flags.writeable
        assert ours.raw.flags.c_contiguous
    fields = {name: field for name, field in readers[0].fields.items() if not name.startswith("GGUF.")}
    assert list(fields) == list(file.metadata)
    for name, field in fields.items():
        value: Any = file.metadata[name]
        if field.types[0] is GGUFValueType.ARRAY:
            assert isinstance(value, StringArray if field.types[-1] is GGUFValueType.STRING else np.ndarray), name
            value = list(value) if isinstance(value, StringArray) else value.tolist()
        assert value == field.contents(), name
        assert type(value) is type(field.contents()), name


@pytest.mark.parametrize("alignment", [8, 32, 256])
def test_every_value_and_tensor_type_reads_as_in_gguf_py(tmp_path: Path, alignment: int) -> None:
    write_random(tmp_path / "model.gguf", seed=alignment, alignment=alignment)
    with open_gguf(tmp_path / "model.gguf") as file:
        assert file.version == 3
        assert file.path == tmp_path / "model.gguf"
        assert file.files == (file.path,)
        assert len(file.tensors) == len(TYPES)
        assert_equal_to_gguf_py(file)


def test_version_2_reads_as_version_3(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_random(path, seed=2)
    content = bytearray(path.read_bytes())
    content[4] = 2
    path.write_bytes(content)
    file = open_gguf(os.fspath(path))
    assert file.version == 2
    assert_equal_to_gguf_py(file)


@pytest.mark.parametrize("shard", [0, 1, 3])
def test_any_shard_opens_the_whole_model(tmp_path: Path, shard: int) -> None:
    write_random(tmp_path / "model.gguf", seed=3, split_max_tensors=10)
    files = sorted(tmp_path.iterdir())
    assert [path.name for path in files] == [f"model-{i:05}-of-00004.gguf" for i in range(1, 5)]
    file = open_gguf(files[shard])
    assert file.path == files[shard]
    assert file.files == tuple(files)
    assert_equal_to_gguf_py(file)


def test_a_first_shard_without_tensors_and_relative_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_random(tmp_path / "model.gguf", seed=4, split_max_tensors=30, small_first_shard=True)
    monkeypatch.chdir(tmp_path)
    file = open_gguf("model-00002-of-00003.gguf")
    assert file.files[0] == Path("model-00001-of-00003.gguf")
    assert_equal_to_gguf_py(file)


def test_a_single_file_that_calls_itself_a_split_of_one(tmp_path: Path) -> None:
    path = tmp_path / "merged.gguf"
    path.write_bytes(document([key("split.no", 0), key("split.count", 1)], [tensor("a")], bytes(64)))
    assert list(open_gguf(path).tensors) == ["a"]


def test_types_that_do_not_decode_open_with_their_size(tmp_path: Path) -> None:
    # 144 is ik_llama.cpp's IQ4_KS: 4 bytes a row and 136 for 256 weights. 202 interleaves 8 rows of Q4_0.
    tensors = [tensor("iq4_ks", (512, 3), 144, 0), tensor("q4_0_r8", (64, 16, 2), 202, 832)]
    path = tmp_path / "ik.gguf"
    path.write_bytes(document([], tensors, bytes(range(256)) * 8))
    file = open_gguf(path)
    refused, interleaved = file.tensors["iq4_ks"], file.tensors["q4_0_r8"]
    assert not refused.type.decodes
    assert refused.raw.shape == (3, 4 + 2 * 136)
    assert interleaved.shape == (2, 16, 64)
    assert interleaved.raw.shape == (2, 16, 2 * 18)
    assert interleaved.raw[0, 0, 0] == 832 % 256


def test_gaps_and_any_order_of_tensors_are_read(tmp_path: Path) -> None:
    tensors = [tensor("late", (4,), offset=128), tensor("early", (4,), offset=32)]
    path = tmp_path / "gaps.gguf"
    path.write_bytes(document([], tensors, bytes(range(144))))
    file = open_gguf(path)
    assert list(file.tensors) == ["late", "early"]
    assert file.tensors["late"].raw.tolist() == [list(range(128, 144))]
    assert file.tensors["early"].raw.tolist() == [list(range(32, 48))]


def test_a_vocabulary_alone_and_empty_arrays_open(tmp_path: Path) -> None:
    path = tmp_path / "vocab.gguf"
    path.write_bytes(document([*vocabulary(3), key("none", []), numbers("zero", UINT8, [])]))
    file = open_gguf(path)
    assert file.tensors == {}
    assert list(get(file, "none", StringArray)) == []
    assert get(file, "zero", np.ndarray).tolist() == []


def strings_file(folder: Path, strings: list[str]) -> StringArray:
    path = folder / "strings.gguf"
    path.write_bytes(document([key("a", strings), numbers("after", INT32, [7])]))
    return get(open_gguf(path), "a", StringArray)


def test_string_arrays_index_slice_and_iterate_like_lists(tmp_path: Path) -> None:
    # more than one of the 1 MiB pieces that are checked together, with strings of every UTF-8 length and none
    rng = random.Random(5)
    expected = ["".join(rng.choices("aé中🙂", k=rng.choice((0, 1, 5, 3000)))) for _ in range(1500)]
    strings = strings_file(tmp_path, expected)
    assert sum(map(len, expected)) > 1 << 20
    assert len(strings) == 1500
    assert list(strings) == expected
    assert [strings[i] for i in range(-1500, 1500)] == expected * 2
    for where in (slice(None), slice(3, 9), slice(-5, None), slice(None, None, -7), slice(9, 3)):
        assert strings[where] == expected[where]
    assert expected[7] in strings
    assert strings.index(expected[1400]) == expected.index(expected[1400])
    for index in (1500, -1501):
        with pytest.raises(IndexError, match="a has 1500 strings"):
            strings[index]


def test_strings_overwritten_after_open_are_an_error_not_garbage(tmp_path: Path) -> None:
    strings = strings_file(tmp_path, ["good", "text"])
    path = tmp_path / "strings.gguf"
    with path.open("r+b") as file:
        file.seek(path.read_bytes().index(b"text"))
        file.write(b"\xff")
    assert strings[0] == "good"
    for read in (lambda: strings[1], lambda: list(strings)):
        with pytest.raises(ModelFileError, match=r"strings.gguf: a: string 1 is no longer UTF-8.*at byte"):
            read()


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("absent", int, "absent: the key is missing, expected an integer"),
        ("flag", int, r"flag: the value is a bool \(True\), expected an integer"),
        ("number", bool, r"number: the value is an integer \(7\), expected a bool"),
        ("number", float, r"number: the value is an integer \(7\), expected a float"),
        ("number", str, r"number: the value is an integer \(7\), expected a string"),
        ("text", StringArray, r"text: the value is a string \('x{60}'\), expected an array of strings"),
        ("list", np.ndarray, "list: the value is an array of 2 strings, expected an array of numbers"),
        ("array", StringArray, "array: the value is an array of 3 float32, expected an array of strings"),
    ],
)
def test_get_names_the_key_and_both_types(tmp_path: Path, name: str, kind: Any, message: str) -> None:
    path = tmp_path / "keys.gguf"
    keys = [key("flag", True), key("number", 7), key("text", "x" * 100), key("list", ["a", "b"])]
    path.write_bytes(document([*keys, numbers("array", FLOAT32, [0.5, 1.5, 2.5])]))
    file = open_gguf(path)
    assert get(file, "flag", bool) is True
    assert get(file, "number", int) == 7
    assert get(file, "array", np.ndarray).tolist() == [0.5, 1.5, 2.5]
    with pytest.raises(ModelFileError, match=message) as caught:
        get(file, name, kind)
    assert caught.value.where == name


def test_views_outlive_close_and_the_map_ends_with_the_last(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(document([], [tensor("a", (4,))], bytes(range(16))))

    def is_mapped() -> bool:
        return str(path) in Path("/proc/self/maps").read_text()

    with open_gguf(path) as file:
        raw = file.tensors["a"].raw
    assert raw.tolist() == [list(range(16))]
    with pytest.raises(AssertionError, match="closed"):
        file.tensors  # noqa: B018
    with pytest.raises(AssertionError, match="closed"):
        file.metadata  # noqa: B018
    if sys.platform == "linux":
        assert is_mapped()
        del raw
        assert not is_mapped()


def test_the_model_of_the_bad_models_corpus_is_good(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(model_file())
    file = open_gguf(path)
    assert_equal_to_gguf_py(file)
    assert get(file, "general.architecture", str) == "deepseek2"


# --- Time and memory -------------------------------------------------------------------------------------------------

MEASURE = """
import json, sys, time
from kvfold.formats.gguf import open_gguf

def peak_mb():  # not ru_maxrss: a child starts with its parent's
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))

before = peak_mb()
start = time.process_time()  # other tests run beside this one
file = open_gguf(sys.argv[1])
seconds, added = time.process_time() - start, peak_mb() - before
print(json.dumps({"seconds": seconds, "mb": added, "tokens": len(file.metadata["tokenizer.ggml.tokens"])}))
"""


def v3_sized_header() -> bytes:
    """129,280 tokens and 127,741 merges, of 6.6 and 10.4 bytes on average: 5.3 MB."""
    rng = random.Random(6)
    pool = "".join(rng.choices("abcdefghijklmnopqrstuvwxyzĠ中", k=1 << 16))

    def strings(name: str, count: int, make: Callable[[int], str]) -> bytes:
        return key(f"tokenizer.ggml.{name}", [make(rng.randrange(1 << 15)) for _ in range(count)])

    return document(
        [
            strings("tokens", 129_280, lambda at: pool[at : at + 1 + at % 11]),
            numbers("tokenizer.ggml.scores", FLOAT32, [0.0] * 129_280),
            numbers("tokenizer.ggml.token_type", INT32, [1] * 129_280),
            strings(
                "merges", 127_741, lambda at: f"{pool[at : at + 1 + at % 7]} {pool[at + 9 : at + 10 + at % 8]}"
            ),
        ]
    )


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory from /proc")
def test_a_v3_header_opens_in_half_a_second_and_60_mb(tmp_path: Path) -> None:
    path = tmp_path / "header.gguf"
    path.write_bytes(v3_sized_header())
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, path], env=environment, capture_output=True, text=True, check=True
    )
    measured = json.loads(done.stdout)
    assert measured["tokens"] == 129_280
    assert measured["seconds"] <= 0.5
    assert measured["mb"] <= 60
