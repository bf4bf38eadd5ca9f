"""Lists, cases, rounds in turn with an opponent, and the rows they give."""

from __future__ import annotations

import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvfold.bench.measure import Case, Rig
from kvfold.bench.opponent import Opponent, case_of, rate_of, rows_in
from kvfold.bench.report import markdown, quantiles, row
from kvfold.bench.sweep import Result, cases_of, made_in_memory, parse_counts, sweep, variants
from kvfold.errors import NumericsError, SettingError
from kvfold.formats.checkpoint import Checkpoint
from kvfold.formats.synthetic import SHAPES, synthetic_checkpoint


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return synthetic_checkpoint(SHAPES["tiny"])


SETTINGS: dict[str, Any] = {
    "mla": ["auto"],
    "fa": ["auto"],
    "cache_type": ["f16"],
    "threads": [1],
    "batch_rows": [64],
    "dtype": "auto",
    "backend": "native",
    "workspace_bytes": 64 << 20,
}


def results(
    checkpoint: Checkpoint, cases: list[Case], opponents: tuple[Opponent, ...] = (), **lists: Any
) -> list[Result]:
    chosen = variants(cases, **(SETTINGS | lists))
    return list(sweep(checkpoint, chosen, cases, repetitions=3, opponents=opponents))


# --- lists ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "counts"),
    [
        ("512", [512]),
        ("512,2048", [512, 2048]),
        ("1-4", [1, 2, 3, 4]),
        ("64-256+64", [64, 128, 192, 256]),
        ("64-250+64", [64, 128, 192]),
        ("1-64*2,100", [1, 2, 4, 8, 16, 32, 64, 100]),
        ("7-7", [7]),
        ("0", [0]),
    ],
)
def test_lists_are_llama_benchs(text: str, counts: list[int]) -> None:
    assert parse_counts(text) == counts


@pytest.mark.parametrize(
    "text", ["", "a", "1,", "1--2", "-1", "1-4+0", "1-4*1", "0-4*2", "5-2", "1-4-8", "1-999999999"]
)
def test_lists_that_mean_nothing_are_refused(text: str) -> None:
    with pytest.raises(SettingError):
        parse_counts(text)


def test_cases_come_in_llama_benchs_order_and_once() -> None:
    cases = cases_of([512, 0, 2048], [128], [0, 4096])
    assert [case.name for case in cases] == [
        "pp512", "pp2048", "tg128", "pp512 @ d4096", "pp2048 @ d4096", "tg128 @ d4096",
    ]  # fmt: skip
    assert cases_of([0], [8, 8], [0]) == [Case(0, 8, 0)]
    with pytest.raises(SettingError, match="both 0"):
        cases_of([0], [0], [4096])


@pytest.mark.parametrize("end", [KeyboardInterrupt, SystemExit, NumericsError, MemoryError])
def test_what_ends_a_sweep_comes_behind_what_was_sampled_until_then(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, end: type[BaseException]
) -> None:
    """Of the second variant two rounds of one case and one of the other."""
    sample, calls = Rig.sample, itertools.count(1)

    def interrupted(rig: Rig, case: Case) -> Any:
        if next(calls) == 10:
            raise end
        return sample(rig, case)

    monkeypatch.setattr(Rig, "sample", interrupted)
    cases = cases_of([20], [3], [0])
    chosen = variants(cases, **(SETTINGS | {"mla": ["1", "2"]}))
    found = []
    with pytest.raises(end):
        for result in sweep(checkpoint, chosen, cases, repetitions=3):
            found.append(result)
    assert [(r.variant.settings.mla.value, r.case.name, len(r.samples), r.is_cut) for r in found] == [
        ("1", "pp20", 3, False), ("1", "tg3", 3, False), ("2", "pp20", 2, True), ("2", "tg3", 1, True),
    ]  # fmt: skip
    assert [row(r)["is_cut"] for r in found] == [False, False, True, True]
    (remark,) = [line for line in markdown([row(r) for r in found]) if "tg3: cut short" in line]
    assert remark == "row 4, tg3: cut short, samples: 1"


