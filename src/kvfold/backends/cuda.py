"""Backend `cuda`: the model's ops as GPU kernels, generation captured as CUDA graphs.

Owns the weights, the cache and the graphs in one GPU's memory. A step whose sequences all take one path, fused, with the
same few rows, or which is one sequence's prompt of at most 512, is replayed as one graph of its form (cuda_captured.py): arrays of the
step are copied into fixed buffers first, the tiles of attention are dealt on the device, and no launch depends on a length. Every
other step replays its layers but for attention (cuda_layers.py); what has too many or too few rows for that is launched op by op.
Logits go to the host, where the engine samples; a replayed step whose rows say how their tokens are chosen has them chosen in
the graph too, and the next replay may take them from there (model.step.Choosing).
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvfold.backends.cuda_captured import MOST_STEP_ROWS, StepBuffers, StepForm
from kvfold.backends.cuda_layers import (
    CAPTURE_MODE,
    CapturedLayers,
    bucket_of,
    make_ready_to_capture,
    uncollected,
)
from kvfold.backends.cuda_ops import CudaOps, Value, made
from kvfold.backends.cuda_step import DeviceStep, on_device
from kvfold.backends.cuda_weights import DeviceWeights
from kvfold.cache.latent import PAGE_TOKENS, CacheType, PagedCache
from kvfold.errors import Cancelled
from kvfold.kernels import ceilings, row_attention
from kvfold.kernels.cached_blocks import Blocks
from kvfold.kernels.choose import choose
from kvfold.mla.rope import cos_sin
from kvfold.model.deepseek import DeepseekModel
from kvfold.model.step import MOST_TOP_K, Int32, Step

if TYPE_CHECKING:
    from torch.cuda import _POOL_HANDLE

_CACHE_TYPES = {
    CacheType.F32: torch.float32,
    CacheType.F16: torch.float16,
    CacheType.BF16: torch.bfloat16,
    CacheType.Q8_0: torch.uint8,
    CacheType.FP8: torch.uint8,
}
_BLOCKS: dict[CacheType, Blocks] = {CacheType.Q8_0: "q8_0", CacheType.FP8: "fp8"}


class CudaBackend:
    """One model over one cache of this shape, both in the memory of `device`.

    dtype: bfloat16 (hidden rows, norms, softmax, routing and every sum float32) or float32 throughout.
    workspace_bytes: of weights that an op decodes, kept; as many of expanded keys and values or stored scores of one op.
    captures: False launches every step op by op, in as many rows as it has.

    Raises torch.cuda.OutOfMemoryError.
    """

    name = "cuda"

    def __init__(
        self,
        model: DeepseekModel,
        weights: DeviceWeights,
        cache: PagedCache,
        *,
        device: torch.device,
        dtype: torch.dtype,
        workspace_bytes: int,
        captures: bool = True,
    ) -> None:
        self.model = model
        self.device = device
        self.dtype = dtype
        self.workspace_bytes = workspace_bytes
        self.num_pages = cache.num_pages
        self.weights = weights
        cache_type = cache.layout.cache_type
        self.row_dims = cache.layout.row_dims
        self.blocks = _BLOCKS.get(cache_type)  # the format of pools of bytes
        self.pools = tuple(
            torch.empty(
                (cache.layout.num_layers, cache.num_pages, PAGE_TOKENS, cache_type.columns(dim)),
                dtype=_CACHE_TYPES[cache_type],
                device=device,
            )
            for dim in cache.layout.row_dims
        )
        # Of every position that fits the cache: 32 numbers each for 64 rotary dimensions, 8 MB for 32k tokens.
        positions = np.arange(cache.num_pages * PAGE_TOKENS, dtype=np.int32)
        self.cos, self.sin = (torch.from_numpy(a).to(device) for a in cos_sin(model.config.rope, positions))
        self.arrived = torch.zeros(1, dtype=torch.int32, device=device)  # number_product.route's
        mla = model.config.mla
        self.exchange = row_attention.Exchange(mla.num_heads, mla.kv_lora_rank, mla.v_head_dim, device)
        # By output row of the last step that chose. Steps launched ahead take their ids from here, replayed or not.
        self.chosen = torch.zeros(MOST_STEP_ROWS, dtype=torch.int32, device=device)
        captures = captures and device.type == "cuda"
        self._graphs = _Graphs(self) if captures else None
        self._layers = CapturedLayers(self) if captures else None

    @cached_property
    def scratch(self) -> Tensor:
        """Decoded weights of the op at work, of launched and captured steps alike. Taken when a step first needs it."""
        return torch.empty(self.workspace_bytes, dtype=torch.uint8, device=self.device)

    def as_current(self) -> torch.cuda.device_of:
        """Around launches: they go to the current GPU of the calling thread, which is GPU 0 until somebody sets another."""
        return torch.cuda.device_of(self.chosen)

    @property
    def device_name(self) -> str:
        return torch.cuda.get_device_name(self.device)

    def write_pages(self, array: int, layer: int, pages: list[int], stored: NDArray[np.generic]) -> None:
        """Cached rows [pages, PAGE_TOKENS, columns] as cache/latent.py stores them."""
        pool = self.pools[array][layer]
        pool[pages] = torch.from_numpy(stored).to(self.device).view(pool.dtype)

    def read_rate(self) -> float:
        """Bytes a second, measured now."""
        with self.as_current():
            return ceilings.read_rate(self.device)

    def multiply_adds(self) -> dict[str, float]:
        """A second, by kind of operand, measured now."""
        kinds = {"bf16": torch.bfloat16, "f32": torch.float32}
        with self.as_current():
            return {kind: ceilings.multiply_adds(self.device, dtype) for kind, dtype in kinds.items()}

    def chooses(self, step: Step) -> bool:
        return self._graphs is not None and self._graphs.chooses(step)

    def start(self, step: Step) -> CudaRun:
        """ValueError where one path comes in two forms: an op works on one range of rows."""
        seen: set[int] = set()
        for path, *_ in step.segments.tolist():
            if path in seen:
                raise ValueError(f"segments: path {path} twice, expected once.")
            seen.add(path)
        return CudaRun(self, step, self._graphs, self._layers)


class CudaRun:
    """Implements model.step.StepRun, and ChoosingRun where the backend chooses."""

    def __init__(
        self, backend: CudaBackend, step: Step, graphs: _Graphs | None, layers: CapturedLayers | None
    ) -> None:
        self._backend = backend
        self._step = step
        self._graphs = graphs
        self._layers = layers if bucket_of(step.num_rows) else None
        self._ops: CudaOps | None = None
        self._x: Value | None = None
        self._cancelled = False
        self._outputs = _Outputs({})
        self.position = 0

    @property
    def outputs(self) -> Mapping[str, NDArray[np.float32]]:
        """Each is copied to the host when it is asked for."""
        return self._outputs

    @property
    def chosen(self) -> Int32:
        assert self._outputs.chosen is not None
        tokens, copied = self._outputs.chosen
        copied.synchronize()
        return tokens.numpy()

    def cancel(self) -> None:
        self._cancelled = True

    def run(self, last: int | None = None) -> int:
        model = self._backend.model
        stop = model.num_segments if last is None else last
        with torch.inference_mode(), self._backend.as_current():
            if self.position == 0 and self._graphs is not None:
                self._check_cancelled()
                outputs = self._graphs.run(self._step)
                if outputs is not None:
                    self._outputs, self.position = outputs, model.num_segments
                    return self.position
            if self._ops is None:
                bucket = bucket_of(self._step.num_rows) if self._layers else None
                step = on_device(self._step, model.config.mla, self._backend.device, bucket)
                self._ops = CudaOps(self._backend, step)
            while self.position < stop:
                self._check_cancelled()
                self._x = self._segment(self._ops, self.position, self._x)
                self.position += 1
            self._outputs = _Outputs(self._ops.outputs)
        return self.position

    def _segment(self, ops: CudaOps, index: int, x: Value | None) -> Value | None:
        model = self._backend.model
        # The last layer and the head work on the step's output rows, which no graph knows.
        if self._layers is None or x is None or index >= model.num_segments - 2:
            return model.run_segment(ops, index, x)
        return made(self._layers.run(ops, index - 1, x.tensor))

    def _check_cancelled(self) -> None:
        if self._cancelled:
            self._cancelled = False
            raise Cancelled(f"The step was cancelled before segment {self.position}.")


class _Outputs(Mapping[str, "NDArray[np.float32]"]):
    """Arrays on the device, float32 on the host for who looks one up. chosen: tokens on the host once the event is over."""

    def __init__(
        self, tensors: Mapping[str, Tensor], chosen: tuple[Tensor, torch.cuda.Event] | None = None
    ) -> None:
        self._tensors = tensors
        self.chosen = chosen

    def __getitem__(self, name: str) -> NDArray[np.float32]:
        tensor = self._tensors[name]
        if not tensor.is_cuda:
            return tensor.float().numpy()
        # Pinned: 26 MB of logits (64 rows of 102,400) took 4.4 ms into pageable memory.
        with torch.cuda.device_of(tensor):  # pinned memory makes a context on the current GPU
            host = torch.empty(tensor.shape, dtype=torch.float32, pin_memory=True)
        host.copy_(tensor, non_blocking=True)
        torch.cuda.current_stream(tensor.device).synchronize()
        return host.numpy()

    def keep(self) -> None:
        """Out of memory that another replay is about to write."""
        self._tensors = {name: tensor.clone() for name, tensor in self._tensors.items()}

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


_CapturedStep = tuple[torch.cuda.CUDAGraph, dict[str, Tensor]]
"""(graph, its outputs)"""


class _Graphs:
    """Steps of one form: the first is launched op by op, which compiles the kernels, the second captured, all others replayed. So
    a form that comes once costs no capture, which takes as long as launching it."""

    def __init__(self, backend: CudaBackend) -> None:
        self._backend = backend
        self._buffers = StepBuffers(
            backend.model.config.mla,
            backend.dtype,
            backend.pools[0],
            backend.num_pages,
            backend.workspace_bytes,
            backend.device,
        )
        # Their launches' workspaces are where graphs write besides the graphs' memory, so they live as long.
        self._steps: dict[StepForm, DeviceStep] = {}
        self._captured: dict[StepForm, _CapturedStep | None] = {}
        self._memory: _POOL_HANDLE | None = None
        self._last: weakref.ref[_Outputs] | None = None

    def run(self, step: Step) -> _Outputs | None:
        """The step's outputs; None where no graph serves it."""
        form = self._buffers.form(step)
        if form is None:
            return None
        self._buffers.fill(step, form)
        # Graphs share their memory: outputs that somebody still holds are saved before a replay of any of them writes
        # there. Mostly nobody does, and no copy is made.
        last = None if self._last is None else self._last()
        if last is not None:
            last.keep()
        outputs = self._outputs(step, form, self._run(form))
        self._last = weakref.ref(outputs)
        return outputs

    def _run(self, form: StepForm) -> dict[str, Tensor]:
        """Logits of all rows of generated ones, of a prompt's last."""
        if form not in self._steps:
            step = self._buffers.step(form)
            outputs = self._launch(step, form)
            self._steps[form] = step
            return outputs
        if form not in self._captured:
            self._captured[form] = self._captured_or_none(form)
        captured = self._captured[form]
        if captured is None:
            return self._launch(self._steps[form], form)
        graph, outputs = captured
        graph.replay()
        return outputs

    def _outputs(self, step: Step, form: StepForm, tensors: dict[str, Tensor]) -> _Outputs:
        num_rows = step.num_rows
        if len(step.choices) == num_rows:
            tokens = torch.empty(num_rows, dtype=torch.int32, pin_memory=True)
            tokens.copy_(self._backend.chosen[:num_rows], non_blocking=True)
            copied = torch.cuda.Event()
            copied.record(torch.cuda.current_stream(self._backend.device))
            return _Outputs({}, (tokens, copied))
        wanted = step.output_rows
        if form.is_prompt or len(wanted) == num_rows:
            return _Outputs({name: x[: len(wanted)] for name, x in tensors.items()})
        rows = torch.from_numpy(wanted).to(self._backend.device).long()
        return _Outputs({name: x[rows] for name, x in tensors.items()})

    def chooses(self, step: Step) -> bool:
        return len(step.choices) == step.num_rows and self._buffers.form(step) is not None

    def graph(self, step: Step) -> torch.cuda.CUDAGraph | None:
        """That which serves the step; None where none has been captured."""
        form = self._buffers.form(step)
        captured = None if form is None else self._captured.get(form)
        return None if captured is None else captured[0]

    def _launch(self, step: DeviceStep, form: StepForm) -> dict[str, Tensor]:
        backend = self._backend
        for launch in (*step.launches, *step.head_launches):
            launch.schedule()
        ops = CudaOps(backend, step)
        x: Value | None = None
        for index in range(backend.model.num_segments):
            x = backend.model.run_segment(ops, index, x)
        if not form.is_prompt:
            choose(ops.outputs["logits"], self._buffers.choices(form), MOST_TOP_K, backend.chosen)
        return ops.outputs

    @cached_property
    def _side(self) -> torch.cuda.Stream:
        """Of every capture. torch's own is one for all, on the GPU that captured first."""
        return torch.cuda.Stream(self._backend.device)

    def _captured_or_none(self, form: StepForm) -> _CapturedStep | None:
        """None where there is no memory for it, beside what launching takes: the form is then launched every time."""
        try:
            return self._capture(self._steps[form], form)
        except torch.cuda.OutOfMemoryError:
            return None

    def _capture(self, step: DeviceStep, form: StepForm) -> _CapturedStep:
        self._memory = self._memory or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        make_ready_to_capture()
        with (
            uncollected,
            torch.cuda.graph(graph, pool=self._memory, stream=self._side, capture_error_mode=CAPTURE_MODE),
        ):
            outputs = self._launch(step, form)
        return graph, outputs
