"""Reads a Hugging Face directory: config.json and one or more .safetensors files. Such a file is

    u64 n, little-endian
    n bytes of JSON: {"name": {"dtype": "BF16", "shape": [rows, cols], "data_offsets": [begin, end]}, ...}
    the tensors' bytes; offsets count from the end of the JSON

Owns the directory's structure and the maps of its files; knows nothing of models, and decodes no weights. The
safetensors library judges every header (sizes, holes, overlaps: it has been audited), but it hands out copies and no
offsets. So each file is opened with it first and, once found whole, its header is read again here for the offsets
that zero-copy views of one map need.

Weights in fp8 (e4m3, DeepSeek-V3 and its kin) come with a second tensor NAME_scale_inv, float32, one multiplier for
each block of 128 x 128.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from kvfold.errors import ModelFileError, UnsupportedModel, UnsupportedType
from kvfold.formats.file_map import FileMap, map_file
from kvfold.quant.types import BlockType, by_name

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
# DeepSeek-V3 in one file would need 14 MB of header (91,000 tensors of 150 bytes), its index 9 MB.
HEADER_LIMIT = JSON_LIMIT = 32 << 20  # bytes
FP8_BLOCK = 128
SCALE_SUFFIX = "_scale_inv"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
PICKLE_REASON = (
    "this is a PyTorch pickle, which can run any code when it is opened; kvfold reads .safetensors and .gguf. "
    "Most repositories offer one of them; transformers' save_pretrained writes safetensors."
)
_TYPES = {"BF16": "BF16", "F16": "F16", "F32": "F32", "F8_E4M3": "F8_E4M3"}


@dataclass(frozen=True, eq=False)
class HfTensor:
    """One tensor of a directory; nothing of it has been read.

    name:   as in the file, "model.layers.3.self_attn.q_a_proj.weight"
    shape:  (experts, rows, cols), (rows, cols) or (cols,)
    raw:    uint8 [..., rows, row_bytes] of the map, read-only; a vector: [1, row_bytes]
    scale:  float32 [ceil(rows / 128), ceil(cols / 128)] of an fp8 matrix, else None
    offset: its first byte, from the start of `file`
    """

    name: str
    type: BlockType
    shape: tuple[int, ...]
    raw: NDArray[np.uint8]
    scale: NDArray[np.float32] | None
    file: Path
    offset: int


@dataclass(frozen=True, eq=False)
class HfDirectory:
    """An open directory. config: config.json, parsed. tensors: by name, the fp8 scales joined to their matrices."""

    path: Path
    config: Mapping[str, object]
    maps: tuple[FileMap, ...]
    tensors: Mapping[str, HfTensor]

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(map.path for map in self.maps)


def open_hf_directory(path: str | os.PathLike[str]) -> HfDirectory:
    """Opens a directory and checks all of its structure; no tensor data is read.

    ModelFileError: a file is missing, damaged, or disagrees with another.
    UnsupportedType, UnsupportedModel: tensors in a type or quantization that kvfold does not read.
    """
    path = Path(path)
    config = _read_json(path / CONFIG)
    _check_quantization(path / CONFIG, config)
    files, weight_map = _files(path)
    tensors: dict[str, HfTensor] = {}
    maps = tuple(_map(file) for file in files)
    for map in maps:
        file = map.path
        for name, tensor in _read_file(map).items():
            if name in tensors:
                raise ModelFileError(file, f"this tensor is in {tensors[name].file.name} too.", where=name)
            tensors[name] = tensor
    for name, file_name in weight_map.items():
        if name not in tensors or tensors[name].file.name != file_name:
            raise ModelFileError(
                path / INDEX,
                f"the index places this tensor in {file_name}, which does not hold it. Fetch the directory again.",
                where=name,
            )
    return HfDirectory(path, config, maps, _join_scales(tensors))


def _read_json(file: Path) -> dict[str, Any]:
    try:
        if file.stat().st_size > JSON_LIMIT:
            raise ModelFileError(file, f"expected at most {JSON_LIMIT} bytes of JSON, got {file.stat().st_size}.")
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelFileError(
            file, "the file is missing; a Hugging Face directory needs it beside its .safetensors files."
        ) from error
    except (OSError, ValueError, RecursionError) as error:  # ValueError: bad JSON and bad UTF-8
        raise ModelFileError(file, f"expected a JSON file, but it cannot be read: {error}.") from error
    if not isinstance(value, dict):
        raise ModelFileError(file, f"expected a JSON object, got {type(value).__name__}.")
    return value


def _check_quantization(file: Path, config: Mapping[str, object]) -> None:
    """Only the fp8 of DeepSeek-V3 is read; the formats of other quantizers have tensors of their own."""
    settings = config.get("quantization_config")
    if settings is None:
        return
    method = settings.get("quant_method") if isinstance(settings, dict) else settings
    if not isinstance(settings, dict) or method != "fp8":
        raise UnsupportedModel(
            f"{file}: quantization_config.quant_method is {method!r}; kvfold reads unquantized weights and 'fp8'. "
            f"Use the original model or a GGUF file of it."
        )
    block = settings.get("weight_block_size")
    if block != [FP8_BLOCK, FP8_BLOCK]:
        raise UnsupportedModel(
            f"{file}: quantization_config.weight_block_size is {block!r}; kvfold reads [{FP8_BLOCK}, {FP8_BLOCK}]."
        )


def _files(path: Path) -> tuple[tuple[Path, ...], dict[str, str]]:
    """(the files to open, the index: tensor name -> file name). One whole file goes before an index, as in
    transformers."""
    if (path / SINGLE).is_file():
        return (path / SINGLE,), {}
    if not (path / INDEX).is_file():
        found = sorted(entry.name for entry in path.iterdir())
        if any(name.endswith(".safetensors") for name in found):
            raise ModelFileError(path, f"there are .safetensors files but neither {SINGLE} nor {INDEX}.")
        pickles = [name for name in found if name.endswith(PICKLE_SUFFIXES)]
        if pickles:
            raise ModelFileError(path / pickles[0], PICKLE_REASON)
        raise ModelFileError(path, f"there is no weight file: expected {SINGLE} or {INDEX} with its shards.")
    weight_map = _read_json(path / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelFileError(path / INDEX, "expected an object of tensor and file names.", where="weight_map")
    for name, file_name in weight_map.items():
        # a plain name: an index must not reach files outside its directory
        if (
            not isinstance(file_name, str)
            or not file_name
            or Path(file_name).name != file_name
            or "\0" in file_name
        ):
            raise ModelFileError(
                path / INDEX, f"expected the name of a file beside it, got {file_name!r}.", where=name
            )
        if file_name.endswith(PICKLE_SUFFIXES):
            raise ModelFileError(path / file_name, PICKLE_REASON)
    names = sorted(set(weight_map.values()))
    missing = [name for name in names if not (path / name).is_file()]
    if missing:
        raise ModelFileError(
            path,
            f"{len(missing)} of {len(names)} weight files are missing: {', '.join(missing[:8])}. Fetch them again.",
        )
    return tuple(path / name for name in names), weight_map


def _read_file(map: FileMap) -> dict[str, HfTensor]:
    """Every tensor of one file as views of its map."""
    file, data = map.path, map.data
    if data.size < 8:
        raise ModelFileError(file, f"expected at least the 8 bytes of a header's length, got {data.size}.")
    (length,) = struct.unpack("<Q", data[:8].tobytes())
    if length > min(HEADER_LIMIT, data.size - 8):
        raise ModelFileError(
            file, f"a header of {length} bytes, expected at most {min(HEADER_LIMIT, data.size - 8)}.", offset=0
        )
    try:
        with safe_open(file, framework="np"):
            pass
        header = json.loads(data[8 : 8 + length].tobytes(), object_pairs_hook=_unique)
    except (SafetensorError, ValueError, RecursionError) as error:
        raise ModelFileError(file, f"the safetensors header is damaged: {error}.", offset=8) from error
    header.pop("__metadata__", None)
    return {name: _tensor(file, data, 8 + length, name, entry) for name, entry in header.items()}


def _map(file: Path) -> FileMap:
    try:
        with file.open("rb") as stream:
            if not os.fstat(stream.fileno()).st_size:
                raise ModelFileError(file, "the file is empty.")
            return map_file(file, stream)
    except OSError as error:
        raise ModelFileError(file, f"the file cannot be read: {error.strerror}.") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The library takes the last of two equal names; a file with two is damaged or hostile."""
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the name {next(name for name in names if names.count(name) > 1)!r} is there twice")
    return result


