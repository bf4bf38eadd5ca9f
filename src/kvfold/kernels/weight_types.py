"""The types of which a GPU can read single weights: those that block_weights.py decodes. Imports no torch."""

TYPES = frozenset(
    [
        "F32",
        "F16",
        "BF16",
        "F8_E4M3",
        "Q4_0",
        "Q4_1",
        "Q5_0",
        "Q5_1",
        "Q8_0",
        "Q2_K",
        "Q3_K",
        "Q4_K",
        "Q5_K",
        "Q6_K",
        "IQ4_NL",
        "IQ4_XS",
    ]
)
