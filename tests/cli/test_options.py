"""Options: sizes, environment variables, llama.cpp's spellings, defaults equal to the engine's."""

from __future__ import annotations

import inspect
import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import typer

from kit.command_line import Kvfold
from kvfold.cli.later import LATER_FLAGS, LATER_VERBS
from kvfold.cli.main import app
from kvfold.cli.options import FA_VALUES, parse_limit, parse_size
from kvfold.cli.run import run
from kvfold.engine.sampler import SamplingParams
from kvfold.llm import LLM
from kvfold.mla.plan import Fa

VERBS = ("run", "chat", "inspect", "plan", "bench", "check", "synth")


@pytest.mark.parametrize(
    ("text", "value"),
    [("0", 0), ("4096", 4096), ("32K", 32768), ("32k", 32768), ("1M", 1 << 20), ("2G", 2 << 30), ("1T", 1 << 40)],
)
def test_sizes_take_binary_suffixes(text: str, value: int) -> None:
    assert parse_size(text) == value


@pytest.mark.parametrize("text", ["", "K", "-1", "1.5K", "32KB", "1E", "0x10", "1 K"])
def test_anything_else_is_no_size(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="32K"):
        parse_size(text)


def test_minus_one_is_no_limit() -> None:
    assert parse_limit("-1") == -1
    with pytest.raises(typer.BadParameter):
        parse_limit("-2")


def commands() -> dict[str, Any]:
    return typer.main.get_command(app).commands  # type: ignore[attr-defined]


def shown_options(name: str) -> list[Any]:
    return [
        p for p in commands()[name].params if p.param_type_name == "option" and not p.hidden and p.name != "help"
    ]


@pytest.mark.parametrize("verb", VERBS)
def test_every_flag_has_its_own_environment_variable_and_help(verb: str) -> None:
    options = shown_options(verb)
    variables = [option.envvar for option in options]
    assert all(variable.startswith("KVFOLD_") for variable in variables)
    assert len(set(variables)) == len(variables)
    assert all(option.help for option in options)


def test_the_same_flag_means_the_same_everywhere() -> None:
    by_variable: dict[str, set[tuple[str, ...]]] = {}
    for verb in VERBS:
        for option in shown_options(verb):
            by_variable.setdefault(option.envvar, set()).add(tuple(option.opts))
    assert {variable: spellings for variable, spellings in by_variable.items() if len(spellings) > 1} == {}


def test_help_shows_defaults_and_variables(kvfold: Kvfold) -> None:
    done = kvfold("run", "--help")
    assert done.code == 0
    text = " ".join(done.out.split())
    for shown in (
        "KVFOLD_CTX_SIZE",
        "KVFOLD_TEMP; default: 0.8",
        "KVFOLD_WORKSPACE; default: (1/32 of the free memory, 64M to 256M, or what the threads need)",
        "-ctk",
        "-mla",
    ):
        assert shown in text, shown


def test_defaults_are_the_engines() -> None:
    ours = {name: p.default for name, p in inspect.signature(run).parameters.items()}
    for field in fields(SamplingParams):
        if field.name in ours and field.name != "stop":
            assert ours[field.name] == field.default, field.name
    engine = {name: p.default for name, p in inspect.signature(LLM).parameters.items()}
    assert ours["batch_size"] == engine["batch_rows"] and ours["workspace"] == engine["workspace_bytes"]
    for name in ("mla", "fa", "dtype", "cache_type", "backend", "device", "threads"):
        assert ours[name] == engine[name], name


def test_every_sampling_setting_but_the_bias_has_a_flag() -> None:
    settings = {field.name for field in fields(SamplingParams)} - {"max_tokens", "logit_bias"}
    assert settings <= set(inspect.signature(run).parameters)


# --- later work ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["run", "plan", "bench"])
@pytest.mark.parametrize("flag", LATER_FLAGS, ids=lambda flag: flag.names[0])
def test_flags_of_later_work_are_answered_by_a_sentence(kvfold: Kvfold, verb: str, flag: Any) -> None:
    if verb in flag.anyway:
        pytest.skip(f"{verb} does so anyway: test_run.py")
    for name in flag.names:
        values = ["x"] if flag.takes_value else []
        done = kvfold(verb, "-b", "0", name, *values, "/no/such/model.gguf", "text", "more")
        assert (done.code, done.out) == (1, ""), name
        assert done.err == f"kvfold: {flag.names[0]} is not there yet. Today: {flag.today}.\n", name


@pytest.mark.parametrize("verb", ["run", "chat", "plan", "bench"])
def test_what_an_answer_says_to_use_is_there(verb: str) -> None:
    works = {spelling for option in shown_options(verb) for spelling in option.opts}
    for flag in LATER_FLAGS:
        named = re.findall(r"(?<!\S)--?[a-z][a-z-]*", re.sub("`.*?`", "", flag.today))
        assert works.issuperset(named), flag.today


def test_fmoe_is_taken_with_a_value_as_well(kvfold: Kvfold) -> None:
    assert kvfold("run", "-fmoe", "1", "-p", "text").err.startswith("kvfold: -fmoe is not there yet.")


@pytest.mark.parametrize(
    ("arguments", "fused"),
    [
        (["-fa"], True),
        (["-fa", "-c", "1K"], True),
        (["-fa", "on"], True),
        (["--flash-attn", "1"], True),
        (["-fa", "auto"], True),
        (["-fa", "off"], False),
        (["--fa", "0"], False),
    ],
)
def test_fa_is_on_where_its_value_is_left_out(
    kvfold: Kvfold, tiny_gguf: Path, arguments: list[str], fused: bool
) -> None:
    report = json.loads(kvfold("plan", tiny_gguf, "--json", *arguments).out)
    assert [phase["fused"] for phase in report["phases"]] == [fused] * 4


