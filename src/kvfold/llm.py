"""LLM: what a user holds. Joins text, engine and backend; everything below it speaks token ids.

llm = LLM()                                   # the embedded model; or a .gguf, a directory, "org/repo"
llm.generate(["Once"], SamplingParams(max_tokens=64, seed=1))[0].text
for piece in llm.stream("Once"): print(piece, end="")
llm.logits(token_ids)                         # float32 [T, vocab]
"""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvfold.cache.session import Session
from kvfold.engine.request import FinishReason, Request
from kvfold.engine.runner import Runner
from kvfold.engine.sampler import Sampler, SamplingParams
from kvfold.errors import SettingError
from kvfold.load import DEFAULT_WORKSPACE_BYTES, Loaded, Progress, Settings, load
from kvfold.text.tokenizer import Tokenizer

DEFAULT_BATCH_ROWS = 2048

Prompt = str | Sequence[int]


@dataclass(frozen=True)
class Stats:
    """Counts and seconds of one request. Prompt time runs from its first step to its first token."""

    prompt_tokens: int
    reused_tokens: int  # of the prompt, found in the session's cache
    generated_tokens: int
    prompt_seconds: float
    generation_seconds: float
    peak_memory_bytes: int

    @property
    def prompt_rate(self) -> float:
        """Computed prompt tokens per second."""
        computed = self.prompt_tokens - self.reused_tokens
        return computed / self.prompt_seconds if self.prompt_seconds else 0.0

    @property
    def generation_rate(self) -> float:
        """Tokens per second after the first."""
        return (self.generated_tokens - 1) / self.generation_seconds if self.generation_seconds else 0.0


@dataclass(frozen=True)
class Output:
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str  # "stop", "length" or "cancelled"
    stats: Stats


