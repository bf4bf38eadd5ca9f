"""Weights on their way into the memory of a GPU: once, in the blocks of their file, through pinned buffers.

What lies there in another form than in the file: norms and biases (float32), the router (float32), the up-projections
(the compute type: 113 MB for DeepSeek-V2-Lite, 2 GB for V3; they are 1 % of a model and read in two orders): gpu_weights.py
says which. Rows of the types in matrix.PLANES, and rows that
their file has interleaved, keep their bytes in another order. Codebooks, of at most 8 KB, come along once each.
Matrices that multiply the same rows lie below each other where they
are of one type, so that one launch serves both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import accumulate, repeat

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvfold.backends import gpu_weights
from kvfold.kernels import codebooks, rounded_product, tile_product
from kvfold.kernels.matrix import PLANES, Matrix, planes
from kvfold.mla.absorb import KvUp, split_k_b_v_b, split_kv_b
from kvfold.model.deepseek import DeepseekModel
from kvfold.quant.decode import codebook, decode_tensor
from kvfold.quant.interleave import separate
from kvfold.quant.tensor import QuantTensor, matrices

Weight = QuantTensor | tuple[QuantTensor, ...]
Progress = Callable[[int, int], None]

PLANES_BYTES = 256 << 20  # of the copy that a piece of a matrix needs while its rows are laid out
STAGE_BYTES = 32 << 20  # two pinned buffers of this size: one is filled while the other is copied
# Threads that fill a buffer from the file's map, PIECE_BYTES at a time. One alone took 2.9 s for 8.3 GiB that lay in memory.
READERS = 8
PIECE_BYTES = 2 << 20
ROUNDING = rounded_product.TYPES | {"F8_E4M3"}  # few rows to whole numbers; many, of fp8, to fp8


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows [start, stop) of a matrix that may hold other weights beside this one."""

    matrix: Matrix
    start: int
    stop: int


