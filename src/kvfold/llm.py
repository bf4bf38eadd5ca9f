"""LLM: what a user holds. Joins text, engine and backend; everything below it speaks token ids.

llm = LLM()                                   # the embedded model; or a .gguf, a directory, "org/repo"
llm.generate(["Once"], SamplingParams(max_tokens=64, seed=1))[0].text
for piece in llm.stream("Once"): print(piece, end="")
llm.chat([{"role": "user", "content": "Tell me a fable."}]).text
llm.logits(token_ids)                         # float32 [T, vocab]
"""

from __future__ import annotations

import operator
import os
import resource
import sys
import weakref
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from kvfold.cache.session import Session
from kvfold.engine.request import Request
from kvfold.engine.runner import Runner
from kvfold.engine.sampler import Sampler, SamplingParams
from kvfold.errors import OutOfPages, SettingError
from kvfold.load import Loaded, Progress, Settings, load, opened
from kvfold.text.chat_template import ChatTemplate
from kvfold.text.reasoning import Split, ThoughtSplitter, opens_thought
from kvfold.text.streaming import DetokenizeStream
from kvfold.text.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant")

Prompt = str | Sequence[int]
Message = Mapping[str, str]
"""{"role": one of ROLES, "content": text}."""


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
    finish_reason: str  # "stop", "length" or "cancelled"; "running" before the end, "error" after one
    stats: Stats
    reasoning: str = ""  # of a chat: what the model thought before it answered


