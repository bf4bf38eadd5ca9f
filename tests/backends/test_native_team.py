"""The team of threads of the native backend: how many start, when they wait awake, and when they are bound to a core
each. In processes of their own, whose limits and CPUs are changed. Members are bound on a quiet machine alone: beside other
tests, those of it are skipped (`-n 0` runs them)."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
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


def printed(script: str, path: Path, *arguments: str) -> list[str]:
    return run_alone(START + script, str(path), *arguments)


def run_alone(script: str, *arguments: str) -> list[str]:
    environment = os.environ | {"PYTHONPATH": str(Path(kvfold.__file__).parents[1]), "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script, *arguments]
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


MS = 1_000_000
# (ms, on a CPU, ready without one) as threads tell, and whether the team has its CPUs to itself 1000 and 1899 ms after 0.
TOLD: dict[str, tuple[list[tuple[int, int, int]], bool, bool]] = {
    "nothing yet": ([], True, True),
    "nobody waits": ([(t, 98, 0) for t in range(100, 1000, 100)], True, True),
    "slices of others": ([(t, 95, 9) for t in range(100, 1000, 100)], True, True),
    "half of the time": ([(900, 50, 50)], False, False),
    "a fifth of it": ([(900, 80, 21)], False, False),
    "half, until then": ([(800, 50, 50)], False, True),
    "half, and again": ([(800, 50, 50), (1500, 50, 50)], False, False),
    "one of two threads": ([(900, 50, 50), (901, 100, 0)], False, False),
    "mostly asleep": ([(900, 1, 4)], True, True),
    "mostly asleep, and waits": ([(900, 12, 12)], False, False),
    "asleep for an hour": ([(900, 60_000, 300)], True, True),
    "the system does not tell": ([(t, 0, 0) for t in range(100, 2000, 100)], False, False),
}


@pytest.mark.parametrize("case", list(TOLD))
def test_a_team_is_calm_after_a_second_in_which_nobody_waited(case: str) -> None:
    told, *expected = TOLD[case]
    calm = _native.Calm(0)
    assert not calm.holds(999 * MS)
    for first, now, holds in ((0, 1000, expected[0]), (1000, 1899, expected[1])):
        for at, ran, waited in told:
            if first <= at < now:
                calm.tell(at * MS, ran * MS, waited * MS)
        assert calm.holds(now * MS) == holds


TEAM = """
import ctypes, multiprocessing, os, sys, threading, time
import numpy as np
from kvfold import _native

cpus = sorted(os.sched_getaffinity(0))[:2]
os.sched_setaffinity(0, cpus)

class Team:
    def __init__(self, count):
        before = set(os.listdir("/proc/self/task"))
        self.kernels = _native.Kernels(count)
        self.members = [int(task) for task in set(os.listdir("/proc/self/task")) - before]
        self.raw = np.ones((2048, 2048), np.float32).view(np.uint8)
        self.x, self.out = np.ones((8, 2048), np.float32), np.empty((8, 2048), np.float32)

    def work(self, seconds, until=lambda: False):
        '''Whether `until` was true before `seconds` were over.'''
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.kernels.linear(0, self.raw, self.x, self.out)
            assert sorted(os.sched_getaffinity(threading.get_native_id())) == cpus, "the caller's"
            if until():
                return True
        return False

    def work_until_bound(self):
        '''Ends the process where that does not happen: "busy" if other processes leave no time in which nobody waits.'''
        looked = quiet_since = time.monotonic()
        times, longest = self.waited(), 0

        def bound():
            nonlocal looked, quiet_since, times, longest
            now = time.monotonic()
            if now - looked > 0.1:
                before, times, looked = times, self.waited(), now
                if max(after - at for after, at in zip(times, before)) > 10_000_000:
                    quiet_since = now
                longest = max(longest, now - quiet_since)
            return self.bound()

        if not self.work(8, bound):
            sys.exit(print("busy" if longest < 2 else f"free, though nobody waited for {longest} s"))

    def waited(self):
        tasks = [threading.get_native_id(), *self.members]
        return [int(open(f"/proc/self/task/{task}/schedstat").read().split()[1]) for task in tasks]

    def cpus(self):
        return [sorted(os.sched_getaffinity(member)) for member in self.members]

    def bound(self):
        return all(len(mask) == 1 and mask[0] in cpus for mask in self.cpus())

    def free(self):
        return all(mask == cpus for mask in self.cpus())

def burn(cpu):
    os.sched_setaffinity(0, [cpu])
    while True:
        pass

team = Team(2)
assert team.free()
"""

TAKES_TURNS = """
team.work_until_bound()
neighbours = [multiprocessing.get_context("fork").Process(target=burn, args=(cpu,), daemon=True) for cpu in cpus]
for neighbour in neighbours:
    neighbour.start()
print("free beside them:", team.work(10, team.free), "and not again:", not team.work(2, team.bound))
for neighbour in neighbours:
    neighbour.kill()
team.work_until_bound()
print("bound")
"""

TWO_TEAMS = """
other = Team(2)
team.work_until_bound()
other.work_until_bound()
done = threading.Event()
thread = threading.Thread(target=lambda: other.work(60, done.is_set))
thread.start()
print("free:", team.work(10, lambda: team.free() and other.free()))
done.set()
thread.join()
"""

# Only who calls waits for a CPU, and neither of two calls twice in a row.
CALLERS_TAKE_TURNS = """
team.work_until_bound()
member_cpu = team.cpus()[0][0]
caller_cpu = next(cpu for cpu in cpus if cpu != member_cpu)
turns = [threading.Semaphore(1), threading.Semaphore(0)]
end = time.monotonic() + 10
masks = []  # whether the member was free, call by call

