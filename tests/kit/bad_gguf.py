"""A small GGUF writer that writes what it is told, and the corpus of bad files made with it.

The gguf package writes only good files; here every length, count, type and offset can be wrong. `BAD_FILES` are wrong
in their structure and must be refused by `open_gguf`; `BAD_MODELS` are well-formed files of a model that cannot be,
refused when they are opened as a checkpoint. Each case names the words its error must contain.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from kvfold.errors import KvfoldError, ModelFileError, UnsupportedModel, UnsupportedType
from kvfold.formats import gguf

UINT8, INT8, UINT16, INT16, UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY, UINT64, INT64, FLOAT64 = range(13)
F32, Q4_0, Q4_K, I8, Q4_0_R8 = 0, 2, 12, 24, 202
_CODES = {
    UINT8: "B", INT8: "b", UINT16: "H", INT16: "h", UINT32: "I", INT32: "i", FLOAT32: "f", BOOL: "B",
    UINT64: "Q", INT64: "q", FLOAT64: "d",
}  # fmt: skip
U64_MAX = 2**64 - 1


# --- A writer that does not object -----------------------------------------------------------------------------------


def u32(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}I", *values)


def u64(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}Q", *values)


def string(text: str | bytes, *, length: int | None = None) -> bytes:
    """A length and the text; `length` to lie about it."""
    raw = text if isinstance(text, bytes) else text.encode()
    return u64(len(raw) if length is None else length) + raw


def key(name: str | bytes, value: object, kind: int | None = None) -> bytes:
    """One key. A str, bool, float, int (UINT32) or list of strings knows its kind; bytes are written as they are."""
    if isinstance(value, bytes):
        assert kind is not None
        return string(name) + u32(kind) + value
    if isinstance(value, list):
        return string(name) + u32(ARRAY, STRING) + u64(len(value)) + b"".join(map(string, value))
    if isinstance(value, str):
        return string(name) + u32(STRING) + string(value)
    if kind is None:
        kind = BOOL if isinstance(value, bool) else FLOAT32 if isinstance(value, float) else UINT32
    return string(name) + u32(kind) + struct.pack("<" + _CODES[kind], value)


def numbers(name: str, kind: int, values: list[int] | list[float], *, count: int | None = None) -> bytes:
    """A key with an array of numbers; `count` to lie about their number."""
    payload = struct.pack(f"<{len(values)}{_CODES[kind]}", *values)
    return string(name) + u32(ARRAY, kind) + u64(len(values) if count is None else count) + payload


def tensor(
    name: str | bytes, ne: Iterable[int] = (8, 2), type: int = F32, offset: int = 0, *, dims: int | None = None
) -> bytes:
    """One entry of the tensor table; ne as ggml writes it, the contiguous dimension first."""
    ne = list(ne)
    return string(name) + u32(len(ne) if dims is None else dims) + u64(*ne) + u32(type) + u64(offset)


def document(
    keys: Iterable[bytes] = (),
    tensors: Iterable[bytes] = (),
    data: bytes = b"",
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    alignment: int = 32,
    num_keys: int | None = None,
    num_tensors: int | None = None,
) -> bytes:
    keys, tensors = list(keys), list(tensors)
    num_tensors = len(tensors) if num_tensors is None else num_tensors
    num_keys = len(keys) if num_keys is None else num_keys
    header = magic + u32(version) + u64(num_tensors, num_keys) + b"".join(keys + tensors)
    return header + bytes(-len(header) % alignment if data else 0) + data


ARCHITECTURE = key("general.architecture", "deepseek2")


def vocabulary(num_tokens: int, *, type: int = 1, first: str = "token0") -> list[bytes]:
    """Keys of a vocabulary that agree with each other."""
    return [
        key("tokenizer.ggml.tokens", [first, *(f"token{i}" for i in range(1, num_tokens))]),
        numbers("tokenizer.ggml.scores", FLOAT32, [0.0] * num_tokens),
        numbers("tokenizer.ggml.token_type", INT32, [type] * num_tokens),
    ]


def shard(
    number: int, count: int, tensors: list[bytes], data: bytes, total: int, *, keys: Iterable[bytes] = ()
) -> bytes:
    """Shard `number` (from 0) of `count`, of a model of `total` tensors."""
    split = [
        key("split.no", number, UINT16),
        key("split.count", count, UINT16),
        key("split.tensors.count", total, INT32),
    ]
    return document([*keys, *split], tensors, data)


# --- The corpus ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BadFile:
    """name: of the case. build: writes it into a directory and returns the path to open. reason: words of the error."""

    name: str
    build: Callable[[Path], Path]
    reason: str
    error: type[KvfoldError] = ModelFileError


BAD_FILES: list[BadFile] = []
BAD_MODELS: list[BadFile] = []


def _bad(
    name: str,
    content: bytes | Callable[[Path], Path],
    reason: str,
    error: type[KvfoldError] = ModelFileError,
) -> None:
    build = _written(lambda: content) if isinstance(content, bytes) else content
    BAD_FILES.append(BadFile(name, build, reason, error))


def _sparse(head: bytes, size: int, tail: bytes = b"") -> Callable[[Path], Path]:
    """A file that begins with `head`, goes on with zeros that occupy no disk up to `size`, and ends with `tail`."""

    def write(folder: Path) -> Path:
        path = folder / "sparse.gguf"
        path.write_bytes(head)
        os.truncate(path, size)
        with path.open("ab") as file:
            file.write(tail)
        return path

    return write


def _written(make: Callable[[], bytes]) -> Callable[[Path], Path]:
    """A file whose content is made when it is written, not when this module is imported."""

    def write(folder: Path) -> Path:
        path = folder / "written.gguf"
        path.write_bytes(make())
        return path

    return write


def _header() -> None:
    _bad("empty file", b"", "empty")
    _bad("magic alone", b"GGUF", "the version needs 4 bytes and 0 are left")
    _bad("three bytes", b"GGU", "magic number needs 4 bytes")
    _bad("other magic", document(magic=b"FUGG"), "no GGUF file")
    _bad("zip archive", document(magic=b"PK\x03\x04"), "no GGUF file")
    _bad("version 0", document(version=0), "version 0")
    _bad("version 1", document(version=1), "version 1, versions 2 and 3 are read")
    _bad("version 4", document(version=4), "version 4")
    _bad("big-endian", b"GGUF" + struct.pack(">IQQ", 3, 0, 1), "big-endian")
    _bad("tensor count 2^64 - 1", document(num_tensors=U64_MAX), "announces 18446744073709551615 tensors")
    _bad("tensor count 2^63", document(num_tensors=2**63), "tensors, at most")
    _bad("one tensor too few", document([ARCHITECTURE], [tensor("a")], num_tensors=2), "is truncated")
    _bad("more tensors than are read", document(num_tensors=gguf.TENSORS_LIMIT + 1), "at most 16384 are read")
    _bad("key count 2^64 - 1", document(num_keys=U64_MAX), "keys, at most")
    _bad("one key too few", document([ARCHITECTURE], num_keys=2), "the length of the key needs 8 bytes")
    _bad("more keys than are read", document(num_keys=gguf.KEYS_LIMIT + 1), "at most 16384 are read")


def _keys() -> None:
    _bad("key length 2^64 - 1", document([string("a", length=U64_MAX)]), "has 18446744073709551615 bytes")
    _bad("key length 2^63", document([string("a", length=2**63)]), "at most 65535 are read")
    _bad("key past the end", document([string("general", length=100)]), "the key needs 100 bytes and 7 are left")
    _bad("key of 65,536 bytes", document([key("k" * 65_536, 1)]), "has 65536 bytes, at most 65535")
    _bad("empty key", document([key("", 1)]), "expected at least one character")
    _bad("key not UTF-8", document([key(b"a\xff", 1)]), "the key is not UTF-8")
    _bad("key with a terminal escape", document([key("a\x1b[31m", 1)]), "all printable")
    _bad("key twice", document([ARCHITECTURE, key("b", 1), ARCHITECTURE]), "occurs twice")
    _bad("value type 13", document([key("a", bytes(8), 13)]), "the value type is 13, expected 0 to 12")
    _bad("value type 2^32 - 1", document([key("a", bytes(8), 2**32 - 1)]), "value type is 4294967295")
    _bad("number cut short", document([key("a", bytes(7), UINT64)]), "needs 8 bytes and 7 are left")
    _bad("value missing", document([string("a")]), "the value type needs 4 bytes")
    _bad("bool of value 2", document([key("a", 2, BOOL)]), "the bool has the value 2")
    most = gguf.KEYS_LIMIT - 1
    last_twice = _written(lambda: document([*(key(f"key.{i}", i) for i in range(most)), key("key.0", 0)]))
    _bad("last of 16,384 keys twice", last_twice, "key.0: this key occurs twice")


def _strings() -> None:
    def of_length(length: int) -> bytes:
        return document([key("a", string("text", length=length), STRING)])

    limit = gguf.STRING_LIMIT
    at = len(document([key("a", b"", STRING)]))  # a length of 2^64 - at makes position + length wrap to 0
    _bad("string length 2^64 - 1", of_length(U64_MAX), "has 18446744073709551615 bytes")
    _bad("string length wraps to the start", of_length(2**64 - at), "bytes, at most")
    _bad("string past the end", of_length(5), "the value needs 5 bytes and 4 are left")
    _bad("string length cut short", document([key("a", bytes(7), STRING)]), "the length of the value needs 8")
    _bad("string over the limit", _sparse(of_length(limit + 1), 3 * limit), "16777217 bytes, at most")
    _bad("string not UTF-8", document([key("a", string(b"ab\xc3("), STRING)]), "not UTF-8 (invalid continuation")
    _bad("string with a surrogate", document([key("a", string(b"\xed\xa0\x80"), STRING)]), "not UTF-8")
    _bad("wide strings", _written(_wide_strings), "c: the value type needs 4 bytes")


def _wide_strings() -> bytes:
    """31 MiB of text that takes 4 bytes a character in memory, because of one character in each string."""
    wide = string("🙂" + "a" * (15 << 20))
    return document([key("a", wide, STRING), key("b", wide, STRING), string("c")])


def _arrays() -> None:
    def of(kind: int, count: int, payload: bytes = b"") -> bytes:
        return document([string("a") + u32(ARRAY, kind) + u64(count) + payload])

    _bad("array of 2^31 bytes", of(UINT8, 2**31), "the array of 2147483648 uint8 needs 2147483648 bytes")
    _bad("array whose bytes wrap to 0", of(FLOAT64, 2**61), "needs 18446744073709551616 bytes and 0 are left")
    _bad("array of 2^64 - 1 bytes", of(INT8, U64_MAX), "needs 18446744073709551615 bytes")
    _bad("array one element short", of(UINT32, 3, bytes(11)), "needs 12 bytes and 11 are left")
    _bad("array of type 13", of(13, 1, bytes(8)), "elements have the type 13")
    _bad("array of bools of value 2", of(BOOL, 3, b"\0\1\2"), "other values than 0 and 1")
    _bad("array of arrays", of(ARRAY, 1, u32(UINT8) + u64(1) + b"\0"), "array of arrays")
    _bad("arrays nested 5,000 deep", of(ARRAY, 1, (u32(ARRAY) + u64(1)) * 5000), "array of arrays")
    _bad("array of 2^31 strings", of(STRING, 2**31), "arrays of 2147483648 strings, at most 1048576")
    _bad("strings whose lengths wrap to 0", of(STRING, 2**61), "at most 1048576")
    _bad("more strings than bytes", of(STRING, 3, bytes(23)), "needs 24 bytes and 23 are left")
    _bad("string of 2^64 - 1 in an array", of(STRING, 1, string("a", length=U64_MAX)), "string 0 of 1 has")
    # in 64 bits, position + 8 + length is the position of this very length: an endless loop
    _bad("string that leads back to itself", of(STRING, 9, u64(2**64 - 8) * 9), "string 0 of 9 has")
    _bad("last string past the end", of(STRING, 2, string("ab") + string("cd", length=3)), "string 1 of 2 has 3")
    _bad(
        "strings that eat the next length", of(STRING, 2, string("ab", length=10) + u64(0)), "before string 1 of 2"
    )
    _bad("array with a string not UTF-8", of(STRING, 3, string("a") + string(b"\xff") + string("b")), "string 1 is")
    _bad("character over two strings", of(STRING, 2, string(b"\xc3") + string(b"\xa9")), "string 0 is not UTF-8")
    _bad("last string cut in a character", of(STRING, 2, string("a") + string(b"b\xe2\x82")), "string 1 is not")
    many, strings = gguf.ARRAY_STRINGS_LIMIT, string("a") + u32(ARRAY, STRING)
    full = document([strings + u64(many)], num_keys=2)
    end = len(full) + 8 * many
    _bad("a million empty strings, cut", _sparse(full, end - 1), f"needs {8 * many} bytes and {8 * many - 1} are")
    _bad("a million empty strings, then no key", _sparse(full, end), "key 1: the length of the key needs 8 bytes")
    _bad("strings over two arrays", _sparse(full, end, key("b", [""])), "b: arrays of 1048577 strings, at most")
    _bad(
        "2^30 empty strings in 8 GiB", _sparse(document([strings + u64(2**30)]), 8 << 30), "1073741824 strings, at"
    )
    long = document([strings + u64(1, gguf.STRING_LIMIT + 1)])
    _bad("array with a string over the limit", _sparse(long, 32 << 20), "has a string of 16777217 bytes")
    head = document([string("a") + u32(ARRAY, UINT8) + u64(33 << 20)])
    _bad("header over its limit", _sparse(head, 64 << 20), "left of the 33554432 a header may have")


def _alignments() -> None:
    for value, kind in (
        (0, UINT32), (1, UINT32), (3, UINT32), (4, UINT32), (48, UINT32), (131_072, UINT32), (2**31, UINT32),
        (-32, INT32), (2**63, UINT64),
    ):  # fmt: skip
        content = document([key("general.alignment", value, kind)], [tensor("a")], bytes(64))
        _bad(f"alignment {value}", content, f"the alignment is {value}, expected a power of two")
    _bad("alignment as text", document([key("general.alignment", "32")]), "expected an integer")
    _bad("alignment as bool", document([key("general.alignment", True)]), "expected an integer")
    _bad("alignment as array", document([numbers("general.alignment", UINT32, [32])]), "expected an integer")


def _tensors() -> None:
    def one(*args: object, **more: object) -> bytes:
        return document([ARCHITECTURE], [tensor(*args, **more)], bytes(64))  # type: ignore[arg-type]

    name_at_end = document([], [string("a", length=64)])
    _bad("tensor name past the end", name_at_end, "the tensor name needs 64 bytes and 1 are left")
    _bad("tensor name of 2^64 - 1", document([], [string("a", length=U64_MAX)]), "at most 64 are read")
    _bad("tensor name of 65 bytes", one("n" * 65), "has 65 bytes, at most 64")
    _bad("empty tensor name", one(""), "expected at least one character")
    _bad("tensor name not UTF-8", one(b"a\xff"), "the tensor name is not UTF-8")
    _bad("tensor name with a line feed", one("a\nb"), "all printable")
    _bad("tensor twice", document([], [tensor("a"), tensor("a", offset=64)], bytes(128)), "two tensors have this")
    _bad("0 dimensions", one("a", ()), "has 0 dimensions, expected 1 to 4")
    _bad("5 dimensions", one("a", (8, 1, 1, 1, 1)), "has 5 dimensions")
    _bad("2^32 - 1 dimensions", one("a", dims=2**32 - 1), "has 4294967295 dimensions")
    _bad("a zero dimension", one("a", (8, 0)), "expected no zero")
    _bad("all dimensions zero", one("a", (0, 0, 0, 0)), "expected no zero")
    _bad("dimensions that wrap to 0", one("a", (2**32, 2**32), I8), "occupies bytes")
    _bad("dimensions that wrap to 64", one("a", (32, 2**59 + 2), I8), "occupies bytes")
    _bad("bytes that wrap to 32", one("a", (2**62 + 8,), F32), "occupies bytes")
    _bad("dimension 2^64 - 1", one("a", (U64_MAX,), I8), "occupies bytes")
    _bad("four dimensions of 2^62", one("a", (2**62,) * 4), "occupies bytes")
    _bad("type 100", one("a", type=100), "a: Tensor type number 100 is", UnsupportedType)
    _bad("type 1000", one("a", type=1000), "a: Tensor type number 1000 is not known", UnsupportedType)
    _bad("type -1", one("a", type=2**32 - 1), "a: Tensor type number 4294967295 is", UnsupportedType)
    _bad("row of 31 in Q4_0", one("a", (31, 2), Q4_0), "rows of 31 weights, expected a multiple of 32")
    _bad("row of 128 in Q4_K", one("a", (128, 2), Q4_K), "rows of 128 weights, expected a multiple of 256")
    _bad("3 rows in Q4_0_R8", one("a", (32, 3), Q4_0_R8), "3 rows, expected a multiple of 8")
    _bad("a vector in Q4_0_R8", one("a", (32,), Q4_0_R8), "1 rows, expected a multiple of 8")
    _bad("table cut in the dimensions", document([], [tensor("a")[:20]]), "a dimension needs 8 bytes")
    _bad("table cut in the offset", document([], [tensor("a")[:-1]]), "the tensor's offset needs 8 bytes and 7")


def _data() -> None:
    def two(a: int, b: int, alignment: int = 32) -> bytes:
        keys = [key("general.alignment", alignment)] if alignment != 32 else []
        return document(keys, [tensor("a", offset=a), tensor("b", offset=b)], bytes(160), alignment=alignment)

    table = document([], [tensor("a")])
    _bad("no data section", table, "is truncated or damaged, download it again")
    _bad("data section not reached", table + bytes(-len(table) % 32), "is truncated or damaged")
    _bad("last byte missing", document([], [tensor("a")], bytes(63)), "is truncated or damaged")
    _bad("offset past the end", two(0, 128), "b: shape (2, 8) in F32 occupies")
    _bad("offset at the end", two(0, 160), "b: shape (2, 8) in F32 occupies")
    _bad("offset 2^63", two(0, 2**63), "b: shape (2, 8) in F32 occupies")
    _bad("offset that wraps to the start", two(0, 2**64 - 32), "b: shape (2, 8) in F32 occupies")
    _bad("offset 2^64 - 1", two(0, U64_MAX), "no multiple of the alignment 32")
    _bad("offset misaligned", two(0, 72), "b: the offset 72 is no multiple of the alignment 32")
    _bad("offset misaligned for 64", two(0, 96, 64), "b: the offset 96 is no multiple of the alignment 64")
    _bad("two tensors in one place", two(64, 64), "b: begins inside a")
    _bad("tensors overlap", two(0, 32), "b: begins inside a")
    _bad("tensors overlap, table reversed", two(96, 64), "a: begins inside b")
    within = [tensor("a", (4, 10)), tensor("b", (1,), F32, 64)]
    _bad("tensor within a tensor", document([], within, bytes(160)), "b: begins inside a")
    most = gguf.TENSORS_LIMIT - 1
    crowd = _written(
        lambda: document(
            [], [*(tensor(f"t{i}", (8,), F32, 32 * i) for i in range(most)), tensor("u")], bytes(32 * most)
        )
    )
    _bad("last of 16,384 tensors overlaps", crowd, ": begins inside ")


def _tokenizers() -> None:
    tokens, scores, types = vocabulary(3)

    def model(*keys: bytes) -> bytes:
        return document([ARCHITECTURE, *keys])

    for name, kind, expected in (("scores", FLOAT32, "3 float32"), ("token_type", INT32, "3 int32")):
        full = f"tokenizer.ggml.{name}"
        zeros: list[int] = [0, 0, 0]
        for length in (0, 2, 4):
            content = model(tokens, numbers(full, kind, [0] * length))
            _bad(f"{length} {name} for 3 tokens", content, f"expected an array of {expected}, one for each token")
        for wrong in (UINT8, UINT32, FLOAT64, BOOL):
            _bad(f"{name} of type {wrong}", model(tokens, numbers(full, wrong, zeros)), f"an array of {expected}")
        _bad(f"{name} as strings", model(tokens, key(full, ["0"] * 3)), f"an array of {expected}")
        _bad(f"{name} as a number", model(tokens, key(full, 3)), f"an array of {expected}")
    _bad("scores without tokens", model(scores), "expected an array of 0 float32")
    _bad("types without tokens", model(types), "expected an array of 0 int32")
    _bad("tokens as numbers", model(numbers("tokenizer.ggml.tokens", INT32, [1, 2])), "an array of strings")
    _bad("tokens as text", model(key("tokenizer.ggml.tokens", "abc")), "expected an array of strings")
    _bad("merges as numbers", model(numbers("tokenizer.ggml.merges", INT32, [1, 2])), "an array of strings")
    for text in ("<0x-1>", "<0x100>", "<0xG0>", "token", ""):
        content = model(*vocabulary(1, type=6, first=text))
        _bad(f"byte token {text!r}", content, f"stands for a single byte and reads {text!r}")
    _bad("257 byte tokens", model(*vocabulary(257, type=6, first="<0x00>")), "257 tokens stand for single bytes")


def _splits() -> None:
    def split(name: str, first: bytes | None, second: bytes | None, reason: str) -> None:
        def write(folder: Path) -> Path:
            there = []
            for number, content in enumerate((first, second), start=1):
                if content is not None:
                    there.append(folder / f"model-{number:05}-of-00002.gguf")
                    there[-1].write_bytes(content)
            return there[0]

        _bad(name, write, reason)

    one = shard(0, 2, [tensor("a")], bytes(64), 2, keys=[ARCHITECTURE])
    two = shard(1, 2, [tensor("b")], bytes(64), 2)
    split("second shard missing", one, None, "model-00002-of-00002.gguf: this shard is missing: 1 of 2")
    split("first shard missing", None, two, "model-00001-of-00002.gguf: this shard is missing: 1 of 2")
    split("shards in the wrong order", two, one, "split.no: the value is an integer (1), expected 0")
    split("shards of another count", shard(0, 3, [tensor("a")], bytes(64), 2), two, "split.count an integer (3)")
    split("second shard of another count", one, shard(1, 3, [tensor("b")], bytes(64), 2), "(3), expected 2")
    split(
        "shards with a tensor too few", shard(0, 2, [tensor("a")], bytes(64), 3), two, "(3), expected 2, the number"
    )
    split(
        "second shard counts differently", one, shard(1, 2, [tensor("b")], bytes(64), 3), "(3), expected 2, the n"
    )
    split("tensor in both shards", one, shard(1, 2, [tensor("a")], bytes(64), 2), "this tensor is in model-00001")
    split("second shard is no shard", one, document([], [tensor("b")], bytes(64)), "split.no: the value is missing")
    split("second shard truncated", one, two[:-1], "00002-of-00002.gguf: b: shape (2, 8) in F32 occupies")
    split("second shard damaged", one, b"GGUF" + two[8:], "model-00002-of-00002.gguf: GGUF version 1")
    _bad("shard under another name", one, "expected a name like model-00001-of-00003.gguf")
    for kind, value in (("text", key("split.count", "2")), ("array", numbers("split.count", UINT16, [2, 2]))):
        _bad(f"split.count as {kind}", document([ARCHITECTURE, value]), "expected a name like")

    def one_of(count: int) -> Callable[[Path], Path]:
        def write(folder: Path) -> Path:
            path = folder / f"model-00001-of-{count:05}.gguf"
            path.write_bytes(shard(0, count, [tensor("a")], bytes(64), 2))
            return path

        return write

    _bad("4,095 shards missing", one_of(4096), "4095 of 4096 are not there")
    _bad("more shards than are read", one_of(4097), "a model in 4097 shards, at most 4096 are read")


def _paths() -> None:
    def pipe(folder: Path) -> Path:
        os.mkfifo(folder / "pipe.gguf")
        return folder / "pipe.gguf"

    _bad("directory", lambda folder: folder, "this is a directory")
    _bad("no such file", lambda folder: folder / "absent.gguf", "cannot be opened: No such file")
    _bad("named pipe", pipe, "no regular file")
    _bad("NUL in the path", lambda folder: folder / "a\0b.gguf", "cannot be opened: embedded null byte")


for _group in (
    _header, _keys, _strings, _arrays, _alignments, _tensors, _data, _tokenizers, _splits, _paths
):  # fmt: skip
    _group()


# --- Models that cannot be -------------------------------------------------------------------------------------------

# A model of one dense and one MoE layer, of the smallest dimensions that are all different.
_KEYS: dict[str, object] = {
    "block_count": 2,
    "context_length": 64,
    "embedding_length": 32,
    "feed_forward_length": 48,
    "attention.head_count": 3,
    "attention.head_count_kv": 3,
    "attention.q_lora_rank": 20,
    "attention.kv_lora_rank": 24,
    "attention.key_length": 18,  # 10 without and 8 with rotation
    "attention.value_length": 12,
    "attention.layer_norm_rms_epsilon": 1e-6,
    "rope.dimension_count": 8,
    "rope.freq_base": 1e4,
    "leading_dense_block_count": 1,
    "expert_count": 4,
    "expert_used_count": 2,
    "expert_shared_count": 1,
    "expert_feed_forward_length": 16,
    "expert_gating_func": 2,
    "expert_weights_norm": True,
    "expert_weights_scale": 2.5,
    "expert_group_count": 2,
    "expert_group_used_count": 1,
    "vocab_size": 40,
}
_ATTENTION = {
    "attn_norm.weight": (32,),
    "attn_q_a.weight": (20, 32),
    "attn_q_a_norm.weight": (20,),
    "attn_q_b.weight": (3 * 18, 20),
    "attn_kv_a_mqa.weight": (24 + 8, 32),
    "attn_kv_a_norm.weight": (24,),
    "attn_kv_b.weight": (3 * (10 + 12), 24),
    "attn_output.weight": (32, 3 * 12),
    "ffn_norm.weight": (32,),
}
_DENSE = {"ffn_gate.weight": (48, 32), "ffn_up.weight": (48, 32), "ffn_down.weight": (32, 48)}
_MOE = {
    "ffn_gate_inp.weight": (4, 32),
    "exp_probs_b.bias": (4,),
    "ffn_gate_exps.weight": (4, 16, 32),
    "ffn_up_exps.weight": (4, 16, 32),
    "ffn_down_exps.weight": (4, 32, 16),
    "ffn_gate_shexp.weight": (16, 32),
    "ffn_up_shexp.weight": (16, 32),
    "ffn_down_shexp.weight": (32, 16),
}
_SHAPES: dict[str, tuple[int, ...]] = {
    "token_embd.weight": (40, 32),
    **{f"blk.0.{name}": shape for name, shape in (_ATTENTION | _DENSE).items()},
    **{f"blk.1.{name}": shape for name, shape in (_ATTENTION | _MOE).items()},
    "output_norm.weight": (32,),
    "output.weight": (40, 32),
}


def model_file(
    keys: dict[str, object] | None = None,
    shapes: dict[str, tuple[int, ...] | None] | None = None,
    *,
    architecture: str | None = "deepseek2",
) -> bytes:
    """A well-formed deepseek2 file, all weights zero. `keys` and `shapes` replace or, with None, remove entries."""
    values = {name: value for name, value in (_KEYS | (keys or {})).items() if value is not None}
    entries = [key(f"deepseek2.{name}", value) for name, value in values.items()]
    if architecture is not None:
        entries.insert(0, key("general.architecture", architecture))
    placed = {name: shape for name, shape in (_SHAPES | (shapes or {})).items() if shape is not None}
    table, offset = [], 0
    for name, shape in placed.items():
        table.append(tensor(name, reversed(shape), F32, offset))
        size = 4
        for dimension in shape:
            size *= dimension
        offset += -(-size // 32) * 32
    return document([*entries, *vocabulary(40)], table, bytes(offset))


def _bad_model(
    name: str,
    reason: str,
    *,
    error: type[KvfoldError] = ModelFileError,
    keys: dict[str, object] | None = None,
    shapes: dict[str, tuple[int, ...] | None] | None = None,
    architecture: str | None = "deepseek2",
) -> None:
    make = _written(lambda: model_file(keys, shapes, architecture=architecture))
    BAD_MODELS.append(BadFile(name, make, reason, error))


def _models() -> None:
    _bad_model("architecture missing", "general.architecture", error=UnsupportedModel, architecture=None)
    _bad_model("another architecture", "general.architecture", error=UnsupportedModel, architecture="llama")
    for name, value in (
        ("block_count", 0), ("block_count", 2**31), ("embedding_length", 0), ("attention.head_count", 0),
        ("attention.head_count", 10**6), ("attention.head_count", 2.5), ("attention.kv_lora_rank", 0),
        ("attention.kv_lora_rank", 2**32 - 1), ("attention.q_lora_rank", 0), ("rope.dimension_count", 0),
        ("rope.dimension_count", 7), ("rope.dimension_count", "8"), ("attention.key_length", 8),
        ("attention.key_length", 0), ("attention.value_length", 0), ("attention.head_count_kv", 2),
        ("attention.layer_norm_rms_epsilon", 0.0), ("attention.layer_norm_rms_epsilon", float("nan")),
        ("leading_dense_block_count", 3), ("expert_count", 0), ("expert_count", 10**6), ("expert_count", None),
        ("expert_used_count", 0), ("expert_used_count", 5), ("expert_group_count", 3),
        ("expert_group_used_count", 3), ("expert_feed_forward_length", 0), ("feed_forward_length", 0),
        ("vocab_size", 0), ("context_length", 0), ("rope.freq_base", -1.0), ("attention.kv_lora_rank", None),
    ):  # fmt: skip
        _bad_model(f"{name} {value}", f"deepseek2.{name}", keys={name: value})
    _bad_model(
        "gating function 9", "deepseek2.expert_gating_func", error=UnsupportedModel, keys={"expert_gating_func": 9}
    )
    _bad_model(
        "MLA key length without latent",
        "key_length",
        keys={"attention.key_length_mla": 18, "attention.value_length_mla": 12},
    )
    for tensor_name, shape in (
        ("blk.0.attn_kv_b.weight", (3 * (10 + 12) - 1, 24)), ("blk.1.attn_kv_a_mqa.weight", (24, 32)),
        ("blk.1.ffn_gate_exps.weight", (3, 16, 32)), ("blk.0.attn_q_b.weight", (20, 54)),
        ("token_embd.weight", (41, 32)), ("blk.1.attn_norm.weight", (1, 32, 1)), ("output_norm.weight", (31,)),
    ):  # fmt: skip
        _bad_model(f"{tensor_name} of shape {shape}", tensor_name, shapes={tensor_name: shape})
    for absent in (
        "blk.0.attn_kv_b.weight",
        "blk.1.ffn_down_exps.weight",
        "output_norm.weight",
        "token_embd.weight",
    ):
        _bad_model(f"without {absent}", absent, shapes={absent: None})
    _bad_model("with a tensor left over", "blk.2.attn_norm.weight", shapes={"blk.2.attn_norm.weight": (32,)})


_models()
