"""Messages to a prompt, by the checkpoint's own chat template.

A template comes with the model file and is not to be trusted: one of the known texts is rendered by our own code,
any other in jinja2's immutable sandbox, in a process of its own with bounds on time, memory and output. What users
write stays text: a control token inside a message never becomes that token. Never loads a model, never samples.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kvfold.errors import SettingError, TemplateError, UnsupportedModel
from kvfold.text.known_templates import Conversation, known_template
from kvfold.text.tokenizer import Tokenizer

SECONDS = 2.0  # for one rendering
START_SECONDS = 0.3  # for the process to be up (0.1 s measured) and gone again
MEMORY_BYTES = 512 << 20  # address space of the rendering process
MAX_CHARACTERS = 4 << 20  # of the prompt: what a context of a million tokens holds
OPTIONS = ("thinking", "enable_thinking", "clear_thinking")  # what a request may tell a template

# Templates write markers around roles ('<|im_' + role + '|>'), so a role must not bring its own
_ROLE = re.compile(r"[a-z_]{1,32}")
_WORKER = Path(__file__).with_name("template_worker.py")
_GUARDS = range(0xFDD0, 0xFDF0)  # code points that are no characters: nobody writes them


class ChatTemplate:
    """One checkpoint's template. UnsupportedModel where the checkpoint has none."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        if tokenizer.chat_template is None:
            raise UnsupportedModel(
                "this checkpoint has no chat template: it completes text (kvfold run), it was not made to converse"
            )
        self._source = tokenizer.chat_template
        self._tokenizer = tokenizer
        self._render_known = known_template(self._source)

    @property
    def is_known(self) -> bool:
        """Whether plain conversations are rendered without a template engine."""
        return self._render_known is not None

    def encode(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        options: Mapping[str, bool] | None = None,
    ) -> list[int]:
        """The prompt's token ids. Control tokens are those the template wrote; those in messages and tools are text.
        A BOS is added where the model wants one and the template wrote none. Raises as `render`, and as
        Tokenizer.encode."""
        guard, rendered = self._render(messages, add_generation_prompt, tools, options or {})
        ids: list[int] = []
        for part, is_control in self._tokenizer.split_special(rendered):
            if is_control:
                ids.append(self._tokenizer.special_ids[part])
            else:
                ids += self._tokenizer.encode(part.replace(guard, ""), add_bos=False)
        bos_id = self._tokenizer.bos_id
        if self._tokenizer.add_bos and bos_id is not None and ids[:1] != [bos_id]:
            ids.insert(0, bos_id)
        return ids

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        options: Mapping[str, bool] | None = None,
    ) -> str:
        """The prompt as text, to be read. Only `encode` keeps control tokens and their look-alikes apart.

        messages: {role, content, ...} as in the OpenAI API. options: those of OPTIONS.
        SettingError: a message without role, values that are no JSON, an option not in OPTIONS.
        TemplateError: the template raised, took more than SECONDS, MEMORY_BYTES or MAX_CHARACTERS.
        """
        guard, rendered = self._render(messages, add_generation_prompt, tools, options or {})
        return rendered.replace(guard, "")

    # ---- inside

    def _render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] | None,
        options: Mapping[str, bool],
    ) -> tuple[str, str]:
        """(guard, prompt). The guard stands inside every control token that came with the messages or tools, so that
        only the template's own are whole."""
        _check(messages, options)
        try:
            said = json.dumps([messages, tools], default=dict)
        except (TypeError, ValueError, RecursionError) as error:
            raise SettingError(f"the messages or tools cannot be written as JSON: {error}") from error
        guard = next(
            (chr(code) for code in _GUARDS if f"\\u{code:04x}" not in said and chr(code) not in self._source), ""
        )
        if not guard:
            raise SettingError("the messages use all 32 noncharacters from U+FDD0 on; remove one of them")
        messages, tools = self._guarded(json.loads(said), guard)

        plain = None if tools else _plain(messages)
        bos, eos = self._token_text(self._tokenizer.bos_id), self._token_text(self._tokenizer.eos_id)
        if self._render_known is not None and plain is not None:
            thinking = bool(options.get("thinking", False))
            return guard, self._render_known(Conversation(plain, bos, eos, add_generation_prompt, thinking))
        variables = {
            "messages": messages,
            "tools": tools,
            "add_generation_prompt": add_generation_prompt,
            "bos_token": bos,
            "eos_token": eos,
            **options,
        }
        return guard, render_in_sandbox(self._source, variables)

    def _token_text(self, id: int | None) -> str:
        return "" if id is None else self._tokenizer.token_text(id) or ""

    def _guarded(self, value: Any, guard: str) -> Any:
        if isinstance(value, str):
            return self._guarded_text(value, guard)
        if isinstance(value, list):
            return [self._guarded(item, guard) for item in value]
        if isinstance(value, dict):
            return {self._guarded(key, guard): self._guarded(item, guard) for key, item in value.items()}
        return value

    def _guarded_text(self, text: str, guard: str) -> str:
        while True:  # again, as one control token may have hidden another that begins inside it
            parts = list(self._tokenizer.split_special(text))
            if not any(is_control and len(part) > 1 for part, is_control in parts):
                return text
            text = "".join(part[:1] + guard + part[1:] if is_control else part for part, is_control in parts)


def _check(messages: Sequence[Mapping[str, Any]], options: Mapping[str, bool]) -> None:
    for index, message in enumerate(messages):
        role = message.get("role") if isinstance(message, Mapping) else None
        if not isinstance(role, str) or not _ROLE.fullmatch(role):
            raise SettingError(
                f"message {index} is {message!r:.60}; expected a mapping with 'role' (small letters) and 'content'"
            )
    for name in options:
        if name not in OPTIONS:
            raise SettingError(f"unknown template option {name!r:.40}; allowed: {', '.join(OPTIONS)}")


def _plain(messages: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]] | None:
    """The messages as (role, text), or None where they say more than that."""

    def pairs() -> Iterator[tuple[str, str]]:
        for message in messages:
            role, content = message["role"], message.get("content")
            if (
                set(message) == {"role", "content"}
                and role in ("system", "user", "assistant")
                and type(content) is str
            ):
                yield role, content

    plain = list(pairs())
    return plain if len(plain) == len(messages) else None


def render_in_sandbox(source: str, variables: Mapping[str, Any]) -> str:
    """`source` rendered with `variables` (JSON values) in a process of its own. Raises TemplateError."""
    request = {
        "path": sys.path,
        "source": source,
        "variables": variables,
        "seconds": SECONDS,
        "bytes": MEMORY_BYTES,
        "characters": MAX_CHARACTERS,
    }
    try:
        # -I -S: nothing of the environment or the working directory is imported; no variable reaches the template
        worker = subprocess.run(
            [sys.executable, "-I", "-S", str(_WORKER)],
            input=json.dumps(request).encode(),
            capture_output=True,
            timeout=SECONDS + START_SECONDS,
            env={},
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise TemplateError(f"the chat template ran for more than {SECONDS:g} s and was ended") from None
    if worker.returncode == -signal.SIGALRM:
        raise TemplateError(f"the chat template ran for more than {SECONDS:g} s and was ended")
    try:
        reply = json.loads(worker.stdout)
    except ValueError:
        last = worker.stderr.decode(errors="replace").strip().splitlines()[-1:] or [
            f"exit status {worker.returncode}"
        ]
        raise TemplateError(f"the chat template ended its process: {last[0][:300]}") from None
    if "error" in reply:
        raise TemplateError(f"the chat template failed: {reply['error']}")
    return str(reply["text"])