class LLM:
    """A loaded model.

    model:      None (embedded), a .gguf file, a Hugging Face directory, or a hub name such as "org/repo"
    mla, fa:    "auto", or the peers' numbers: mla 0 to 3, fa 0 or 1
    dtype:      "auto", "float32" or "bfloat16" (plain only)
    cache_type: "f16", "f32" or "bf16"
    backend:    "auto", "native" or "plain"
    n_ctx:      tokens the cache holds, all concurrent requests together; None: the model's context, or what fits
    batch_rows: prompt rows in one step
    progress:   called with (bytes read, bytes in all) while weights are read

    Raises ModelFileError, UnsupportedModel, SettingError, MissingExtra.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        *,
        mla: str | int = "auto",
        fa: str | int = "auto",
        dtype: str = "auto",
        cache_type: str = "f16",
        backend: str = "auto",
        device: str = "auto",
        threads: int | None = None,
        n_ctx: int | None = None,
        batch_rows: int = DEFAULT_BATCH_ROWS,
        workspace_bytes: int = DEFAULT_WORKSPACE_BYTES,
        progress: Progress | None = None,
    ) -> None:
        if batch_rows < 1:
            raise SettingError(f"batch_rows={batch_rows}: at least 1.")
        settings = Settings.parse(
            mla=mla,
            fa=fa,
            dtype=dtype,
            cache_type=cache_type,
            backend=backend,
            device=device,
            threads=threads,
            n_ctx=n_ctx,
            workspace_bytes=workspace_bytes,
        )
        self.loaded: Loaded = load(model, settings, progress=progress)
        self.tokenizer = Tokenizer.from_vocabulary(self.loaded.checkpoint.vocabulary)
        self._runner = Runner(self.loaded.backend, self.loaded.pool, self.loaded.plan, max_prompt_rows=batch_rows)

    @property
    def vocab_size(self) -> int:
        return self.loaded.model.config.vocab_size

    def generate(self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | None = None) -> list[Output]:
        """Completes every prompt (text, or token ids), together in one batch. Outputs are in the order given.

        Raises OutOfPages where a prompt and its max_tokens can never fit the cache.
        """
        params = params or SamplingParams()
        streams = [Stream(self, prompt, params) for prompt in _as_list(prompts)]
        for stream in streams:
            for _ in stream:
                pass
        return [stream.output for stream in streams]

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, *, session: Session | None = None
    ) -> Stream:
        """Completes one prompt: iterate for pieces of text; `.output` holds the whole after the last piece.

        A session keeps its cache between calls: a prompt that begins like the last one is computed from where it
        differs.
        """
        return Stream(self, prompt, params or SamplingParams(), session)

    def session(self) -> Session:
        """A cache that outlives its requests. Release it when the conversation ends."""
        return Session(self.loaded.pool)

    def logits(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """Logits after every token: float32 [T, vocab]. No token is added to those given."""
        ids = self._checked(token_ids)
        return np.concatenate(list(self._runner.logits(ids)))

    def _checked(self, token_ids: Sequence[int]) -> list[int]:
        ids = [int(i) for i in token_ids]
        wrong = next((i for i in ids if not 0 <= i < self.vocab_size), None)
        if wrong is not None:
            raise SettingError(f"Token id {wrong}: the vocabulary has ids 0 to {self.vocab_size - 1}.")
        if not ids:
            raise SettingError("The prompt has no tokens: give at least one.")
        return ids

    def _prompt_ids(self, prompt: Prompt) -> list[int]:
        return self._checked(self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt)


class Stream(Iterator[str]):
    """One request as it runs. Pieces are whole code points; a stop string never shows. Closing it early cancels."""

    def __init__(self, llm: LLM, prompt: Prompt, params: SamplingParams, session: Session | None = None) -> None:
        self._runner = llm._runner
        self._text = llm.tokenizer.stream(stop=params.stop)
        self._seen = 0
        self._pieces: list[str] = []
        self._flushed = False
        prompt_ids = llm._prompt_ids(prompt)
        sampler = Sampler(params, llm.vocab_size, llm.tokenizer.eos_ids)
        end_ids = frozenset() if params.ignore_eos else llm.tokenizer.eos_ids
        # The context bounds a completion; a prompt that leaves no room is refused by the scheduler's sentence.
        room = llm.loaded.n_ctx - len(prompt_ids)
        max_tokens = min(params.max_tokens, room) if room > 0 else params.max_tokens
        self._request: Request = self._runner.submit(prompt_ids, sampler.sample, max_tokens, end_ids, session)

    def __next__(self) -> str:
        while True:
            while self._seen < len(self._request.token_ids):
                token = self._request.token_ids[self._seen]
                self._seen += 1
                piece = "" if token in self._request.end_ids else self._text.push(token)
                self._pieces.append(piece)
                if self._text.stopped_by is not None:
                    self._runner.cancel(self._request, FinishReason.STOP)
                    self._seen = len(self._request.token_ids)
                if piece:
                    return piece
            if self._request.finish_reason is None:
                self._runner.step()
            elif not self._flushed:
                self._flushed = True
                rest = self._text.finish()
                self._pieces.append(rest)
                if rest:
                    return rest
            else:
                raise StopIteration

    def close(self) -> None:
        """Cancel what is left; the text so far stays."""
        self._runner.cancel(self._request)

    @property
    def output(self) -> Output:
        """What was generated so far; final after the last piece."""
        request = self._request
        reason = request.finish_reason or FinishReason.CANCELLED
        return Output("".join(self._pieces), tuple(request.token_ids), reason.value, self.stats)

    @property
    def stats(self) -> Stats:
        request = self._request
        return Stats(
            prompt_tokens=len(request.prompt_ids),
            reused_tokens=request.num_reused,
            generated_tokens=len(request.token_ids),
            prompt_seconds=request.first_token_at - request.prompt_started_at,
            generation_seconds=request.last_token_at - request.first_token_at,
            peak_memory_bytes=peak_memory_bytes(),
        )


def peak_memory_bytes() -> int:
    """Peak resident memory of this process, mapped weights included."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    items = list(prompts)
    if items and isinstance(items[0], int | np.integer):
        return [[int(i) for i in items if not isinstance(i, str | Sequence)]]
    return [item for item in items if not isinstance(item, int)]