# --- rows -------------------------------------------------------------------------------------------------------------

# What llama-bench (tools/llama-bench/llama-bench.cpp) prints of a CPU run, and ik_llama.cpp's mla_attn.
LLAMA_BENCH = {
    "build_commit": str, "build_number": int, "cpu_info": str, "gpu_info": str, "backends": str,
    "model_filename": str, "model_type": str, "model_size": int, "model_n_params": int, "n_batch": int,
    "n_ubatch": int, "n_threads": int, "type_k": str, "type_v": str, "n_gpu_layers": int, "flash_attn": int,
    "mla_attn": int, "n_prompt": int, "n_gen": int, "n_depth": int, "test_time": str, "avg_ns": int,
    "stddev_ns": int, "avg_ts": float, "stddev_ts": float, "samples_ns": list, "samples_ts": list,
    "use_mmap": bool,
}  # fmt: skip


def test_rows_have_llama_benchs_fields_and_arithmetic(checkpoint: Checkpoint) -> None:
    rows = [row(result) for result in results(checkpoint, cases_of([20], [6], [0, 70]))]
    assert [(r["n_prompt"], r["n_gen"], r["n_depth"]) for r in rows] == [
        (20, 0, 0), (0, 6, 0), (20, 0, 70), (0, 6, 70),
    ]  # fmt: skip
    for found in rows:
        for field, kind in LLAMA_BENCH.items():
            assert type(found[field]) is kind, field
        assert json.loads(json.dumps(found)) == found
        ns, tokens = found["samples_ns"], found["n_prompt"] + found["n_gen"]
        assert len(ns) == len(found["samples_ts"]) == len(found["samples_share"]) == 3
        assert found["avg_ns"] == round(statistics.mean(ns))
        assert found["samples_ts"] == [1e9 * tokens / one for one in ns]
        assert found["stddev_ts"] == pytest.approx(statistics.stdev(found["samples_ts"]))
        assert found["share"] == statistics.median(found["samples_share"]) > 0
        assert found["model_size"] == checkpoint.nbytes
        assert (found["type_k"], found["flash_attn"], found["mla_attn"], found["n_threads"]) == ("f16", -1, -1, 1)
        assert found["backend"] == "native" and found["isa"]
        assert (found["dtype"], found["workspace_bytes"], found["deterministic"]) == ("int8", 64 << 20, False)
        assert (found["use_mmap"], found["weights"]) == (False, "in memory already")
        assert found["ceilings"]["int8"]["best_gmacs"] >= found["ceilings"]["int8"]["gmacs"] > 0
        assert "opponents" not in found
    prompt, generation = rows[2], rows[3]
    assert prompt["bound_by"] == "int8" and "token_ms" not in prompt
    assert generation["bound_by"] == "read"
    assert generation["token_ms"]["p99"] >= generation["token_ms"]["p50"] > 0
    assert generation["read_ms"]["p99_over_p50"] >= 1
    assert [(plan["path"], plan["steps"]) for plan in generation["plan"]] == [("absorbed", 6)]


def test_a_share_is_the_rate_over_the_ceiling_beside_it(checkpoint: Checkpoint) -> None:
    prompt, generation = results(checkpoint, cases_of([20], [6], [0]))
    for sample, share in zip(prompt.samples, row(prompt)["samples_share"], strict=True):
        rate = sample.run.multiply_adds / (sample.run.ns / 1e9)
        assert share == pytest.approx(rate / sample.ceilings.multiply_adds["int8"])
    for sample, share in zip(generation.samples, row(generation)["samples_share"], strict=True):
        rate = sample.run.nbytes / (sample.run.ns / 1e9)
        seconds_of_a_read = statistics.mean(sample.ceilings.read_ns) / 1e9
        assert share == pytest.approx(rate / (sample.ceilings.read_bytes / seconds_of_a_read))


