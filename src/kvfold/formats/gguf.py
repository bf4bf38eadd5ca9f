"""Reads GGUF files (ggml docs/gguf.md). A file holds, little-endian and packed, without padding between fields:

    "GGUF"  u32 version (2 or 3)  u64 tensor count  u64 key count
    for each key:     string key, u32 value type, then the value
    for each tensor:  string name, u32 dimensions, u64 ne[dimensions] (ne[0] fastest), u32 ggml type, u64 offset
    zero bytes up to a multiple of general.alignment (a key; 32 without it): here the data section begins
    the data section: a tensor begins `offset` bytes into it, a multiple of the alignment, its rows one after another
    string:  u64 bytes, then UTF-8, no terminator
    array:   u32 element type, u64 count, then the elements; strings in it each with their own length
    split file: NAME-00001-of-00003.gguf ... each a GGUF file with split.no, split.count and split.tensors.count

Owns the file's structure and the map of its bytes; knows nothing of models, and decodes no weights. A file is
untrusted: every count, length and offset is a Python int, compared with the bytes that are left before anything is
allocated or read, and a file that breaks a rule is refused as a whole by `open_gguf`. What it returns stays inside the
file as it was at open; whoever shortens a file that is mapped ends the process (SIGBUS), as with any map.

The whole header is checked at open, but its 250,000 strings (a DeepSeek-V3 vocabulary) stay in the map: opening
keeps eight bytes for each, and `StringArray` decodes on access.
"""

from __future__ import annotations

import os
import re
import stat
import struct
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, TypeAlias, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from kvfold.errors import ModelFileError, UnsupportedType
from kvfold.formats.file_map import FileMap, map_file
from kvfold.quant.types import BlockType, by_id

# What a header may ask of us. One of DeepSeek-V3's size takes 5.3 MB. A hostile one of 32 MiB costs 32 MiB of map,
# 128 MiB of str (4 B a character) and a 16 MiB copy: below 200 MB. Walking 2^20 strings takes 0.3 s.
HEADER_LIMIT = 32 << 20  # bytes
STRING_LIMIT = 16 << 20  # bytes of one string: some files hold a whole tokenizer.json in one
ARRAY_STRINGS_LIMIT = 1 << 20  # strings in all arrays of a file together; DeepSeek-V3: 257,021
KEYS_LIMIT = TENSORS_LIMIT = 1 << 14  # DeepSeek-V3: 1,086 tensors, fewer than 100 keys
SHARDS_LIMIT = 4096
KEY_BYTES_LIMIT = 65_535  # docs/gguf.md
TENSOR_NAME_BYTES_LIMIT = 64  # docs/gguf.md
DIMS_LIMIT = 4  # GGML_MAX_DIMS
DEFAULT_ALIGNMENT = 32
# docs/gguf.md: a multiple of 8; a power of two as every reader demands. 64 KiB is the largest page size in use.
MIN_ALIGNMENT, MAX_ALIGNMENT = 8, 65_536

_MAGIC = b"GGUF"
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_BOOL, _STRING, _ARRAY = 7, 8, 9
# value type: how one number is unpacked, and the elements of an array of them
_NUMBERS: dict[int, tuple[struct.Struct, np.dtype[Any]]] = {
    id: (struct.Struct("<" + code), np.dtype("<" + code))
    for id, code in {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 10: "Q", 11: "q", 12: "d"}.items()
}
SHARD_NAME = re.compile(r"(?P<stem>.*)-[0-9]{5}-of-(?P<count>[0-9]{5})\.gguf", re.DOTALL)


