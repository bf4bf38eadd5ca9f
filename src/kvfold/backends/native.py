"""Backend `native`: the model recorded once as a Program, walked by C++ (csrc/program.h) on a team of threads.

Owns the way from Python values to the plain structs of C++ and the arrays those point into; computes nothing itself
but the angles of RoPE. numpy only: a native run never imports torch.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import inf

import numpy as np
from numpy.typing import NDArray

from kvfold import _native
from kvfold.backends.profile import Profile
from kvfold.backends.shared_experts import with_shared_experts_inside
from kvfold.cache.latent import PAGE_TOKENS, CacheLayout, CacheType, PagedCache
from kvfold.cache.pages import pages_for
from kvfold.errors import Cancelled
from kvfold.mla.plan import Path
from kvfold.mla.rope import cos_sin
from kvfold.model.deepseek import DeepseekModel
from kvfold.model.op_work import WeightSize
from kvfold.model.program import Buffer, OpRecord, Program, Segment, Value, record
from kvfold.model.step import Step
from kvfold.quant.tensor import Weight, Weights, matrices
from kvfold.quant.types import SIDE_BY_SIDE, BlockType, side_by_side_id

CACHE_TYPES = {CacheType.F32: 0, CacheType.F16: 1, CacheType.BF16: 2, CacheType.Q8_0: 3}


class NativeBackend:
    """One model over one cache. Weights and cache are borrowed, never copied.

    isa: the instruction set its kernels were taken from, the one in use when it was built.
    rounds_activations: linear layers and experts run on the file's own blocks, their activations rounded as
    quant/activations.py says (to 8 bits for quantized types); otherwise everything is float32.
    threads: members of the team that runs every op, the caller included. Results do not depend on it.
    deterministic: products on blocks go by tiles for rows of prompts and by row dots for generated ones; otherwise by
    what is faster for their number.
    check_numerics: a run raises NumericsError where an op makes NaN or infinity. profile: `profile` collects times.
    workspace_bytes: memory for tiles of weights, keys and scores, shared by all steps (one segment runs at a time).

    Raises ValueError where weights, model and cache do not fit each other, SettingError where the smallest tiles do
    not fit the workspace or the system does not start that many threads.
    """

    name = "native"

    def __init__(
        self,
        model: DeepseekModel,
        weights: Weights,
        cache: PagedCache,
        *,
        threads: int,
        workspace_bytes: int,
        rounds_activations: bool = False,
        deterministic: bool = False,
        check_numerics: bool = False,
        profile: bool = False,
    ) -> None:
        self.model = model
        self.isa = _native.isa()
        self._first_answer = _FirstAnswer()
        recorded = _recorded(model, weights, rounds_activations=rounds_activations)
        self._handles = {name: handle for handle, name in enumerate(recorded.weight_names)}
        self._layouts = [_layout(weights[name]) for name in recorded.weight_names]
        self._program = _native.Program(
            *_program_arguments(recorded, weights, cache),
            threads,
            workspace_bytes,
            rounds_activations,
            by_role=deterministic,
            checks_numerics=check_numerics,
            times_ops=profile,
        )
        self.profile = None
        if profile:
            row_bytes = cache.layout.bytes_per_token // cache.layout.num_layers
            self.profile = Profile(recorded, _sizes(recorded.weight_names, weights), row_bytes)

    def start(self, step: Step) -> NativeRun:
        """Checks the step and reserves its buffers; nothing runs yet. ValueError: array, expected, got."""
        return NativeRun(self.model, self._program, step, self._first_answer, self.profile)

    @property
    def is_answering_first(self) -> bool:
        """Whether steps run, or stand at a cut for a moment, and none has had outputs so far."""
        return self._first_answer.is_awaited

    def move_weights(self, weights: Weights) -> None:
        """The same weights at other places in memory, rows side by side perhaps, all of them from the next cut on, for
        steps under way too.

        The old arrays are not read any more when this returns. ValueError where a new one is of another type or
        shape, KeyError for a name the model does not use.
        """
        moved = []
        for name, weight in weights.items():
            handle = self._handles[name]
            number, rows, cols = _layout(weight)
            expected, *shape = self._layouts[handle]
            if [rows, cols] != shape or number not in (expected, side_by_side_id(expected)):
                raise ValueError(
                    f"{name}: type number, rows and columns {(number, rows, cols)}, expected {self._layouts[handle]}."
                )
            moved.append((handle, number, _parts(weight)))
        self._program.move_weights(moved)


def least_workspace_bytes(
    model: DeepseekModel,
    weights: Weights,
    layout: CacheLayout,
    *,
    threads: int,
    rounds_activations: bool,
    isa: str,
    paths: Collection[Path],
    fused: bool,
    n_ctx: int,
) -> int:
    """The least `workspace_bytes` of a backend that is not built yet, for sequences of up to n_ctx tokens on these paths.
    Reads no weight.

    isa: the instruction set it will have, "auto": the one in use. Raises ValueError as NativeBackend does.
    """
    recorded = _recorded(model, weights, rounds_activations=rounds_activations)
    keys = pages_for(n_ctx) * PAGE_TOKENS
    return _native.Program.least_workspace(
        *_program_arguments(recorded, weights, PagedCache(layout, 1)),
        threads,
        rounds_activations,
        isa,
        [(path.value, fused, keys) for path in paths],
    )


def side_by_side(program: Program, weights: Weights, isa: str) -> dict[str, BlockType]:
    """The weights that `isa` ("auto": the set in use) multiplies faster with their rows side by side, and the types that
    they have then: of linear layers and experts alone, as what looks rows up or goes along columns reads the file's blocks.
    """
    known = _native.side_by_side_types(isa)

    def type_of(name: str) -> BlockType | None:
        part = matrices(weights[name])[0]
        type = SIDE_BY_SIDE.get(part.type.name)
        return type if type is not None and type.id in known and part.rows % type.interleaved_rows == 0 else None

    types: dict[str, BlockType | None] = {}
    joined = with_shared_experts_inside(program, weights, rounds_activations=True)
    for op in (op for segment in joined.segments for op in segment.ops):
        names = [program.weight_names[handle] for handle in op.weights if handle >= 0]
        of_op = [type_of(name) if op.kind in ("linear", "experts") else None for name in names]
        for gate in range(0, len(names) if op.kind == "experts" else 0, 3):
            if of_op[gate] != of_op[gate + 1]:  # gate and up meet in one pass
                of_op[gate : gate + 2] = [None] * 2
        for name, type in zip(names, of_op, strict=True):
            types[name] = type if types.get(name, type) == type else None
    shared = _sharing_bytes(weights, types)
    return {name: type for name, type in types.items() if type is not None and name not in shared}


def _sharing_bytes(weights: Weights, names: Iterable[str]) -> set[str]:
    """Weights of which a byte is another's too, as a head that is the embedding."""
    places = (
        (part.raw.__array_interface__["data"][0], part.raw.nbytes, name)
        for name in names
        for part in matrices(weights[name])
    )
    shared: set[str] = set()
    end, before = 0, ""  # of what reaches furthest so far
    for start, nbytes, name in sorted(places):
        if start < end:
            shared |= {before, name}
        if start + nbytes > end:
            end, before = start + nbytes, name
    return shared