@pytest.mark.parametrize(
    "arguments",
    [
        ("run", "{model}", "-fa", "Once upon"),
        ("run", "-fa", "Once upon"),
        ("plan", "-fa", "Once upon"),
        ("bench", "-fa", "1,Once upon"),
    ],
)
def test_a_prompt_or_a_model_behind_fa_is_not_its_value(
    kvfold: Kvfold, tiny_gguf: Path, arguments: tuple[str, ...]
) -> None:
    """Taken for it, `kvfold run MODEL -fa PROMPT` complained about stdin."""
    done = kvfold(*(argument.format(model=tiny_gguf) for argument in arguments), stdin=b"never read")
    assert (done.code, done.out) == (2, "")
    said = " ".join(done.err.split())
    assert "'Once upon' is none of its values: allowed are auto, 0, 1, off, on." in said
    assert said.endswith("in front of -fa or behind its value: -fa 1 'Once upon'")


@pytest.mark.parametrize("value", ["true", "True", "yes", "2", "-1"])
@pytest.mark.parametrize("verb", ["run", "plan", "bench"])
def test_a_word_behind_fa_that_is_no_value_is_no_prompt_either(kvfold: Kvfold, verb: str, value: str) -> None:
    written = [f"--fa={value}"] if value.startswith("-") else ["-fa", value]
    done = kvfold(verb, *written, stdin=b"never read")
    assert (done.code, done.out) == (2, "")
    said = " ".join(done.err.split())
    assert "Invalid value for '--fa'" in said
    assert said.endswith(f"{value!r} is none of its values: allowed are auto, 0, 1, off, on.")


def test_bench_names_the_option_whose_list_has_a_wrong_item(kvfold: Kvfold) -> None:
    done = kvfold("bench", "-b", "512,0")
    assert (done.code, done.out) == (2, "")
    assert "Invalid value for '--batch-size': at least 1 is expected." in done.err


def test_fa_has_the_engines_values() -> None:
    assert set(FA_VALUES.values()) == {value.value for value in Fa}


@pytest.mark.parametrize("verb", sorted(LATER_VERBS))
def test_verbs_of_later_work_are_answered_by_a_sentence(kvfold: Kvfold, verb: str) -> None:
    for arguments in ([], ["model.gguf", "--port", "80", "-x"], ["--help"]):
        done = kvfold(verb, *arguments)
        assert (done.code, done.out) == (1, "")
        assert done.err == f"kvfold: `kvfold {verb}` is not there yet. Today: {LATER_VERBS[verb]}.\n"


def test_no_flag_of_later_work_hides_one_that_works() -> None:
    works = {
        spelling for verb in ("run", "plan", "bench") for option in shown_options(verb) for spelling in option.opts
    }
    later = [name for flag in LATER_FLAGS for name in flag.names]
    assert not works & set(later)
    assert len(later) == len(set(later))
    assert not set(LATER_VERBS) & set(VERBS)


# --- exit codes ------------------------------------------------------------------------------------------------------


def test_version_and_no_arguments(kvfold: Kvfold) -> None:
    import kvfold as package

    assert kvfold("--version").out == f"kvfold {package.__version__}\n"
    shown = kvfold()
    assert "inspect" in shown.out + shown.err


@pytest.mark.parametrize(
    "arguments",
    [["--bogus"], ["run", "--bogus"], ["nosuchverb"], ["run", "-t", "many", "text"], ["run", "-n", "0", "text"]],
)
def test_a_wrong_command_line_is_exit_code_2(kvfold: Kvfold, arguments: list[str]) -> None:
    done = kvfold(*arguments)
    assert (done.code, done.out) == (2, "")
    assert "Error" in done.err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["run", "/no/such.gguf", "text"], "kvfold: /no/such.gguf: "),
        (["run", "--top-p", "2", "text"], "kvfold: top_p is 2.0; allowed: "),
        (["run", "-mla", "4", "text"], "kvfold: mla=4: allowed are auto, 0, 1, 2, 3."),
        (["run", "--device", "cuda:999", "text"], "kvfold: No backend can run this model: cuda: "),
        (["plan", "-ctk", "q3"], "kvfold: cache_type=q3: allowed are f32, f16, bf16, q8_0, fp8."),
        (["synth", "llama", "x.gguf"], "kvfold: llama: there is no such shape"),
    ],
)
def test_a_known_error_is_one_sentence_and_exit_code_1(kvfold: Kvfold, arguments: list[str], sentence: str) -> None:
    done = kvfold(*arguments)
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith(sentence)
    assert done.err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ("run", "", "text"),
        ("run", "-m", "", "text"),
        ("chat", ""),
        ("chat", "-m", ""),
        ("bench", ""),
        ("bench", "-m", ""),
        ("plan", ""),
        ("inspect", ""),
    ],
    ids=" ".join,
)
def test_an_empty_name_is_no_model(kvfold: Kvfold, arguments: tuple[str, ...]) -> None:
    """Neither the embedded one nor whatever lies in the working directory."""
    done = kvfold(*arguments)
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith("kvfold: The name of the model is empty: ")


def test_debug_shows_where_a_sentence_comes_from(kvfold: Kvfold, monkeypatch: pytest.MonkeyPatch) -> None:
    from kvfold.errors import SettingError

    monkeypatch.setenv("KVFOLD_DEBUG", "1")
    with pytest.raises(SettingError, match="no such shape"):
        kvfold("synth", "llama", "x.gguf")