@dataclass(eq=False)
class DeviceWeights:
    """rows: matrices by name. vectors: float32. up: per layer w_uk [H, nope, kv_lora] and w_uv [H, v, kv_lora]."""

    rows: dict[str, Rows] = field(default_factory=dict)
    vectors: dict[str, Tensor] = field(default_factory=dict)
    up: dict[KvUp, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        matrices = {id(r.matrix): r.matrix for r in self.rows.values()}.values()
        total = sum(m.raw.nbytes + (0 if m.scale is None else m.scale.nbytes) for m in matrices)
        return (
            total
            + sum(v.nbytes for v in self.vectors.values())
            + sum(a.nbytes + b.nbytes for a, b in self.up.values())
        )


def codebook_words(type: str, device: torch.device | str) -> Tensor | None:
    """What a Matrix of this type has for `codebook`."""
    name = codebooks.OF_TYPE.get(type)
    return None if name is None else codebooks.words(torch.from_numpy(codebook(name))).to(device)


def upload(
    model: DeepseekModel,
    weights: Mapping[str, Weight],
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress | None = None,
    *,
    rounds: bool = False,
) -> DeviceWeights:
    """rounds: rows are rounded to 8 bits where a type has kernels for that (Matrix.rounds).

    torch.cuda.OutOfMemoryError where the memory is too small.
    """
    out = DeviceWeights()
    stage = _Stage(device, sum(part.nbytes for w in weights.values() for part in matrices(w)), progress)
    names = [name for name in weights if not gpu_weights.is_up(name)]
    joined = {name: group for group in _groups(model, weights) for name in group}
    for name in names:
        if name in out.rows or name in out.vectors:
            continue
        weight = weights[name]
        if gpu_weights.is_vector(weight):
            out.vectors[name] = stage.numbers(decode_tensor(matrices(weight)[0]))
        elif gpu_weights.is_router(name):
            numbers = stage.numbers(np.concatenate([decode_tensor(part) for part in matrices(weight)]))
            out.rows[name] = Rows(_plain("F32", numbers), 0, len(numbers))
        else:
            group = joined.get(name, (name,))
            matrix = _matrix([weights[member] for member in group], stage)
            matrix = replace(matrix, rounds=rounds and matrix.type in ROUNDING)
            start = 0
            for member in group:
                rows = sum(part.rows for part in matrices(weights[member]))
                rows = matrix.rows if len(group) == 1 else rows
                out.rows[member] = Rows(matrix, start, start + rows)
                start += rows
    for layer in range(model.config.num_layers):
        kv_up = model.kv_up(layer)
        mla = model.config.mla

        def decoded(name: str) -> Tensor:
            return tile_product.decode(_matrix([weights[name]], stage), dtype)

        if kv_up.kv_b is not None:
            w_uk, w_uv = split_kv_b(decoded(kv_up.kv_b), mla)
        else:
            assert kv_up.k_b is not None and kv_up.v_b is not None
            w_uk, w_uv = split_k_b_v_b(decoded(kv_up.k_b), decoded(kv_up.v_b), mla)
        out.up[kv_up] = w_uk.contiguous(), w_uv.contiguous()
    stage.finish()
    return out


def _groups(model: DeepseekModel, weights: Mapping[str, Weight]) -> Iterator[tuple[str, str]]:
    """Pairs of matrices that multiply the same rows and are of one type, without scales of their own."""
    q = "attn_q" if model.config.mla.q_lora_rank is None else "attn_q_a"
    for layer in range(model.config.num_layers):
        for first, second in ((q, "attn_kv_a_mqa"), ("ffn_gate", "ffn_up"), ("ffn_gate_shexp", "ffn_up_shexp")):
            pair = f"blk.{layer}.{first}.weight", f"blk.{layer}.{second}.weight"
            if all(name in weights and isinstance(weights[name], QuantTensor) for name in pair):
                a, b = (matrices(weights[name])[0] for name in pair)
                if a.type == b.type and a.cols == b.cols and a.scale is None and b.scale is None:
                    yield pair


def _plain(type: str, numbers: Tensor) -> Matrix:
    return Matrix(type, numbers.shape[0], numbers.shape[1], numbers.view(torch.uint8).view(len(numbers), -1))


def _matrix(weights: list[Weight], stage: _Stage) -> Matrix:
    """One weight (its parts stay parts), or several joined to one part."""
    parts = [part for weight in weights for part in matrices(weight)]
    first = parts[0]
    joins = len(weights) > 1
    rows = sum(p.rows for p in parts) if joins else first.rows
    count = 1 if joins else len(parts)
    stored = stage.empty(sum(p.rows for p in parts), first.raw.shape[-1])
    type = first.type.name
    if first.type.interleaved_rows > 1:
        type = stage.copy_separated(parts, stored)
    else:
        stage.copy([part.raw for part in parts], stored)
    row_bytes = gpu_weights.row_bytes(first.type, stored.shape[1])
    raw = stored if row_bytes == stored.shape[1] else stage.empty(len(stored), row_bytes)
    if type in PLANES or raw is not stored:
        size = max(1, PLANES_BYTES // row_bytes)
        for piece, place in zip(stored.split(size), raw.split(size), strict=True):
            laid = planes(type, piece) if type in PLANES else piece
            place[:, : laid.shape[1]].copy_(laid)
    scale = None
    if first.scale is not None:
        scale = stage.numbers(np.stack([p.scale for p in parts if p.scale is not None]))
    return Matrix(type, rows, first.cols, raw, scale, count, codebook=stage.codebook(type))


def _windows(sources: list[NDArray[np.uint8]], window_bytes: int) -> Iterator[list[NDArray[np.uint8]]]:
    """The sources cut in pieces of at most PIECE_BYTES, as many together as fit window_bytes."""
    window: list[NDArray[np.uint8]] = []
    free = window_bytes
    for source in sources:
        start = 0
        while start < source.size:
            size = min(PIECE_BYTES, source.size - start, free)
            window.append(source[start : start + size])
            start, free = start + size, free - size
            if not free:
                yield window
                window, free = [], window_bytes
    if window:
        yield window


class _Stage:
    """Copies arrays to the device and reports how far it is."""

    def __init__(self, device: torch.device, total: int, progress: Progress | None) -> None:
        self._device = device
        self._total = total
        self._done = 0
        self._progress = progress
        self._turn = 0
        self._buffers: list[Tensor] = []
        self._events: list[torch.cuda.Event] = []
        self._readers = ThreadPoolExecutor(READERS, "kvfold-upload")
        self._codebooks: dict[str, Tensor | None] = {}
        if device.type == "cuda":
            self._buffers = [torch.empty(STAGE_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
            self._events = [torch.cuda.Event() for _ in range(2)]
        if progress:
            progress(0, total)

    def empty(self, rows: int, row_bytes: int) -> Tensor:
        return torch.empty(rows, row_bytes, dtype=torch.uint8, device=self._device)

    def numbers(self, array: NDArray[np.float32]) -> Tensor:
        self._count(array.nbytes)
        return torch.from_numpy(np.array(array, np.float32)).to(self._device)

    def copy(self, sources: list[NDArray[np.uint8]], target: Tensor) -> None:
        """The bytes of the sources, one after another, fill the target. Small ones (a layer's experts) share a buffer."""
        out = target.view(-1)
        start = 0
        for pieces in _windows([source.reshape(-1) for source in sources], STAGE_BYTES):
            size = sum(piece.size for piece in pieces)
            place = out[start : start + size]
            if not self._buffers:
                self._fill(place.numpy(), pieces)
            else:
                buffer, event = self._buffers[self._turn], self._events[self._turn]
                event.synchronize()  # its last copy has left
                self._fill(buffer.numpy(), pieces)
                place.copy_(buffer[:size], non_blocking=True)
                event.record()
                self._turn ^= 1
            start += size
            self._count(size)

    def copy_separated(self, parts: list[QuantTensor], target: Tensor) -> str:
        """Matrices of interleaved rows, one below another: as rows of the type whose name comes back."""
        start, name = 0, ""
        for part in parts:
            group, row_bytes = part.type.interleaved_rows, part.raw.shape[1]
            few, many = (max(1, size // (group * row_bytes)) * group for size in (PIECE_BYTES, STAGE_BYTES))
            for first in range(0, part.rows, many):
                rows = part.raw[first : min(first + many, part.rows)]
                pieces = [rows[at : at + few] for at in range(0, len(rows), few)]
                separated = list(self._readers.map(separate, repeat(part.type), pieces))
                name = separated[0][0]
                self.copy([piece for _, piece in separated], target[start : start + len(rows)])
                start += len(rows)
        return name

    def codebook(self, type: str) -> Tensor | None:
        if type not in self._codebooks:
            self._codebooks[type] = codebook_words(type, self._device)
        return self._codebooks[type]

    def _fill(self, buffer: NDArray[np.uint8], pieces: list[NDArray[np.uint8]]) -> None:
        starts = accumulate((piece.size for piece in pieces), initial=0)
        places = [buffer[start : start + piece.size] for start, piece in zip(starts, pieces, strict=False)]
        list(self._readers.map(np.copyto, places, pieces))

    def finish(self) -> None:
        self._readers.shutdown()
        if self._buffers:
            torch.cuda.synchronize(self._device)

    def _count(self, nbytes: int) -> None:
        self._done = min(self._total, self._done + nbytes)
        if self._progress:
            self._progress(self._done, self._total)