class LLM:
    """A loaded model.

    model:      None (embedded), a .gguf file, a Hugging Face directory, or a hub name such as "org/repo"
    mla, fa:    "auto", or the peers' numbers: mla 0 to 3, fa 0 or 1
    dtype:      "float32"; "int8", activations rounded for quantized weights; "bfloat16" (plain, cuda);
                "auto" is int8 on native and cuda, float32 on plain
    cache_type: "f16", "q8_0", "bf16", "f32" or "fp8" (latents only, not on backend native); "auto" is bf16 on a GPU, f16
                elsewhere
    backend:    "auto", "cuda", "native" or "plain"
    device:     "cpu", "cuda" or "cuda:N"; "cuda" is the first GPU of compute capability 8.0 or newer that has room for the
                model and its context, else the one with most room; "auto" is that GPU, else the CPU
    n_ctx:      tokens the cache holds, all concurrent requests together; None: the model's context, or what fits
    batch_rows: prompt rows in one step; None: the whole prompt, or as many as memory allows
    workspace_bytes: scratch memory of a step; None: from the free memory, 64 to 256 MiB, or what the threads need
    mmap:       "auto" copies weights that fit into memory, on 2 MiB pages, and leaves others in the map of their file;
                from 1 GiB on it answers from the map meanwhile; "on" leaves all there; "off" copies first, or raises
    progress:   called with (bytes read, bytes in all) while weights are read
    isa:        "auto", "generic", "avx2", "avx512" or "amx": the instruction set of all native models of this process
    deterministic:  the logits of a row are bit-equal whatever is computed beside it, on one instruction set
    check_numerics: NaN and infinity raise NumericsError that names layer and op
    profile:    every op is timed; bench.profile makes a table of it

    Raises ModelFileError, UnsupportedModel, SettingError, MissingExtra.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        *,
        mla: str | int = "auto",
        fa: str | int = "auto",
        dtype: str = "auto",
        cache_type: str = "auto",
        backend: str = "auto",
        device: str = "auto",
        threads: int | None = None,
        n_ctx: int | None = None,
        batch_rows: int | None = None,
        workspace_bytes: int | None = None,
        mmap: str = "auto",
        isa: str = "auto",
        deterministic: bool = False,
        check_numerics: bool = False,
        profile: bool = False,
        progress: Progress | None = None,
    ) -> None:
        if batch_rows is not None and batch_rows < 1:
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
            mmap=mmap,
            isa=isa,
            deterministic=deterministic,
            check_numerics=check_numerics,
            profile=profile,
        )
        checkpoint = opened(model)
        with ThreadPoolExecutor(1) as beside:  # 0.4 s for DeepSeek-V2's vocabulary: weights are copied meanwhile
            tokenizer = beside.submit(Tokenizer.from_vocabulary, checkpoint.vocabulary)
            self.loaded: Loaded = load(checkpoint, settings, progress=progress, answers_early=True)
        self.tokenizer = tokenizer.result()
        self.batch_rows: int = batch_rows or self.loaded.window_rows
        self._runner = Runner(
            self.loaded.backend,
            self.loaded.pool,
            self.loaded.plan,
            num_segments=self.loaded.model.num_segments,
            max_prompt_rows=self.batch_rows,
        )

    @property
    def vocab_size(self) -> int:
        return self.loaded.model.config.vocab_size

    def generate(self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | None = None) -> list[Output]:
        """Completes every prompt (text, or token ids), together in one batch. Outputs are in the order given.

        Raises OutOfPages where a prompt and its max_tokens can never fit the cache.
        """
        params = params or SamplingParams()
        every_prompt = [self._prompt_ids(prompt) for prompt in _as_list(prompts)]
        with ExitStack() as streams:
            opened = [streams.enter_context(Stream(self, ids, params)) for ids in every_prompt]
            for stream in opened:
                for _ in stream:
                    pass
        return [stream.output for stream in opened]

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        session: Session | None = None,
        progress: Progress | None = None,
    ) -> Stream:
        """Completes one prompt: iterate for pieces of text; `.output` holds the whole after the last piece.

        progress: called with (prompt tokens computed, in all) between slices of the prompt's layers, every 0.1 s or
        after a layer.

        A session keeps its cache between calls: a prompt that begins like the last one is computed from where it
        differs.
        """
        return Stream(self, self._prompt_ids(prompt), params or SamplingParams(), session, progress)

    def chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        session: Session | None = None,
        thinking: bool | None = None,
    ) -> Output:
        """The assistant's answer to a conversation that ends with the user: `.text`, and `.reasoning` apart from it.

        messages: [{"role": "system" | "user" | "assistant", "content": text}, ...]; control tokens in them are text
        session:  keeps the cache between turns; one conversation at a time
        thinking: asks the template for a thought first, or for none; None leaves it to the template, and templates
                  without the choice ignore it

        Raises SettingError (a message that is none), UnsupportedModel (no chat template), TemplateError, OutOfPages.
        """
        with closing(self.chat_stream(messages, params, session=session, thinking=thinking)) as stream:
            for _ in stream:
                pass
            return stream.output

    def chat_stream(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        session: Session | None = None,
        thinking: bool | None = None,
        progress: Progress | None = None,
    ) -> ChatStream:
        """As `chat`, while it is generated: iterate for (thought, answer), of which one is usually empty. `progress` as
        in `stream`."""
        prompt = self.chat_prompt(messages, thinking=thinking)
        inside = opens_thought(self.tokenizer.decode(prompt, skip_special=False))
        if session is not None:
            prompt = self._as_cached(prompt, session.token_ids)
        stream = self.stream(prompt, params, session=session, progress=progress)
        return ChatStream(stream, inside=inside, lead=self._answer_lead)

    def chat_prompt(self, messages: Sequence[Message], *, thinking: bool | None = None) -> list[int]:
        """The token ids that ask the model for its answer to a conversation. Arguments and errors as in `chat`."""
        _check_messages(messages)
        options = {} if thinking is None else {"thinking": thinking, "enable_thinking": thinking}
        return self.chat_template.encode(messages, options=options)

    @cached_property
    def chat_template(self) -> ChatTemplate:
        """How this checkpoint writes a conversation. UnsupportedModel where it has no template."""
        return ChatTemplate(self.tokenizer)

    @cached_property
    def _answer_lead(self) -> str:
        """The blank that the template writes before an answer and the model generates: " " after DeepSeek-V2's
        "Assistant:", mostly nothing. Left in the answer it would be there twice in the next prompt."""
        user = {"role": "user", "content": "?"}
        asked = self.chat_template.render([user])
        answered = self.chat_template.render([user, {"role": "assistant", "content": "!"}, user])
        lead = answered.removeprefix(asked).partition("!")[0]
        return lead if answered.startswith(asked) and lead.isspace() else ""

    def session(self) -> Session:
        """A cache that outlives its requests. Release it when the conversation ends."""
        return Session(self.loaded.pool)

    def logits(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """Logits after every token: float32 [T, vocab]. No token is added to those given."""
        ids = self._checked(token_ids)
        if len(ids) > self.loaded.n_ctx:
            raise OutOfPages(f"{len(ids)} tokens do not fit n_ctx={self.loaded.n_ctx}: raise n_ctx or give fewer.")
        return np.concatenate(list(self._runner.logits(ids)))

    def _checked(self, token_ids: Sequence[int]) -> list[int]:
        try:
            ids = [operator.index(i) for i in token_ids]
        except TypeError:
            raise SettingError("A prompt is text or a list of token ids, which are integers.") from None
        wrong = next((i for i in ids if not 0 <= i < self.vocab_size), None)
        if wrong is not None:
            raise SettingError(f"Token id {wrong}: the vocabulary has ids 0 to {self.vocab_size - 1}.")
        if not ids:
            raise SettingError("The prompt has no tokens: give at least one.")
        return ids

    def _as_cached(self, prompt: list[int], cached: Sequence[int]) -> list[int]:
        """`prompt`, its beginning in the cached tokens as far as they say the same, byte by byte.

        A sampled answer is often not in the tokens that encoding its text gives. Its own are what the model said, and
        they are in the cache. Control tokens match themselves only, so text that looks like one stays text.
        """
        control = set(self.tokenizer.special_ids.values())
        kept = taken = 0  # tokens of each that are known to say the same
        i = j = 0
        said, wanted = b"", b""  # bytes after those
        while said.startswith(wanted) or wanted.startswith(said):
            if said == wanted:
                kept, taken, said, wanted = i, j, b"", b""
                if i < len(cached) and j < len(prompt) and cached[i] == prompt[j]:
                    i, j = i + 1, j + 1
                    continue
            if len(said) <= len(wanted):
                if i == len(cached) or cached[i] in control:
                    break
                said, i = said + self.tokenizer.token_bytes(cached[i]), i + 1
            else:
                if j == len(prompt) or prompt[j] in control:
                    break
                wanted, j = wanted + self.tokenizer.token_bytes(prompt[j]), j + 1
        return [*cached[:kept], *prompt[taken:]]

    def _prompt_ids(self, prompt: Prompt) -> list[int]:
        ids = self._checked(self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt)
        if len(ids) >= self.loaded.n_ctx:
            raise OutOfPages(
                f"The prompt has {len(ids)} tokens and n_ctx={self.loaded.n_ctx} leaves no room for an answer: "
                f"shorten the prompt or raise n_ctx."
            )
        return ids


class _Reader:
    """The text of one request. The engine hands it every token as it is sampled, whoever reads the stream."""

    def __init__(self, text: DetokenizeStream) -> None:
        self._text = text
        self.pieces: list[str] = []

    def __call__(self, token: int) -> bool:
        self.pieces.append(self._text.push(token))
        return self._text.stopped_by is not None

    def finish(self) -> None:
        self.pieces.append(self._text.finish())


class Stream(Iterator[str]):
    """One request as it runs. Pieces are whole code points; a stop string never shows.

    Closing it, leaving its `with` block or dropping it ends the request. An error of the request is raised by the
    stream that reads it.
    """

    def __init__(
        self,
        llm: LLM,
        prompt_ids: list[int],
        params: SamplingParams,
        session: Session | None = None,
        progress: Progress | None = None,
    ) -> None:
        self._progress = progress
        self._runner = llm._runner
        self._reader = _Reader(llm.tokenizer.stream(stop=params.stop))
        self._num_read = 0
        self._is_finished = False
        sampler = Sampler(params, llm.vocab_size, llm.tokenizer.eos_ids)
        self._request: Request = self._runner.submit(
            prompt_ids,
            sampler.sample,
            min(params.max_tokens, llm.loaded.n_ctx - len(prompt_ids)),
            frozenset() if params.ignore_eos else frozenset(llm.tokenizer.eos_ids),
            accept=self._reader,
            session=session,
            choices=None if sampler.needs_logits else sampler,
        )
        weakref.finalize(self, self._runner.drop, self._request)

    def __next__(self) -> str:
        reader, request = self._reader, self._request
        while True:
            while self._num_read < len(reader.pieces):
                piece = reader.pieces[self._num_read]
                self._num_read += 1
                if piece:
                    return piece
            if request.finish_reason is None:
                self._runner.advance(request, len(request.token_ids), self._report)
            elif request.error is not None:
                raise request.error
            elif not self._is_finished:
                self._is_finished = True
                reader.finish()
            else:
                raise StopIteration

    def _report(self) -> None:
        if self._progress is not None and len(self._request.token_ids) <= 1:
            done = int(self._runner.prompt_rows_done(self._request))
            self._progress(done, len(self._request.prompt_ids))

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Cancel what is left; the text so far stays."""
        self._runner.cancel(self._request)

    @property
    def output(self) -> Output:
        """What was generated so far; final after the last piece."""
        request = self._request
        reason = "running" if request.finish_reason is None else request.finish_reason.value
        return Output("".join(self._reader.pieces), tuple(request.token_ids), reason, self.stats)

    @property
    def stats(self) -> Stats:
        request = self._request
        return Stats(
            prompt_tokens=len(request.prompt_ids),
            reused_tokens=request.num_reused,
            generated_tokens=len(request.token_ids),
            prompt_seconds=max(0.0, request.first_token_at - request.prompt_started_at),
            generation_seconds=request.last_token_at - request.first_token_at,
            peak_memory_bytes=peak_memory_bytes(),
        )


