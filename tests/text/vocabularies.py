"""Small byte-level vocabularies for the tests, each trained with the pre-tokenizer of a published tokenizer.json
(pre_tokenizers.json holds those as the files spell them), and seeded strings that look for trouble.

`Vocabulary.json` is the tokenizer.json text, `Vocabulary.metadata` the same vocabulary as a GGUF's keys.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import models, pre_tokenizers, trainers

HERE = Path(__file__).parent
SCHEMES = tuple(json.loads((HERE / "pre_tokenizers.json").read_text()))

BOS, EOS, USER, ASSISTANT = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"
CONTROL = (BOS, EOS, USER, ASSISTANT, "<|im_end|>", "<|EOT|>")
USER_DEFINED = ("<think>", "</think>")
UNUSED = ("[PAD0]", "[PAD1]")

PARAGRAPHS = (
    "The fox said that the grapes were sour, and it's no wonder: they'll hang there until 1234567 o'clock.\n\n",
    "Der Fuchs sagte, die Trauben seien sauer; größer wär's nicht möglich. Ça va être l'été, señor.\n",
    "Лиса сказала, что виноград зелен. Η αλεπού είπε ότι τα σταφύλια είναι ξινά. ᾧ ΐ Ὅμηρος\n",
    "狐狸说葡萄是酸的，它已经走了。キツネはブドウがすっぱいと言った。여우는 포도가 시다고 말했다.\n",
    "قال الثعلب إن العنب حامض. लोमड़ी ने कहा कि अंगूर खट्टे हैं। องุ่นเปรี้ยว\n",
    "👩‍👩‍👧‍👦 🏴󠁧󠁢󠁥󠁮󠁧󠁿 🇩🇪 ❤️ 👍🏽 🦊🍇 e\u0301 n\u0303 ½ Ⅷ ٣٤٥ ２０２６ ①\n",
    "def f(x: int) -> str:\n\treturn f'{x!r:>8}' if x >= 0x1F else None  # a comment\n\n\n",
    "<div class=\"a-b\">&nbsp;</div>  {'key': [1, 2.5e-3, null]};\r\n\r\n   \t \u00a0\u3000 x\u200by\n",
)


@dataclass(frozen=True)
class Vocabulary:
    scheme: str
    json: str
    metadata: dict[str, Any]

    def oracle(self) -> tokenizers.Tokenizer:
        """What `tokenizers` makes of the tokenizer.json, special tokens in text staying text."""
        backend = tokenizers.Tokenizer.from_str(self.json)
        backend.encode_special_tokens = True
        return backend


@cache
def vocabulary(scheme: str, size: int = 1200) -> Vocabulary:
    """`size` tokens: 256 bytes and merges, then control, user-defined and two unused ones, as in the real files."""
    backend = tokenizers.Tokenizer(models.BPE())
    spec = json.loads(backend.to_str())
    spec["pre_tokenizer"] = json.loads((HERE / "pre_tokenizers.json").read_text())[scheme]
    spec["decoder"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    backend = tokenizers.Tokenizer.from_str(json.dumps(spec))
    backend.train_from_iterator(
        [*PARAGRAPHS * 3, *strange_strings(2000, seed=0, words=())],
        trainers.BpeTrainer(
            vocab_size=size - len(CONTROL) - len(USER_DEFINED) - len(UNUSED),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    backend.add_special_tokens([tokenizers.AddedToken(text, special=True, normalized=False) for text in CONTROL])
    backend.add_tokens([tokenizers.AddedToken(text, special=False, normalized=False) for text in USER_DEFINED])
    count = backend.get_vocab_size()
    tokens = [backend.id_to_token(id) for id in range(count)] + list(UNUSED)
    merges = json.loads(backend.to_str())["model"]["merges"]
    types = [3 if text in CONTROL else 4 if text in USER_DEFINED else 5 if text in UNUSED else 1 for text in tokens]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": scheme,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [" ".join(merge) for merge in merges],
        "tokenizer.ggml.bos_token_id": tokens.index(BOS),
        "tokenizer.ggml.eos_token_id": tokens.index(EOS),
        "tokenizer.ggml.add_bos_token": True,
    }
    return Vocabulary(scheme, backend.to_str(), metadata)


_ALPHABETS = (
    "etaoin shrdlu ETAOIN'sStT",
    " \t\n\r\u00a0\u2003\u3000\u0085\u200b",
    "0123456789٣४２½Ⅷ①",
    "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~",
    "，。！？；：「」‘’“”…—·～",
    "狐狸葡萄酸的他她一龥㐀豈々〇",
    "かなカナー여우포도ᄀᆨ",
    "äöüßÇéñÅøłžşĲŉſKΩ",
    "αβγΐΰώᾧὍлисаЖЩѢԱաႠაⴀᏣꭰ",
    "قالعنبחתוलोमड़ीคำ",
    "🦊🍇👍🏽❤️🏴󠁧󠁢󠁿🇩🇪\u200d\ufe0f",
    "\u0301\u0303\u05b0\u094d\u0e31\u20e3",
    "𐐀𐓓𞤀𝔸𠀀\ue000\U0010fffd\ufdd0\uffff\x00\x7f\ufeff",
    "def for(x): return {}[];//#==!=->",
)


def strange_strings(count: int, seed: int, words: tuple[str, ...] = CONTROL + USER_DEFINED + UNUSED) -> list[str]:
    """Seeded strings of 0 to 120 characters: runs from one alphabet after another, words of the paragraphs, and the
    texts of special tokens, whole and cut."""
    rng = random.Random(seed)
    known = " ".join(PARAGRAPHS).split(" ")

    def piece() -> str:
        roll = rng.random()
        if roll < 0.15:
            return rng.choice(known) + rng.choice(("", " "))
        if roll < 0.20 and words:
            word = rng.choice(words)
            return word if rng.random() < 0.6 else word[: rng.randint(1, len(word))]
        alphabet = rng.choice(_ALPHABETS)
        return "".join(rng.choice(alphabet) for _ in range(rng.randint(1, 8)))

    return ["".join(piece() for _ in range(rng.randint(0, 15))) for _ in range(count)]
