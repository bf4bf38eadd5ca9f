"""The team of threads of the native backend: how many start, and when they wait awake. In processes of their own, whose
limits and CPUs are changed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import kvfold
from kit.tiny_models import tiny_model, write_gguf
from kvfold import _native

START = """
import os, resource, sys
import numpy as np
from kvfold import _native
from kvfold.backends.native import NativeBackend
from kvfold.errors import SettingError
from kvfold.load import Settings, load

loaded = load(sys.argv[1], Settings.parse(backend="native", threads=1, n_ctx=64))

def backend(threads):
    return NativeBackend(
        loaded.model, loaded.checkpoint.tensors, loaded.cache, threads=threads, workspace_bytes=16 << 20
    )
"""

REFUSED = """
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
_, hard = resource.getrlimit(resource.RLIMIT_AS)
stack = resource.getrlimit(resource.RLIMIT_STACK)[0]
resource.setrlimit(resource.RLIMIT_AS, (used + 20 * (8 << 20 if stack < 0 else stack), hard))
for _ in range(2):  # the threads that had started are gone again
    try:
        backend(512)
    except SettingError as error:
        print(error)
resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
print(len(os.listdir("/proc/self/task")), backend(3)._program.num_segments)
"""

SPINS = """
cpus = sorted(os.sched_getaffinity(0))
print(backend(len(cpus))._program.spins, backend(len(cpus) + 1)._program.spins)
os.sched_setaffinity(0, cpus[:1])
print(backend(1)._program.spins, backend(2)._program.spins)
"""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tiny_model("v2-lite"), tmp_path_factory.mktemp("team") / "m.gguf")


def printed(script: str, path: Path) -> list[str]:
    environment = os.environ | {"PYTHONPATH": str(Path(kvfold.__file__).parents[1]), "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-c", START + script, str(path)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.skipif(sys.platform != "linux", reason="the limit on address space is Linux's")
def test_a_team_that_cannot_start_is_refused_in_words(path: Path) -> None:
    """Room for at most 20 stacks: an error that names `threads`, every started thread ended, and a smaller team runs."""
    first, second, after = printed(REFUSED, path)
    for line in (first, second):
        assert line.startswith("threads: 512, the system started ")
        assert line.endswith("ask for fewer.")
    assert after == "1 5"


@pytest.mark.skipif(sys.platform != "linux", reason="affinity is Linux's")
def test_members_wait_awake_only_with_a_cpu_each(path: Path) -> None:
    """As many members as CPUs of the affinity mask spin, one more do not; nor two bound to one CPU."""
    assert printed(SPINS, path) == ["True False", "True False"]


NONE = 2**31 - 1
# The process's own cgroups, files under the mount, and the whole CPUs of their quota.
QUOTAS: dict[str, tuple[str, dict[str, str], int]] = {
    "no cgroup": ("", {}, NONE),
    "no limit": ("0::/a", {"cpu.max": "max 100000", "a/cpu.max": "max 100000"}, NONE),
    "version 2": ("0::/a/b", {"a/b/cpu.max": "350000 100000"}, 3),
    "version 2, less than a CPU": ("0::/a", {"a/cpu.max": "50000 100000"}, 1),
    "the least of those above": ("0::/a/b", {"a/cpu.max": "200000 100000", "a/b/cpu.max": "400000 100000"}, 2),
    "not a neighbour's": ("0::/a", {"b/cpu.max": "100000 100000"}, NONE),
    "a container's root": ("0::/../host/path", {"cpu.max": "600000 100000"}, 6),
    "version 1": (
        "3:cpuset:/a\n2:cpu,cpuacct:/a\n",
        {"cpu/a/cpu.cfs_quota_us": "250000", "cpu/a/cpu.cfs_period_us": "50000"},
        5,
    ),
    "version 1, no limit": ("2:cpu:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, NONE),
}


@pytest.mark.parametrize("case", list(QUOTAS))
def test_the_quota_of_a_cgroup_is_read(case: str, tmp_path: Path) -> None:
    own, files, cpus = QUOTAS[case]
    (tmp_path / "own").write_text(own)
    for name, text in files.items():
        file = tmp_path / "root" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    assert _native.quota_cpus(str(tmp_path / "own"), str(tmp_path / "root")) == cpus


BESIDE = """
import multiprocessing, resource, time
import numpy as np
from kvfold.bench.measure import Case, Rig, context_for
from kvfold.formats.synthetic import SHAPES, synthetic_checkpoint

def burn():
    while True:
        pass

def rates(rig, case, seconds):
    '''(tokens a second, CPU seconds of this process a second)'''
    used = lambda: sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
    started, cpu, tokens = time.monotonic(), used(), 0
    while time.monotonic() - started < seconds:
        rig.run(case)
        tokens += case.num_tokens
    took = time.monotonic() - started
    return tokens / took, (used() - cpu) / took

case = Case(0, 32, 256)
checkpoint = synthetic_checkpoint(SHAPES["tiny"])
chosen = Settings.parse(threads=len(os.sched_getaffinity(0)), n_ctx=context_for([case]), backend="native")
rig = Rig(load(checkpoint, chosen), [case], batch_rows=512)
rig.warm_up(case)
found = []
for _ in range(5):
    alone, alone_cpu = rates(rig, case, 1.5)
    neighbour = multiprocessing.get_context("fork").Process(target=burn, daemon=True)
    neighbour.start()
    beside, beside_cpu = rates(rig, case, 1.5)
    neighbour.kill()
    neighbour.join()
    found.append((beside / alone) / (beside_cpu / alone_cpu))
print(sorted(found)[2])
"""


@pytest.mark.full
def test_beside_a_busy_neighbour_the_work_follows_the_share_of_cpu_time(path: Path) -> None:
    """Tokens a second fall as our CPU time does, and by no more than a tenth besides: members that wait for one that
    lost its CPU burn theirs. Median of five pairs, generation, a member for each CPU."""
    assert float(printed(BESIDE, path)[0]) >= 0.9