def call(turn):
    os.sched_setaffinity(threading.get_native_id(), [caller_cpu])
    while time.monotonic() < end:
        turns[turn].acquire(timeout=1)
        team.kernels.linear(0, team.raw, team.x, team.out)
        masks.append(team.free())
        turns[1 - turn].release()

neighbour = multiprocessing.get_context("fork").Process(target=burn, args=(caller_cpu,), daemon=True)
neighbour.start()
callers = [threading.Thread(target=call, args=(turn,)) for turn in (0, 1)]
for caller in callers:
    caller.start()
for caller in callers:
    caller.join()
neighbour.kill()
first = masks.index(True) if True in masks else len(masks)
print("free:", first < len(masks) / 2, "and not bound again:", all(masks[first:]))
"""

# The filter of system calls holds for this thread and those that it starts (x86-64 and AArch64).
NEVER_BOUND = """
team.work_until_bound()  # so it is quiet enough
many = Team(3)
print("free, three on two CPUs:", not many.work(3, lambda: not many.free()))

class Filter(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("program", ctypes.c_void_p)]

number = {"x86_64": 203, "aarch64": 122}[os.uname().machine]  # of sched_setaffinity, which is to fail with EPERM
steps = [(0x20, 0, 0, 0), (0x15, 0, 1, number), (0x06, 0, 0, 0x00050001), (0x06, 0, 0, 0x7FFF0000)]
program = np.array(steps, np.dtype([("code", "u2"), ("yes", "u1"), ("no", "u1"), ("k", "u4")]))
libc = ctypes.CDLL(None)
assert libc.prctl(38, 1, 0, 0, 0) == 0  # no new privileges
assert libc.prctl(22, 2, ctypes.byref(Filter(len(steps), program.ctypes.data)), 0, 0) == 0
try:
    os.sched_setaffinity(0, cpus)
except PermissionError:
    refused = Team(2)
    print("free, refused:", not refused.work(3, lambda: not refused.free()))
"""


def printed_by_team(script: str) -> list[str]:
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one CPU: no member beside the caller")
    lines = run_alone(TEAM + script)
    if lines[-1] == "busy":
        pytest.skip(f"other processes leave no two seconds in which nobody waits; until then {lines[:-1]}")
    return lines


@pytest.mark.skipif(sys.platform != "linux", reason="affinity is Linux's")
def test_members_are_bound_to_a_core_each_until_a_neighbour_wants_it() -> None:
    """Bound when quiet, within the CPUs of the process, the caller never; free beside two processes that spin, as long as
    they do; then bound again."""
    assert printed_by_team(TAKES_TURNS) == ["free beside them: True and not again: True", "bound"]


@pytest.mark.skipif(sys.platform != "linux", reason="affinity is Linux's")
def test_two_teams_at_once_are_free() -> None:
    """Each bound while it works alone."""
    assert printed_by_team(TWO_TEAMS) == ["free: True"]


@pytest.mark.skipif(sys.platform != "linux", reason="affinity is Linux's")
def test_members_are_free_where_callers_wait_that_take_turns() -> None:
    assert printed_by_team(CALLERS_TAKE_TURNS) == ["free: True and not bound again: True"]


@pytest.mark.skipif(sys.platform != "linux", reason="affinity is Linux's")
def test_more_members_than_cpus_and_a_system_that_refuses_leave_members_free() -> None:
    assert printed_by_team(NEVER_BOUND) == ["free, three on two CPUs: True", "free, refused: True"]


@pytest.mark.parametrize(
    ("siblings", "expected"),
    [
        (None, lambda cpu: {cpu}),
        ("{}", lambda cpu: {cpu}),
        ("{},64", lambda cpu: {cpu, 64}),
        ("{},64-66", lambda cpu: {cpu, 64, 65, 66}),
        ("nonsense", lambda cpu: {cpu}),
        ("{},2000", lambda cpu: {cpu}),
        ("{}-18446744073709551615", lambda cpu: set(range(cpu, 1024))),
    ],
)
def test_a_core_is_a_cpu_and_its_siblings(
    siblings: str | None, expected: Callable[[int], set[int]], tmp_path: Path
) -> None:
    if siblings is not None:
        folder = tmp_path / "cpu5/topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(siblings.format(5) + "\n")
    assert _native.core_of(5, str(tmp_path)) == expected(5)
    assert _native.core_of(1024, str(tmp_path)) == _native.core_of(-1, str(tmp_path)) == set()


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

case = Case(*map(int, sys.argv[2:]))
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
@pytest.mark.parametrize("case", [("0", "32", "256"), ("128", "0", "0")], ids=["generation", "prompt"])
def test_beside_a_busy_neighbour_the_work_follows_the_share_of_cpu_time(
    path: Path, case: tuple[str, str, str]
) -> None:
    """Tokens a second fall as our CPU time does, and by no more than a tenth besides: members that wait for one that
    lost its CPU burn theirs. Median of five pairs, a member for each CPU."""
    assert float(printed(BESIDE, path, *case)[0]) >= 0.9
