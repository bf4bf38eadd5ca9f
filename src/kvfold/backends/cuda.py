"""Backend `cuda`: the model's ops as GPU kernels, generation captured as CUDA graphs.

Owns the weights, the cache and the graphs in one GPU's memory. A step whose sequences all take one path, fused, with the
same few rows is replayed as one graph of its (path, batch bucket, rows a sequence): arrays of the step are copied into fixed
buffers first, the tiles of attention are dealt on the device, and no launch depends on a length. Every other step, prompts
above all, replays its layers but for attention (cuda_layers.py); what has too many or too few rows for that is launched op by op.
Logits go to the host, where the engine samples; a replayed step whose rows say how their tokens are chosen has them chosen in
the graph too, and the next replay may take them from there (model.step.Choosing).
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvfold.backends.cuda_layers import CAPTURE_MODE, CapturedLayers, bucket_of, uncollected
from kvfold.backends.cuda_ops import CudaOps, Value, made
from kvfold.backends.cuda_step import (
    MOST_ROWS,
    SHORT_TOKENS,
    DecodeLaunch,
    DeviceStep,
    decode_workspace,
    most_tokens,
    on_device,
)
from kvfold.backends.cuda_weights import DeviceWeights
from kvfold.cache.latent import PAGE_TOKENS, CacheType, PagedCache
from kvfold.errors import Cancelled
from kvfold.kernels import ceilings, merged_unfold, row_attention
from kvfold.kernels.cached_blocks import Blocks
from kvfold.kernels.choose import choose
from kvfold.kernels.mla_decode import DecodeWorkspace
from kvfold.mla.plan import Path
from kvfold.mla.rope import cos_sin
from kvfold.model.deepseek import DeepseekModel
from kvfold.model.step import LIKELIEST, MOST_TOP_K, Choice, Int32, Step

# Sequences of a captured step; a step takes the smallest that holds it, and the rest is padding.
BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128)

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
        self.chosen = torch.zeros(BUCKETS[-1] * MOST_ROWS, dtype=torch.int32, device=device)
        captures = captures and device.type == "cuda"
        self._graphs = _Graphs(self) if captures else None
        self._layers = CapturedLayers(self) if captures else None

    @cached_property
    def scratch(self) -> Tensor:
        """Decoded weights of the op at work, of launched and captured steps alike. Taken when a step first needs it."""
        return torch.empty(self.workspace_bytes, dtype=torch.uint8, device=self.device)

    @property
    def device_name(self) -> str:
        return torch.cuda.get_device_name(self.device)

    def write_pages(self, array: int, layer: int, pages: list[int], stored: NDArray[np.generic]) -> None:
        """Cached rows [pages, PAGE_TOKENS, columns] as cache/latent.py stores them."""
        pool = self.pools[array][layer]
        pool[pages] = torch.from_numpy(stored).to(self.device).view(pool.dtype)

    def read_rate(self) -> float:
        """Bytes a second, measured now."""
        return ceilings.read_rate(self.device)

    def multiply_adds(self) -> dict[str, float]:
        """A second, by kind of operand, measured now."""
        kinds = {"bf16": torch.bfloat16, "f32": torch.float32}
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
        with torch.inference_mode():
            if self.position == 0 and stop == model.num_segments and self._graphs is not None:
                self._check_cancelled()
                outputs = self._graphs.run(self._step)
                if outputs is not None:
                    self._outputs, self.position = outputs, stop
                    return stop
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


@dataclass(frozen=True, eq=False)
class _Captured:
    """workspace: where the graph writes although it is not of the graphs' memory, so it has to live as long."""

    graph: torch.cuda.CUDAGraph
    outputs: dict[str, Tensor]
    workspace: DecodeWorkspace


_Key = tuple[Path, int, int, int | None]
"""(path, bucket, rows a sequence, DeviceStep.most_tokens where kernels are chosen by it)"""


