"""`kvfold chat`: answers on stdout and nothing else; commands, several lines, Ctrl-C, a full context."""

from __future__ import annotations

import inspect
import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from kit.command_line import Kvfold, heed_signals
from kit.tiny_models import chat_keys, tiny_model, write_gguf
from kvfold import LLM, SamplingParams
from kvfold.cli.answer import MarkdownBlocks, block_end, keep_line_breaks
from kvfold.cli.chat import chat
from kvfold.cli.run import run
from kvfold.formats.checkpoint import open_checkpoint
from kvfold.load import embedded_model

ARGUMENTS = ("chat", "-c", "512", "-n", "8", "--seed", "3", "--temp", "0", "--ignore-eos", "-t", "1")
TEMPLATE = str(open_checkpoint(embedded_model()).vocabulary.metadata["tokenizer.chat_template"])


@pytest.fixture(scope="module")
def chat_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("chat") / "tiny.gguf"
    return write_gguf(tiny_model("v2-lite"), path, keys=chat_keys(TEMPLATE))


@pytest.fixture(scope="module")
def llm(chat_gguf: Path) -> LLM:
    return LLM(chat_gguf, n_ctx=512, threads=1)


def talk(llm: LLM, *said: str, system: str | None = None) -> tuple[list[dict[str, str]], list[str]]:
    """(messages, answers) of the same conversation in Python."""
    params = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
    messages = [{"role": "system", "content": system}] if system else []
    answers = []
    session = llm.session()
    for text in said:
        messages.append({"role": "user", "content": text})
        answers.append(llm.chat(messages, params, session=session).text)
        messages.append({"role": "assistant", "content": answers[-1]})
    session.release()
    return messages, answers


def lines(*texts: str) -> bytes:
    return "".join(f"{text}\n" for text in texts).encode()


# --- from a pipe -----------------------------------------------------------------------------------------------------


def test_every_line_is_a_turn_and_stdout_the_answers(kvfold: Kvfold, chat_gguf: Path, llm: LLM) -> None:
    done = kvfold(*ARGUMENTS, chat_gguf, stdin=lines("abc", "", "and then?"))
    assert done.code == 0, done.err
    assert done.out == "".join(f"{answer}\n" for answer in talk(llm, "abc", "and then?")[1])
    rates = re.findall(
        r"prompt (\d+) tokens(?: \((\d+) from the cache\))?, .* t/s; generation 8 tokens, .* t/s;", done.err
    )
    assert len(rates) == 2
    assert rates[0][1] == ""
    # all of the first prompt and its answer but the last token, or up to where its text has other tokens
    assert int(rates[1][1]) >= int(rates[0][0])


def test_a_backslash_or_triple_quotes_join_lines(kvfold: Kvfold, chat_gguf: Path, llm: LLM) -> None:
    said = lines("one\\", "two", '"""/help', "", "  me", '"""', '"""short"""')
    expected = talk(llm, "one\ntwo", "/help\n\n  me", "short")[1]
    assert kvfold(*ARGUMENTS, "-m", chat_gguf, stdin=said).out == "".join(f"{answer}\n" for answer in expected)


def test_a_message_without_its_end_is_not_sent(kvfold: Kvfold, chat_gguf: Path) -> None:
    assert kvfold(*ARGUMENTS, chat_gguf, stdin=lines('"""abc')).out == ""


