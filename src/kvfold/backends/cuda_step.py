"""A step in the memory of a GPU: what its kernels read, and how its rows are dealt to launches of decode."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvfold.config import MlaConfig
from kvfold.kernels import row_attention
from kvfold.kernels.head_decode import head_workspace
from kvfold.kernels.mla_decode import DecodeWorkspace, schedule_decode
from kvfold.mla.plan import Path
from kvfold.model.step import Step

# Rows of one sequence in a launch: they share the tiles of latents that they all see.
MOST_ROWS = 4
# Contexts up to here are cut in so few parts (16 of a tile) that merging them where they are unfolded costs less than a
# launch. One row of V2-Lite on an H200: 1.3 us a layer less at 128 keys, 1.8 more at 4096 (33 parts).
SHORT_TOKENS = 1024
# What a step's contexts are told apart by, beside those that are longer: kernels for short ones are chosen by it.
MOST_TOKENS = (row_attention.MOST_KEYS, SHORT_TOKENS)


@dataclass(frozen=True, eq=False)
class DecodeLaunch:
    """One launch of decode: rows [start, stop) of the step, as sequences of equally many rows."""

    start: int
    stop: int
    page_starts: Tensor  # int32 [B + 1]
    kv_lens: Tensor  # int32 [B]
    workspace: DecodeWorkspace

    def schedule(self) -> None:
        schedule_decode(self.kv_lens, self.workspace)


@dataclass(frozen=True, eq=False)
class PromptKeys:
    """Keys of a decompressed prompt, whose rows are the last of them, where their number is known on the device alone."""

    kv_len: Tensor  # int32 [1]
    num_keys: int  # that are expanded: whole pages, as many keys or more


@dataclass(frozen=True, eq=False)
class DeviceStep:
    """num_rows, and arrays of model/step.py on the device.

    host:         the step they came from; None for a captured graph's, whose values change from replay to replay
    positions, slots: at least num_rows of them; what is behind those is padding
    absorbed:     rows of the absorbed segment
    launches:     its rows dealt to launches of mla_decode; empty where it is not fused
    head_launches: rows of the standard or the decompressed segment, of sequences that have at most MOST_ROWS, dealt to those
                  of head_decode; empty where it is not fused. A model has one of the two segments
    output_rows:  int64, or None for all rows
    most_tokens:  of MOST_TOKENS, the first that no context is longer than; None where one is longer than all
    prompt:       of a captured graph whose rows are a decompressed prompt
    """

    host: Step | None
    num_rows: int
    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    pages: Tensor
    absorbed: slice
    launches: tuple[DecodeLaunch, ...]
    head_launches: tuple[DecodeLaunch, ...]
    output_rows: Tensor | None
    most_tokens: int | None
    prompt: PromptKeys | None = None


def most_tokens(kv_lens: NDArray[np.int32]) -> int | None:
    return next((most for most in MOST_TOKENS if kv_lens.max(initial=0) <= most), None)


def expanded_bytes(mla: MlaConfig, dtype: torch.dtype) -> int:
    """Of one key expanded for all heads, its value with it; the rope part stays where it is."""
    return mla.num_heads * (mla.qk_nope_head_dim + mla.v_head_dim) * dtype.itemsize


def path_rows(step: Step, path: Path) -> slice:
    """The rows of the segment that takes this path; empty where there is none."""
    segment = step.segment(path.value)
    if segment is None:
        return slice(0, 0)
    return slice(int(step.row_starts[segment[1].start]), int(step.row_starts[segment[1].stop]))


def on_device(step: Step, mla: MlaConfig, device: torch.device, padded_rows: int | None = None) -> DeviceStep:
    """The step's arrays copied, rows that decode dealt to launches and their schedules made. padded_rows: of positions and
    slots, position 0 and no slot behind the step's own."""

    def put(array: NDArray[np.integer]) -> Tensor:
        return torch.from_numpy(np.array(array)).to(device, non_blocking=True)

    padding = (0, (padded_rows or step.num_rows) - step.num_rows)

    def launched(dealt: list[_Dealt], path: Path) -> tuple[DecodeLaunch, ...]:
        launches = []
        for start, rows, kv_lens, page_starts in dealt:
            workspace = decode_workspace(path, len(kv_lens), rows, mla, device)
            stop = start + rows * len(kv_lens)
            launches.append(DecodeLaunch(start, stop, put(page_starts), put(kv_lens), workspace))
            launches[-1].schedule()
        return tuple(launches)

    launches: dict[Path, tuple[DecodeLaunch, ...]] = {}
    for path, deal in ((Path.ABSORBED, _deal), (Path.STANDARD, _deal_few), (Path.DECOMPRESSED, _deal_few)):
        segment = step.segment(path.value)
        if segment is not None and segment[0]:
            launches[path] = launched(deal(step, segment[1]), path)
    is_all = len(step.output_rows) == step.num_rows
    return DeviceStep(
        step,
        step.num_rows,
        put(step.token_ids),
        put(np.pad(step.positions, padding)),
        put(np.pad(step.slots, padding, constant_values=-1)),
        put(step.pages),
        path_rows(step, Path.ABSORBED),
        launches.get(Path.ABSORBED, ()),
        launches.get(Path.STANDARD, ()) + launches.get(Path.DECOMPRESSED, ()),
        None if is_all else put(step.output_rows.astype(np.int64)),
        most_tokens(step.kv_lens),
    )


