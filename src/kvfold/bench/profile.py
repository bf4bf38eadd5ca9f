"""The profile of a run beside the ceilings of its machine: a table of where the time went.

Ours is the least time an op could take: its bytes at the machine's reading rate or its multiply-adds at the best rate of
any kind of operand, whichever is longer. `of_ceiling` is that time over the one it took.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

from kvfold.backends.profile import Totals
from kvfold.bench.measure import Ceilings, ceilings_now, meter_of
from kvfold.errors import SettingError
from kvfold.load import Loaded

TOKEN_READS = 5  # of a token's weights


@dataclass(frozen=True)
class Line:
    """One group of ops in one phase. gbs, gmacs: giga bytes and giga multiply-adds a second; bound_by: "read" or
    "multiply", empty where neither is counted."""

    phase: str
    op: str
    calls: int
    seconds: float
    share: float  # of the phase
    gbs: float
    gmacs: float
    of_ceiling: float
    bound_by: str


def profile_of(loaded: Loaded) -> list[dict[str, Any]]:
    """The lines of everything that ran since the last call, and ceilings measured now."""
    profile = getattr(loaded.backend, "profile", None)
    if profile is None:
        raise SettingError("profile: the model was loaded without it. Load it with profile=True.")
    return lines_of(profile.take(), [ceilings_now(meter_of(loaded), TOKEN_READS)])


def lines_of(totals: Totals, ceilings: Sequence[Ceilings]) -> list[dict[str, Any]]:
    """As JSON has them. The best of several measured ceilings counts: no op is faster than its machine."""
    read = max(one.read_rate for one in ceilings)
    multiply = max(rate for one in ceilings for rate in one.multiply_adds.values())
    lines = []
    for phase, entries in groupby(totals.items(), key=lambda entry: entry[0][0]):
        groups = [(group, total) for (_, group), total in entries]
        all_seconds = sum(total.ns for _, total in groups) / 1e9
        for group, total in groups:
            seconds, work = max(total.ns, 1) / 1e9, total.work
            least_read, least_multiply = work.nbytes / read, work.multiply_adds / multiply
            bound_by = "read" if least_read >= least_multiply else "multiply"
            lines.append(
                Line(
                    phase=phase,
                    op=group,
                    calls=total.calls,
                    seconds=seconds,
                    share=seconds / all_seconds,
                    gbs=work.nbytes / seconds / 1e9,
                    gmacs=work.multiply_adds / seconds / 1e9,
                    of_ceiling=max(least_read, least_multiply) / seconds,
                    bound_by=bound_by if work.nbytes or work.multiply_adds else "",
                )
            )
    return [asdict(line) for line in lines]


_HEADINGS = ("op", ">calls", ">seconds", ">share", ">GB/s", ">GMAC/s", ">of ceiling")


def markdown(lines: list[dict[str, Any]]) -> Iterator[str]:
    """A table a phase, the largest part of the time first, and its sums."""
    for phase, entries in groupby(lines, key=lambda line: line["phase"]):
        ops = sorted(entries, key=lambda line: -line["seconds"])
        seconds = sum(op["seconds"] for op in ops)
        together = {
            "op": "together",
            "calls": sum(op["calls"] for op in ops),
            "seconds": seconds,
            "share": 1.0,
            "gbs": sum(op["gbs"] * op["seconds"] for op in ops) / seconds,
            "gmacs": sum(op["gmacs"] * op["seconds"] for op in ops) / seconds,
            "of_ceiling": sum(op["of_ceiling"] * op["seconds"] for op in ops) / seconds,
            "bound_by": "",
        }
        yield f"{phase}:"
        yield ""
        yield from table(_HEADINGS, [_cells(op) for op in (*ops, together)])
        yield ""


def _cells(line: dict[str, Any]) -> list[str]:
    counted = line["gbs"] or line["gmacs"]
    bound = f"{100 * line['of_ceiling']:.0f} % {line['bound_by']}".rstrip()
    return [
        line["op"],
        f"{line['calls']:,}",
        f"{line['seconds']:.4f}",
        f"{100 * line['share']:.1f} %",
        f"{line['gbs']:.1f}" if line["gbs"] else "",
        f"{line['gmacs']:.1f}" if line["gmacs"] else "",
        bound if counted else "",
    ]


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Markdown, aligned; a heading that starts with ">" aligns its column to the right."""
    lines = [[heading.removeprefix(">") for heading in headings], *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    right = [heading.startswith(">") for heading in headings]

    def line(cells: Sequence[str]) -> str:
        padded = (
            cell.rjust(width) if is_right else cell.ljust(width)
            for cell, width, is_right in zip(cells, widths, right, strict=True)
        )
        return f"| {' | '.join(padded)} |"

    yield line(lines[0])
    yield line(["-" * (width - is_right) + ":" * is_right for width, is_right in zip(widths, right, strict=True)])
    yield from map(line, lines[1:])