class StringArray(Sequence[str]):
    """An array of strings inside a mapped header, decoded on access. Bounds and UTF-8 were checked at open."""

    def __init__(self, file: Path, key: str, data: NDArray[np.uint8], starts: NDArray[np.uint64]) -> None:
        """data: uint8 [file size]. starts: uint64 [len + 1], byte of the file where each string's text begins; the
        last entry is where one more would begin, so string i ends 8 bytes (a length) before starts[i + 1]."""
        self._file = file
        self._key = key
        self._data = data
        self._starts = starts

    def __len__(self) -> int:
        return len(self._starts) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self._key} has {len(self)} strings, there is no string {index}")
        i = index % len(self)
        start, end = int(self._starts[i]), int(self._starts[i + 1]) - _U64.size
        return self._decode(self._data[start:end].tobytes(), i)

    def __iter__(self) -> Iterator[str]:
        """All strings in order: 0.3 us each, by index 1 us."""
        starts = self._starts.tolist()
        base = starts[0]
        text = self._data[base : starts[-1] - _U64.size].tobytes()
        for i, (start, following) in enumerate(pairwise(starts)):
            yield self._decode(text[start - base : following - base - _U64.size], i)

    def __repr__(self) -> str:
        return f"StringArray({self._key}, {len(self)} strings)"

    def _decode(self, text: bytes, index: int) -> str:
        try:
            return text.decode()
        except UnicodeDecodeError as error:
            raise ModelFileError(
                self._file,
                f"string {index} is no longer UTF-8 as it was when the file was opened: something writes to the file",
                where=self._key,
                offset=int(self._starts[index]),
            ) from error


Value: TypeAlias = bool | int | float | str | NDArray[Any] | StringArray
_V = TypeVar("_V", bool, int, float, str, np.ndarray, StringArray)


@dataclass(frozen=True, eq=False)
class GgufTensor:
    """One tensor of a file; nothing of it has been read.

    name:   as in the file, "blk.3.attn_q_a.weight"
    type:   how a row's bytes are read. Types that kvfold knows but does not decode (`type.decodes` False) open too
    shape:  slowest dimension first (ggml's ne reversed): (experts, rows, cols), (rows, cols), (cols,)
    raw:    uint8 [..., rows, row_bytes] of the map, read-only; a vector: [1, row_bytes]
    file:   the file (of a split model) that holds it
    offset: its first byte, from the start of that file
    """

    name: str
    type: BlockType
    shape: tuple[int, ...]
    raw: NDArray[np.uint8]
    file: Path
    offset: int

    @property
    def nbytes(self) -> int:
        return self.raw.nbytes

    @property
    def scale(self) -> None:
        """GGUF types keep their scales inside their blocks; only fp8 safetensors have some beside (QuantTensor)."""
        return None


class GgufFile:
    """An open model: one file, or all shards of a split one.

    path:     as given to `open_gguf`
    maps:     every file of the model, in shard order
    version:  of the GGUF format, of the first file
    metadata: the first file's keys, in file order. Numbers, bools and strings are Python's; a numeric array is a
              read-only numpy view of the map (little-endian, perhaps unaligned); a string array is a StringArray
    tensors:  by name, in file order, the files one after another

    `close` (or a with block) lets go of the files. Views that were handed out stay valid: a file's map ends with
    the last of them.
    """

    def __init__(
        self,
        path: Path,
        maps: tuple[FileMap, ...],
        version: int,
        metadata: Mapping[str, Value],
        tensors: dict[str, GgufTensor],
    ) -> None:
        self.path = path
        self.files = tuple(map.path for map in maps)
        self.version = version
        self._maps: tuple[FileMap, ...] | None = maps
        self._metadata: Mapping[str, Value] | None = metadata
        self._tensors: dict[str, GgufTensor] | None = tensors

    @property
    def maps(self) -> tuple[FileMap, ...]:
        assert self._maps is not None, f"{self.path} is closed"
        return self._maps

    @property
    def metadata(self) -> Mapping[str, Value]:
        assert self._metadata is not None, f"{self.path} is closed"
        return self._metadata

    @property
    def tensors(self) -> dict[str, GgufTensor]:
        assert self._tensors is not None, f"{self.path} is closed"
        return self._tensors

    def close(self) -> None:
        self._maps = None
        self._metadata = None
        self._tensors = None

    def __enter__(self) -> GgufFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_gguf(path: str | os.PathLike[str]) -> GgufFile:
    """Opens a GGUF file and checks all of its structure; no tensor data is read. Any shard opens its whole model.

    ModelFileError: the file, or a shard, is missing, damaged, truncated or inconsistent.
    UnsupportedType: a tensor has a type number that no known program writes, so its size is unknown.
    """
    path = Path(path)
    opened = _read_file(path)
    count = opened.metadata.get("split.count", 1)
    shards = [opened] if type(count) is int and count <= 1 else _open_shards(opened)
    tensors: dict[str, GgufTensor] = {}
    for shard in shards:
        for name, tensor in shard.tensors.items():
            if name in tensors:
                raise ModelFileError(
                    shard.path, f"this tensor is in {tensors[name].file.name} too", where=name, offset=tensor.offset
                )
            tensors[name] = tensor
    first = shards[0]
    return GgufFile(
        path, tuple(shard.map for shard in shards), first.version, MappingProxyType(first.metadata), tensors
    )