def test_every_combination_of_settings_is_a_row_of_its_own(checkpoint: Checkpoint) -> None:
    found = results(checkpoint, [Case(9, 0, 0)], mla=["0", "2"], fa=["0", "1"], threads=[1, 2], cache_type=["f32"])
    rows = [row(result) for result in found]
    assert {(r["mla_attn"], r["flash_attn"], r["n_threads"]) for r in rows} == {
        (mla, fa, threads) for mla in (0, 2) for fa in (0, 1) for threads in (1, 2)
    }
    assert {r["plan"][0]["path"] for r in rows if r["mla_attn"] == 0} == {"standard"}
    assert {r["plan"][0]["fused"] for r in rows if r["flash_attn"] == 0} == {False}


def test_what_is_listed_twice_is_one_row() -> None:
    """As cases are: more samples are `repetitions`."""
    twice = {"mla": ["1", "1"], "fa": ["1", "1"], "threads": [1, 2, 1], "cache_type": ["f16", "f16"]}
    found = variants([Case(9, 0, 0)], **(SETTINGS | twice | {"batch_rows": [64, 64]}))
    assert [variant.settings.threads for variant in found] == [1, 2]


def test_rows_and_notices_say_what_varies(checkpoint: Checkpoint) -> None:
    cases, said = [Case(20, 0, 0)], list[str]()
    chosen = variants(cases, **(SETTINGS | {"batch_rows": [8, 16], "mla": ["1", "2"]}))
    rows = [row(found) for found in sweep(checkpoint, chosen, cases, repetitions=1, notice=said.append)]
    assert [line.partition(" t/s")[2] for line in said if not line.startswith("note: ")] == [
        " with -b 8 -mla 1", " with -b 8 -mla 2", " with -b 16 -mla 1", " with -b 16 -mla 2",
    ]  # fmt: skip
    table = [[cell.strip() for cell in line.split("|")] for line in list(markdown(rows))[:6]]
    at = table[0].index("n_batch")
    assert [cells[at] for cells in table[2:]] == ["8", "8", "16", "16"]
    assert "n_batch" not in next(markdown(rows[:2]))


def test_settings_are_refused_before_anything_is_loaded() -> None:
    with pytest.raises(SettingError, match="cache_type=q3: allowed are"):
        results(None, [Case(1, 0, 0)], cache_type=["f16", "q3"])  # type: ignore[arg-type]


ONE_VARIANT: dict[str, Any] = {
    "mla": ["auto"],
    "fa": ["auto"],
    "cache_type": ["f16"],
    "threads": [2],
    "batch_rows": [None],
    "dtype": "auto",
    "backend": "native",
    "workspace_bytes": None,
}


def test_what_is_asked_for_twice_is_one_variant_though_the_free_memory_changed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    free = itertools.count(100 << 20, 1 << 20)
    monkeypatch.setattr("kvfold.load.default_workspace_bytes", lambda free_bytes: next(free))
    found = variants([Case(20, 0, 0)], **(ONE_VARIANT | {"mla": ["auto", "1", "auto"]}))
    assert [variant.settings.mla.value for variant in found] == ["auto", "1"]


