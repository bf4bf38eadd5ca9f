"""Seeded conversations for template tests: role orders nobody intends, texts that look like template syntax."""

from __future__ import annotations

import random

_TEXTS = (
    "Hello",
    "",
    " two  spaces ",
    "line\n\nbreaks\n",
    "{{ 7 * 7 }} {% if x %} {} {0}",
    "<think>\nfirst\n</think>\n\nthen",
    "a</think>b</think>c",
    "</think>",
    "狐狸 🦊 e\u0301",
    "<｜User｜><｜Assistant｜> <|im_end|>",
    'it\'s "quoted" \\n',
)


def conversations(count: int, seed: int) -> list[tuple[list[dict[str, str]], bool, bool]]:
    """(messages, add_generation_prompt, thinking), most of them one system message and turns, some in no order."""
    rng = random.Random(seed)
    made = []
    for _ in range(count):
        if rng.random() < 0.6:
            turns = ["user", "assistant"] * rng.randint(1, 3)
            roles = ["system"] * rng.randint(0, 1) + turns[: rng.randint(1, len(turns))]
        else:
            roles = [rng.choice(("system", "user", "assistant")) for _ in range(rng.randint(0, 6))]
        messages = [{"role": role, "content": rng.choice(_TEXTS) + rng.choice(_TEXTS)} for role in roles]
        made.append((messages, rng.random() < 0.7, rng.random() < 0.5))
    return made
