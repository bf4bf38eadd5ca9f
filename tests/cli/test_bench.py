"""`kvfold bench`: what it prints, and which model it measures. Figures are tests/bench's."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kit.command_line import Kvfold, start
from kvfold.backends import gpu
from kvfold.bench.measure import Rig
from kvfold.cli.terminal import print_json
from kvfold.formats import synthetic

SMALL = ("--shape", "tiny", "-t", "1", "-r", "2", "--workspace", "64M")


def test_json_is_one_list_and_nothing_else(kvfold: Kvfold) -> None:
    done = kvfold("bench", *SMALL, "-p", "16,24", "-n", "3", "-d", "0,70", "-o", "json")
    assert done.code == 0
    rows = json.loads(done.out)
    assert done.out.count("\n") == 1
    assert [(row["n_prompt"], row["n_gen"], row["n_depth"]) for row in rows] == [
        (p, n, d) for d in (0, 70) for p, n in ((16, 0), (24, 0), (0, 3))
    ]
    assert all(len(row["samples_ts"]) == 2 for row in rows)
    assert "2 of 2: tg3 @ d70 " in done.err


def test_a_table_is_the_default(kvfold: Kvfold) -> None:
    done = kvfold("bench", *SMALL, "-p", "16", "-n", "0", "-mla", "1,2", "-fa", "on")
    assert done.code == 0
    lines = done.out.splitlines()
    assert lines[0].startswith("| model ")
    assert "absorbed" in lines[2] and "decompressed" in lines[3]
    assert lines[-1].startswith("build: kvfold ")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
@pytest.mark.parametrize("output", ["json", "md"])
def test_a_signal_prints_the_rows_there_are(output: str, number: signal.Signals, code: int) -> None:
    few = ("--shape", "tiny", "-t", "1", "--workspace", "64M", "-r", "1000000", "-p", "16", "-n", "3", "-o", output)
    process = start("bench", *few, stdout=subprocess.PIPE)
    assert process.stderr is not None
    assert any(line.startswith(b"2 of 1000000: tg3 ") for line in process.stderr)
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == code
    if output == "json":
        rows = json.loads(out)
        assert [(row["n_prompt"], row["n_gen"], row["is_cut"]) for row in rows] == [(16, 0, True), (0, 3, True)]
        assert all(len(row["samples_ts"]) >= 2 for row in rows)
    else:
        assert out.startswith(b"| model ")
        assert b"row 1, pp16: cut short, samples: " in out and b"row 2, tg3: cut short, samples: " in out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--device", "cuda"), "kvfold: No backend can run this model: cuda: no NVIDIA driver was found"),
        (
            ("--backend", "native", "-ctk", "f16,fp8"),
            "kvfold: No backend can run this model: native: keeps its cache",
        ),
        (("-d", "2000000000", "--device", "cpu"), "kvfold: 2000000512 cached tokens take "),
        (
            ("--device", "cpu", "--mmap", "on"),
            "kvfold: mmap=on: these weights are in memory, there is no file to map.",
        ),
    ],
)
def test_what_cannot_be_loaded_is_refused_before_weights_are_made(
    kvfold: Kvfold, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], sentence: str
) -> None:
    """8 GiB and half a minute of deepseek-v2-lite; a later row's settings count too."""
    monkeypatch.setattr(gpu, "driver", lambda: gpu.Driver(0, ()))
    monkeypatch.setattr(synthetic, "_chunks", lambda *ignored: pytest.fail("weights are made"))
    done = kvfold("bench", *SMALL, *arguments)
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith(sentence)


def test_lists_may_be_given_several_times(kvfold: Kvfold) -> None:
    done = kvfold("bench", *SMALL, "-p", "8", "-p", "9,10", "-n", "0", "-b", "4", "-o", "json")
    rows = json.loads(done.out)
    assert [(row["n_prompt"], row["n_batch"]) for row in rows] == [(8, 4), (9, 4), (10, 4)]
    assert [row["plan"][0]["steps"] + sum(p["steps"] for p in row["plan"][1:]) for row in rows] == [2, 3, 3]


