"""Steps at fixed places: of what form a step is that one graph can hold, and its arrays where that graph reads them.

A form fixes every launch of a step and no value: lengths, page lists, slots and tokens are read on the device. Its rows are a
bucket of them, so a step has rows of padding: token 0, no slot, nobody attends to them. Of generated rows the padding is
behind; of a prompt it is in front, as rows before the sequence's first, so that its last row, of which logits are wanted, is
the last of every bucket.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kvfold.backends.cuda_layers import bucket_of
from kvfold.backends.cuda_step import (
    MOST_ROWS,
    SHORT_TOKENS,
    DecodeLaunch,
    DeviceStep,
    PromptKeys,
    decode_workspace,
    expanded_bytes,
    most_tokens,
)
from kvfold.config import MlaConfig
from kvfold.kernels import merged_unfold, row_attention
from kvfold.kernels.mla_decode import DecodeWorkspace
from kvfold.mla.plan import Path
from kvfold.model.step import LIKELIEST, Choice, Step

# Sequences of a captured step of generated rows; a step takes the smallest that holds it, and the rest is padding.
BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128)
MOST_STEP_ROWS = BUCKETS[-1] * MOST_ROWS
# Keys that a captured prompt expands, padding included; more of them take longer on the device than on the host. Few buckets, since
# each is a capture: expanding 1024 keys in vain takes some 7 us a layer of 16 heads.
KEY_BUCKETS = (512, 1024, 2048, 4096, 8192)


class StepForm(NamedTuple):
    """What the launches of a step depend on.

    path:        of all rows, fused
    is_prompt:   more than MOST_ROWS rows of one sequence, of which at most the last is an output; else every row is one
    batch, rows: sequences, and rows of each. An absorbed prompt is decoded as sequences of MOST_ROWS rows, a decompressed one
                 is a single sequence
    most_tokens: DeviceStep's, where kernels are chosen by it
    num_keys:    of a decompressed prompt: PromptKeys'
    """

    path: Path
    is_prompt: bool
    batch: int
    rows: int
    most_tokens: int | None
    num_keys: int | None

    @property
    def num_rows(self) -> int:
        return self.batch * self.rows


class StepBuffers:
    """Arrays of one step in the memory of a GPU, always at the same places, as `form` says what lies there.

    A prompt without an output has its last row's logits computed all the same: reading the head is 90 us of V2-Lite's 5 ms in bf16."""

    def __init__(
        self,
        mla: MlaConfig,
        dtype: torch.dtype,
        pool: Tensor,
        num_pages: int,
        workspace_bytes: int,
        device: torch.device,
    ) -> None:
        """pool: of the cache, as it is read. workspace_bytes: of expanded keys and values."""
        self._mla = mla
        self._dtype = dtype
        self._pool = pool
        self._workspace_bytes = workspace_bytes
        # Every page in use once, and shared ones again: a step with more is launched op by op.
        self._most_pages = 2 * num_pages + BUCKETS[-1]
        sizes = {
            "slots": 2 * MOST_STEP_ROWS,  # int64
            "choices": 2 * len(Choice._fields) * MOST_STEP_ROWS,  # float64
            "token_ids": MOST_STEP_ROWS,
            "positions": MOST_STEP_ROWS,
            "kv_lens": BUCKETS[-1],
            "page_starts": BUCKETS[-1] + 1,
            "pages": self._most_pages,
        }
        self._places: dict[str, slice] = {}
        at = 0
        for name, size in sizes.items():
            self._places[name] = slice(at, at + size)
            at += size
        self._host = torch.zeros(at, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._device = torch.zeros(at, dtype=torch.int32, device=device)
        self._parts = {name: self._host.numpy()[place] for name, place in self._places.items()}
        # Of the first form of a path and rows a sequence. Partial results of all its forms lie there, up to 35 MB: steps follow one another.
        self._workspaces: dict[tuple[Path, int], DecodeWorkspace] = {}
        self._copied = (
            torch.cuda.Event() if device.type == "cuda" else None
        )  # the last copy out of the pinned buffer

    def form(self, step: Step) -> StepForm | None:
        """None where no one form holds it: rows on two paths, several sequences of which one has many rows, too many rows, pages
        or keys. Without fusing, scores of all keys are stored: of as many as a replay may meet they would take a workspace for
        the longest context there could be."""
        if len(step.segments) != 1 or not step.segments[0, 1] or len(step.pages) > self._most_pages:
            return None
        path = Path(int(step.segments[0, 0]))
        batch, counts = len(step.kv_lens), set(np.diff(step.row_starts).tolist())
        if batch == 1 and step.num_rows > MOST_ROWS:
            return self._prompt_form(step, path)
        if len(counts) != 1 or max(counts) > MOST_ROWS or batch > BUCKETS[-1]:
            return None
        bucket, rows = next(b for b in BUCKETS if b >= batch), counts.pop()
        if path is not Path.ABSORBED:
            return StepForm(path, False, bucket, rows, None, None)
        per_row, most = (bucket * rows, self._mla.num_heads), most_tokens(step.kv_lens)
        if most == row_attention.MOST_KEYS and not row_attention.serves(
            *per_row, self._mla.kv_lora_rank, self._dtype, self._pool
        ):
            most = SHORT_TOKENS
        if most == SHORT_TOKENS and not merged_unfold.serves(*per_row):
            most = None
        return StepForm(path, False, bucket, rows, most, None)

    def _prompt_form(self, step: Step, path: Path) -> StepForm | None:
        bucket = bucket_of(step.num_rows)
        wants_last = step.output_rows.tolist() in ([], [step.num_rows - 1])
        if bucket is None or bucket > MOST_STEP_ROWS or not wants_last or path is Path.STANDARD:
            return None
        if path is Path.ABSORBED:
            return StepForm(path, True, bucket // MOST_ROWS, MOST_ROWS, None, None)
        num_keys = next((keys for keys in KEY_BUCKETS if keys >= step.kv_lens[0]), None)
        if num_keys is None or num_keys * expanded_bytes(self._mla, self._dtype) > self._workspace_bytes:
            return None
        return StepForm(path, True, 1, bucket, None, num_keys)

    def fill(self, step: Step, form: StepForm) -> None:
        """Rows without a choice take the likeliest token, which costs least."""
        if self._copied is not None:
            self._copied.synchronize()
        parts, batch, num_rows = self._parts, len(step.kv_lens), step.num_rows
        first = form.num_rows - num_rows if form.is_prompt else 0
        for name, array, padding in (
            ("token_ids", step.token_ids, 0),
            ("positions", step.positions, 0),
            ("slots", step.slots, -1),
        ):
            part = parts[name].view(array.dtype)[: form.num_rows]
            part.fill(padding)
            part[first : first + num_rows] = array
        choices = parts["choices"].view(np.float64).reshape(-1, len(Choice._fields))
        choices[len(step.choices) : form.num_rows] = LIKELIEST
        choices[: len(step.choices)] = step.choices
        kv_lens, page_starts = parts["kv_lens"][: form.batch], parts["page_starts"][: form.batch + 1]
        kv_lens.fill(0)
        page_starts.fill(0)
        if form.is_prompt:
            ends = step.kv_lens[0] - form.num_rows + form.rows * np.arange(1, form.batch + 1)
            np.maximum(ends, 0, out=kv_lens, casting="same_kind")
        else:
            kv_lens[:batch] = step.kv_lens
            page_starts[: batch + 1] = step.page_starts
        parts["pages"][: len(step.pages)] = step.pages
        end = self._places["pages"].start + len(step.pages)
        self._device[:end].copy_(self._host[:end], non_blocking=True)
        if self._copied is not None:
            self._copied.record(torch.cuda.current_stream(self._device.device))

    def _of(self, name: str, size: int) -> Tensor:
        return self._device[self._places[name]][:size]

    def choices(self, form: StepForm) -> Tensor:
        """float64 [T, 5], as Step has them."""
        numbers = self._of("choices", 2 * len(Choice._fields) * form.num_rows)
        return numbers.view(torch.float64).view(form.num_rows, -1)

    def step(self, form: StepForm) -> DeviceStep:
        """A step of this form, whose values are those that were filled in last."""
        device, num_rows = self._device.device, form.num_rows
        is_absorbed = form.path is Path.ABSORBED
        kv_lens = self._of("kv_lens", form.batch)
        launches: tuple[DecodeLaunch, ...] = ()
        if form.num_keys is None:
            kind = form.path, form.rows
            workspace = decode_workspace(
                form.path, form.batch, form.rows, self._mla, device, beside=self._workspaces.get(kind)
            )
            self._workspaces.setdefault(kind, workspace)
            page_starts = self._of("page_starts", form.batch + 1)
            launches = (DecodeLaunch(0, num_rows, page_starts, kv_lens, workspace),)
        return DeviceStep(
            None,
            num_rows,
            self._of("token_ids", num_rows),
            self._of("positions", num_rows),
            self._of("slots", 2 * num_rows).view(torch.int64),
            self._of("pages", self._most_pages),
            slice(0, num_rows if is_absorbed else 0),
            launches if is_absorbed else (),
            () if is_absorbed else launches,
            torch.tensor([num_rows - 1], device=device) if form.is_prompt else None,
            form.most_tokens,
            PromptKeys(kv_lens, form.num_keys) if form.num_keys is not None else None,
        )
