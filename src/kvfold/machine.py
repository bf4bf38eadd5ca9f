"""What this process may use of the machine: memory and CPUs, within the limits of the control groups it runs in.

A container's limit is not in /proc/meminfo: a process that goes by that alone is killed where it should have mapped its
weights. Both versions of Linux's control groups are read; each group above ours may have a limit of its own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from kvfold import _native

NO_LIMIT = 1 << 60
"""Version 1 writes 2^63 rounded to pages where no limit is set."""


def available_memory_bytes(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> int | None:
    """MemAvailable, or what a control group leaves if that is less. None where the system does not tell."""
    try:
        lines = (proc / "meminfo").read_text().splitlines()
    except OSError:
        return None
    free = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
    left = [room for room in _rooms(proc / "self" / "cgroup", groups) if room is not None]
    return min([*left, free], default=None) if free is not None else min(left, default=None)


def physical_cores(topology: Path = Path("/sys/devices/system/cpu")) -> int:
    """Cores this process may use, hyper-threads counted once where the system tells, and no more than its control
    groups grant the time of."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    cores = {frozenset(_native.core_of(cpu, str(topology)) or {cpu}) for cpu in allowed}
    return max(1, min(len(cores), _native.usable_cpus()))


def _rooms(own: Path, groups: Path) -> Iterator[int | None]:
    """What each memory control group of this process leaves."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return
    for line in lines:  # number:controllers:/path
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            files = ("memory.max", "memory.current", "active_file", "inactive_file")
            roots = [groups, groups / "unified"]
        elif "memory" in controllers.split(","):
            files = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_active_file", "total_inactive_file")
            roots = [groups / "memory"]
        else:
            continue
        # Inside a container the path may be the host's, of which only the root is mounted.
        inner = [part for part in path.split("/") if part not in ("", "..")]
        for root in roots:
            for depth in range(len(inner) + 1):
                yield _room(root.joinpath(*inner[:depth]), *files)


def _room(group: Path, limit_file: str, usage_file: str, *reclaimable: str) -> int | None:
    """The limit less what is used; cached files do not count, the system drops them first. None: no limit."""
    try:
        limit = int((group / limit_file).read_text())  # "max" is no number
        used = int((group / usage_file).read_text())
        counts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    if limit >= NO_LIMIT:
        return None
    return max(0, limit - used + sum(int(counts.get(name, 0)) for name in reclaimable))
