"""The one table of tensor types: how many bytes hold how many weights, and which types kvfold decodes.

Owns names, numbers and sizes; the arithmetic is quant/decode.py. Numbers are those a GGUF file stores
(`ggml_type`). Sources, both of August 2026: llama.cpp `ggml/src/ggml-common.h` and gguf-py `constants.py` for
mainline types, ik_llama.cpp `ggml/include/ggml.h` and `ggml/src/ggml-common.h` for numbers from 97 on. The two
projects agree on every number both use, with two exceptions noted in the table (36, and the size of 15).
"""

from __future__ import annotations

from dataclasses import dataclass

from kvfold.errors import UnsupportedType


@dataclass(frozen=True)
class BlockType:
    """A tensor type: rows of blocks, each `block_bytes` for `block_elements` consecutive weights.

    name:             as ggml spells it, upper case but for the K of the k-quants ("Q4_K")
    id:               number in a GGUF file; negative for types that only Hugging Face files have
    decodes:          False: recognised and refused, `instead` says what to use
    interleaved_rows: rows stored together. A group of this many rows is contiguous; inside it the rows are
                      mixed, so rows come and go in whole groups only
    standard:         for rows that are interleaved blocks of another type: that type's name
    row_meta_bytes:   bytes a row has before its blocks (an interleaved group starts with those of all its rows)
    """

    name: str
    id: int
    block_elements: int
    block_bytes: int
    decodes: bool = True
    instead: str = ""
    interleaved_rows: int = 1
    standard: str = ""
    row_meta_bytes: int = 0

    @property
    def is_side_by_side(self) -> bool:
        """One of SIDE_BY_SIDE."""
        return self.id <= side_by_side_id(0)

    @property
    def name_in_file(self) -> str:
        return self.standard if self.is_side_by_side else self.name

    def row_bytes(self, cols: int) -> int:
        """Bytes of one row of `cols` weights. UnsupportedType where that is not a whole number of blocks."""
        if cols < 0 or cols % self.block_elements:
            raise UnsupportedType(
                f"Type {self.name} stores {self.block_elements} weights a block: a row of {cols} is not a "
                f"whole number of blocks. The shape or the type of this tensor is wrong."
            )
        return self.row_meta_bytes + cols // self.block_elements * self.block_bytes

    def refusal(self, tensor: str) -> UnsupportedType:
        """The error for a tensor of a type that is not decoded: what it is and what to use instead."""
        return UnsupportedType(f"{tensor}: type {self.name} (number {self.id}) is not decoded. {self.instead}")


def _refused(
    name: str, id: int, block_elements: int, block_bytes: int, instead: str, *, rows: int = 1, meta: int = 0
) -> BlockType:
    return BlockType(
        name,
        id,
        block_elements,
        block_bytes,
        decodes=False,
        instead=instead,
        interleaved_rows=rows,
        row_meta_bytes=meta,
    )


def _interleaved(of: BlockType, id: int, rows: int) -> BlockType:
    return BlockType(
        f"{of.name}_R{rows}", id, of.block_elements, of.block_bytes, interleaved_rows=rows, standard=of.name
    )


def _requantize(to: str) -> str:
    return f"It exists only in ik_llama.cpp: quantize the original model to {to} instead."


_ACTIVATIONS = "It is for intermediates of matrix products, not for weights: write the tensor as Q8_0 instead."
_REMOVED = "Its writers removed it: quantize the original model to {} instead."

F32 = BlockType("F32", 0, 1, 4)
F16 = BlockType("F16", 1, 1, 2)
Q4_0 = BlockType("Q4_0", 2, 32, 18)
Q4_1 = BlockType("Q4_1", 3, 32, 20)
Q5_0 = BlockType("Q5_0", 6, 32, 22)
Q5_1 = BlockType("Q5_1", 7, 32, 24)
Q8_0 = BlockType("Q8_0", 8, 32, 34)
# gguf-py lists 40 bytes, two float32 before the weights, as ggml had it in 2023; ggml stores two float16.
Q8_1 = BlockType("Q8_1", 9, 32, 36)
Q2_K = BlockType("Q2_K", 10, 256, 84)
Q3_K = BlockType("Q3_K", 11, 256, 110)
Q4_K = BlockType("Q4_K", 12, 256, 144)
Q5_K = BlockType("Q5_K", 13, 256, 176)
Q6_K = BlockType("Q6_K", 14, 256, 210)
# ik_llama.cpp's own is 296 bytes under the same number (a sum after the scale); it writes no file with it.
Q8_K = BlockType("Q8_K", 15, 256, 292)
IQ2_XXS = BlockType("IQ2_XXS", 16, 256, 66)
IQ2_XS = BlockType("IQ2_XS", 17, 256, 74)
IQ3_XXS = BlockType("IQ3_XXS", 18, 256, 98)
IQ1_S = BlockType("IQ1_S", 19, 256, 50)
IQ4_NL = BlockType("IQ4_NL", 20, 32, 18)
IQ3_S = BlockType("IQ3_S", 21, 256, 110)
IQ2_S = BlockType("IQ2_S", 22, 256, 82)
IQ4_XS = BlockType("IQ4_XS", 23, 256, 136)
I8 = BlockType("I8", 24, 1, 1)
I16 = BlockType("I16", 25, 1, 2)
I32 = BlockType("I32", 26, 1, 4)
I64 = BlockType("I64", 27, 1, 8)
F64 = BlockType("F64", 28, 1, 8)
IQ1_M = BlockType("IQ1_M", 29, 256, 56)
BF16 = BlockType("BF16", 30, 1, 2)
TQ1_0 = BlockType("TQ1_0", 34, 256, 54)
TQ2_0 = BlockType("TQ2_0", 35, 256, 66)
MXFP4 = BlockType("MXFP4", 39, 32, 17)
NVFP4 = BlockType("NVFP4", 40, 64, 36)
Q1_0 = BlockType("Q1_0", 41, 128, 18)
Q2_0 = BlockType("Q2_0", 42, 64, 18)
Q6_0 = BlockType("Q6_0", 133, 32, 26)
# safetensors "F8_E4M3": the variant without infinities (fn). Its 128x128 scales are in QuantTensor.scale.
F8_E4M3 = BlockType("F8_E4M3", -1, 1, 1)