class ChatStream(Iterator[Split]):
    """One answer as it is generated, in (thought, answer) pieces. Closing it early cancels; what was generated until
    then may still be read."""

    def __init__(self, stream: Stream, *, inside: bool, lead: str) -> None:
        """inside: the prompt has opened a thought. lead: a blank before the answer that is not part of it."""
        self._stream = stream
        self._splitter = ThoughtSplitter(inside=inside)
        self._pieces: list[Split] = []
        self._lead = lead
        self._flushed = False

    def __next__(self) -> Split:
        for text in self._stream:
            if any(piece := self._add(self._splitter.push(text))):
                return piece
        if not self._flushed:
            self._flushed = True
            if any(piece := self._add(self._splitter.finish())):
                return piece
        raise StopIteration

    def _add(self, piece: Split) -> Split:
        if piece.answer and self._lead:
            piece = piece._replace(answer=piece.answer.removeprefix(self._lead))
            self._lead = ""
        self._pieces.append(piece)
        return piece

    def close(self) -> None:
        """Cancel what is left; the text so far stays."""
        self._stream.close()

    @property
    def output(self) -> Output:
        """What was read so far; final after the last piece."""
        thought = "".join(piece.thought for piece in self._pieces)
        answer = "".join(piece.answer for piece in self._pieces)
        return replace(self._stream.output, text=answer, reasoning=thought)

    @property
    def stats(self) -> Stats:
        return self._stream.stats


