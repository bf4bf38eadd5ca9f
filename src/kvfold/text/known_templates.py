"""The chat templates of released models, rendered without a template engine.

A template is known by the SHA-256 of its exact text, so nothing is guessed: any other text goes to the sandbox. What
is rendered here are conversations of system, user and assistant messages with plain text; tools and pictures go to
the sandbox as well. Each function writes what jinja2 makes of the published text, its oddities included; the digests
in tests/text/test_known_templates.py were taken from jinja2.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

USER, ASSISTANT, EOS = "<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"


@dataclass(frozen=True)
class Conversation:
    """messages: (role, text) with role system, user or assistant. thinking: the option some templates read."""

    messages: Sequence[tuple[str, str]]
    bos: str
    eos: str
    add_generation_prompt: bool
    thinking: bool = False

    def texts(self, role: str) -> list[str]:
        return [text for who, text in self.messages if who == role]


Render = Callable[[Conversation], str]


def known_template(source: str) -> Render | None:
    """The renderer of this exact template text, or None. A single line break at its end is jinja2's to drop."""
    return KNOWN.get(hashlib.sha256(source.removesuffix("\n").encode()).hexdigest())


def _plain_words(chat: Conversation) -> str:
    """DeepSeek-V2: roles as English words."""
    around = {"system": ("", "\n\n"), "user": ("User: ", "\n\n"), "assistant": ("Assistant: ", chat.eos)}
    return chat.bos + _in_order(chat, around) + ("Assistant:" if chat.add_generation_prompt else "")


def _storyteller(chat: Conversation) -> str:
    """kvfold's own model: DeepSeek-V3's markers, every message where it stands."""
    around = {"system": ("", ""), "user": (USER, ""), "assistant": (ASSISTANT, EOS)}
    return chat.bos + _in_order(chat, around) + (ASSISTANT if chat.add_generation_prompt else "")


def _in_order(chat: Conversation, around: Mapping[str, tuple[str, str]]) -> str:
    """Every message between what its role puts before and after it."""
    return "".join(around[role][0] + text + around[role][1] for role, text in chat.messages)


def _system_first(*, join: bool, drop_thought: bool, generation: str = ASSISTANT, before_bos: str = "") -> Render:
    """DeepSeek-V2.5 to R1: system text first, then turns.

    join: system messages are joined by an empty line; otherwise the last one counts. drop_thought: of an assistant
    message only what follows </think> stays. before_bos: what the template writes for each system message before
    anything else.
    """

    def render(chat: Conversation) -> str:
        system = chat.texts("system")
        parts = [before_bos * len(system), chat.bos, "\n\n".join(system) if join else "".join(system[-1:])]
        for role, text in chat.messages:
            if role == "user":
                parts.append(USER + text)
            elif role == "assistant":
                parts.append(ASSISTANT + (text.split("</think>")[-1] if drop_thought else text) + EOS)
        return "".join(parts) + (generation if chat.add_generation_prompt else "")

    return render


def _v3_0324(chat: Conversation) -> str:
    """The assistant's turn opens with the user's message; a generation prompt opens one only where none is open."""
    parts = [chat.bos, "\n\n".join(chat.texts("system"))]
    for role, text in chat.messages:
        if role != "system":
            parts.append(USER + text + ASSISTANT if role == "user" else text + EOS)
    last = next((role for role, _ in reversed(chat.messages) if role != "system"), None)
    return "".join(parts) + (ASSISTANT if chat.add_generation_prompt and last != "user" else "")


def _r1_0528(chat: Conversation) -> str:
    """The assistant's turn opens with every user message but one at the very end."""
    parts = [chat.bos, "\n\n".join(chat.texts("system"))]
    for index, (role, text) in enumerate(chat.messages):
        if role == "user":
            parts.append(USER + text + (ASSISTANT if index < len(chat.messages) - 1 else ""))
        elif role == "assistant":
            parts.append(text.split("</think>")[-1] + EOS)
    return "".join(parts) + (ASSISTANT if chat.add_generation_prompt else "")