def get(file: GgufFile, key: str, kind: type[_V]) -> _V:
    """The value of a key that must be there and be of this kind: bool, int (no bool), float, str, np.ndarray (an
    array of numbers) or StringArray. ModelFileError names the key and both kinds."""
    if key not in file.metadata:
        raise ModelFileError(file.files[0], f"the key is missing, expected {_KINDS[kind]}", where=key)
    value = file.metadata[key]
    if type(value) is not kind:
        raise ModelFileError(file.files[0], f"the value is {_describe(value)}, expected {_KINDS[kind]}", where=key)
    return value


_KINDS: dict[type, str] = {
    bool: "a bool",
    int: "an integer",
    float: "a float",
    str: "a string",
    np.ndarray: "an array of numbers",
    StringArray: "an array of strings",
}


def _describe(value: Value) -> str:
    if isinstance(value, np.ndarray):
        return f"an array of {value.size} {value.dtype.name}"
    if isinstance(value, StringArray):
        return f"an array of {len(value)} strings"
    shown = value[:60] if isinstance(value, str) else value
    return f"{_KINDS[type(value)]} ({shown!r})"


@dataclass(frozen=True)
class _OneFile:
    map: FileMap
    version: int
    metadata: dict[str, Value]
    tensors: dict[str, GgufTensor]

    @property
    def path(self) -> Path:
        return self.map.path


def _read_file(path: Path) -> _OneFile:
    map = _map(path)
    data = map.data
    header = _Header(path, data)
    version = _read_version(header)
    tensor_count = header.count("tensors", TENSORS_LIMIT)
    key_count = header.count("keys", KEYS_LIMIT)
    metadata: dict[str, Value] = {}
    for index in range(key_count):
        start = header.position
        header.where = f"key {index}"
        key = header.name("key", KEY_BYTES_LIMIT)
        header.where = key
        if key in metadata:
            raise header.error("this key occurs twice", start)
        metadata[key] = header.value()
    header.where = ""
    _check_tokenizer(path, metadata)
    alignment = _read_alignment(path, metadata)
    infos = _read_tensor_infos(header, tensor_count)
    start = -(-header.position // alignment) * alignment
    return _OneFile(map, version, metadata, _place_tensors(path, data, infos, start, alignment))


def _map(path: Path) -> FileMap:
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):  # opening a pipe would wait for its writer
            kind = "a directory" if stat.S_ISDIR(mode) else "no regular file"
            raise ModelFileError(path, f"this is {kind}, expected a .gguf file")
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise ModelFileError(path, "the file is empty, expected a GGUF header: download it again", offset=0)
            return map_file(path, file)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise ModelFileError(path, f"cannot be opened: {getattr(error, 'strerror', None) or error}") from error