class _Graphs:
    """Captured steps over one set of buffers that each replay reads anew."""

    def __init__(self, backend: CudaBackend) -> None:
        self._backend = backend
        self._captured: dict[_Key, _Captured] = {}
        self._memory = torch.cuda.graph_pool_handle()
        most_rows = BUCKETS[-1] * MOST_ROWS
        # Every page in use once, and shared ones again: a step with more is launched op by op.
        self._most_pages = 2 * backend.num_pages + BUCKETS[-1]
        sizes = {
            "slots": 2 * most_rows,  # int64
            "choices": 2 * len(Choice._fields) * most_rows,  # float64
            "token_ids": most_rows,
            "positions": most_rows,
            "kv_lens": BUCKETS[-1],
            "page_starts": BUCKETS[-1] + 1,
            "pages": self._most_pages,
        }
        self._places: dict[str, slice] = {}
        at = 0
        for name, size in sizes.items():
            self._places[name] = slice(at, at + size)
            at += size
        self._host = torch.zeros(at, dtype=torch.int32, pin_memory=True)
        self._device = torch.zeros(at, dtype=torch.int32, device=backend.device)
        self._parts = {name: self._host.numpy()[place] for name, place in self._places.items()}
        self._copied = torch.cuda.Event()  # the last copy out of the pinned buffer
        self._last: weakref.ref[_Outputs] | None = None

    def run(self, step: Step) -> _Outputs | None:
        """The step's outputs; None where no graph serves it."""
        key = self._key(step)
        if key is None:
            return None
        _, bucket, rows, _ = key
        self._fill(step, bucket, rows)
        if key not in self._captured:
            self._captured[key] = self._capture(*key)
        # Graphs share their memory: outputs that somebody still holds are saved before a replay of any of them writes
        # there. Mostly nobody does, and no copy is made.
        last = None if self._last is None else self._last()
        if last is not None:
            last.keep()
        captured = self._captured[key]
        captured.graph.replay()
        num_rows = step.num_rows
        if len(step.choices) == num_rows:
            tokens = torch.empty(num_rows, dtype=torch.int32, pin_memory=True)
            tokens.copy_(self._backend.chosen[:num_rows], non_blocking=True)
            copied = torch.cuda.Event()
            copied.record(torch.cuda.current_stream(self._backend.device))
            outputs = _Outputs({}, (tokens, copied))
        elif len(step.output_rows) == num_rows:
            outputs = _Outputs({name: x[:num_rows] for name, x in captured.outputs.items()})
        else:
            wanted = torch.from_numpy(step.output_rows).to(self._backend.device).long()
            outputs = _Outputs({name: x[wanted] for name, x in captured.outputs.items()})
        self._last = weakref.ref(outputs)
        return outputs

    def chooses(self, step: Step) -> bool:
        return len(step.choices) == step.num_rows and self._key(step) is not None

    def _key(self, step: Step) -> _Key | None:
        """Of a step whose rows take one path, fused, a few a sequence. Without fusing, scores of all keys are stored: of as many as
        a replay may meet they would take a workspace for the longest context there could be."""
        if len(step.segments) != 1 or not step.segments[0, 1]:
            return None
        path = Path(int(step.segments[0, 0]))
        counts = set(np.diff(step.row_starts).tolist())
        batch = len(step.kv_lens)
        if len(counts) != 1 or max(counts) > MOST_ROWS or batch > BUCKETS[-1] or len(step.pages) > self._most_pages:
            return None
        bucket, rows = next(b for b in BUCKETS if b >= batch), counts.pop()
        if path is not Path.ABSORBED:
            return path, bucket, rows, None
        backend, mla = self._backend, self._backend.model.config.mla
        per_row, most = (bucket * rows, mla.num_heads), most_tokens(step.kv_lens)
        if most == row_attention.MOST_KEYS and not row_attention.serves(
            *per_row, mla.kv_lora_rank, backend.dtype, backend.pools[0]
        ):
            most = SHORT_TOKENS
        if most == SHORT_TOKENS and not merged_unfold.serves(*per_row):
            most = None
        return path, bucket, rows, most

    def _fill(self, step: Step, bucket: int, rows: int) -> None:
        """The step's arrays into the fixed buffers, padding behind them: no keys, no slot, token 0. Rows without a choice
        take the likeliest token, which costs least."""
        self._copied.synchronize()
        parts = self._parts
        num_rows, batch = step.num_rows, len(step.kv_lens)
        used = {"slots": 2 * num_rows, "token_ids": num_rows, "positions": num_rows, "kv_lens": batch}
        sizes = {
            "slots": 2 * bucket * rows,
            "token_ids": bucket * rows,
            "positions": bucket * rows,
            "kv_lens": bucket,
        }
        for name, size in sizes.items():
            parts[name][used[name] : size] = -1 if name == "slots" else 0
        parts["slots"].view(np.int64)[:num_rows] = step.slots
        choices = parts["choices"].view(np.float64).reshape(-1, len(Choice._fields))
        choices[len(step.choices) : bucket * rows] = LIKELIEST
        choices[: len(step.choices)] = step.choices
        parts["token_ids"][:num_rows] = step.token_ids
        parts["positions"][:num_rows] = step.positions
        parts["kv_lens"][:batch] = step.kv_lens
        parts["page_starts"][: batch + 1] = step.page_starts
        parts["page_starts"][batch + 1 : bucket + 1] = 0
        parts["pages"][: len(step.pages)] = step.pages
        end = self._places["pages"].start + len(step.pages)
        self._device[:end].copy_(self._host[:end], non_blocking=True)
        self._copied.record(torch.cuda.current_stream(self._backend.device))

    def _capture(self, path: Path, bucket: int, rows: int, most: int | None) -> _Captured:
        backend = self._backend
        num_rows = bucket * rows

        def buffer(name: str, size: int) -> Tensor:
            return self._device[self._places[name]][:size]

        is_absorbed = path is Path.ABSORBED
        kv_lens = buffer("kv_lens", bucket)
        choices = buffer("choices", 2 * len(Choice._fields) * num_rows).view(torch.float64).view(num_rows, -1)
        workspace = decode_workspace(path, bucket, rows, backend.model.config.mla, backend.device)
        launch = DecodeLaunch(0, num_rows, buffer("page_starts", bucket + 1), kv_lens, workspace)
        step = DeviceStep(
            None,
            num_rows,
            buffer("token_ids", num_rows),
            buffer("positions", num_rows),
            buffer("slots", 2 * num_rows).view(torch.int64),
            buffer("pages", self._most_pages),
            slice(0, num_rows if is_absorbed else 0),
            (launch,) if is_absorbed else (),
            () if is_absorbed else (launch,),
            None,
            most,
        )

        def whole() -> dict[str, Tensor]:
            launch.schedule()
            ops = CudaOps(backend, step)
            x: Value | None = None
            for index in range(backend.model.num_segments):
                x = backend.model.run_segment(ops, index, x)
            choose(ops.outputs["logits"], choices, MOST_TOP_K, backend.chosen)
            return ops.outputs

        # Compiles the kernels and lets libraries set themselves up. It computes this very step, so what it writes to the
        # cache is what the replay writes again; the tokens it takes are in place then, and what it chooses nobody reads.
        side = torch.cuda.Stream(backend.device)
        side.wait_stream(torch.cuda.current_stream(backend.device))
        with torch.cuda.stream(side):
            whole()
        torch.cuda.current_stream(backend.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with uncollected, torch.cuda.graph(graph, pool=self._memory, capture_error_mode=CAPTURE_MODE):
            outputs = whole()
        return _Captured(graph, outputs, workspace)
