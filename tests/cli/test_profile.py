"""`--profile`, `--check-numerics`, `--deterministic` and `--isa` on the command line."""

from __future__ import annotations

import json
from pathlib import Path

from kit.command_line import Kvfold
from kvfold import _native

FIELDS = {"phase", "op", "calls", "seconds", "share", "gbs", "gmacs", "of_ceiling", "bound_by"}


def test_run_shows_where_the_time_went_and_stdout_is_the_answer_alone(kvfold: Kvfold, tiny_gguf: Path) -> None:
    plain = kvfold("run", tiny_gguf, "abc", "-n", "4", "-c", "64", "--temp", "0")
    done = kvfold("run", tiny_gguf, "abc", "-n", "4", "-c", "64", "--temp", "0", "--profile")
    assert (done.code, done.out) == (0, plain.out)
    lines = done.err.splitlines()
    assert lines.index("prompt:") < lines.index("generation:")
    assert sum(line.startswith("| experts ") for line in lines) == 2
    assert "| op " not in plain.err


def test_json_has_the_profile_as_one_list(kvfold: Kvfold, tiny_gguf: Path) -> None:
    answer = json.loads(kvfold("run", tiny_gguf, "abc", "-n", "2", "-c", "64", "--profile", "--json").out)
    assert all(line.keys() == FIELDS for line in answer["profile"])
    for phase in ("prompt", "generation"):
        assert abs(sum(line["share"] for line in answer["profile"] if line["phase"] == phase) - 1) < 1e-6


def test_bench_has_it_in_its_rows_where_it_is_asked_for(kvfold: Kvfold) -> None:
    small = ("--shape", "tiny", "-t", "1", "-r", "1", "-p", "8", "-n", "2", "-o", "json")
    assert all("profile" not in row for row in json.loads(kvfold("bench", *small).out))
    rows = json.loads(kvfold("bench", *small, "--profile").out)
    assert [{line["phase"] for line in row["profile"]} for row in rows] == [{"prompt"}, {"generation"}]
    head = next(line for line in rows[1]["profile"] if line["op"] == "embed")
    assert head["calls"] == 2, "the warm-up does not count"


def test_the_set_that_ran_is_reported(kvfold: Kvfold) -> None:
    small = ("--shape", "tiny", "-t", "1", "-r", "1", "-p", "4", "-n", "0", "-o", "json", "--deterministic")
    try:
        for isa in _native.isa_names():
            (row,) = json.loads(kvfold("bench", *small, "--isa", isa, "--check-numerics").out)
            assert row["isa"] == isa
    finally:
        _native.force_isa("auto")
    done = kvfold("run", "--isa", "sse9", "text")
    assert done.err == "kvfold: isa=sse9: allowed are auto, generic, avx2, avx512, amx.\n"
