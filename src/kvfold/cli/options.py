"""The options of the verbs, each once: its llama.cpp spellings, its environment variable, its help.

Nothing here imports the engine: `kvfold --help` must stay quick. Defaults that the engine has too are compared with
it by tests/cli/test_options.py.
"""

from __future__ import annotations

import re
import shlex
from typing import Annotated

import typer

FA_FLAGS = ("--fa", "-fa", "--flash-attn")
FA_VALUES = {"auto": "auto", "0": "0", "1": "1", "off": "0", "on": "1"}  # llama.cpp writes off and on

_WORD = re.compile(r"[\w-]*")
_SIZE = re.compile(r"(\d+)([KMGT]?)", re.IGNORECASE)
_SUFFIX = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def parse_size(value: str | int) -> int:
    """A count or a number of bytes, with an optional binary suffix: "32K" is 32768, "1M" is 1048576."""
    match = _SIZE.fullmatch(str(value))
    if match is None:
        raise typer.BadParameter(f"{value!r} is not a size: expected a number such as 4096, 32K or 1M.")
    return int(match[1]) * _SUFFIX[match[2].upper()]


def parse_count(value: str | int) -> int:
    """A size of at least 1."""
    count = parse_size(value)
    if count < 1:
        raise typer.BadParameter("at least 1 is expected.")
    return count


def parse_limit(value: str | int) -> int:
    """A size of at least 1, or -1 for no limit."""
    return -1 if str(value) == "-1" else parse_count(value)


def parse_fa_option(value: str) -> str:
    """auto, 0 or 1. Looked at before anything else is read: what stands behind an -fa that was to stand alone is a prompt or
    a model, which would be missed somewhere else. A single word such as "true" is meant as the value."""
    known = FA_VALUES.get(value.lower())
    if known is None:
        sentence = f"{value!r} is none of its values: allowed are {', '.join(FA_VALUES)}."
        if not _WORD.fullmatch(value):
            sentence += f" A prompt or a model goes in front of -fa or behind its value: -fa 1 {shlex.quote(value)}"
        raise typer.BadParameter(sentence)
    return known


def with_fa_values(arguments: list[str]) -> list[str]:
    """A command line with 1 after every -fa that stands alone, as it does in llama.cpp's older ones: at the end or
    before another option. Typer has no options whose value may be left out."""
    complete = []
    for argument, following in zip(arguments, [*arguments, "-"][1:], strict=True):
        complete.append(argument)
        if argument in FA_FLAGS and following.startswith("-"):
            complete.append("1")
    return complete


ModelArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="[MODEL]",
        show_default="the embedded model",
        envvar="KVFOLD_MODEL",
        help="A .gguf file, a Hugging Face directory, or a hub name such as org/repo.",
    ),
]
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        metavar="MODEL",
        envvar="KVFOLD_MODEL",
        show_default="the embedded model",
        help="A .gguf file, a Hugging Face directory, or a hub name such as org/repo.",
    ),
]
Context = Annotated[
    int,
    typer.Option(
        "--ctx-size",
        "--ctx",
        "-c",
        metavar="SIZE",
        parser=parse_size,
        envvar="KVFOLD_CTX_SIZE",
        show_default="0: the model's own context, or what fits a quarter of the free memory (of a GPU's: all)",
        help="Tokens that the cache holds.",
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads",
        "-t",
        envvar="KVFOLD_THREADS",
        show_default="the physical cores",
        help="Threads that compute. Where each has a CPU all but the caller's are bound to a core each, until other "
        "processes want it.",
    ),
]
BatchRows = Annotated[
    int | None,
    typer.Option(
        "--batch-size",
        "-b",
        metavar="SIZE",
        parser=parse_count,
        envvar="KVFOLD_BATCH_SIZE",
        show_default="the whole prompt, or what fits a quarter of the free memory, at most 2 GiB",
        help="Prompt rows in one step.",
    ),
]
Mla = Annotated[
    str,
    typer.Option(
        "--mla",
        "-mla",
        metavar="auto|0|1|2|3",
        envvar="KVFOLD_MLA",
        help="Attention path. 0: standard, over a cache of full K and V. 1: absorbed. 2: decompressed. "
        "3: decompressed for prompts, absorbed for generation. auto: the cheaper one, step by step.",
    ),
]
Fa = Annotated[
    str,
    typer.Option(
        *FA_FLAGS,
        metavar="[auto|0|1]",
        parser=parse_fa_option,
        envvar="KVFOLD_FA",
        help="1, or no value: fused attention with an online softmax. 0: scores are stored for a tile of rows.",
    ),
]
CacheTypeOption = Annotated[
    str,
    typer.Option(
        "--cache-type",
        "-ctk",
        "--cache-type-k",
        metavar="auto|f16|q8_0|bf16|f32|fp8",
        envvar="KVFOLD_CACHE_TYPE",
        help="Number format of the cached rows.",
    ),
]
Dtype = Annotated[
    str,
    typer.Option(
        "--dtype",
        metavar="auto|int8|float32|bfloat16",
        envvar="KVFOLD_DTYPE",
        help="Number format of activations. auto rounds them to 8 bits (int8) where few rows meet quantized weights on a "
        "GPU, and always on native; plain computes in float32.",
    ),
]
Backend = Annotated[
    str,
    typer.Option(
        "--backend",
        metavar="auto|cuda|native|plain",
        envvar="KVFOLD_BACKEND",
        help="What computes. auto: the first that runs this model.",
    ),
]
Device = Annotated[
    str,
    typer.Option(
        "--device",
        "-dev",
        metavar="auto|cpu|cuda|cuda:N",
        envvar="KVFOLD_DEVICE",
        help="Where it computes. cuda: the first GPU of compute capability 8.0 or newer that has room for the model and its "
        "context (-c), else the one with most room. auto: that GPU, else the CPU.",
    ),
]
Workspace = Annotated[
    int | None,
    typer.Option(
        "--workspace",
        metavar="BYTES",
        parser=parse_size,
        envvar="KVFOLD_WORKSPACE",
        show_default="1/32 of the free memory, 64M to 256M, or what the threads need",
        help="Scratch memory of one step: bounds the expanded keys and the stored scores.",
    ),
]
Mmap = Annotated[
    str,
    typer.Option(
        "--mmap",
        metavar="auto|on|off",
        envvar="KVFOLD_MMAP",
        help="off: copy the weights into memory, on 2 MiB pages. on: leave them in the map of their file. auto: copy "
        "them if they fit. A GPU has them in its own memory: auto alone.",
    ),
]
Isa = Annotated[
    str,
    typer.Option(
        "--isa",
        metavar="auto|generic|avx2|avx512|amx",
        envvar="KVFOLD_ISA",
        help="Instruction set of the native kernels. auto: the fastest this processor has.",
    ),
]
Deterministic = Annotated[
    bool,
    typer.Option(
        "--deterministic",
        envvar="KVFOLD_DETERMINISTIC",
        help="The same text gets the same bits whatever runs beside it, however a prompt is cut, on any number of threads.",
    ),
]
CheckNumerics = Annotated[
    bool,
    typer.Option(
        "--check-numerics",
        envvar="KVFOLD_CHECK_NUMERICS",
        help="Stop at the first NaN or infinity, and say which layer and op made it.",
    ),
]
Profile = Annotated[
    bool,
    typer.Option(
        "--profile",
        envvar="KVFOLD_PROFILE",
        help="Show where the time goes, op by op, beside what this machine could do.",
    ),
]
Temperature = Annotated[
    float,
    typer.Option(
        "--temp",
        "--temperature",
        envvar="KVFOLD_TEMP",
        help="0: always the likeliest token.",
    ),
]
TopK = Annotated[
    int,
    typer.Option(
        "--top-k",
        envvar="KVFOLD_TOP_K",
        help="Keep the k likeliest tokens; 0: all.",
    ),
]
TopP = Annotated[
    float,
    typer.Option(
        "--top-p",
        envvar="KVFOLD_TOP_P",
        help="Keep the likeliest tokens that together have probability p; 1: all.",
    ),
]
MinP = Annotated[
    float,
    typer.Option(
        "--min-p",
        envvar="KVFOLD_MIN_P",
        help="Keep tokens at least p times as likely as the likeliest; 0: all.",
    ),
]
TypicalP = Annotated[
    float,
    typer.Option(
        "--typical",
        envvar="KVFOLD_TYPICAL",
        help="Keep the tokens of the most typical surprise that together have probability p; 1: all.",
    ),
]
RepetitionPenalty = Annotated[
    float,
    typer.Option(
        "--repeat-penalty",
        envvar="KVFOLD_REPEAT_PENALTY",
        help="Divide the logits of seen tokens; 1: do not.",
    ),
]
FrequencyPenalty = Annotated[
    float,
    typer.Option(
        "--frequency-penalty",
        envvar="KVFOLD_FREQUENCY_PENALTY",
        help="Subtract from the logit of a token each time it was seen.",
    ),
]
PresencePenalty = Annotated[
    float,
    typer.Option(
        "--presence-penalty",
        envvar="KVFOLD_PRESENCE_PENALTY",
        help="Subtract from the logits of seen tokens.",
    ),
]
PenaltyLastN = Annotated[
    int,
    typer.Option(
        "--repeat-last-n",
        envvar="KVFOLD_REPEAT_LAST_N",
        help="Last tokens that count as seen; 0: none, -1: all.",
    ),
]
Mirostat = Annotated[
    int,
    typer.Option(
        "--mirostat",
        envvar="KVFOLD_MIROSTAT",
        help="2: steer towards a surprise instead of filtering; 0: filter.",
    ),
]
MirostatTau = Annotated[
    float,
    typer.Option(
        "--mirostat-ent",
        envvar="KVFOLD_MIROSTAT_ENT",
        help="Surprise a token that mirostat steers towards, in bits.",
    ),
]
MirostatEta = Annotated[
    float,
    typer.Option(
        "--mirostat-lr",
        envvar="KVFOLD_MIROSTAT_LR",
        help="Learning rate of mirostat.",
    ),
]
Seed = Annotated[
    int | None,
    typer.Option(
        "--seed",
        "-s",
        envvar="KVFOLD_SEED",
        show_default="another one each time",
        help="The same seed and prompt give the same text.",
    ),
]
Stop = Annotated[
    list[str] | None,
    typer.Option(
        "--stop",
        "--reverse-prompt",
        "-r",
        metavar="TEXT",
        envvar="KVFOLD_STOP",
        show_default=False,
        help="End where this text begins; may be given several times (in the variable: parted by blanks).",
    ),
]
IgnoreEos = Annotated[
    bool, typer.Option("--ignore-eos", envvar="KVFOLD_IGNORE_EOS", help="Never choose a token that ends the text.")
]
NewTokens = Annotated[
    int,
    typer.Option(
        "--predict",
        "--n-predict",
        "-n",
        metavar="SIZE",
        parser=parse_limit,
        envvar="KVFOLD_PREDICT",
        help="Tokens to generate at most; -1: until the context is full.",
    ),
]
Json = Annotated[
    bool,
    typer.Option("--json", envvar="KVFOLD_JSON", help="Print one JSON object on stdout."),
]
Verbose = Annotated[
    bool,
    typer.Option(
        "--verbose",
        "-v",
        envvar="KVFOLD_VERBOSE",
        help="Say on stderr what was loaded, which backend runs, the plan of each phase, and the sampler.",
    ),
]
