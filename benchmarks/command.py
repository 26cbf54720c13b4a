"""What every benchmark command shares: its options, where it prints, and what it says about itself.

Nothing here knows a subject: `identity/`, `concepts/` and `cost/` import this file, and it imports
none of them.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from rich.console import Console

from difflora_core.demo import paths
from difflora_core.evaluation.report import Report
from difflora_core.storage.atomic import write_text

CACHE = paths.WORK / "benchmarks"
"""Folder of everything that a benchmark trains or draws and may need again."""

Log = Callable[[str], None]
"""Prints a line."""


def silent(line: str) -> None:
    """A log that prints nothing."""


def command_parser(
    description: str, report: bool = True, threads: int | None = 0
) -> argparse.ArgumentParser:
    """A parser with the options that most benchmarks have.

    Args:
        description: shown by --help.
        report: whether there is a report to write, --json.
        threads: default of --threads, 0 for all cores; None when the benchmark sets them itself.
    """
    parser = argparse.ArgumentParser(description=description)
    if report:
        parser.add_argument("--json", type=Path, help="write everything to this file")
    if threads is not None:
        help_text = "CPU threads, 0 = all cores"
        parser.add_argument("--threads", type=int, default=threads, help=help_text)
    return parser


def set_threads(count: int) -> None:
    """Use so many cores; 0 takes all."""
    torch.set_num_threads(count or os.cpu_count() or 1)


def benchmark_console() -> Console:
    """Where benchmarks print."""
    return Console(highlight=False, soft_wrap=True)


def write_report(report: Report, path: Path | None, console: Console) -> None:
    """Write everything to a JSON file, where one is asked for."""
    if path:
        write_text(path, report.to_json() + "\n")
        console.print(f"wrote {path}")


def show_report(
    report: Report,
    path: Path | None,
    console: Console,
    digits: Mapping[str, int] | None = None,
) -> None:
    """Print the table, and by which machine and commit (of its facts) it was made; write it too."""
    console.print(report.to_markdown(digits))
    console.print(f"{report.facts['machine']}, {str(report.facts['commit'])[:12]}")
    write_report(report, path, console)


def machine() -> str:
    """Processor, cores and torch version in one line."""
    processor = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().split("\n") if line.startswith("model name")]
        processor = names[0].split(":")[1].strip() if names else processor
    cores = f"{torch.get_num_threads()} of {os.cpu_count()} cores"
    return f"{processor}, {cores}, torch {torch.__version__}"


def commit() -> str:
    """The commit that is measured; with "+changes" when files differ from it."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(paths.ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    name = git("rev-parse", "HEAD") or "unknown"
    return f"{name}+changes" if git("status", "--porcelain", "--untracked-files=no") else name