class _Header:
    """A position in a file's header. Each read first compares what it needs with what is left.

    where: the key or tensor being read, for errors
    """

    def __init__(self, path: Path, data: NDArray[np.uint8]) -> None:
        self.path = path
        self.data = data
        self.where = ""
        self.position = 0
        self.end = min(len(data), HEADER_LIMIT)
        self._view = data.data
        self._array_strings = 0

    def error(self, reason: str, offset: int | None = None) -> ModelFileError:
        return ModelFileError(
            self.path, reason, where=self.where, offset=self.position if offset is None else offset
        )

    def need(self, nbytes: int, what: str) -> None:
        left = self.end - self.position
        if nbytes <= left:
            return
        if self.end == len(self.data):
            raise self.error(f"{what} needs {nbytes} bytes and {left} are left: the file is truncated or damaged")
        raise self.error(f"{what} needs {nbytes} bytes and {left} are left of the {HEADER_LIMIT} a header may have")

    def take(self, nbytes: int, what: str) -> bytes:
        self.need(nbytes, what)
        start = self.position
        self.position += nbytes
        return self._view[start : self.position].tobytes()

    def u32(self, what: str) -> int:
        return int.from_bytes(self.take(_U32.size, what), "little")

    def u64(self, what: str) -> int:
        return int.from_bytes(self.take(_U64.size, what), "little")

    def count(self, what: str, limit: int) -> int:
        start = self.position
        count = self.u64(f"the number of {what}")
        if count > limit:
            raise self.error(f"the header announces {count} {what}, at most {limit} are read", start)
        return count

    def text(self, what: str, limit: int) -> str:
        start = self.position
        length = self.u64(f"the length of the {what}")
        if length > limit:
            raise self.error(f"the {what} has {length} bytes, at most {limit} are read", start)
        try:
            return self.take(length, f"the {what}").decode()
        except UnicodeDecodeError as error:
            raise self.error(
                f"the {what} is not UTF-8 ({error.reason})", start + _U64.size + error.start
            ) from error

    def name(self, what: str, limit: int) -> str:
        """A key or a tensor name: they are shown to people and sought by others, so no control characters."""
        start = self.position
        name = self.text(what, limit)
        if not name or not name.isprintable():
            raise self.error(f"the {what} is {name[:60]!r}, expected at least one character, all printable", start)
        return name

    def value(self) -> Value:
        start = self.position
        kind = self.u32("the value type")
        if kind == _STRING:
            return self.text("value", STRING_LIMIT)
        if kind == _ARRAY:
            return self.array()
        if kind == _BOOL:
            byte = self.take(1, "the value")[0]
            if byte > 1:
                raise self.error(f"the bool has the value {byte}, expected 0 or 1", start)
            return byte == 1
        if kind not in _NUMBERS:
            raise self.error(f"the value type is {kind}, expected 0 to 12", start)
        unpack = _NUMBERS[kind][0]
        number: int | float = unpack.unpack(self.take(unpack.size, "the value"))[0]
        return number

    def array(self) -> NDArray[Any] | StringArray:
        start = self.position
        kind = self.u32("the type of the array's elements")
        count = self.u64("the array's length")
        if kind == _STRING:
            return self.strings(count)
        if kind == _ARRAY:  # docs/gguf.md has them; llama.cpp refuses them as we do
            raise self.error("the value is an array of arrays, expected an array of numbers or strings", start)
        if kind != _BOOL and kind not in _NUMBERS:
            raise self.error(f"the array's elements have the type {kind}, expected 0 to 12", start)
        dtype = np.dtype(np.bool_) if kind == _BOOL else _NUMBERS[kind][1]
        nbytes = count * dtype.itemsize
        self.need(nbytes, f"the array of {count} {dtype.name}")
        elements = self.data[self.position : self.position + nbytes]
        if kind == _BOOL and nbytes and elements.max() > 1:
            raise self.error("the array of bools has other values than 0 and 1", start)
        self.position += nbytes
        return elements.view(dtype)

    def strings(self, count: int) -> StringArray:
        """An array of strings: walks their lengths (0.25 us each), then checks the texts in large pieces."""
        start = self.position
        self._array_strings += count
        if self._array_strings > ARRAY_STRINGS_LIMIT:
            raise self.error(
                f"arrays of {self._array_strings} strings, at most {ARRAY_STRINGS_LIMIT} are read", start
            )
        self.need(count * _U64.size, f"the array of {count} strings")
        starts = array("Q", [start + _U64.size])
        append, length_at, view = starts.append, _U64.unpack_from, self._view
        at, last = start, self.end - _U64.size
        for index in range(count):
            if at > last:
                self.position = at
                raise self.error(
                    f"the header ends before string {index} of {count}: the file is truncated or damaged"
                )
            length = length_at(view, at)[0]
            at += _U64.size + length
            if at > self.end:
                self.position = starts[-1] - _U64.size
                raise self.error(f"string {index} of {count} has {length} bytes, past the end of the header")
            append(at + _U64.size)
        self.position = at
        found = np.frombuffer(starts, np.uint64)
        self._check_strings(found)
        return StringArray(self.path, self.where, self.data, found)

    def _check_strings(self, starts: NDArray[np.uint64]) -> None:
        """Every string is UTF-8 and no longer than STRING_LIMIT. starts: as in StringArray."""
        begins = starts.astype(np.int64)
        longest = int(np.diff(begins).max(initial=0)) - _U64.size
        if longest > STRING_LIMIT:
            raise self.error(f"the array has a string of {longest} bytes, at most {STRING_LIMIT} are read")
        # Many strings are decoded at once: a copy of about 1 MiB with the lengths between them zeroed. A zero byte is
        # a character, so text cut short or continued in the next string shows. 257,021 strings: 20 ms, one by one 70.
        first, count = 0, len(begins) - 1
        while first < count:
            stop = int(np.searchsorted(begins, begins[first] + (1 << 20)))
            stop = min(max(stop, first + 1), count)
            base = int(begins[first])
            piece = self.data[base : int(begins[stop]) - _U64.size].copy()
            lengths = begins[first + 1 : stop] - _U64.size - base
            piece[lengths[:, None] + np.arange(_U64.size)] = 0
            try:
                piece.tobytes().decode()
            except UnicodeDecodeError as error:
                at = base + error.start
                index = int(np.searchsorted(begins, at, side="right")) - 1
                raise self.error(f"string {index} is not UTF-8 ({error.reason})", at) from error
            first = stop


