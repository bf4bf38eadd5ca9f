"""The table of tensor types: gguf's sizes and numbers, ik_llama.cpp's numbers, sentences for what is refused."""

import gguf
import pytest

from kvfold.errors import UnsupportedType
from kvfold.quant.types import TYPES, by_id, by_name


def test_every_type_of_the_gguf_package_is_known_and_decodes() -> None:
    for number, (elements, size) in gguf.GGML_QUANT_SIZES.items():
        known = by_id(int(number))
        assert known.name == number.name
        assert known.decodes
        expected = 36 if known.name == "Q8_1" else size  # gguf lists the block of 2023: types.py
        assert (known.block_elements, known.block_bytes) == (elements, expected), known.name


@pytest.mark.parametrize(
    ("number", "name", "decodes"),
    [
        (133, "Q6_0", True),
        (137, "IQ2_K", False),
        (144, "IQ4_KS", False),
        (151, "Q8_KV", False),
        (154, "IQ3_KT", False),
        (202, "Q4_0_R8", True),
        (212, "Q4_K_R4", True),
        (223, "IQ4_XS_R8", True),
        (230, "BF16_R16", True),
        (339, "IQ4_K_R4", False),
        (353, "MXFP4_R8", True),
        (399, "Q8_K_R8", False),
    ],
)
def test_numbers_of_ik_llama(number: int, name: str, decodes: bool) -> None:
    assert (by_id(number).name, by_id(number).decodes) == (name, decodes)
    assert by_name(name.lower()) is by_id(number)


def test_a_refused_type_says_what_to_use_instead() -> None:
    refused = [t for t in TYPES if not t.decodes]
    assert len(refused) == 44
    for t in refused:
        sentence = str(t.refusal("blk.0.attn_q.weight"))
        assert "blk.0.attn_q.weight" in sentence and t.name in sentence and "instead" in sentence
    assert not any(t.instead for t in TYPES if t.decodes)


def test_an_interleaved_type_has_the_blocks_of_its_standard() -> None:
    for t in TYPES:
        if t.standard:
            of = by_name(t.standard)
            assert t.row_bytes(512) == of.row_bytes(512) and t.interleaved_rows in (4, 8, 16)


@pytest.mark.parametrize(("name", "cols", "row_bytes"), [("Q4_K", 7168, 4032), ("IQ1_S_R4", 64, 14), ("F16", 0, 0)])
def test_row_bytes(name: str, cols: int, row_bytes: int) -> None:
    assert by_name(name).row_bytes(cols) == row_bytes


def test_wrong_rows_numbers_and_names_are_typed_errors() -> None:
    with pytest.raises(UnsupportedType, match=r"Q4_K stores 256 weights a block: a row of 100"):
        by_name("Q4_K").row_bytes(100)
    with pytest.raises(UnsupportedType, match="number 77"):
        by_id(77)
    with pytest.raises(UnsupportedType, match=r"'q9_z'.*Q4_K"):
        by_name("q9_z")