def test_commands(kvfold: Kvfold, chat_gguf: Path, llm: LLM, tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    said = [
        "abc",
        "/reset",
        "/system Be brief.",
        "def",
        f"/save {file}",
        "/system",
        "/reset",
        "def",
        "/quit",
        "never",
    ]
    done = kvfold(*ARGUMENTS, chat_gguf, stdin=lines(*said))
    with_system, plain = talk(llm, "def", system="Be brief."), talk(llm, "def")
    assert done.out == "".join(f"{answer}\n" for answer in (*talk(llm, "abc")[1], *with_system[1], *plain[1]))
    assert json.loads(file.read_text()) == with_system[0]
    assert os.listdir(tmp_path) == ["talk.json"]
    assert done.code == 0
    for shown in ("a new conversation", "system message: Be brief.", "no system message", f"3 messages in {file}"):
        assert f"{shown}\n" in done.err


def test_help_lists_the_commands(kvfold: Kvfold, chat_gguf: Path) -> None:
    done = kvfold(*ARGUMENTS, chat_gguf, stdin=lines("/help"))
    for command in ("/help", "/reset", "/think", "/system TEXT", "/save FILE", "/quit"):
        assert re.search(rf"^{command}  +\w", done.err, re.MULTILINE), command


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (
            "/nosuch x",
            "there is no command /nosuch; there are /help, /reset, /think, /system TEXT, /save FILE, /quit",
        ),
        ("/save", "/save needs the name of a file"),
        ("/save /no/such/directory/x.json", "No such file or directory"),
        ("/think", "no choice of thinking"),
    ],
)
def test_a_wrong_command_says_so_and_the_conversation_goes_on(
    kvfold: Kvfold, chat_gguf: Path, llm: LLM, line: str, sentence: str
) -> None:
    done = kvfold(*ARGUMENTS, chat_gguf, stdin=lines(line, "abc"))
    assert (done.code, done.out) == (1, talk(llm, "abc")[1][0] + "\n")
    assert sentence in done.err


def test_think_asks_the_template(kvfold: Kvfold, tmp_path: Path) -> None:
    template = "{{ messages[-1]['content'] }}{{ '<think>' if thinking else '</think>' }}"
    file = write_gguf(tiny_model("v2-lite"), tmp_path / "thinks.gguf", keys=chat_keys(template))
    done = kvfold(*ARGUMENTS, file, stdin=lines("abc", "/think", "abc", "/think"))
    first, second = done.out.split("\n")[0], done.out.split("\n")[1:]
    assert first
    assert second == [""]  # the second answer is a thought without an end: it is on stderr
    thought = done.err.partition("thinking on\n")[2].partition("cut off after 8 tokens")[0]
    assert thought.strip()
    assert done.err.endswith("thinking off\n")


def test_json_is_one_object_a_turn(kvfold: Kvfold, chat_gguf: Path, llm: LLM) -> None:
    done = kvfold(*ARGUMENTS, "--json", chat_gguf, stdin=lines("abc", "def"))
    objects = [json.loads(line) for line in done.out.splitlines()]
    assert [item["text"] for item in objects] == talk(llm, "abc", "def")[1]
    assert [item["seed"] for item in objects] == [3, 3]
    assert objects[0]["reasoning"] == ""
    assert objects[1]["stats"]["reused_tokens"] > 0


def test_the_system_flag_is_the_system_message(kvfold: Kvfold, chat_gguf: Path, llm: LLM) -> None:
    done = kvfold(*ARGUMENTS, "-sys", "Be brief.", chat_gguf, stdin=lines("abc"))
    assert done.out == talk(llm, "abc", system="Be brief.")[1][0] + "\n"


def test_a_full_context_is_said_and_reset_helps(kvfold: Kvfold, chat_gguf: Path, llm: LLM) -> None:
    done = kvfold(*ARGUMENTS, "-c", "64", chat_gguf, stdin=lines("abc", "x" * 60, "/reset", "abc"))
    answer = talk(llm, "abc")[1][0]
    assert (done.code, done.out) == (1, f"{answer}\n{answer}\n")
    assert re.search(r"with this message the conversation has \d+ tokens, and 64 are remembered", done.err)
    assert "/reset starts a new conversation" in done.err


def test_an_answer_that_fills_the_context_says_so(kvfold: Kvfold, chat_gguf: Path) -> None:
    done = kvfold(*ARGUMENTS, "-c", "64", "-n", "-1", chat_gguf, stdin=lines("abc"))
    assert done.code == 0
    assert "cut off: all 64 tokens that are remembered are used. /reset starts" in done.err


