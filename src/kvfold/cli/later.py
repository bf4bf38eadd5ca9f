"""Flags and verbs of the peers that kvfold understands and does not have yet.

Each is accepted wherever it is written and answered by one sentence that says what to use today; a flag that asks for
what a verb does anyway is taken without a word.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Annotated, Any

import typer

from kvfold.errors import NotYet


@dataclass(frozen=True)
class LaterFlag:
    """names: every spelling, the best known first. takes_value: whether a value follows it. anyway: the verbs that do
    what it asks for."""

    names: tuple[str, ...]
    takes_value: bool
    today: str
    anyway: tuple[str, ...] = ()


_ONE_DEVICE = "a model runs whole on one device, --device cpu or cuda:N"

LATER_FLAGS = (
    LaterFlag(("-ngl", "--gpu-layers", "--n-gpu-layers"), True, _ONE_DEVICE),
    LaterFlag(("-ot", "--override-tensor"), True, _ONE_DEVICE),
    LaterFlag(("-cmoe", "--cpu-moe"), False, _ONE_DEVICE),
    LaterFlag(("-ncmoe", "--n-cpu-moe"), True, _ONE_DEVICE),
    LaterFlag(("-nkvo", "--no-kv-offload"), False, "the cache lies where the model runs, leave it out"),
    LaterFlag(("-sm", "--split-mode"), True, _ONE_DEVICE),
    LaterFlag(("-ts", "--tensor-split"), True, _ONE_DEVICE),
    LaterFlag(("-mg", "--main-gpu"), True, _ONE_DEVICE),
    LaterFlag(("--numa",), True, "start kvfold under `numactl --interleave=all`"),
    LaterFlag(
        ("-rtr", "--run-time-repack"),
        False,
        "--mmap off or auto has rows in the order that is fastest, leave it out",
    ),
    LaterFlag(("-fmoe", "--fused-moe"), False, "gate, up and down of the chosen experts are one op, leave it out"),
    LaterFlag(("-amb", "--attention-max-batch"), True, "--workspace bounds the scratch of attention"),
    LaterFlag(("-ser", "--smart-expert-reduction"), True, "every expert that the router chooses is computed"),
    LaterFlag(("-ctv", "--cache-type-v"), True, "keys and values are one cached row, and -ctk is its type"),
    LaterFlag(("-ub", "--ubatch-size"), True, "-b is the number of prompt rows in one step"),
    LaterFlag(("-np", "--parallel"), True, "LLM.generate in Python runs a list of prompts as one batch"),
    LaterFlag(("--host",), True, "there is no server: use `kvfold run`, or LLM in Python"),
    LaterFlag(("--port",), True, "there is no server: use `kvfold run`, or LLM in Python"),
    LaterFlag(("--api-key",), True, "there is no server: use `kvfold run`, or LLM in Python"),
    LaterFlag(("-tb", "--threads-batch"), True, "-t is the number of threads for prompts as well"),
    LaterFlag(("-no-cnv", "--no-conversation"), False, "`kvfold run` completes a text", ("run",)),
    LaterFlag(("-st", "--single-turn"), False, "`kvfold run` ends after one answer", ("run",)),
    LaterFlag(("--no-display-prompt",), False, "the prompt never goes to stdout, leave it out", ("run",)),
    LaterFlag(("--no-warmup",), False, "only `kvfold bench` warms up, leave it out", ("run", "chat")),
    LaterFlag(("--jinja",), False, "`kvfold chat` follows the model's template, leave it out", ("run", "chat")),
    LaterFlag(("-cnv", "--conversation"), False, "`kvfold chat` converses, `kvfold run` completes a text"),
    LaterFlag(
        ("-sys", "--system-prompt"), True, "`kvfold chat -sys TEXT` converses, `kvfold run` completes a text"
    ),
    LaterFlag(("-hf", "--hf-repo"), True, "a hub name is a model, org/repo or org/repo:Q4_K_M in place of a file"),
    LaterFlag(("-md", "--model-draft"), True, "there is no speculative decoding, leave it out"),
    LaterFlag(("--lora",), True, "merge the adapter into the model's weights before converting it"),
    LaterFlag(("--mlock",), False, "weights that fit are copied into memory at load, leave it out"),
    LaterFlag(("--no-mmap",), False, "--mmap off copies the weights into memory"),
    LaterFlag(
        ("-mmp",), True, "--mmap off copies the weights into memory, --mmap on leaves them in the map of their file"
    ),
    LaterFlag(("-l", "--logit-bias"), True, "SamplingParams(logit_bias=...) in Python"),
    LaterFlag(("--grammar",), True, "generation is not constrained: check the text, and sample again"),
    LaterFlag(("-j", "--json-schema"), True, "generation is not constrained: check the text, and sample again"),
)

LATER_VERBS = {
    "serve": "`kvfold run --json` from a program, or LLM in Python",
    "quantize": "llama.cpp's llama-quantize, whose files kvfold reads",
    "convert": "Hugging Face directories load as they are; llama.cpp's convert_hf_to_gguf.py writes GGUF",
    "imatrix": "llama.cpp's llama-imatrix",
    "perplexity": "LLM.logits(token_ids) in Python gives the logits of every position",
    "pull": "`kvfold run org/repo PROMPT` downloads a model at its first use",
    "ls": "`hf cache ls` lists what was downloaded",
    "rm": "`hf cache rm` removes what was downloaded",
    "verify": "--backend plain --dtype float32 is the reference to compare with",
    "doctor": "`kvfold plan MODEL` says what fits and which backend runs",
}


def not_yet(name: str, today: str) -> NotYet:
    return NotYet(f"{name} is not there yet. Today: {today}.")


def accept_later_flags(verb: Callable[..., None]) -> Callable[..., None]:
    """The verb with every flag of LATER_FLAGS as a hidden option, which is answered before anything else is; those
    that it has itself are its own."""

    @wraps(verb)
    def without_them(**values: Any) -> None:
        verb(**{name: value for name, value in values.items() if name not in hidden})

    signature = inspect.signature(verb, eval_str=True)
    has = {name for parameter in signature.parameters.values() for name in _spellings(parameter)}
    hidden = {
        f"later_{index}": _hidden_option(flag, verb.__name__)
        for index, flag in enumerate(LATER_FLAGS)
        if not has.intersection(flag.names)
    }
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        for name, (annotation, default) in hidden.items()
    ]
    own = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in signature.parameters.values()]
    without_them.__annotations__ = {parameter.name: parameter.annotation for parameter in (*own, *added)}
    vars(without_them)["__signature__"] = signature.replace(parameters=[*own, *added])
    return without_them


def _spellings(parameter: inspect.Parameter) -> Sequence[str]:
    described = getattr(parameter.annotation, "__metadata__", ())
    return [name for info in described for name in getattr(info, "param_decls", None) or ()]


def _hidden_option(flag: LaterFlag, verb: str) -> tuple[Any, object]:
    """(annotation, default). Eager: the answer must not wait for a complaint about another argument."""

    def refuse(value: str | bool | None) -> None:
        if value is not None and value is not False and verb not in flag.anyway:
            raise not_yet(flag.names[0], flag.today)

    option = typer.Option(*flag.names, hidden=True, is_eager=True, callback=refuse)
    return (Annotated[str | None, option], None) if flag.takes_value else (Annotated[bool, option], False)


def add_later_verbs(app: typer.Typer) -> None:
    """Hidden verbs that take any arguments and answer with their sentence."""
    takes_anything = {"ignore_unknown_options": True, "allow_extra_args": True}
    for verb, today in LATER_VERBS.items():
        app.command(verb, hidden=True, add_help_option=False, context_settings=takes_anything)(_answer(verb, today))


def _answer(verb: str, today: str) -> Callable[[], None]:
    def answer() -> None:
        raise not_yet(f"`kvfold {verb}`", today)

    return answer
