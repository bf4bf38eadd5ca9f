"""`kvfold run`: the answer on stdout and nothing else, everything else on stderr."""

from __future__ import annotations

import json
import re
import signal
import subprocess
from pathlib import Path

import pytest

from kit.command_line import Kvfold, start
from kit.tiny_models import tiny_model, write_gguf
from kvfold import LLM, SamplingParams, _native
from kvfold.backends.choose import native_profile
from kvfold.cache.latent import CacheType
from kvfold.cli.later import LATER_FLAGS
from kvfold.llm import Output

PROMPT = "abc abc"
ARGUMENTS = ("run", "-c", "256", "-n", "12", "--seed", "3", "--ignore-eos")
RATE = r"(?:[\d.]+|-) t/s"
CLOSING = re.compile(rf"prompt (\d+) tokens, {RATE}; generation (\d+) tokens, {RATE}; peak memory [\d,]+ MiB\n")


@pytest.fixture(scope="module")
def output(tiny_gguf: Path) -> Output:
    """What Python gives for the same settings."""
    return LLM(tiny_gguf, n_ctx=256).generate([PROMPT], SamplingParams(max_tokens=12, seed=3, ignore_eos=True))[0]


@pytest.fixture(scope="module")
def expected(output: Output) -> str:
    return output.text


def test_stdout_is_the_answer_and_stderr_ends_with_the_rates(
    kvfold: Kvfold, tiny_gguf: Path, output: Output
) -> None:
    done = kvfold(*ARGUMENTS, tiny_gguf, PROMPT)
    assert (done.code, done.out) == (0, output.text + "\n")
    closing = CLOSING.fullmatch(done.err)
    assert closing, done.err
    assert closing.groups() == (str(output.stats.prompt_tokens), "12")


def test_every_way_to_give_model_and_prompt_says_the_same(kvfold: Kvfold, tiny_gguf: Path, expected: str) -> None:
    text = PROMPT.encode()
    ways = [
        ((*ARGUMENTS, "-m", tiny_gguf, PROMPT), b""),
        ((*ARGUMENTS, tiny_gguf, "-p", PROMPT), b""),
        ((*ARGUMENTS, "-m", tiny_gguf, "-p", PROMPT), b""),
        ((*ARGUMENTS, "-m", tiny_gguf), text),
        ((*ARGUMENTS, "-m", tiny_gguf), text + b"\n"),
        ((*ARGUMENTS, "-m", tiny_gguf, "-"), text + b"\r\n"),
        ((*ARGUMENTS, tiny_gguf, "-"), text),
        ((*ARGUMENTS, "-m", tiny_gguf, "-p", "-"), text),
    ]
    for arguments, stdin in ways:
        assert kvfold(*arguments, stdin=stdin).out == expected + "\n", arguments