def _tensor(file: Path, data: NDArray[np.uint8], start: int, name: str, entry: Mapping[str, Any]) -> HfTensor:
    dtype, shape = entry["dtype"], tuple(entry["shape"])  # the library has checked fields, sizes and bounds
    offset = start + entry["data_offsets"][0]
    if dtype not in _TYPES:
        raise UnsupportedType(
            f"{file}: {name} has dtype {dtype}; kvfold reads {', '.join(_TYPES)}. "
            f"Use the original model or a GGUF file of it."
        )
    if not 1 <= len(shape) <= 3 or 0 in shape:
        raise ModelFileError(file, f"expected 1 to 3 dimensions above 0, got {shape}.", where=name, offset=offset)
    kind = by_name(_TYPES[dtype])
    row_bytes = kind.row_bytes(shape[-1])
    rows = shape[:-1] or (1,)
    raw = data[offset : offset + int(np.prod(rows)) * row_bytes].reshape(*rows, row_bytes)
    return HfTensor(name, kind, shape, raw, None, file, offset)


def _join_scales(tensors: Mapping[str, HfTensor]) -> dict[str, HfTensor]:
    """Gives each fp8 matrix its scales and takes those out of the list."""
    joined: dict[str, HfTensor] = {}
    for name, tensor in tensors.items():
        owner = tensors.get(name.removesuffix(SCALE_SUFFIX)) if name.endswith(SCALE_SUFFIX) else None
        if owner is not None and owner.type.name == "F8_E4M3":
            continue
        joined[name] = _with_scale(tensor, tensors) if tensor.type.name == "F8_E4M3" else tensor
    return joined