def test_a_file_is_measured_as_well(kvfold: Kvfold, tiny_gguf: Path) -> None:
    done = kvfold("bench", tiny_gguf, "-p", "8", "-n", "0", "-r", "1", "-t", "1", "-ctk", "f32", "-o", "json")
    (row,) = json.loads(done.out)
    assert (row["model_filename"], row["type_k"], row["stddev_ts"]) == (str(tiny_gguf), "f32", 0.0)


def test_a_row_has_the_settings_that_repeat_it(kvfold: Kvfold, tiny_gguf: Path) -> None:
    few = ("-p", "8", "-n", "0", "-r", "1", "-t", "1", "--dtype", "float32", "--workspace", "48M", "-o", "json")
    for mmap, place in (("on", "mapped: requested"), ("off", "copied into memory at ")):
        (row,) = json.loads(kvfold("bench", tiny_gguf, *few, "--mmap", mmap).out)
        assert (row["dtype"], row["workspace_bytes"], row["use_mmap"]) == ("float32", 48 << 20, mmap == "on")
        assert row["weights"].startswith(place)


def test_what_loading_found_is_said_once(kvfold: Kvfold, tiny_gguf: Path) -> None:
    few = ("-n", "0", "-r", "1", "-t", "1", "-mla", "1,2")
    note = "note: n_ctx=5056 is beyond the 4096 tokens the model was made for.\n"
    assert kvfold("bench", tiny_gguf, *few, "-p", "8", "-d", "5000").err.count(note) == 1
    assert "note:" not in kvfold("bench", tiny_gguf, *few, "-p", "8", "-d", "4088").err