def _read_version(header: _Header) -> int:
    magic = header.take(4, "the magic number")
    if magic != _MAGIC:
        raise header.error(f"starts with {magic!r}, expected {_MAGIC!r}: this is no GGUF file", 0)
    version = header.u32("the version")
    if version and version & 0xFFFF == 0:
        raise header.error("a big-endian GGUF file, only little-endian ones are read: convert the model again", 4)
    if version not in (2, 3):
        advice = "convert the model again" if version < 2 else "a newer kvfold may read it"
        raise header.error(f"GGUF version {version}, versions 2 and 3 are read: {advice}", 4)
    return version


def _read_alignment(path: Path, metadata: dict[str, Value]) -> int:
    key = "general.alignment"
    alignment = metadata.get(key, DEFAULT_ALIGNMENT)
    if type(alignment) is not int:
        raise ModelFileError(path, f"the value is {_describe(alignment)}, expected an integer", where=key)
    if not MIN_ALIGNMENT <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
        raise ModelFileError(
            path,
            f"the alignment is {alignment}, expected a power of two from {MIN_ALIGNMENT} to {MAX_ALIGNMENT}",
            where=key,
        )
    return alignment


# Each is parallel to the tokens or absent; a narrower element type once let others read past the array's end.
_TOKENIZER_ARRAYS = {"scores": np.dtype("<f4"), "token_type": np.dtype("<i4")}
_BYTE_TOKEN_TYPE = 6
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def _check_tokenizer(path: Path, metadata: dict[str, Value]) -> None:
    """The arrays of a vocabulary have the right element types and agree in length; byte tokens name a byte."""
    for key in ("tokenizer.ggml.tokens", "tokenizer.ggml.merges"):
        value = metadata.get(key)
        if value is not None and not isinstance(value, StringArray):
            raise ModelFileError(path, f"the value is {_describe(value)}, expected an array of strings", where=key)
    tokens = metadata.get("tokenizer.ggml.tokens")
    token_count = len(tokens) if isinstance(tokens, StringArray) else 0
    for name, dtype in _TOKENIZER_ARRAYS.items():
        key = f"tokenizer.ggml.{name}"
        value = metadata.get(key)
        if value is None:
            continue
        if not isinstance(value, np.ndarray) or value.dtype != dtype or value.size != token_count:
            raise ModelFileError(
                path,
                f"the value is {_describe(value)}, expected an array of {token_count} {dtype.name}, one for each token",
                where=key,
            )
    types = metadata.get("tokenizer.ggml.token_type")
    if not isinstance(tokens, StringArray) or not isinstance(types, np.ndarray):
        return
    byte_tokens = np.flatnonzero(types == _BYTE_TOKEN_TYPE)
    if byte_tokens.size > 256:
        raise ModelFileError(
            path,
            f"{byte_tokens.size} tokens stand for single bytes, expected at most 256",
            where="tokenizer.ggml.tokens",
        )
    for index in byte_tokens.tolist():
        if not _BYTE_TOKEN.fullmatch(tokens[index]):
            raise ModelFileError(
                path,
                f"token {index} stands for a single byte and reads {tokens[index][:60]!r}, expected '<0x00>' to '<0xFF>'",
                where="tokenizer.ggml.tokens",
            )