def _with_scale(tensor: HfTensor, tensors: Mapping[str, HfTensor]) -> HfTensor:
    name = tensor.name + SCALE_SUFFIX
    if len(tensor.shape) != 2:
        raise UnsupportedType(
            f"{tensor.file}: {tensor.name} is fp8 with shape {tensor.shape}; kvfold reads fp8 as matrices only."
        )
    scale = tensors.get(name)
    if scale is None:
        raise ModelFileError(tensor.file, f"the scales of an fp8 matrix are missing: {name}.", where=tensor.name)
    blocks = tuple(-(-dim // FP8_BLOCK) for dim in tensor.shape)
    if scale.type.name != "F32" or scale.shape != blocks:
        raise ModelFileError(
            scale.file,
            f"{scale.type.name} of shape {scale.shape}, expected F32 of shape {blocks}: one for each "
            f"{FP8_BLOCK} x {FP8_BLOCK} block of {tensor.shape}.",
            where=name,
        )
    if scale.offset % 4:  # kernels take the address of aligned numbers; 28 kB for the largest matrix of DeepSeek-V3
        values = np.frombuffer(scale.raw.tobytes(), np.float32).reshape(blocks)
    else:
        values = scale.raw.view(np.float32).reshape(blocks)
    return HfTensor(tensor.name, tensor.type, tensor.shape, tensor.raw, values, tensor.file, tensor.offset)