class _FirstAnswer:
    """Whether somebody waits for the first outputs of a backend. A prompt may take several steps, which stand at cuts, and
    a step may fail: what waits for the answer then waits GAP_SECONDS longer."""

    GAP_SECONDS = 0.1

    def __init__(self) -> None:
        self._given, self._running, self._ended = False, 0, -inf
        self._lock = threading.Lock()

    @property
    def is_awaited(self) -> bool:
        return not self._given and (self._running > 0 or time.monotonic() - self._ended < self.GAP_SECONDS)

    @contextmanager
    def awaited(self) -> Iterator[None]:
        with self._lock:
            self._running += 1
        try:
            yield
        finally:
            with self._lock:
                self._running, self._ended = self._running - 1, time.monotonic()

    def give(self) -> None:
        self._given = True


class NativeRun:
    """Implements model.step.StepRun. `profile` gets the times of the ops when the head has run."""

    def __init__(
        self,
        model: DeepseekModel,
        program: _native.Program,
        step: Step,
        first_answer: _FirstAnswer,
        profile: Profile | None = None,
    ) -> None:
        if step.positions.shape != step.token_ids.shape:
            raise ValueError(f"positions: shape {step.positions.shape}, expected {step.token_ids.shape}.")
        self._num_segments = model.num_segments
        self._step, self._profile, self._ns = step, profile, 0
        self._first_answer = first_answer
        self._outputs: dict[str, NDArray[np.float32]] = {
            name: np.empty((len(step.output_rows), width), np.float32) for name, width in program.outputs
        }
        cos, sin = cos_sin(model.config.rope, step.positions)
        self._run = _native.StepRun(
            program,
            token_ids=step.token_ids,
            slots=step.slots,
            row_starts=step.row_starts,
            kv_lens=step.kv_lens,
            page_starts=step.page_starts,
            pages=step.pages,
            segments=step.segments,
            output_rows=step.output_rows,
            is_prompt=step.is_prompt,
            cos=cos,
            sin=sin,
            outputs=list(self._outputs.values()),
        )

    @property
    def position(self) -> int:
        return self._run.position

    @property
    def outputs(self) -> Mapping[str, NDArray[np.float32]]:
        """Empty before the head has run."""
        return self._outputs if self.position == self._num_segments else {}

    def run(self, last: int | None = None) -> int:
        started = time.perf_counter_ns()
        with self._first_answer.awaited():
            reached = self._run.run(self._num_segments if last is None else last)
        self._ns += time.perf_counter_ns() - started
        if not reached:
            raise Cancelled(f"The step was cancelled before segment {self.position}.")
        if self.position == self._num_segments:
            if len(self._step.output_rows) > 0:
                self._first_answer.give()
            if self._profile is not None:
                self._profile.add(self._step, self._ns, self._run.op_times)
                self._profile = None  # run() may be called again
        return self.position

    def cancel(self) -> None:
        self._run.cancel()