def test_a_model_and_a_shape_exclude_each_other(
    kvfold: Kvfold, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = ("-p", "4", "-n", "0", "-r", "1", "-t", "1", "-o", "json")
    assert kvfold("bench", tiny_gguf, "--shape", "tiny", *few).code == 2
    monkeypatch.setenv("KVFOLD_MODEL", str(tiny_gguf))
    assert json.loads(kvfold("bench", "--shape", "tiny", *few).out)[0]["model_filename"] == "tiny"
    monkeypatch.setenv("KVFOLD_SHAPE", "deepseek-v3")
    monkeypatch.delenv("KVFOLD_MODEL")
    assert json.loads(kvfold("bench", tiny_gguf, *few).out)[0]["model_filename"] == str(tiny_gguf)


def test_a_model_may_be_written_as_llama_bench_has_it(
    kvfold: Kvfold, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = ("-p", "4", "-n", "0", "-r", "1", "-t", "1", "-o", "json")
    monkeypatch.setenv("KVFOLD_MODEL", "/no/such.gguf")
    monkeypatch.setenv("KVFOLD_SHAPE", "deepseek-v3")
    assert json.loads(kvfold("bench", "-m", tiny_gguf, *few).out)[0]["model_filename"] == str(tiny_gguf)
    assert kvfold("bench", "-m", tiny_gguf, tiny_gguf, *few).code == 2
    assert kvfold("bench", "-m", tiny_gguf, "--shape", "tiny", *few).code == 2


@pytest.mark.parametrize("flag", [("--layers", "1"), ("--type", "q4_k"), ("--legacy-kv-b",)])
def test_what_makes_a_shape_is_refused_beside_a_file(
    kvfold: Kvfold, tiny_gguf: Path, flag: tuple[str, ...]
) -> None:
    """Taken and passed over it would look as if it had been measured."""
    done = kvfold("bench", tiny_gguf, "-p", "4", "-n", "0", *flag)
    assert (done.code, done.out) == (2, "")
    assert f"{flag[0]}: of a --shape" in done.err


def test_an_opponent_adds_its_rate_and_the_ratio(kvfold: Kvfold, tmp_path: Path) -> None:
    script = tmp_path / "peer.py"
    script.write_text('print(\'[{"n_prompt": 16, "n_gen": 0, "n_depth": 0, "samples_ts": [0.5]}]\')')
    done = kvfold("bench", *SMALL, "-p", "16", "-n", "0", "--opponent", f"{sys.executable} {script}")
    assert done.code == 0
    assert "opponents t/s" in done.out and "0.50 ± 0.00" in done.out


def test_a_signal_that_comes_twice_prints_them_too(kvfold: Kvfold, monkeypatch: pytest.MonkeyPatch) -> None:
    """`timeout` sends it to the process, and to the group that it is in."""

    def kill_before(function: Callable[..., Any]) -> Callable[..., Any]:
        def killed(*arguments: Any) -> Any:
            os.kill(os.getpid(), signal.SIGTERM)
            return function(*arguments)

        return killed

    functions = itertools.chain([Rig.sample], itertools.repeat(kill_before(Rig.sample)))
    monkeypatch.setattr(Rig, "sample", lambda *of: next(functions)(*of))  # noqa: PLW0108 (another function each time)
    monkeypatch.setattr("kvfold.cli.bench.print_json", kill_before(print_json))
    done = kvfold("bench", *SMALL, "-p", "16", "-n", "0", "-o", "json")
    [found] = json.loads(done.out)
    assert (done.code, len(found["samples_ts"]), found["is_cut"]) == (143, 1, True)


def test_an_opponent_that_computes_is_ended_with_us(tmp_path: Path) -> None:
    script, pid = tmp_path / "peer.py", tmp_path / "pid"
    script.write_text(f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(60)")
    process = start("bench", *SMALL, "-p", "16", "-n", "0", "--opponent", f"{sys.executable} {script}")
    while not (pid.exists() and pid.read_text()):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


@pytest.mark.parametrize("output", ["json", "md"])
def test_an_opponent_that_fails_later_leaves_the_rows_there_are(
    kvfold: Kvfold, tmp_path: Path, output: str
) -> None:
    """At its second start, in the second of three rounds."""
    script = tmp_path / "peer.py"
    script.write_text(
        "import pathlib, sys\n"
        "mark = pathlib.Path(__file__).with_suffix('.ran')\n"
        "if mark.exists(): sys.exit('boom')\n"
        "mark.touch()\n"
        'print(\'[{"n_prompt": 16, "n_gen": 0, "samples_ts": [0.5]}]\')'
    )
    peer = ("--opponent", f"{sys.executable} {script}")
    done = kvfold("bench", *SMALL, "-r", "3", "-p", "16", "-n", "0", "-o", output, *peer)
    assert done.code == 1
    assert done.err.splitlines()[-1].startswith("kvfold: opponent ") and "boom" in done.err
    if output == "json":
        [found] = json.loads(done.out)
        assert (len(found["samples_ts"]), found["is_cut"]) == (1, True)
        assert found["opponents"][0]["samples_ts"] == [0.5]
    else:
        assert "row 1, pp16: cut short, samples: 1" in done.out


def test_the_ratio_is_to_the_fastest_of_several_opponents(
    kvfold: Kvfold, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "peer.py"
    script.write_text('import sys; print(\'[{"n_prompt": 16, "n_gen": 0, "samples_ts": [%s]}]\' % sys.argv[1])')
    peer = f"{sys.executable} {script}"
    monkeypatch.setenv("KVFOLD_OPPONENT", f"{peer} 0.25; {peer} 0.75")
    [found] = json.loads(kvfold("bench", *SMALL, "-p", "16", "-n", "0", "-r", "1", "-o", "json").out)
    assert [one["samples_ts"] for one in found["opponents"]] == [[0.25], [0.75]]
    assert found["ratio_to_best"] == pytest.approx(found["avg_ts"] / 0.75)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("-p", "0", "-n", "0"), "kvfold: Nothing to measure"),
        (("-p", "x"), "kvfold: x: 'x' is not a number"),
        (("-ctk", "q3_k"), "kvfold: cache_type=q3_k: allowed are"),
        (("-mla", "auto,7"), "kvfold: mla=7: allowed are"),
        (("--shape", "llama"), "kvfold: llama: there is no such shape"),
        (("--opponent", "'"), "kvfold: opponent=': No closing quotation"),
        (("-ngl", "99"), "kvfold: -ngl is not there yet"),
    ],
)
def test_what_cannot_be_measured_is_one_sentence(kvfold: Kvfold, arguments: tuple[str, ...], sentence: str) -> None:
    done = kvfold("bench", *arguments)
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith(sentence)
