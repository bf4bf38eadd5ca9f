"""`kvfold check`: every native kernel against its definition, on this machine."""

from __future__ import annotations

import time

import typer

from kvfold.cli.options import Isa, Json, Threads
from kvfold.cli.terminal import note, print_json, print_table, report


def check(isa: Isa = "auto", threads: Threads = None, json: Json = False) -> None:
    """Compares every native kernel with its definition, on this machine.

    Decoders, products, experts, attention paths, cache types and row-wise ops, on every instruction set this processor
    has or the one asked for. Errors are shares of the root mean square of a row. Exit code 1 where one is above its bound.
    """
    from kvfold.check import check as findings_of
    from kvfold.check import isas_of
    from kvfold.load import Settings

    settings = Settings.parse(isa=isa, threads=threads)
    started = time.monotonic()
    findings = list(findings_of(isas_of(settings.isa), threads=settings.threads))
    wrong = [finding for finding in findings if not finding.is_right]
    if json:
        print_json({"threads": settings.threads, "num_wrong": len(wrong), "findings": findings})
    else:
        print_table(
            report(),
            f"Kernels against their definitions, {settings.threads} threads",
            ("kernel", "type", "isa", ">worst error", ">bound", "verdict"),
            [
                (f.kernel, f.type, f.isa, f"{f.worst:.1e}", f"{f.bound:.0e}", "right" if f.is_right else "WRONG")
                for f in findings
            ],
        )
    note(f"{len(findings)} kernels, {len(wrong)} wrong, {time.monotonic() - started:.0f} s")
    if wrong:
        raise typer.Exit(1)