TYPES: tuple[BlockType, ...] = (
    F8_E4M3,
    F32,
    F16,
    Q4_0,
    Q4_1,
    _refused("Q4_2", 4, 16, 10, _REMOVED.format("Q4_0")),
    _refused("Q4_3", 5, 16, 12, _REMOVED.format("Q4_1")),
    Q5_0,
    Q5_1,
    Q8_0,
    Q8_1,
    Q2_K,
    Q3_K,
    Q4_K,
    Q5_K,
    Q6_K,
    Q8_K,
    IQ2_XXS,
    IQ2_XS,
    IQ3_XXS,
    IQ1_S,
    IQ4_NL,
    IQ3_S,
    IQ2_S,
    IQ4_XS,
    I8,
    I16,
    I32,
    I64,
    F64,
    IQ1_M,
    BF16,
    _refused("Q4_0_4_4", 31, 32, 18, _REMOVED.format("Q4_0"), rows=4),
    _refused("Q4_0_4_8", 32, 32, 18, _REMOVED.format("Q4_0"), rows=4),
    _refused("Q4_0_8_8", 33, 32, 18, _REMOVED.format("Q4_0"), rows=8),
    TQ1_0,
    TQ2_0,
    # Mainline had IQ4_NL_4_4 here in 2024; ik_llama.cpp reads BitNet's ternary matrices, 4 weights a byte and one
    # scale for a whole matrix. Neither decodes, so the number needs no further distinction.
    _refused("I2_S", 36, 4, 1, "Quantize the original model to TQ2_0 or IQ4_NL instead."),
    _refused("IQ4_NL_4_8", 37, 32, 18, _REMOVED.format("IQ4_NL"), rows=4),
    _refused("IQ4_NL_8_8", 38, 32, 18, _REMOVED.format("IQ4_NL"), rows=8),
    MXFP4,
    NVFP4,
    Q1_0,
    Q2_0,
    # Numbers of ik_llama.cpp from here on.
    _refused("Q8_0_X4", 97, 32, 34, _ACTIVATIONS),
    _refused("Q8_1_X4", 98, 32, 36, _ACTIVATIONS),
    _refused("Q8_2_X4", 99, 32, 36, _ACTIVATIONS),
    Q6_0,
    _refused("IQ1_BN", 134, 64, 13, _requantize("TQ1_0"), meta=2),
    _refused("IQ2_BN", 135, 64, 16, _requantize("TQ2_0"), meta=4),
    _refused("Q8_K64", 136, 64, 68, _ACTIVATIONS),
    _refused("IQ2_K", 137, 256, 76, _requantize("IQ2_S or Q2_K")),
    _refused("IQ3_K", 138, 256, 110, _requantize("IQ3_S or Q3_K")),
    _refused("IQ4_K", 139, 256, 144, _requantize("IQ4_NL or Q4_K")),
    _refused("IQ5_K", 140, 256, 176, _requantize("Q5_K")),
    _refused("IQ6_K", 141, 256, 212, _requantize("Q6_K")),
    _refused("IQ4_KS", 144, 256, 136, _requantize("IQ4_XS"), meta=4),
    _refused("IQ2_KS", 145, 256, 70, _requantize("IQ2_XS"), meta=2),
    _refused("IQ4_KSS", 146, 256, 128, _requantize("IQ4_XS"), meta=4),
    _refused("Q8_K16", 147, 64, 64, _ACTIVATIONS, meta=20),
    _refused("Q8_K32", 148, 256, 296, _ACTIVATIONS),
    _refused("Q8_KR8", 149, 256, 296, _ACTIVATIONS),
    _refused("Q8_K128", 150, 128, 140, _ACTIVATIONS),
    _refused("Q8_KV", 151, 32, 32, _requantize("Q8_0"), meta=8),
    _refused("IQ5_KS", 152, 256, 168, _requantize("Q5_K"), meta=4),
    _refused("IQ2_KT", 153, 256, 68, _requantize("IQ2_XXS"), meta=4),
    _refused("IQ3_KT", 154, 256, 100, _requantize("IQ3_XXS"), meta=4),
    _refused("IQ4_KT", 155, 256, 128, _requantize("IQ4_XS"), meta=4),
    _refused("IQ3_KS", 156, 256, 102, _requantize("IQ3_XXS"), meta=2),
    _refused("IQ2_KL", 157, 256, 86, _requantize("IQ2_S"), meta=2),
    _refused("IQ1_KT", 158, 256, 56, _requantize("IQ1_M"), meta=4),
    _interleaved(Q4_0, 202, 8),
    _interleaved(Q5_0, 206, 4),
    _interleaved(Q8_0, 208, 8),
    _interleaved(Q2_K, 210, 4),
    _interleaved(Q3_K, 211, 4),
    _interleaved(Q4_K, 212, 4),
    _interleaved(Q5_K, 213, 4),
    _interleaved(Q6_K, 214, 4),
    _interleaved(IQ2_XXS, 216, 4),
    _interleaved(IQ2_XS, 217, 4),
    _interleaved(IQ3_XXS, 218, 4),
    # These two share IQ1_S's codebook only: blocks of 32, and one float16 scale a row in front of each group.
    BlockType("IQ1_S_R4", 219, 32, 6, interleaved_rows=4, row_meta_bytes=2),
    _interleaved(IQ4_NL, 220, 4),
    _interleaved(IQ3_S, 221, 4),
    _interleaved(IQ2_S, 222, 4),
    _interleaved(IQ4_XS, 223, 8),
    BlockType("IQ1_M_R4", 229, 32, 7, interleaved_rows=4, row_meta_bytes=2),
    # Rows are mixed in pairs of columns, so a pair is the block.
    BlockType("BF16_R16", 230, 2, 4, interleaved_rows=16, standard="BF16"),
    _interleaved(Q6_0, 233, 4),
    _refused("IQ2_BN_R4", 335, 64, 16, _requantize("TQ2_0"), rows=4, meta=4),
    _refused("IQ2_K_R4", 337, 256, 76, _requantize("IQ2_S or Q2_K"), rows=4),
    _refused("IQ3_K_R4", 338, 256, 110, _requantize("IQ3_S or Q3_K"), rows=4),
    _refused("IQ4_K_R4", 339, 256, 144, _requantize("IQ4_NL or Q4_K"), rows=4),
    _refused("IQ5_K_R4", 340, 256, 176, _requantize("Q5_K"), rows=4),
    _refused("IQ4_KS_R4", 344, 256, 136, _requantize("IQ4_XS"), rows=4, meta=4),
    _refused("IQ5_KS_R4", 352, 256, 168, _requantize("Q5_K"), rows=4, meta=4),
    _interleaved(MXFP4, 353, 8),
    _refused("Q8_K_R16", 397, 256, 258, _requantize("Q8_0"), rows=16),
    _refused("Q8_KV_R8", 398, 32, 32, _requantize("Q8_0"), rows=8, meta=4),
    _refused("Q8_K_R8", 399, 256, 258, _requantize("Q8_0"), rows=8),
)