def test_a_row_says_the_workspace_that_its_threads_had(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The default is raised at load to what they need; another run is given the figure of the row."""
    monkeypatch.setattr("kvfold.load.default_workspace_bytes", lambda free_bytes: 1 << 20)
    case = Case(20, 0, 0)
    (result,) = sweep(checkpoint, variants([case], **(ONE_VARIANT | {"threads": [16]})), [case], repetitions=1)
    assert row(result)["workspace_bytes"] == result.loaded.settings.workspace_bytes > 1 << 20


def test_a_cache_that_memory_does_not_hold_is_refused_before_it_is_filled(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(n_prompt=512, n_gen=0, n_depth=0)
    ours = variants([case], **ONE_VARIANT)
    monkeypatch.setattr("kvfold.bench.sweep.available_memory_bytes", lambda: 10_000)
    with pytest.raises(
        SettingError, match=r"512 cached tokens take 0\.0 GiB and 0\.0 are free: shorten -p, -n or -d"
    ):
        next(sweep(checkpoint, ours, [case], repetitions=1))


def test_a_cache_in_a_gpus_memory_is_not_held_against_the_systems(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    class LoadedInstead(Exception): ...

    def load_instead(*arguments: Any) -> None:
        raise LoadedInstead

    case = Case(n_prompt=512, n_gen=0, n_depth=0)
    ours = variants([case], **ONE_VARIANT)
    on_gpu = SimpleNamespace(candidate=SimpleNamespace(free_bytes=lambda device: 1 << 37))
    monkeypatch.setattr("kvfold.bench.sweep.available_memory_bytes", lambda: 10_000)
    monkeypatch.setattr("kvfold.bench.sweep.backend_for", lambda *arguments: on_gpu)
    monkeypatch.setattr("kvfold.bench.sweep.load", load_instead)
    with pytest.raises(LoadedInstead):
        next(sweep(checkpoint, ours, [case], repetitions=1))


def test_percentiles_are_those_of_all_times() -> None:
    found = quantiles([1_000_000] * 98 + [3_000_000] * 2)
    assert (found["p50"], found["p99"], found["p99_over_p50"]) == (1.0, 3.0, 3.0)


def test_the_table_has_a_line_for_each_row_and_names_the_ceilings(checkpoint: Checkpoint) -> None:
    rows = [row(result) for result in results(checkpoint, cases_of([20], [6], [70]))]
    rows[0]["discarded"] = [{"ns": 1}]
    lines = list(markdown(rows))
    assert len({len(line) for line in lines[:4]}) == 1
    assert all(line.startswith("| ") and line.endswith(" |") for line in lines[:4])
    assert "pp20 @ d70" in lines[2] and f"{rows[0]['avg_ts']:.2f} ± {rows[0]['stddev_ts']:.2f}" in lines[2]
    assert "% of int8 |" in lines[2] and "% of read |" in lines[3]
    assert lines[3].endswith(f" {rows[1]['read_ms']['p99_over_p50']:.2f} |")
    rest = "\n".join(lines[4:])
    assert "int8 " in rest and "GB/s" in rest
    assert "row 1, pp20 @ d70: 1 samples discarded" in rest


def test_weights_that_do_not_fit_are_refused_before_they_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvfold.bench.sweep.available_memory_bytes", lambda: 1 << 30)
    with pytest.raises(
        SettingError, match=r"deepseek-v3 in bf16 takes 134\d\.\d GB, and 1\.1 GB of memory are free"
    ):
        made_in_memory("deepseek-v3", layers=None, type="bf16", legacy_kv_b=False, seed=0, variants=())


# --- opponents --------------------------------------------------------------------------------------------------------

# Prints llama-bench's JSON with the rates of the round that its own calls count.
SCRIPT = """
import json, pathlib, sys
count = pathlib.Path(sys.argv[1])
calls = int(count.read_text()) if count.exists() else 0
count.write_text(str(calls + 1))
print("[")
print("============ Repacked 378 tensors")
rows = [
    {"n_prompt": 20, "n_gen": 0, "n_depth": 0, "samples_ts": [100.0 * (calls + 1)]},
    {"n_prompt": 70, "n_gen": 6, "test": "tg6@pp70", "samples_ts": [50.0, 10.0, 40.0]},
    {"n_prompt": 999, "n_gen": 0, "n_depth": 0, "samples_ts": [1.0]},
]
print(",\\n".join(json.dumps(row) for row in rows))
print("]")
"""


def scripted(script: Path, text: str, *arguments: Path) -> Opponent:
    """An opponent that runs this text of Python."""
    script.write_text(text)
    quoted = " ".join(f'"{argument}"' for argument in (script, *arguments))
    [parsed] = Opponent.parse_all(f"{sys.executable} {quoted}")
    return parsed


@pytest.fixture
def opponent(tmp_path: Path) -> Opponent:
    return scripted(tmp_path / "llama bench.py", SCRIPT, tmp_path / "count")


def test_an_opponent_runs_once_a_round_and_its_rates_pair_with_ours(
    checkpoint: Checkpoint, opponent: Opponent
) -> None:
    cases = [Case(20, 0, 0), Case(21, 0, 0), Case(0, 6, 70)]
    prompt, alone, generation = results(checkpoint, cases, (opponent,))
    [beside], [beside_generation] = prompt.pairs, generation.pairs
    assert beside.samples_ts == (100.0, 200.0, 300.0)
    ratios = tuple(ours / theirs for ours, theirs in zip(prompt.samples_ts, (100.0, 200.0, 300.0), strict=True))
    assert beside.ratios == ratios
    assert beside_generation.samples_ts == (40.0, 40.0, 40.0)  # the median of an opponent's own repetitions
    assert alone.pairs == ()
    [found] = row(prompt)["opponents"]
    assert found["median_ratio"] == row(prompt)["ratio_to_best"] == sorted(ratios)[1]
    assert found["command"] == opponent.command
    lines = list(markdown([row(prompt), row(alone)]))
    cells = [cell.strip() for cell in lines[2].split("|")]
    assert "opponents t/s" in lines[0]
    assert cells[-3:-1] == ["200.00 ± 100.00", f"{found['median_ratio']:.2f} x"]
    assert len({len(line) for line in lines[:4]}) == 1


def test_the_ratio_is_to_the_fastest_opponent_of_each_round(
    checkpoint: Checkpoint, opponent: Opponent, tmp_path: Path
) -> None:
    steady = tmp_path / "steady.py"
    steady.write_text("""print('[{"n_prompt": 20, "n_gen": 0, "n_depth": 0, "samples_ts": [150.0]}]')""")
    both = Opponent.parse_all(f"{opponent.command}; {sys.executable} {steady}")
    assert both[0] == opponent
    [prompt] = results(checkpoint, [Case(20, 0, 0)], both)
    best = (150.0, 200.0, 300.0)  # beside 100, 200 and 300
    ratios = [ours / theirs for ours, theirs in zip(prompt.samples_ts, best, strict=True)]
    assert row(prompt)["ratio_to_best"] == pytest.approx(statistics.median(ratios))
    assert len(row(prompt)["opponents"]) == 2


# Prints a row, then counts 20 steps of 5 ms in a file until the next one.
COUNTING = """
import pathlib, sys, time
starts, count = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
starts.write_text(starts.read_text() + "x" if starts.exists() else "x")
for rate in (1.0, 2.0, 3.0):
    print('{"n_prompt": 20, "n_gen": 0, "samples_ts": [%s]},' % rate, flush=True)
    for _ in range(20):
        time.sleep(0.005)
        with count.open("ab") as file:
            file.write(b"x")
"""


@pytest.fixture
def counting(tmp_path: Path) -> Opponent:
    return scripted(tmp_path / "counting.py", COUNTING, tmp_path / "starts", tmp_path / "count")


def test_an_opponent_is_stopped_between_its_rows(counting: Opponent, tmp_path: Path) -> None:
    count = tmp_path / "count"
    lengths = []
    for _ in counting.rows():
        time.sleep(0.02)  # a signal is not there at once
        before = count.stat().st_size if count.exists() else 0
        time.sleep(0.2)
        assert (count.stat().st_size if count.exists() else 0) == before
        lengths.append(before)
    assert lengths[0] < 20 <= lengths[1] < 40 <= lengths[2] < 60 == count.stat().st_size


def test_an_opponent_that_repeats_its_cases_is_started_once(
    checkpoint: Checkpoint, counting: Opponent, tmp_path: Path
) -> None:
    [prompt] = results(checkpoint, [Case(20, 0, 0)], (counting,))
    assert prompt.pairs[0].samples_ts == (1.0, 2.0, 3.0)
    assert (tmp_path / "starts").read_text() == "x"


@pytest.fixture
def endless(tmp_path: Path) -> Opponent:
    text = (
        "import os, sys; open(sys.argv[1], 'w').write(str(os.getpid()))\n"
        'while True: print(\'{"n_prompt": 1, "n_gen": 0, "samples_ts": [1.0]}\', flush=True)'
    )
    return scripted(tmp_path / "endless.py", text, tmp_path / "pid")


# Runs another case from its second start on.
CHANGING = """
import json, pathlib, sys
count = pathlib.Path(sys.argv[1])
rows = 21 if count.exists() else 20
count.write_text("")
print(json.dumps({"n_prompt": rows, "n_gen": 0, "samples_ts": [100.0]}))
"""


def test_an_opponent_that_stops_running_a_case_leaves_ours_its_samples(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    changing = scripted(tmp_path / "changing.py", CHANGING, tmp_path / "count")
    [prompt] = results(checkpoint, [Case(20, 0, 0)], (changing,))
    assert (len(prompt.samples), prompt.pairs) == (3, ())


def test_an_opponent_is_ended_once_there_are_enough_rows(
    checkpoint: Checkpoint, endless: Opponent, tmp_path: Path
) -> None:
    [prompt] = results(checkpoint, [Case(1, 0, 0)], (endless,))
    assert prompt.pairs[0].samples_ts == (1.0, 1.0, 1.0)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_a_stopped_opponent_does_not_outlive_us(endless: Opponent, tmp_path: Path) -> None:
    killed = f"""
import os, signal
from kvfold.bench.opponent import Opponent
rows = Opponent.parse_all({endless.command!r})[0].rows()
next(rows)
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", killed], check=False).returncode == -signal.SIGKILL
    process = Path("/proc", (tmp_path / "pid").read_text(), "stat")
    for _ in range(100):
        if not process.exists() or process.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.05)
    pytest.fail("it is still there")


