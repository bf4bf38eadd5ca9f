"""Layers of a step that are replayed: what a layer does row by row is captured, attention in between is launched.

A prompt of 512 rows took 23 ms on an H200 and 60 to 85 on the clock: some 60 launches a layer, and Python between them. All but
attention depends on the number of rows alone, so it is captured once per (bucket of rows, layer) as two graphs, before and
behind attention, which reads the step's lengths and pages on the host and is launched op by op. Any step whose rows fit a
bucket is served, whatever it mixes, and it may stop at any cut: between layers its rows lie in memory of its own. What has a form of its
own (cuda_captured.py: above all a single short prompt) is replayed whole instead.

Rows up to the bucket are padding: no slot, nobody attends to them, and every row is computed apart from the others.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvfold.backends.cuda_ops import ROW_PRODUCT_ROWS, CudaOps, Value, made
from kvfold.backends.cuda_step import DeviceStep
from kvfold.config import MlaConfig
from kvfold.mla.absorb import KvUp

if TYPE_CHECKING:
    from torch.cuda import _POOL_HANDLE

    from kvfold.backends.cuda import CudaBackend

# Rows of captured layers; a step takes the smallest that holds it. Fewer rows than LEAST_ROWS take kernels for few rows,
# whose launches are few; with more than the last the device is slower than the host.
LEAST_ROWS = ROW_PRODUCT_ROWS + 1
BUCKETS = (16, 32, 64, 128, 256, 384, 512, 768, 1024, 1536, 2048)


class _Uncollected:
    """Around captures: no search for unreachable objects. A graph of a model that is gone, freed meanwhile by this thread, would
    end it ("operation not permitted when stream is capturing"). Threads may capture at once: the last to leave switches it on
    again, if it was on."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_inside = 0
        self._was_enabled = False

    def __enter__(self) -> None:
        with self._lock:
            if self._num_inside == 0:
                self._was_enabled = gc.isenabled()
                gc.disable()
            self._num_inside += 1

    def __exit__(self, *failure: object) -> None:
        with self._lock:
            self._num_inside -= 1
            if self._num_inside == 0 and self._was_enabled:
                gc.enable()


uncollected = _Uncollected()  # the collector is the process's, and so is the count


def make_ready_to_capture() -> None:
    """The calling thread gets its handle of cuBLAS, if it has none: made where a thread first multiplies, it would end a capture
    there."""
    torch.cuda.current_blas_handle()


def bucket_of(num_rows: int) -> int | None:
    if num_rows < LEAST_ROWS:
        return None
    return next((bucket for bucket in BUCKETS if bucket >= num_rows), None)


_Kind = tuple[tuple[str, str, int, int], ...]
"""(name within the layer, type, first row in its matrix, address modulo ALIGNMENT) of a layer's matrices."""

# Triton compiles another kernel where a pointer is no multiple of it.
ALIGNMENT = 16
# Other threads may allocate and wait meanwhile; with "global" their calls would end the capture.
CAPTURE_MODE = "thread_local"


@dataclass(frozen=True, eq=False)
class _Buffers:
    """What graphs read and write, for BUCKETS[-1] rows: 16 MB of hidden rows, 13 of queries and 8 attended for V2-Lite."""

    hidden: Tensor  # float32 [T, hidden]
    positions: Tensor  # int32 [T]
    slots: Tensor  # int64 [T]
    queries: Tensor  # [T, H * (nope + rope)], rotated
    attended: Tensor  # [T, H * v]


class _RowOps(CudaOps):
    """Ops of one layer but for attention, in whose place `attend` is called: from the buffer of queries to that of attended."""

    def __init__(
        self, backend: CudaBackend, step: DeviceStep, buffers: _Buffers, attend: Callable[[], None]
    ) -> None:
        super().__init__(backend, step)
        self._buffers = buffers
        self._attend_rows = attend

    def fold_q(self, name: str, q: Value, kv_up: KvUp, mla: MlaConfig) -> Value:
        return q

    def attend_latent(self, name: str, layer: int, q_latent: Value, mla: MlaConfig) -> Value:
        return q_latent

    def unfold_v(self, name: str, o_latent: Value, kv_up: KvUp, mla: MlaConfig) -> Value:
        return o_latent

    def attend_expanded(self, name: str, layer: int, q: Value, kv_up: KvUp, mla: MlaConfig, into: Value) -> Value:
        return self.attend_full(name, layer, q, mla)

    def attend_full(self, name: str, layer: int, q: Value, mla: MlaConfig) -> Value:
        num_rows = self.step.num_rows
        self._buffers.queries[:num_rows].copy_(q.tensor)
        self._attend_rows()
        return made(self._buffers.attended[:num_rows])


