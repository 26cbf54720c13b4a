"""`python -m tests.fuzz`: hostile files for every reader, and a table of what became of them.

Files that once broke a reader come first, see found.json; `--keep` adds those that break one now.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from . import (
    data_files,
    face_folders,
    harness,
    lora_files,
    settings_files,
    stored_files,
    training_files,
)
from .reader import Case, Reader

FOUND = Path(__file__).with_name("found.json")
READERS: tuple[Reader, ...] = (
    *lora_files.READERS,
    *stored_files.READERS,
    *settings_files.READERS,
    *training_files.READERS,
    *face_folders.READERS,
    *data_files.READERS,
)


def main() -> int:
    """Run, print, and fail where a file broke a reader."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=100_000, help="of all readers together")
    parser.add_argument("--start", type=int, default=0, help="number of the first file of a reader")
    parser.add_argument("--only", default="", help="readers whose name holds this")
    parser.add_argument("--json", type=Path, help="write everything to this file")
    parser.add_argument("--keep", action="store_true", help="add what failed to found.json")
    options = parser.parse_args()
    readers = [reader for reader in READERS if options.only in reader.name]
    whole, found = sum(reader.share for reader in readers), read_found()
    columns = ("reader", "files", "refused", "accepted", *harness.FAILURES)
    say("".join(f"{name:>10}" if at else f"{name:28}" for at, name in enumerate(columns)))
    tallies = []
    for reader in readers:
        count = max(1, round(options.files * reader.share / whole))
        new = map(reader.case, range(options.start, options.start + count))
        tallies.append(harness.run(reader, [*found.get(reader.name, ()), *new]))
        say_tally(tallies[-1])
    if options.json:
        options.json.write_text(harness.as_json(tallies))
    if options.keep:
        write_found(found, tallies)
    failed = sum(tally.failed for tally in tallies)
    say(f"{sum(tally.files for tally in tallies)} files, {failed} failures")
    return 1 if failed else 0


def read_found() -> dict[str, list[Case]]:
    """Files that once broke a reader."""
    return {
        reader: [Case(family, tuple(edits), seed) for family, edits, seed in rows]
        for reader, rows in json.loads(FOUND.read_text("utf-8")).items()
    }


def write_found(found: dict[str, list[Case]], tallies: Sequence[harness.Tally]) -> None:
    """Add what failed now."""
    for tally in tallies:
        known = found.setdefault(tally.reader, [])
        known += [c for cases in tally.failures.values() for c in cases if c not in known]
    lines = []
    for reader, cases in found.items():
        rows = ",\n".join(f"  {json.dumps([c.family, list(c.edits), c.seed])}" for c in cases)
        lines.append(f" {json.dumps(reader)}: [\n{rows}\n ]")
    FOUND.write_text("{\n" + ",\n".join(lines) + "\n}\n", "utf-8")


def say_tally(tally: harness.Tally) -> None:
    """A line of the table, and one for every way to fail."""
    counts = (tally.counts[name] for name in ("refused", "accepted", *harness.FAILURES))
    say(f"{tally.reader:28}{tally.files:10}" + "".join(f"{count:10}" for count in counts))
    for why, cases in tally.failures.items():
        say(f"    {why}  {cases[0]}")


def say(line: str) -> None:
    """Print a line."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
