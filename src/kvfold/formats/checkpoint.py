"""Opens any checkpoint kvfold reads and gives every tensor its canonical name.

Owns the decision what a path is, the check that a file holds exactly the tensors its configuration needs, and the
split of 3-D tensors into one matrix per expert or head. Nothing is copied: the bytes stay in the maps of the files.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from kvfold.config import ModelConfig
from kvfold.errors import ModelFileError
from kvfold.formats.file_map import FileMap
from kvfold.formats.gguf import GgufFile, open_gguf
from kvfold.formats.hub import VOCABULARY_FILES, repository_of
from kvfold.formats.safetensors import (
    CONFIG,
    PICKLE_REASON,
    PICKLE_SUFFIXES,
    HfDirectory,
    HfTensor,
    open_hf_directory,
)
from kvfold.formats.tensor_names import KvLayout, TensorSpec, expected_tensors, ignored_reason
from kvfold.quant.tensor import QuantTensor, Weight, Weights, matrices
from kvfold.quant.types import BlockType

LISTED_NAMES = 12  # of missing or leftover tensors in one message; the others are counted


@dataclass(frozen=True)
class Vocabulary:
    """Where a checkpoint's tokenizer is. One of the two is empty.

    metadata: the `tokenizer.*` keys of a GGUF file. files: those of VOCABULARY_FILES that a directory has, by name.
    """

    metadata: Mapping[str, object]
    files: Mapping[str, Path]


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """An open model, complete and checked; no weight has been read.

    path:      as given
    format:    "GGUF", "safetensors", or "synthetic" (in memory, formats/synthetic.py)
    files:     every file that holds weights
    kv_layout: which of the two forms of the latent's up-projection `tensors` has
    tensors:   exactly those of `expected_tensors(config, kv_layout)`, by canonical name: one QuantTensor, or for a
               3-D shape a tuple of matrices, one per expert or head, each under the name of the whole
    info:      what a user may want to know: defaults filled in, tensors ignored. One sentence each
    maps:      the maps that `tensors` are views of; none where they are in memory
    """

    path: Path
    format: str
    files: tuple[Path, ...]
    config: ModelConfig
    kv_layout: KvLayout
    tensors: Weights
    vocabulary: Vocabulary
    info: tuple[str, ...]
    maps: tuple[FileMap, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of all weights as stored, the fp8 scales included."""
        return sum(part.nbytes for tensor in self.tensors.values() for part in matrices(tensor))


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Opens a GGUF file (any shard of a split one), or a directory with safetensors or with one GGUF model.

    ModelFileError: not a checkpoint, or one that is damaged, incomplete or inconsistent.
    UnsupportedModel, UnsupportedType: well-formed, but nothing kvfold runs; the sentence says what would.
    """
    path = Path(path)
    stored = open_stored(path)
    return _from_gguf(path, stored) if isinstance(stored, GgufFile) else _from_hf(path, stored)


def open_stored(path: Path) -> GgufFile | HfDirectory:
    """What a path is, before anyone asks whether it is a model that runs. A directory with safetensors is those,
    whatever else is in it. Raises ModelFileError as open_checkpoint does."""
    if path.is_dir():
        return _open_directory(path)
    if path.suffix in PICKLE_SUFFIXES:
        raise ModelFileError(path, PICKLE_REASON)
    if path.suffix == ".safetensors":
        raise ModelFileError(path, f"open its directory instead, {path.parent}: a model needs {CONFIG} too.")
    return open_gguf(path)


def _open_directory(path: Path) -> GgufFile | HfDirectory:
    try:
        names = sorted(entry.name for entry in path.iterdir())
    except OSError as error:
        raise ModelFileError(path, f"the directory cannot be read: {error.strerror}.") from error
    has_safetensors = any(name.endswith((".safetensors", ".safetensors.index.json")) for name in names)
    # the first shard stands for a split model
    ggufs = [name for name in names if name.endswith(".gguf") and ("-of-" not in name or "-00001-of-" in name)]
    if len(ggufs) == 1 and not has_safetensors:
        return open_gguf(path / ggufs[0])
    if len(ggufs) > 1 and not has_safetensors:
        raise ModelFileError(path, f"the directory holds several models, name one of {', '.join(ggufs)}.")
    if has_safetensors or CONFIG in names:
        return open_hf_directory(path)
    pickles = [name for name in names if name.endswith(PICKLE_SUFFIXES)]
    if pickles:
        raise ModelFileError(path / pickles[0], PICKLE_REASON)
    raise ModelFileError(
        path, f"the directory holds no model: expected {CONFIG} with .safetensors files, or a .gguf file."
    )


def _from_gguf(path: Path, file: GgufFile) -> Checkpoint:
    where = file.files[0]
    shapes = {name: tensor.shape for name, tensor in file.tensors.items()}
    config = ModelConfig.from_gguf(file.metadata, shapes, file=where)
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, Sized) and len(tokens) != config.vocab_size:
        raise ModelFileError(
            where,
            f"{len(tokens)} tokens, expected {config.vocab_size}, one for each row of the embedding.",
            where="tokenizer.ggml.tokens",
        )

    layout, spare, note = _kv_layout(shapes, config.num_layers)
    sources = []
    for spec in expected_tensors(config, layout):
        sources.append((spec, [_Source((spec.name,), spec.shape)]))
        if spec.fused and spec.fused.gguf_name:
            sources[-1][1].append(_fused_source(spec, spec.fused.gguf_name))
    stored = {name: tensor for name, tensor in file.tensors.items() if name not in spare}
    tensors, ignored = _bind(where, config, stored, sources)
    vocabulary = {key: value for key, value in file.metadata.items() if key.startswith("tokenizer.")}
    return Checkpoint(
        path=path,
        format="GGUF",
        files=file.files,
        config=config,
        kv_layout=layout,
        tensors=tensors,
        vocabulary=Vocabulary(MappingProxyType(vocabulary), MappingProxyType({})),
        info=(*config.notes, *note, *ignored),
        maps=file.maps,
    )


def _kv_layout(names: Collection[str], num_layers: int) -> tuple[KvLayout, set[str], tuple[str, ...]]:
    """(the form to use, tensors of the other one, a note on them). One form is enough and exact on its own; building
    either from the other would requantize it."""
    whole = {name for name in names if name.endswith(".attn_kv_b.weight")}
    split = {name for name in names if name.endswith((".attn_k_b.weight", ".attn_v_b.weight"))}
    has_whole = all(f"blk.{layer}.attn_kv_b.weight" in whole for layer in range(num_layers))
    if has_whole or not split:
        note = f"{len(split)} tensors ignored: attn_k_b and attn_v_b, as attn_kv_b holds the same weights."
        return KvLayout.KV_B, split, (note,) if split else ()
    note = f"{len(whole)} tensors ignored: attn_kv_b, as attn_k_b and attn_v_b hold the same weights."
    return KvLayout.K_B_V_B, whole, (note,) if whole else ()


def _from_hf(path: Path, directory: HfDirectory) -> Checkpoint:
    name = repository_of(path) or path.resolve().name
    config = ModelConfig.from_hf(directory.config, file=path / CONFIG, name=name)
    sources = []
    for spec in expected_tensors(config, KvLayout.KV_B):
        sources.append((spec, [_Source(spec.hf_names, spec.shape[1:] if spec.fused else spec.shape)]))
        if spec.fused:
            sources[-1][1].append(_fused_source(spec, spec.fused.hf_name))
    tensors, ignored = _bind(path, config, directory.tensors, sources)
    files = {name: path / name for name in VOCABULARY_FILES if (path / name).is_file()}
    return Checkpoint(
        path=path,
        format="safetensors",
        files=directory.files,
        config=config,
        kv_layout=KvLayout.KV_B,
        tensors=tensors,
        vocabulary=Vocabulary(MappingProxyType({}), MappingProxyType(files)),
        info=(*config.notes, *ignored),
        maps=directory.maps,
    )


# --- binding ---------------------------------------------------------------------------------------------------------


class _Stored(Protocol):
    """What GgufTensor and HfTensor both tell."""

    @property
    def type(self) -> BlockType: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def raw(self) -> NDArray[np.uint8]: ...
    @property
    def file(self) -> Path: ...
    @property
    def offset(self) -> int: ...


@dataclass(frozen=True)
class _Source:
    """One place a tensor may come from: these stored tensors, each of this shape, and only `rows` of each matrix."""

    names: tuple[str, ...]
    shape: tuple[int, ...]
    rows: slice | None = None


def _fused_source(spec: TensorSpec, name: str) -> _Source:
    assert spec.fused is not None
    count, rows, cols = spec.shape
    part, parts = spec.fused.part, spec.fused.parts
    return _Source((name,), (count, parts * rows, cols), slice(part * rows, (part + 1) * rows))


def _bind(
    path: Path,
    config: ModelConfig,
    stored: Mapping[str, _Stored],
    sources: Sequence[tuple[TensorSpec, Sequence[_Source]]],
) -> tuple[Weights, list[str]]:
    """(every expected tensor, one sentence for each kind of ignored ones). ModelFileError with the lists of what is
    missing and what is left over, unless both are empty."""
    bound: dict[str, Weight] = {}
    used: set[str] = set()
    missing: list[str] = []
    for spec, candidates in sources:
        source = next((s for s in candidates if all(name in stored for name in s.names)), None)
        if source is None:
            missing += [name for name in candidates[0].names if name not in stored]
            continue
        used.update(source.names)
        parts = tuple(
            part if source.rows is None else part.row_slice(source.rows.start, source.rows.stop)
            for name in source.names
            for part in _split(name, stored[name], spec, source.shape, config)
        )
        bound[spec.name] = parts if len(spec.shape) == 3 else parts[0]

    reasons: Counter[str] = Counter()
    left_over = []
    for name in stored:
        if name not in used:
            reason = ignored_reason(name, config)
            if reason is None:
                left_over.append(name)
            else:
                reasons[reason] += 1
    if missing or left_over:
        lists = [
            f"{kind}: {_listed(names)}" for kind, names in (("missing", missing), ("left over", left_over)) if names
        ]
        raise ModelFileError(
            path,
            f"the tensors are not those of a {config.family} model of {config.num_layers} layers. "
            f"{'; '.join(lists)}. Fetch or convert the file again.",
        )
    ignored = [f"{count} tensor{'s' * (count > 1)} ignored: {reason}." for reason, count in reasons.items()]
    return MappingProxyType(bound), ignored


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - LISTED_NAMES} more" if len(names) > LISTED_NAMES else ""
    return f"{', '.join(names[:LISTED_NAMES])}{more} ({len(names)})"


def _split(
    name: str, tensor: _Stored, spec: TensorSpec, shape: tuple[int, ...], config: ModelConfig
) -> Iterator[QuantTensor]:
    """The matrices of a stored tensor, as views, once its shape and type have been found right."""
    is_flat = _is_per_head(spec) and tensor.shape == (shape[0] * shape[1], shape[2])
    if tensor.shape != shape and not is_flat:
        raise ModelFileError(
            tensor.file,
            f"shape {tensor.shape}, expected {shape}{_because(spec, config)}.",
            where=name,
            offset=tensor.offset,
        )
    kind = tensor.type
    if not kind.decodes:
        raise kind.refusal(f"{tensor.file}: {name}")
    if len(shape) == 1:
        yield QuantTensor(spec.name, kind, shape, tensor.raw)
        return
    rows, cols = shape[-2:]
    if spec.shape[-2] % kind.interleaved_rows:
        raise ModelFileError(
            tensor.file,
            f"{spec.shape[-2]} rows in type {kind.name}, which mixes groups of {kind.interleaved_rows}.",
            where=name,
            offset=tensor.offset,
        )
    if len(shape) == 2:
        scale = tensor.scale if isinstance(tensor, HfTensor) else None
        yield QuantTensor(spec.name, kind, shape, tensor.raw, scale)
        return
    for part in tensor.raw.reshape(shape[0], rows, tensor.raw.shape[-1]):
        yield QuantTensor(spec.name, kind, (rows, cols), part)


def _is_per_head(spec: TensorSpec) -> bool:
    """k_b and v_b: ik_llama.cpp and early llama.cpp conversions store them as one matrix of H * rows, which splits
    into heads in one way only."""
    return spec.name.endswith((".attn_k_b.weight", ".attn_v_b.weight"))


def _because(spec: TensorSpec, config: ModelConfig) -> str:
    """What the expected shape follows from, where one number explains it."""
    kind = spec.name.split(".")[-2]
    if kind in ("token_embd", "output"):
        return f" for a vocabulary of {config.vocab_size}"
    if kind in ("attn_q", "attn_q_b", "attn_kv_b", "attn_k_b", "attn_v_b", "attn_output"):
        return f" for {config.mla.num_heads} heads"
    if config.moe and (kind.endswith("_exps") or kind in ("ffn_gate_inp", "exp_probs_b")):
        return f" for {config.moe.num_experts} experts"
    return ""