# The tuples that csrc/bind_program.cpp reads, in the order of model/program.py's fields.


def _value(value: Value) -> tuple[int, int, int]:
    return value.buffer, value.start, value.width


def _buffer(buffer: Buffer) -> tuple[int, int, int, int]:
    return buffer.width, buffer.domain.value, buffer.first, buffer.last


def _op(op: OpRecord) -> _native._Op:
    inputs, outputs = [_value(v) for v in op.inputs], [_value(v) for v in op.outputs]
    return op.kind, op.name, inputs, outputs, list(op.weights), list(op.ints), list(op.floats)


def _segment(segment: Segment) -> _native._Segment:
    return (
        segment.name,
        [_op(op) for op in segment.ops],
        [_buffer(buffer) for buffer in segment.buffers],
        None if segment.x_out is None else _value(segment.x_out),
        [(name, _value(value)) for name, value in segment.outputs],
    )


def _recorded(model: DeepseekModel, weights: Weights, *, rounds_activations: bool) -> Program:
    widths = {name: _rows(weight) for name, weight in weights.items()}
    return with_shared_experts_inside(record(model, widths), weights, rounds_activations=rounds_activations)


def _program_arguments(
    recorded: Program, weights: Weights, cache: PagedCache
) -> tuple[list[_native._Segment], list[_native._Weight], int, list[NDArray[np.generic]]]:
    """Segments, weights, cache type and cache of a _native.Program."""
    return (
        [_segment(segment) for segment in recorded.segments],
        [(name, *_layout(weights[name]), _parts(weights[name])) for name in recorded.weight_names],
        CACHE_TYPES[cache.layout.cache_type],
        # C++ reads a half as its 16 bits.
        [a.view(np.uint16) if a.dtype == np.float16 else a for a in cache.arrays],
    )


def _rows(weight: Weight) -> int:
    return sum(tensor.rows for tensor in matrices(weight))


def _layout(weight: Weight) -> tuple[int, int, int]:
    """(type number, rows of a part, cols). ValueError where the parts differ."""
    layouts = {(tensor.type.id, tensor.rows, tensor.cols) for tensor in matrices(weight)}
    if len(layouts) != 1:
        raise ValueError(f"{matrices(weight)[0].name}: parts of {len(layouts)} types or shapes, expected one.")
    return layouts.pop()


def _parts(weight: Weight) -> list[tuple[NDArray[np.uint8], NDArray[np.float32] | None]]:
    return [(tensor.raw, tensor.scale) for tensor in matrices(weight)]


def _sizes(names: Sequence[str], weights: Weights) -> list[WeightSize]:
    tensors = [matrices(weights[name]) for name in names]
    return [WeightSize(_rows(parts), parts[0].cols, sum(part.nbytes for part in parts)) for parts in tensors]