def test_a_model_without_a_template_is_one_sentence(kvfold: Kvfold, tiny_gguf: Path) -> None:
    done = kvfold(*ARGUMENTS, tiny_gguf, stdin=lines("abc"))
    assert (done.code, done.out, done.err.count("\n")) == (1, "", 1)
    assert "no chat template" in done.err and "kvfold run" in done.err


def test_what_is_no_utf_8_is_refused(kvfold: Kvfold, chat_gguf: Path) -> None:
    done = kvfold(*ARGUMENTS, chat_gguf, stdin=b"ab\xff\n")
    assert (done.code, done.out) == (1, "")
    assert "byte 2 of a line is not UTF-8" in done.err


def test_a_model_given_twice_is_a_wrong_command_line(kvfold: Kvfold, chat_gguf: Path) -> None:
    assert kvfold("chat", chat_gguf, "-m", chat_gguf).code == 2


@pytest.mark.parametrize("words", ["hello", "tell me / of a fox", "nosuch.gguf"])
def test_what_can_only_be_a_message_is_no_model(kvfold: Kvfold, words: str) -> None:
    done = kvfold("chat", words)
    assert (done.code, done.out) == (2, "")
    assert "kvfold chat takes a model; messages are typed" in " ".join(done.err.split())


def test_chat_has_every_option_of_run_but_the_prompt() -> None:
    own = {"words", "prompt", "file"}
    assert set(inspect.signature(run).parameters) - own <= set(inspect.signature(chat).parameters)


def test_the_storyteller_ends_after_512_tokens_where_nobody_asks_for_more(
    kvfold: Kvfold, monkeypatch: pytest.MonkeyPatch, chat_gguf: Path
) -> None:
    monkeypatch.setattr("kvfold.load.embedded_model", lambda: chat_gguf)
    arguments = ("chat", "-c", "1024", "--seed", "3", "--ignore-eos", "-t", "1")
    assert "generation 512 tokens" in kvfold(*arguments, stdin=lines("abc")).err
    assert "generation 1019 tokens" in kvfold(*arguments, "-n", "-1", stdin=lines("abc")).err


def test_the_storyteller_is_told_at_its_own_temperature_unless_asked(
    kvfold: Kvfold, monkeypatch: pytest.MonkeyPatch, chat_gguf: Path
) -> None:
    def answer(*options: object) -> str:
        arguments = ("chat", "-c", "512", "--seed", "3", "--ignore-eos", "-n", "24", "-t", "1")
        return kvfold(*arguments, *options, stdin=lines("abc")).out

    named = answer(chat_gguf, "--temp", "0.6"), answer(chat_gguf)
    monkeypatch.setattr("kvfold.load.embedded_model", lambda: chat_gguf)
    assert named[0] != named[1]
    assert (answer(), answer("--temp", "0.8")) == named


# --- at a terminal ---------------------------------------------------------------------------------------------------


class Terminal:
    """`kvfold` in a terminal of its own."""

    def __init__(self, home: Path, *arguments: object) -> None:
        self._screen, side = pty.openpty()
        kept = {name: value for name, value in os.environ.items() if not name.startswith("KVFOLD_")}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "kvfold", *map(str, arguments)],
            env=kept | {"XDG_STATE_HOME": str(home), "TERM": "xterm", "COLUMNS": "100", "LINES": "40"},
            stdin=side,
            stdout=side,
            stderr=side,
            start_new_session=True,
            preexec_fn=heed_signals,  # noqa: PLW1509 (runs before any thread)
        )
        os.close(side)
        self.shown = ""

    def type(self, text: str) -> None:
        os.write(self._screen, text.encode())

    def read_more(self) -> bool:
        """Adds what is shown next to `shown`; False at the end of the process."""
        ready, _, _ = select.select([self._screen], [], [], 30.0)
        assert ready, f"nothing more is shown after {self.shown!r}"
        try:
            self.shown += os.read(self._screen, 4096).decode(errors="replace")
        except OSError:  # the process has closed its side
            return False
        return True

    def press_ctrl_c(self) -> None:
        """Until something is shown: readline misses a signal between showing its prompt and waiting for a key."""
        for _ in range(60):
            self.process.send_signal(signal.SIGINT)
            if select.select([self._screen], [], [], 0.5)[0]:
                return

    def wait_for(self, text: str) -> str:
        """What is shown up to `text`, which is then behind us."""
        while text not in self.shown:
            assert self.read_more(), f"{text!r} is not in {self.shown!r}"
        before, _, self.shown = self.shown.partition(text)
        return before

    def end(self) -> int:
        code = self.process.wait(timeout=60)
        os.close(self._screen)
        return code


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "state"