def _v3_1(chat: Conversation) -> str:
    """Turns with </think> where nothing was thought; the generation prompt opens or skips a thought."""
    parts = [chat.bos, "\n\n".join(chat.texts("system"))]
    after_user = False
    for role, text in chat.messages:
        if role == "user":
            parts.append(USER + text)
            after_user = True
        elif role == "assistant":
            parts.append(ASSISTANT + "</think>" if after_user else "")
            parts.append((text.split("</think>", 1)[1] if "</think>" in text else text) + EOS)
            after_user = False
    if chat.add_generation_prompt and after_user:
        parts.append(ASSISTANT + ("<think>" if chat.thinking else "</think>"))
    return "".join(parts)


def _kimi(chat: Conversation) -> str:
    """Moonlight and Kimi-K2: a default system message, and turns that name their role twice."""
    messages = list(chat.messages)
    if messages and messages[0][0] != "system":
        messages.insert(0, ("system", "You are a helpful assistant"))
    body = "".join(f"<|im_{role}|>{role}<|im_middle|>{text}<|im_end|>" for role, text in messages)
    return body + ("<|im_assistant|>assistant<|im_middle|>" if chat.add_generation_prompt else "")


# SHA-256 of the template's text -> its renderer. Where each text was read is said beside it.
KNOWN: Mapping[str, Render] = {
    # DeepSeek-V2, V2-Lite, Coder-V2 (tokenizer_config.json and Ollama's deepseek-coder-v2 GGUF)
    "8aeba567270fa9a8d5372caf4b04affea947c4421d96adc01e3ff94021b0ae8e": _plain_words,
    # DeepSeek-V2.5 (Ollama's GGUF, Xinference's copy). Its spaces between blocks come out, eight a system message
    "cac8d3ea82bac9a92114e474c67bed1497208570426258f9c447a1b355322117": _system_first(
        join=False, drop_thought=False, before_bos=" " * 8
    ),
    # DeepSeek-V3 (Ollama's GGUF)
    "3b8267e54b67df6500f231ffa969955cc9d26b3444a291ced4eb96ca7d3ca1ea": _system_first(
        join=True, drop_thought=False
    ),
    # DeepSeek-V3 (the API's tokenizer archive, R1-1776's GGUF)
    "3a3036eeb96ca0e48565fc1f19b4d7d3fa17ada32bb1b3d5ed539ae74cf22923": _system_first(join=True, drop_thought=True),
    # DeepSeek-V3-0324 (Xinference's copy; the same in Prover-V2)
    "22e97ba043dacf9df1f071a9de9d2bb6b0757491f16e96e810834b86e1641286": _v3_0324,
    # DeepSeek-R1 as first released (Ollama's GGUF)
    "b6835114b7303ddd78919a82e4d9f7d8c26ed0d7dfc36beeb12d524f6144eab1": _system_first(
        join=False, drop_thought=True
    ),
    # DeepSeek-R1 since February 2025 (Ollama's GGUFs, Xinference's copy)
    "56a1447ad31926fdc21fb07e56e5642bd9c850c4f52d8c8af7bbe5f079a84f5f": _system_first(
        join=False, drop_thought=True, generation=ASSISTANT + "<think>\n"
    ),
    # DeepSeek-R1-0528 (Xinference's copy)
    "197ecb0f6315af9121078b3f966dfd9d9f1debcd4baf5ac229671b4818d33e26": _r1_0528,
    # DeepSeek-V3.1 (Ollama's GGUF)
    "45690185067ea25c073bff2d3e425a45ee2564d2bbf6cdf7d885e139d460b8e0": _v3_1,
    # Moonlight-16B-A3B-Instruct (Xinference's copy)
    "0af7f5845651f3ba85a82d70d8af968a1da0a60f4c7bb662a9c305cfc9cc224c": _kimi,
    # Kimi-K2-Instruct (llama.cpp's models/templates)
    "0d19c3a601c02d8f788799efcaceee9f0cda955e165b9c137ea9f7198fea4d37": _kimi,
    # kvfold's storyteller (training/tokenizer.py)
    "0730c89e7e4420a1ea6789c03819d02d41150ad1785db2ea09d8d5854ad0237e": _storyteller,
}