def peak_memory_bytes() -> int:
    """Peak resident memory of this process, mapped weights included."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt (text, or a list of integers) or several. SettingError for a list that mixes the two."""
    if isinstance(prompts, str):
        return [prompts]
    items = list(prompts)
    are_ids = [isinstance(item, int | np.integer) for item in items]
    if any(are_ids):
        if not all(are_ids):
            index = are_ids.index(not are_ids[0])
            raise SettingError(f"Prompt {index} is another kind than prompt 0: give texts, or lists of token ids.")
        return [[operator.index(item) for item in items if not isinstance(item, str | Sequence)]]
    return [item for item in items if not isinstance(item, int)]


def _check_messages(messages: Sequence[Message]) -> None:
    if isinstance(messages, str | Mapping) or not messages:
        raise SettingError('messages: expected a list of at least one {"role": ..., "content": ...}')
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
            got = f"keys {', '.join(map(repr, message))}" if isinstance(message, Mapping) else repr(message)
            raise SettingError(f"message {index} has {got:.60}; expected exactly 'role' and 'content'")
        if message["role"] not in ROLES:
            raise SettingError(f"message {index} has role {message['role']!r:.40}; allowed: {', '.join(ROLES)}")
        if not isinstance(message["content"], str):
            raise SettingError(f"message {index} has content {message['content']!r:.40}; expected text")
    if messages[-1]["role"] != "user":
        raise SettingError(f"the last message is the {messages[-1]['role']}'s; expected one of the user to answer")