def test_ctrl_c_stops_the_turn_only_and_ctrl_d_leaves(chat_gguf: Path, home: Path) -> None:
    terminal = Terminal(home, "chat", "-c", "64K", "--ignore-eos", "--temp", "0", "-t", "1", chat_gguf)
    banner = terminal.wait_for("> ")
    assert "This is tiny (deepseek-v2), " in banner and "/help lists the commands" in banner
    terminal.type("abc\n")
    terminal.wait_for("abc\r\n")
    terminal.read_more()
    terminal.process.send_signal(signal.SIGINT)
    assert "generation" in terminal.wait_for("peak memory")
    terminal.wait_for("> ")
    terminal.type("/save " + str(home.parent / "talk.json") + "\n")
    terminal.wait_for("2 messages in")
    terminal.wait_for("> ")
    terminal.press_ctrl_c()
    terminal.wait_for("Ctrl-D or /quit leaves")
    terminal.wait_for("> ")
    terminal.type("\x04")
    assert terminal.end() == 0
    saved = json.loads((home.parent / "talk.json").read_text())
    assert saved[0] == {"role": "user", "content": "abc"}
    assert saved[1]["content"]
    history = home / "kvfold" / "chat_history"
    assert "abc" in history.read_text().splitlines()
    assert history.stat().st_mode & 0o077 == 0


def test_the_storyteller_says_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "file").touch()  # a state directory that cannot be
    terminal = Terminal(tmp_path / "file", "chat", "-t", "1")
    banner = " ".join(terminal.wait_for("> ").split())
    assert "kvfold's own storyteller" in banner
    assert "not an assistant" in banner
    terminal.type("/quit\n")
    assert terminal.end() == 0


# --- Markdown --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "end"),
    [
        ("", None),
        ("one\ntwo", None),
        ("one\n\n", None),
        ("one\n\nt", 5),
        ("one\n\n\n\nt", 7),
        ("- one\n\n  more of it", None),
        ("\n\none", None),
        ("```\na\n\nb\n```", None),
        ("```\na\n\nb\n```\n\nc", 14),
        ("~~~\n```\n\nb", None),
    ],
)
def test_a_block_ends_where_no_more_text_can_change_it(text: str, end: int | None) -> None:
    assert block_end(text) == end


def test_line_breaks_stay_but_code_is_untouched() -> None:
    assert keep_line_breaks("a\nb\n\n```\nc\nd\n```\ne") == "a  \nb  \n\n```\nc\nd\n```\ne  "


def test_markdown_in_pieces_is_shown_as_in_one() -> None:
    answer = "# A fox\n\nHe said **no**.\nShe said\n\n- one\n- two\n\n```python\na = 1\n\nb = 2\n```\n\nThe end."

    def shown(*pieces: str) -> list[str]:
        console = Console(file=io.StringIO(), width=60, color_system=None)
        blocks = MarkdownBlocks(console)
        for piece in pieces:
            blocks.write(piece)
        blocks.finish()
        return [line.rstrip() for line in console.file.getvalue().splitlines() if line.strip()]  # type: ignore[attr-defined]

    whole = shown(answer)
    assert "He said no." in whole and "She said" in whole and " • one" in whole
    assert shown(*answer) == whole
