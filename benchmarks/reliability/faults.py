"""`make bench name=faults`: kill -9 at any moment, and a disk that fails in the middle.

Five jobs that save as they go (the training loop, DreamBooth, a corpus, a concept, an identity
library) are killed and started again until they end, then their result is compared bit for bit with
that of a run left alone. What a job acknowledged before a kill must be there after it. Then the
disk is full, read-only or gone in the middle of each job: see `disk.py`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from difflora_core.evaluation.report import Report

from ..command import benchmark_console, command_parser, commit, machine, silent, write_report
from .disk import FAULTS, suffer
from .jobs import JOBS
from .kills import kill_often


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; the answer is 0 when everything held."""
    parser = command_parser("Kill -9 and failing disks.", threads=None)
    parser.add_argument("--kills", type=int, default=100, help="of each job")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--jobs", nargs="+", choices=list(JOBS), default=list(JOBS))
    options = parser.parse_args(arguments)
    console = benchmark_console()
    report = measure(options.jobs, options.kills, options.seed, console.print)
    whole = dict.fromkeys(report.columns(), 0)
    console.print(report.to_markdown(whole))
    held = bool(report.facts["held"])
    console.print(f"{'everything held' if held else 'NOT everything held'}; {machine()}")
    write_report(report, options.json, console)
    return 0 if held else 1


def measure(
    jobs: Sequence[str], kills: int, seed: int = 0, log: Callable[[str], None] = silent
) -> Report:
    """Kill jobs and break their disks.

    Args:
        jobs: names of JOBS.
        kills: of each.
        seed: of the moments.
        log: told of everything that went wrong.
    """
    rows: dict[str, dict[str, float]] = {}
    held = True
    for name in jobs:
        began = time.perf_counter()
        tally = kill_often(name, kills, seed, log)
        disks = {fault: suffer(name, fault) for fault in FAULTS}
        held = held and tally.sound and all(disk.sound for disk in disks.values())
        for fault, disk in disks.items():
            if not disk.sound:
                log(f"{name}, disk {fault}: {disk}")
        rows[name] = {
            "kills": tally.kills,
            "at a file's change": tally.at_changes,
            "runs that ended": tally.finished,
            "same to the bit": tally.equal,
            "acknowledged and lost": tally.lost,
            "refused to go on": len(tally.errors),
            **{f"disk {fault}: sound": float(disk.sound) for fault, disk in disks.items()},
            "seconds": time.perf_counter() - began,
        }
    facts = {"held": held, "seed": seed, "commit": commit(), "machine": machine()}
    return Report(rows, facts)