def test_rows_are_found_between_other_lines() -> None:
    text = (
        'load {x} {"a": 1}\n[\n{"n_prompt": 1, "n_gen": 0, "samples_ts": [2.0], "deep": {"n": 1}}, {"n_prompt": 3,'
    )
    assert [found["n_prompt"] for found in rows_in(text)] == [1]


def test_rows_without_a_depth_are_ik_llama_cpps() -> None:
    assert case_of({"n_prompt": 512, "n_gen": 0}) == Case(512, 0, 0)
    assert case_of({"n_prompt": 4096, "n_gen": 32, "test": "tg32@pp4096"}) == Case(0, 32, 4096)
    assert case_of({"n_prompt": 512, "n_gen": 32, "test": "pp512+tg32"}) == Case(512, 32, 0)
    assert case_of({"n_prompt": 0, "n_gen": 8, "n_depth": 64}) == Case(0, 8, 64)


@pytest.mark.parametrize("samples", [[], [0.0], ["fast"], 3.0, None])
def test_samples_that_are_no_rates_are_refused(samples: Any) -> None:
    with pytest.raises(SettingError, match="samples_ts"):
        rate_of({"samples_ts": samples})


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ("", "expected a command"),
        ("llama-bench;; llama-bench", "expected a command"),
        ("llama-bench; ", "expected a command"),
        ("llama-bench 'x", "No closing quotation"),
        ("/no/such/llama-bench -o json", "cannot be started: No such file"),
        (f"{sys.executable} -c 'import sys; sys.exit(\"no model\")'", "exit code 1: no model"),
        (f"{sys.executable} -c 'import sys; sys.exit(3)'", "exit code 3: it said nothing"),
        (f"{sys.executable} -c 'print(1)'", "printed no rows"),
    ],
)
def test_an_opponent_that_does_not_answer_is_one_sentence(command: str, sentence: str) -> None:
    with pytest.raises(SettingError, match=sentence):
        list(Opponent.parse_all(command)[0].rows())


def test_an_opponent_that_runs_other_cases_is_refused_before_ours(
    checkpoint: Checkpoint, opponent: Opponent
) -> None:
    with pytest.raises(SettingError, match=r"ran pp20, tg6 @ d70, pp999, and none of tg5"):
        results(checkpoint, [Case(0, 5, 0)], (opponent,))