class CapturedLayers:
    """Graphs by (bucket, layer) over one set of buffers. The first layer of a kind is launched when a bucket first comes, which
    compiles its kernels; all others are captured then, for about what launching them costs."""

    def __init__(self, backend: CudaBackend) -> None:
        self._backend = backend
        self._launched: set[tuple[int, _Kind]] = set()
        self._captured: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, torch.cuda.CUDAGraph]] = {}
        self._memory: _POOL_HANDLE | None = None

    def run(self, ops: CudaOps, layer: int, x: Tensor) -> Tensor:
        """Hidden rows [T, hidden] behind the layer. ops: of the step, whose positions and slots fill its bucket."""
        step, buffers = ops.step, self.buffers
        bucket = len(step.positions)
        buffers.hidden[: step.num_rows].copy_(x)
        buffers.positions[:bucket].copy_(step.positions)
        buffers.slots[:bucket].copy_(step.slots)

        def attend() -> None:
            self._attend(ops, layer, buffers.queries[: step.num_rows], buffers.attended[: step.num_rows])

        key, kind = (bucket, layer), (bucket, self._kinds[layer])
        if kind in self._launched and key not in self._captured:
            self._captured[key] = self._capture(bucket, layer)
        if key in self._captured:
            before, behind = self._captured[key]
            before.replay()
            attend()
            behind.replay()
        else:
            self._launch(bucket, layer, attend)
            self._launched.add(kind)
        return buffers.hidden[: step.num_rows].clone()

    @cached_property
    def buffers(self) -> _Buffers:
        """Taken when a step first needs them."""
        config, device, rows = self._backend.model.config, self._backend.device, BUCKETS[-1]
        mla, dtype = config.mla, self._backend.dtype
        return _Buffers(
            torch.zeros(rows, config.hidden_size, device=device),
            torch.zeros(rows, dtype=torch.int32, device=device),
            torch.full((rows,), -1, dtype=torch.int64, device=device),
            torch.zeros(rows, mla.num_heads * mla.qk_head_dim, dtype=dtype, device=device),
            torch.zeros(rows, mla.num_heads * mla.v_head_dim, dtype=dtype, device=device),
        )

    @cached_property
    def _side(self) -> torch.cuda.Stream:
        """Of every capture: torch reuses memory within a stream. With a stream each the graphs of 2048 rows held 3.3 GB."""
        return torch.cuda.Stream(self._backend.device)

    @cached_property
    def _kinds(self) -> list[_Kind]:
        """By layer. Layers of one kind launch the same kernels."""
        rows = self._backend.weights.rows
        prefixes = [f"blk.{layer}." for layer in range(self._backend.model.config.num_layers)]
        return [
            tuple(
                (name.removeprefix(prefix), r.matrix.type, r.start, r.matrix.raw.data_ptr() % ALIGNMENT)
                for name, r in rows.items()
                if name.startswith(prefix)
            )
            for prefix in prefixes
        ]

    def _attend(self, ops: CudaOps, layer: int, queries: Tensor, attended: Tensor) -> None:
        model, name = self._backend.model, f"blk.{layer}"
        mla, kv_up, q = model.config.mla, model.kv_up(layer), made(queries)
        if model.standard:
            out = ops.attend_full(f"{name}.attend_full", layer, q, mla)
        else:
            out = ops.fold_q(f"{name}.fold_q", q, kv_up, mla)
            out = ops.attend_latent(f"{name}.attend_latent", layer, out, mla)
            out = ops.unfold_v(f"{name}.unfold_v", out, kv_up, mla)
            out = ops.attend_expanded(f"{name}.attend_expanded", layer, q, kv_up, mla, into=out)
        attended.copy_(out.tensor)

    def _launch(self, bucket: int, layer: int, attend: Callable[[], None]) -> None:
        """The layer's ops of a bucket of rows, from the buffer of hidden rows to it again."""
        buffers = self.buffers
        none = buffers.positions[:0]
        step = DeviceStep(
            None,
            bucket,
            none,
            buffers.positions[:bucket],
            buffers.slots[:bucket],
            none,
            slice(0, 0),
            (),
            (),
            None,
            None,
        )
        ops = _RowOps(self._backend, step, buffers, attend)
        hidden = buffers.hidden[:bucket]
        x = self._backend.model.run_segment(ops, layer + 1, made(hidden))
        assert x is not None
        hidden.copy_(x.tensor)

    def _capture(self, bucket: int, layer: int) -> tuple[torch.cuda.CUDAGraph, torch.cuda.CUDAGraph]:
        """Temporaries of all graphs share memory: nothing that one leaves there is read by another."""
        self._memory = self._memory or torch.cuda.graph_pool_handle()
        before, behind = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        open_graph = before

        def cut() -> None:
            nonlocal open_graph
            open_graph.capture_end()
            open_graph = behind
            open_graph.capture_begin(pool=self._memory, capture_error_mode=CAPTURE_MODE)

        make_ready_to_capture()
        with torch.cuda.stream(self._side), uncollected:
            open_graph.capture_begin(pool=self._memory, capture_error_mode=CAPTURE_MODE)
            try:
                self._launch(bucket, layer, cut)
            except BaseException:
                with suppress(RuntimeError):  # what ended it is the reason to tell
                    open_graph.capture_end()
                raise
            open_graph.capture_end()
        return before, behind
