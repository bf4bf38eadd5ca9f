"""llama.cpp reads the same GGUF vocabularies to the same ids."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import gguf
import pytest

from kvfold.text.tokenizer import Tokenizer
from text.vocabularies import SCHEMES, strange_strings, vocabulary


def differs_in_llama_cpp(scheme: str, text: str) -> bool:
    """Where llama.cpp leaves the published tokenizer: it ends `\\s+$` before U+200B and takes U+0085 for no space
    (deepseek-llm, deepseek-coder); its Kimi classes lack U+3005, U+3007 and combining marks."""
    if scheme in ("deepseek-llm", "deepseek-coder"):
        return bool(set(text) & set("\u0085\u200b\u00a0\u2003\u3000"))
    if scheme == "kimi-k2":
        return bool(set(text) & set("々〇")) or any(unicodedata.category(c)[0] == "M" for c in text)
    return False


@pytest.mark.peer
@pytest.mark.parametrize("scheme", SCHEMES)
def test_ids_equal_llama_cpp(scheme: str, tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    known = vocabulary(scheme)
    path = tmp_path / "vocabulary.gguf"
    writer = gguf.GGUFWriter(path, "deepseek2")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    for key, value in known.metadata.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    theirs = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    ours = Tokenizer.from_gguf(known.metadata)
    strings = [text for text in strange_strings(4000, seed=11) if not differs_in_llama_cpp(scheme, text)]
    assert len(strings) > 1000
    for text in strings:
        for special in (False, True):
            expected = theirs.tokenize(text.encode(), add_bos=True, special=special)
            assert ours.encode(text, special=special) == expected, f"{text!r}, special={special}"