ROWS_SIDE_BY_SIDE = 16


def side_by_side_id(id: int) -> int:
    """The number of a file's type with its rows side by side."""
    return -100 - id


def _side_by_side(name: str) -> BlockType:
    of = next(t for t in TYPES if t.name == name)
    return BlockType(
        f"{name} side by side",
        side_by_side_id(of.id),
        of.block_elements,
        of.block_bytes,
        interleaved_rows=ROWS_SIDE_BY_SIDE,
        standard=name,
    )


SIDE_BY_SIDE = {t: _side_by_side(t) for t in ("Q4_0", "Q5_0", "Q8_0", "Q4_K", "Q6_K", "IQ4_NL")}
"""Types that weights have in memory, never in a file: by the name of the type they had there. csrc/kernels/side_by_side.h
explains them, quant/interleave.py puts them back in standard blocks."""

_BY_ID = {t.id: t for t in TYPES}
_BY_NAME = {t.name.upper(): t for t in TYPES}
assert len(_BY_ID) == len(_BY_NAME) == len(TYPES)


def by_id(id: int) -> BlockType:
    """The type with this ggml number. UnsupportedType if no type has it."""
    if id not in _BY_ID:
        raise UnsupportedType(
            f"Tensor type number {id} is not known (0 to 42 are ggml's, 97 to 399 ik_llama.cpp's). "
            f"The file is damaged or written by a newer program: quantize the model to a known type such as Q4_K."
        )
    return _BY_ID[id]


def by_name(name: str) -> BlockType:
    """The type with this name, in any case ("q4_k", "Q4_K"). UnsupportedType if none has it."""
    if name.upper() not in _BY_NAME:
        known = ", ".join(t.name for t in TYPES if t.decodes)
        raise UnsupportedType(f"Tensor type {name!r} is not known; those that decode are: {known}.")
    return _BY_NAME[name.upper()]
