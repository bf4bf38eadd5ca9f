"""Seconds from the start of a process to the first byte of its answer: what somebody at a terminal waits.

    python bench/first_token.py MODEL [--device cuda] [--runs 5] [--new-cache] [--out first.json] [-- --mmap off ...]

Each run is a fresh `python -m kvfold run MODEL` whose stdout is a pipe; what follows `--` goes to it. --new-cache gives the
first run an empty Triton cache, so that its kernels are compiled; later runs find them there.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROMPT = "Once upon a time there was a king who had three sons, and the youngest of them"


def first_byte(command: list[str], environment: dict[str, str]) -> dict[str, object]:
    """Seconds to the first byte and to the end, and what the run said of itself."""
    with tempfile.TemporaryFile() as said:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, env=environment)
        assert process.stdout is not None
        begin = process.stdout.read(1)
        first = time.perf_counter() - start
        process.stdout.read()
        status = process.wait()
        total = time.perf_counter() - start
        said.seek(0)
        words = said.read().decode(errors="replace").splitlines()
    if status or not begin:
        raise SystemExit("\n".join([*words, f"{' '.join(command)} ended with {status}"]))
    return {"first_byte_s": round(first, 2), "end_s": round(total, 2), "said": words}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--new-cache", action="store_true")
    parser.add_argument("--out", type=Path)
    ours, more = sys.argv[1:], []
    if "--" in ours:
        ours, more = ours[: ours.index("--")], ours[ours.index("--") + 1 :]
    options = parser.parse_args(ours)
    command = [sys.executable, "-m", "kvfold", "run", "-m", options.model, "-p", PROMPT, "-n", "8"]
    command += ["--device", options.device, *more]
    environment = dict(os.environ)
    with tempfile.TemporaryDirectory() as cache:
        if options.new_cache:
            environment["TRITON_CACHE_DIR"] = cache
        runs = []
        for _ in range(options.runs):
            runs.append(first_byte(command, environment))
            print(runs[-1]["first_byte_s"], "s to the first byte,", runs[-1]["end_s"], "to the end", flush=True)
    seconds = [float(str(run["first_byte_s"])) for run in runs]
    print(f"median {statistics.median(seconds):.2f} s of {len(seconds)}")
    if options.out:
        record = {
            "date": datetime.date.today().isoformat(),
            "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}",
            "command": " ".join(command[1:]),
            "model_bytes": Path(options.model).stat().st_size,
            "new_cache_first": options.new_cache,
            "first_byte_s": seconds,
            "runs": runs,
        }
        options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