@dataclass(frozen=True)
class _TensorInfo:
    """A tensor as the header announces it. offset: from the start of the data section; at: of this entry."""

    name: str
    shape: tuple[int, ...]
    type: BlockType
    offset: int
    at: int

    @property
    def rows(self) -> tuple[int, ...]:
        """All dimensions but the contiguous one; (1,) for a vector."""
        return self.shape[:-1] or (1,)


def _read_tensor_infos(header: _Header, count: int) -> list[_TensorInfo]:
    infos: dict[str, _TensorInfo] = {}
    for index in range(count):
        at = header.position
        header.where = f"tensor {index}"
        name = header.name("tensor name", TENSOR_NAME_BYTES_LIMIT)
        header.where = name
        if name in infos:
            raise header.error("two tensors have this name", at)
        dims = header.u32("the number of dimensions")
        if not 1 <= dims <= DIMS_LIMIT:
            raise header.error(f"the tensor has {dims} dimensions, expected 1 to {DIMS_LIMIT}", at)
        shape = tuple(header.u64("a dimension") for _ in range(dims))[::-1]
        if 0 in shape:
            raise header.error(f"the tensor has the shape {shape}, expected no zero", at)
        type_id = header.u32("the tensor type")
        try:
            type = by_id(type_id)
        except UnsupportedType as error:
            raise UnsupportedType(f"{header.path}: {name}: {error} (at byte {at})") from error
        if shape[-1] % type.block_elements:
            raise header.error(
                f"rows of {shape[-1]} weights, expected a multiple of {type.block_elements}, a block of {type.name}",
                at,
            )
        info = _TensorInfo(name, shape, type, header.u64("the tensor's offset"), at)
        if info.rows[-1] % type.interleaved_rows:
            raise header.error(
                f"{info.rows[-1]} rows, expected a multiple of {type.interleaved_rows}, which {type.name} interleaves",
                at,
            )
        infos[name] = info
    header.where = ""
    return list(infos.values())


