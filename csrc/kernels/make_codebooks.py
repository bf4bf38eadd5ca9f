"""Writes codebooks.inc, the codebooks of the IQ types, from the constants of the gguf package.

    python csrc/kernels/make_codebooks.py        # after an update of gguf; tests/quant/ compares the two

An entry of 8 weights with 3 possible magnitudes, or of 4 with 8, is one 16-bit word: 2 (or 4) bits a weight, the first
weight lowest, each the position of its magnitude in the table's list. 27 kB of text; unpacked by the compiler.
"""

from pathlib import Path

import gguf.quants

TABLES = ("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ1_S")
TARGET = Path(__file__).with_name("codebooks.inc")


def generate() -> str:
    """The text of codebooks.inc."""
    parts = ["// Written by make_codebooks.py from the gguf package. Do not edit.\n"]
    for name in TABLES:
        table = getattr(gguf.quants, name)
        entries, weights = table.grid_shape
        magnitudes = ", ".join(str(m) for m in table.grid_map)
        packed = bytes.fromhex(table.grid_hex.decode())
        words = [f"{int.from_bytes(packed[i : i + 2], 'little'):#06x}" for i in range(0, 2 * entries, 2)]
        assert len(packed) == 2 * entries
        symbol = name.lower().replace("_", "")
        parts.append(f"\n// {name}: {entries} entries of {weights} weights\n")
        parts.append(f"constexpr int8_t k_{symbol}_magnitudes[] = {{{magnitudes}}};\n")
        parts.append(f"constexpr uint16_t k_{symbol}_packed[{entries}] = {{\n")
        parts += [f"    {', '.join(words[i : i + 12])},\n" for i in range(0, entries, 12)]
        parts.append("};\n")
    return "".join(parts)


if __name__ == "__main__":
    TARGET.write_text(generate())