def test_settings_come_from_the_environment(
    kvfold: Kvfold, tiny_gguf: Path, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    variables = {
        "KVFOLD_MODEL": str(tiny_gguf),
        "KVFOLD_PROMPT": PROMPT,
        "KVFOLD_CTX_SIZE": "256",
        "KVFOLD_PREDICT": "12",
        "KVFOLD_SEED": "3",
        "KVFOLD_IGNORE_EOS": "1",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert kvfold("run").out == expected + "\n"


def test_what_is_written_goes_before_the_environment(
    kvfold: Kvfold, tiny_gguf: Path, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVFOLD_MODEL", "/no/such.gguf")
    monkeypatch.setenv("KVFOLD_PROMPT", "another prompt")
    assert kvfold(*ARGUMENTS, tiny_gguf, PROMPT).out == expected + "\n"
    assert kvfold(*ARGUMENTS, "-m", tiny_gguf, PROMPT).out == expected + "\n"


def test_what_cannot_be_meant_is_refused(kvfold: Kvfold, tiny_gguf: Path) -> None:
    wrong = [
        ("-m", tiny_gguf, "one", "two"),
        ("one", "two", "three"),
        ("-p", "text", "one", "two"),
        ("-m", tiny_gguf, "-p", "text", "one"),
        (tiny_gguf,),  # a model and no prompt
        ("typo-model.gguf",),
        ("no-such.safetensors",),
        ("pytorch_model.bin",),
        ("models/v3",),
        ("org/repo:Q4_K_M",),
        ("-p", "text", "-f", "prompt.txt"),
        ("-m", tiny_gguf, "-f", "prompt.txt", "text"),
    ]
    for arguments in wrong:
        done = kvfold("run", *arguments)
        assert (done.code, done.out) == (2, ""), arguments
        assert "run" in done.err


def test_a_sole_word_that_names_a_file_is_no_prompt(kvfold: Kvfold) -> None:
    done = kvfold("run", "typo-model.gguf", stdin=b"Once")
    assert "typo-model.gguf: there is no such file or directory, and there is no prompt" in done.err


def test_text_that_only_looks_like_a_file_is_a_prompt_after_p_or_with_a_model(
    kvfold: Kvfold, tiny_gguf: Path
) -> None:
    for arguments in (("-m", tiny_gguf, "and/or"), (tiny_gguf, "-p", "a.gguf"), (tiny_gguf, "a.gguf")):
        assert kvfold("run", "-c", "64", "-n", "1", *arguments).code == 0, arguments
    assert kvfold("run", "-n", "1", "and / or").code == 0


def test_a_prompt_comes_from_a_file(kvfold: Kvfold, tiny_gguf: Path, expected: str, tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    for text in (PROMPT, PROMPT + "\n", PROMPT + "\r\n"):
        file.write_bytes(text.encode())
        assert kvfold(*ARGUMENTS, tiny_gguf, "-f", file).out == expected + "\n"
        assert kvfold(*ARGUMENTS, "-m", tiny_gguf, "--file", file).out == expected + "\n"
    file.write_text("-")  # is that text, not stdin
    assert kvfold(*ARGUMENTS, tiny_gguf, "-f", file, stdin=b"").code == 0
    file.write_bytes(b"ab\xff")
    assert kvfold(*ARGUMENTS, tiny_gguf, "-f", file).err.startswith(f"kvfold: {file}: byte 2 is not UTF-8")
    assert kvfold(*ARGUMENTS, tiny_gguf, "-f", tmp_path / "none").err.startswith(f"kvfold: {tmp_path / 'none'}: ")


def test_a_llama_cpp_command_line_runs_as_it_is(kvfold: Kvfold, tiny_gguf: Path, expected: str) -> None:
    anyway = [name for flag in LATER_FLAGS if "run" in flag.anyway for name in flag.names]
    assert {"-no-cnv", "-st", "--no-warmup", "--jinja", "--no-display-prompt"} <= set(anyway)
    done = kvfold(*ARGUMENTS, "-m", tiny_gguf, *anyway, "-fa", "-p", PROMPT, "-r", expected[4:6])
    assert (done.code, done.out) == (0, expected[: expected.index(expected[4:6])] + "\n")


@pytest.mark.parametrize(
    ("stdin", "reason"), [(b"", "empty"), (b"\n", "empty"), (b"ab\xff", "byte 2 is not UTF-8")]
)
def test_a_bad_stdin_is_refused(kvfold: Kvfold, stdin: bytes, reason: str) -> None:
    done = kvfold("run", stdin=stdin)
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith("kvfold: stdin: ") and reason in done.err


@pytest.mark.parametrize("mla", ["0", "1", "2", "3", "auto"])
@pytest.mark.parametrize("fa", ["0", "on"])
def test_json_holds_text_ids_rates_and_plan(
    kvfold: Kvfold, tiny_gguf: Path, output: Output, mla: str, fa: str
) -> None:
    done = kvfold(*ARGUMENTS, "-mla", mla, "-fa", fa, "-ctk", "f32", "--temp", "0", "--json", tiny_gguf, PROMPT)
    answer = json.loads(done.out)
    assert done.out.count("\n") == 1
    assert (answer["finish_reason"], len(answer["token_ids"])) == ("length", 12)
    prompt_tokens = output.stats.prompt_tokens
    assert answer["stats"]["prompt_tokens"] == prompt_tokens
    assert answer["stats"]["generation_rate"] > 0
    assert (answer["family"], answer["seed"]) == ("deepseek-v3", 3)
    plan, planned = answer["plan"], LLM(tiny_gguf, n_ctx=64).loaded.plan
    prompt_path, generation_path = {
        "0": ("standard", "standard"),
        "1": ("absorbed", "absorbed"),
        "2": ("decompressed", "decompressed"),
        "3": ("decompressed", "absorbed"),
        "auto": tuple(
            planned(*work).path.name.lower() for work in ((prompt_tokens, 0, True), (1, prompt_tokens + 11, False))
        ),
    }[mla]
    assert plan["prompt"]["steps"] == [[prompt_path, 1]]
    assert plan["generation"]["steps"] == [[generation_path, 1]]
    assert plan["generation"]["cached_rows"] == prompt_tokens + 11  # before the last token
    assert plan["prompt"]["fused"] is (fa == "on")
    assert CLOSING.fullmatch(done.err)


def test_every_path_generates_the_same_tokens(kvfold: Kvfold, tiny_gguf: Path) -> None:
    answers = {
        tuple(
            json.loads(kvfold(*ARGUMENTS, "-mla", mla, "--temp", "0", "--json", tiny_gguf, PROMPT).out)["token_ids"]
        )
        for mla in ("0", "1", "2", "3", "auto")
    }
    assert len(answers) == 1


def test_minus_one_generates_until_the_context_is_full(kvfold: Kvfold, tiny_gguf: Path, output: Output) -> None:
    done = kvfold("run", "-c", "64", "-n", "-1", "--ignore-eos", "--json", tiny_gguf, PROMPT)
    assert len(json.loads(done.out)["token_ids"]) == 64 - output.stats.prompt_tokens


def test_stop_strings_end_the_text(kvfold: Kvfold, tiny_gguf: Path, expected: str) -> None:
    stop = expected[4:6]
    done = kvfold(*ARGUMENTS, "--stop", "no such text", "--stop", stop, "--json", tiny_gguf, PROMPT)
    answer = json.loads(done.out)
    assert answer["text"] == expected[: expected.index(stop)]
    assert answer["finish_reason"] == "stop"


def test_verbose_says_model_backend_plan_and_sampler(kvfold: Kvfold, tiny_gguf: Path, output: Output) -> None:
    done = kvfold(*ARGUMENTS, "-v", "-t", "1", tiny_gguf, PROMPT)
    assert done.out == output.text + "\n"
    prompt_tokens = output.stats.prompt_tokens
    for shown in (
        f"model: {tiny_gguf}, deepseek-v3, GGUF",
        "; 1 threads",
        "cache: 256 tokens in f16, ",
        "top-k 40 -> top-p 0.95 -> min-p 0.05 -> temperature 0.8 -> draw (seed 3)",
        f"fused; {prompt_tokens} new over 0 cached rows: ",
        f"generation: absorbed, fused; 1 new over {prompt_tokens + 11} cached rows: decompressed costs ",
    ):
        assert shown in done.err, shown


@pytest.mark.parametrize("isa", _native.isa_names())
def test_the_plan_and_the_instruction_set_shown_are_those_that_ran(
    isa: str, kvfold: Kvfold, tiny_gguf: Path
) -> None:
    """The rates of the set decide between paths, so another profile would show another plan."""
    try:
        done = kvfold(*ARGUMENTS, "-v", "-t", "1", "--isa", isa, tiny_gguf, PROMPT)
        answer = json.loads(kvfold(*ARGUMENTS, "--json", "--isa", isa, tiny_gguf, PROMPT).out)
    finally:
        _native.force_isa("auto")
    assert f"; 1 threads on {isa}\n" in done.err
    profile = f"({native_profile(CacheType.F16, isa).title})"
    assert done.err.count(profile) == 2
    assert answer["isa"] == isa
    assert all(phase["reason"].endswith(profile) for phase in answer["plan"].values())


def test_a_forced_backend_says_so(kvfold: Kvfold, tiny_gguf: Path) -> None:
    assert "backend plain: requested" in kvfold(*ARGUMENTS, "-v", "--backend", "plain", tiny_gguf, PROMPT).err


def test_a_prompt_longer_than_the_context_is_one_sentence(kvfold: Kvfold, tiny_gguf: Path) -> None:
    done = kvfold("run", "-c", "64", tiny_gguf, "x" * 100)
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith("kvfold: The prompt has 100 tokens and n_ctx=64 leaves no room")
    assert done.err.count("\n") == 1


def test_a_context_beyond_what_positions_count_is_one_sentence(kvfold: Kvfold, tiny_gguf: Path) -> None:
    done = kvfold("run", "-c", "1000000G", tiny_gguf, PROMPT)
    assert (done.code, done.out) == (1, "")
    assert done.err == f"kvfold: n_ctx={10**6 << 30}: allowed are 1 to 2147483647 tokens.\n"


def test_memory_that_the_system_does_not_give_is_one_sentence(
    kvfold: Kvfold, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*arguments: object, **settings: object) -> None:
        raise MemoryError("the cache")

    monkeypatch.setattr("kvfold.load.PagedCache", refused)
    done = kvfold("run", tiny_gguf, PROMPT)
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith("kvfold: not enough memory: ") and done.err.count("\n") == 1


# --- in a process of its own -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def long_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that goes on for longer than a test waits."""
    tiny = tiny_model("v3", max_position_embeddings=65536)
    return write_gguf(tiny, tmp_path_factory.mktemp("cli") / "long.gguf")


def test_the_embedded_model_answers_by_default() -> None:
    process = start("run", "-n", "16", "--temp", "0", "Once upon a time", stdout=subprocess.PIPE)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert len(out.decode().split()) >= 5
    assert CLOSING.fullmatch(err.decode())


def test_ctrl_c_ends_with_the_closing_line_and_130(long_gguf: Path) -> None:
    process = start("run", "-c", "64K", "-n", "-1", "--ignore-eos", long_gguf, PROMPT, stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert CLOSING.fullmatch(err.decode()), err
    assert out.endswith(b"\n")


def test_a_closed_pipe_is_quiet(long_gguf: Path) -> None:
    process = start("run", "-c", "64K", "-n", "-1", "--ignore-eos", long_gguf, PROMPT, stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.read(1)
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == b""
    assert process.wait(timeout=60) == 1


def test_a_terminal_without_the_characters_shows_question_marks(tiny_gguf: Path) -> None:
    process = start(*ARGUMENTS, tiny_gguf, PROMPT, encoding="ascii", stdout=subprocess.PIPE)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert b"?" in out and out.isascii()