def _place_tensors(
    path: Path, data: NDArray[np.uint8], infos: list[_TensorInfo], data_start: int, alignment: int
) -> dict[str, GgufTensor]:
    """The tensors over the data section, each aligned, inside the file and apart from all others. Gaps between them
    are allowed: they harm nobody, and the format does not forbid them."""
    tensors: dict[str, GgufTensor] = {}
    for info in infos:
        if info.offset % alignment:
            raise ModelFileError(
                path,
                f"the offset {info.offset} is no multiple of the alignment {alignment}",
                where=info.name,
                offset=info.at,
            )
        row_bytes = info.type.row_bytes(info.shape[-1])
        nbytes = row_bytes
        for rows in info.rows:
            nbytes *= rows
        begin = data_start + info.offset
        if begin + nbytes > len(data):
            raise ModelFileError(
                path,
                f"shape {info.shape} in {info.type.name} occupies bytes {begin} to {begin + nbytes}, "
                f"the file has {len(data)}: it is truncated or damaged, download it again",
                where=info.name,
                offset=info.at,
            )
        raw = data[begin : begin + nbytes].reshape(*info.rows, row_bytes)
        tensors[info.name] = GgufTensor(info.name, info.type, info.shape, raw, path, begin)
    in_order = sorted(tensors.values(), key=lambda tensor: tensor.offset)
    for before, after in pairwise(in_order):
        if before.offset + before.nbytes > after.offset:
            raise ModelFileError(
                path,
                f"begins inside {before.name}, whose bytes are {before.offset} to {before.offset + before.nbytes}",
                where=after.name,
                offset=after.offset,
            )
    return tensors


def _open_shards(opened: _OneFile) -> list[_OneFile]:
    """All shards of a split model, in order, given any one. They must agree with their names and with each other."""
    count = opened.metadata["split.count"]
    match = SHARD_NAME.fullmatch(opened.path.name)
    if match is None or type(count) is not int or int(match["count"]) != count:
        raise ModelFileError(
            opened.path,
            f"this is a shard of a split model with split.count {_describe(count)}, expected a name like "
            f"model-00001-of-00003.gguf with that count: rename the shards as they were when they were published",
            where="split.count",
        )
    if count > SHARDS_LIMIT:
        raise ModelFileError(
            opened.path, f"a model in {count} shards, at most {SHARDS_LIMIT} are read", where="split.count"
        )
    names = [f"{match['stem']}-{number:05}-of-{count:05}.gguf" for number in range(1, count + 1)]
    folder = opened.path.parent
    missing = [name for name in names if not os.path.isfile(os.path.join(folder, name))]
    if missing:
        raise ModelFileError(
            folder / missing[0],
            f"this shard is missing: {len(missing)} of {count} are not there, {', '.join(missing[:8])}"
            f"{' ...' if len(missing) > 8 else ''}: download them into {folder}",
        )
    shards = []
    for number, name in enumerate(names):
        path = folder / name
        shard = opened if path == opened.path else _read_file(path)
        for key, expected in (("split.no", number), ("split.count", count)):
            got = shard.metadata.get(key)
            if type(got) is not int or got != expected:
                raise ModelFileError(
                    path,
                    f"the value is {'missing' if got is None else _describe(got)}, expected {expected} as the name says",
                    where=key,
                )
        shards.append(shard)
    found = sum(len(shard.tensors) for shard in shards)
    for shard in shards:
        key = "split.tensors.count"
        got = shard.metadata.get(key)
        if type(got) is not int or got != found:
            raise ModelFileError(
                shard.path,
                f"the value is {'missing' if got is None else _describe(got)}, expected {found}, "
                f"the number of tensors in the {count} shards: they are not of one model",
                where=key,
            )
    return shards
