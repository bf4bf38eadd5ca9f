"""What a process may use: the smaller of the machine's and what its control groups leave, on fake files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kvfold.machine import available_memory_bytes, physical_cores

MEMINFO = "MemTotal: 16000 kB\nMemFree: 1 kB\nMemAvailable:    8000 kB\n"


def system(root: Path, cgroup: str | None, files: dict[str, str], meminfo: str | None = MEMINFO) -> int | None:
    (root / "proc/self").mkdir(parents=True)
    if meminfo is not None:
        (root / "proc/meminfo").write_text(meminfo)
    if cgroup is not None:
        (root / "proc/self/cgroup").write_text(cgroup)
    for name, text in files.items():
        file = root / "cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return available_memory_bytes(root / "proc", root / "cgroup")


def group(folder: str, limit: object, used: int, files: tuple[int, int] = (0, 0)) -> dict[str, str]:
    return {
        f"{folder}/memory.max": f"{limit}\n",
        f"{folder}/memory.current": f"{used}\n",
        f"{folder}/memory.stat": f"anon 77\nfile 5\ninactive_file {files[0]}\nactive_file {files[1]}\n",
    }


def old_group(folder: str, limit: int, used: int, files: tuple[int, int] = (0, 0)) -> dict[str, str]:
    return {
        f"{folder}/memory.limit_in_bytes": f"{limit}\n",
        f"{folder}/memory.usage_in_bytes": f"{used}\n",
        f"{folder}/memory.stat": f"cache 1\ninactive_file 9\ntotal_inactive_file {files[0]}\n"
        f"total_active_file {files[1]}\n",
    }


FREE = 8000 * 1024


@pytest.mark.parametrize(
    ("cgroup", "files", "expected"),
    [
        (None, {}, FREE),
        ("0::/\n", {}, FREE),
        ("0::/\n", group(".", 5_000_000, 1_000_000), 4_000_000),  # a container's own namespace
        ("0::/a/b\n", group("a/b", 5_000_000, 4_000_000, (300_000, 600_000)), 1_900_000),  # cached files give way
        ("0::/a/b\n", group("a/b", "max", 1) | group("a", 3_000_000, 1_000_000), 2_000_000),
        ("0::/host/path\n", group(".", 2_000_000, 500_000), 1_500_000),  # only the root is mounted
        ("0::/a\n", group("a", 1_000_000, 2_000_000), 0),
        ("0::/a\n", group("a", 10**12, 0), FREE),
        ("0::/a\n", {"a/memory.max": "nonsense"}, FREE),
        ("4:memory:/x\n0::/\n", old_group("memory/x", 3_000_000, 1_000_000, (100, 200)), 2_000_300),
        ("4:cpu,memory:/x\n", old_group("memory/x", 9223372036854771712, 10), FREE),
        ("4:cpu:/x\n", old_group("memory/x", 3_000_000, 1_000_000), FREE),
        ("4:memory:/x\n0::/y\n", group("unified/y", 2_000_000, 0), 2_000_000),
    ],
)
def test_available_memory_is_the_least_of_the_machine_and_its_groups(
    tmp_path: Path, cgroup: str | None, files: dict[str, str], expected: int
) -> None:
    assert system(tmp_path, cgroup, files) == expected


def test_a_system_that_tells_nothing_is_none(tmp_path: Path) -> None:
    assert system(tmp_path, None, {}, meminfo=None) is None


def test_threads_are_no_more_than_the_quota_and_at_least_one(monkeypatch: pytest.MonkeyPatch) -> None:
    cores = physical_cores()
    assert cores >= 1
    for quota, expected in ((1, 1), (10**6, cores)):
        monkeypatch.setattr("kvfold._native.usable_cpus", lambda quota=quota: quota)
        assert physical_cores() == expected


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="affinity is Linux's")
def test_hyper_threads_of_a_core_count_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CPUs 0 and 4, 1 and 5 are cores; of 2 and 6 this process may use one; 3 has no sibling that is told."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3, 4, 5})
    monkeypatch.setattr("kvfold._native.usable_cpus", lambda: 6)
    for cpu in (0, 1, 2, 4, 5, 6):
        folder = tmp_path / f"cpu{cpu}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{cpu % 4},{cpu % 4 + 4}\n")
    assert physical_cores(tmp_path) == 4
