r"""How the text of each DeepSeek-family vocabulary is cut into words before byte-pair merging.

A GGUF names the scheme in `tokenizer.ggml.pre`; the published tokenizer.json files spell it out as a sequence of
isolating splits followed by the byte alphabet. This table holds those sequences (checked against the published
files and, where a GGUF is the only carrier, src/llama-vocab.cpp of llama.cpp). Patterns are Oniguruma's, the
engine inside `tokenizers`: `$` ends a line, `&&` intersects classes. Nothing here reads a file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvfold.errors import UnsupportedModel

if TYPE_CHECKING:
    from tokenizers.pre_tokenizers import PreTokenizer


@dataclass(frozen=True)
class WordSplit:
    """patterns: each isolates its matches, in order. single_digits: every numeric character stands alone.
    end_of_turn: control tokens that end an answer besides the file's own eos and eot ids."""

    patterns: tuple[str, ...]
    single_digits: bool = False
    end_of_turn: tuple[str, ...] = ()


# Cased letters as the DeepSeek LLM tokenizer lists them: 87 ranges, a subset of Unicode's Lu, Ll and Lt that no
# property names. Escaped, because NFC turns U+1F7D, U+1FD3 and U+1FDB into other letters and the ranges around.
_CASED_LETTERS = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af"
    "\u0370-\u0373\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5"
    "\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba"
    "\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45"
    "\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe"
    "\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102"
    "\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139"
    "\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3"
    "\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06"
    "\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3"
    "\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df"
    "\U0001e900-\U0001e943"
)
_CJK = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"  # ideographs, Hangul and all that lies below them from U+0800
_CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"

WORD_SPLITS: dict[str, WordSplit] = {
    # DeepSeek LLM, V2, V2-Lite, V2.5, Coder-V2
    "deepseek-llm": WordSplit(
        (
            "[\r\n]",
            rf"\s?[{_CASED_LETTERS}]+",
            "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
            r"\s+$",
            _CJK,
        ),
        single_digits=True,
    ),
    # DeepSeek-Coder (33B and smaller)
    "deepseek-coder": WordSplit(
        ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK), single_digits=True, end_of_turn=("<|EOT|>",)
    ),
    # DeepSeek-V3, R1, V3.1, and kvfold's own storyteller
    "deepseek-v3": WordSplit(
        (
            r"\p{N}{1,3}",
            "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
            r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
            r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
            r"| ?[\p{P}\p{S}]+[\r\n]*"
            rf"|{_SPACES}",
        )
    ),
    # Kimi-K2, Moonlight: the pat_str of the tiktoken vocabulary
    "kimi-k2": WordSplit(
        (
            r"[\p{Han}]+"
            rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTION}?"
            rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTION}?"
            r"|\p{N}{1,3}"
            r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
            rf"|{_SPACES}",
        ),
        end_of_turn=("<|im_end|>",),
    ),
    # GLM-4 and its successors, GLM-4.7-Flash among them
    "glm4": WordSplit(
        (
            rf"{_CONTRACTION}"
            r"|[^\r\n\p{L}\p{N}]?\p{L}+"
            r"|\p{N}{1,3}"
            r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
            rf"|{_SPACES}",
        ),
        end_of_turn=("<|endoftext|>", "<|user|>", "<|observation|>"),
    ),
}


def _byte_alphabet() -> dict[str, int]:
    """The character that stands for each byte in a byte-level vocabulary (GPT-2): printable Latin-1 characters stand
    for themselves, the other 68 bytes in order for U+0100 and up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


BYTE_OF = _byte_alphabet()
CHAR_OF = {byte: char for char, byte in BYTE_OF.items()}


def word_split(name: str) -> WordSplit:
    """The scheme a GGUF calls `name`. UnsupportedModel with the known names otherwise: a neighbouring scheme would
    give ids the model was never trained on, and nothing would look wrong."""
    if name not in WORD_SPLITS:
        raise UnsupportedModel(
            f"tokenizer.ggml.pre is {name!r}; kvfold knows {', '.join(sorted(WORD_SPLITS))}. "
            "Convert the model again with a current converter, or open its Hugging Face directory instead"
        )
    return WORD_SPLITS[name]


def build_pre_tokenizer(name: str) -> PreTokenizer:
    """The scheme as one `tokenizers` pre-tokenizer, ending in the byte alphabet."""
    from tokenizers import Regex, pre_tokenizers

    split = word_split(name)
    steps: list[PreTokenizer] = [pre_tokenizers.Split(Regex(p), behavior="isolated") for p in split.patterns]
    if split.single_digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    return pre_tokenizers.Sequence(steps)