def decode_workspace(
    path: Path,
    batch: int,
    rows_per_sequence: int,
    mla: MlaConfig,
    device: torch.device,
    beside: DecodeWorkspace | None = None,
) -> DecodeWorkspace:
    """Of the launch that decodes so many sequences on this path; beside: as DecodeWorkspace has it."""
    sizes = batch, rows_per_sequence, mla.num_heads
    if path is Path.ABSORBED:
        return DecodeWorkspace(*sizes, mla.kv_lora_rank, device, beside=beside)
    return head_workspace(*sizes, mla.v_head_dim, device, beside=beside)


_Dealt = tuple[int, int, NDArray[np.int32], NDArray[np.int32]]
"""(first row, rows of a sequence, kv_lens, page_starts) of a launch."""


def _deal(step: Step, sequences: range) -> list[_Dealt]:
    """All rows. Sequences of one length of at most MOST_ROWS go together; else each is cut in pieces of MOST_ROWS rows, and
    what is left."""
    counts = {step.rows(s).stop - step.rows(s).start for s in sequences}
    if len(counts) == 1 and max(counts) <= MOST_ROWS:
        first = sequences.start
        starts = step.page_starts[first : sequences.stop + 1].astype(np.int32)
        return [(step.rows(first).start, counts.pop(), step.kv_lens[first : sequences.stop], starts)]
    launches = []
    for s in sequences:
        rows = step.rows(s)
        total = rows.stop - rows.start
        whole = total // MOST_ROWS
        seen = int(step.kv_lens[s]) - total  # keys before the first row
        for start, size, count in ((0, MOST_ROWS, whole), (whole * MOST_ROWS, total % MOST_ROWS, 1)):
            if size and count:
                kv_lens = (seen + start + size * np.arange(1, count + 1)).astype(np.int32)
                pages = np.full(count + 1, step.page_starts[s], np.int32)
                launches.append((rows.start + start, size, kv_lens, pages))
    return launches


def _deal_few(step: Step, sequences: range) -> list[_Dealt]:
    """Rows of sequences that have at most MOST_ROWS: neighbours of equally many rows go together."""
    dealt = []
    for rows, group in groupby(sequences, lambda s: step.rows(s).stop - step.rows(s).start):
        first, *others = group
        stop = first + 1 + len(others)
        if rows <= MOST_ROWS:
            starts = step.page_starts[first : stop + 1].astype(np.int32)
            dealt.append((step.rows(first).start, rows, step.kv_lens[first:stop], starts))
    return dealt
