"""Runs cases in processes of their own and says how each ended.

A case is one file: refused by one of our errors, accepted and valid, or a failure: another
exception, nonsense that was accepted, more than SECONDS, more than MEMORY. A process that hangs or
dies is one failure; the next process goes on after that case.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import signal
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

from difflora_core.errors import DiffLoRAError

from .reader import Case, Reader

SECONDS = 5.0  # of processor time for one file
HANG = 60.0  # of a clock, on a busy machine
MEMORY = 2**30
ROOM = 4 * 2**30  # of addresses: a bomb larger than that fails to explode
LONGEST_MESSAGE = 2000
FAILURES = ("raw", "nonsense", "slow", "memory")
IN_MEMORY = Path("/dev/shm")  # disks would take most of the time
KEPT = 3
"""Cases kept of every way to fail."""


@dataclass(frozen=True)
class Outcome:
    """How a case ended: refused, accepted, or one of FAILURES; `why` says where."""

    verdict: str
    why: str = ""


@dataclass
class Tally:
    """What became of the files of a reader."""

    reader: str
    counts: Counter[str] = field(default_factory=Counter)
    failures: dict[str, list[Case]] = field(default_factory=dict)

    @property
    def files(self) -> int:
        """How many there were."""
        return sum(self.counts.values())

    @property
    def failed(self) -> int:
        """How many ended as they must not."""
        return sum(self.counts[name] for name in FAILURES)

    def add(self, case: Case, outcome: Outcome) -> None:
        """Count a case, and keep it where it is one of the first of its kind that fail."""
        self.counts[outcome.verdict] += 1
        if outcome.verdict in FAILURES:
            kept = self.failures.setdefault(f"{outcome.verdict}: {outcome.why}", [])
            if len(kept) < KEPT:
                kept.append(case)


def run(reader: Reader, cases: Sequence[Case]) -> Tally:
    """Judge cases in processes that may die."""
    tally, done = Tally(reader.name), 0
    while done < len(cases):
        for case, outcome in zip(cases[done:], _outcomes(reader, cases[done:]), strict=False):
            tally.add(case, outcome)
            done += 1
    return tally


def _outcomes(reader: Reader, cases: Sequence[Case]) -> Iterator[Outcome]:
    """Outcomes of the first cases, up to one that ends the process, or all."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(reader, cases, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        for _ in cases:
            if not ours.poll(HANG):
                yield Outcome("slow", f"more than {HANG:g} seconds")
                return
            outcome = ours.recv()
            yield outcome
            if outcome.verdict == "memory":
                return  # the process has grown: what comes next is judged in a new one
    except EOFError:
        process.join()
        yield Outcome("raw", f"the process ended with {process.exitcode}")
    finally:
        process.kill()
        process.join()
        ours.close()


def _work(reader: Reader, cases: Sequence[Case], results: Connection) -> None:
    """Judge cases one after the other, in a process of its own."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    most = _status("VmSize") + ROOM  # the machine has other work
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    place = IN_MEMORY if os.access(IN_MEMORY, os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=place) as folder:
        warm = True
        for case in cases:
            if warm:  # so that what is loaded at first use counts for no case
                judge(reader, Case(case.family, (), 0), Path(folder))
                warm = False
            results.send(judge(reader, case, Path(folder)))


def judge(reader: Reader, case: Case, folder: Path) -> Outcome:
    """Write a case's file, read it, and look at what came of it."""
    path, content = folder / reader.file, reader.content(case)
    path.write_bytes(content)
    memory, start = _peak(reset=True), time.process_time()
    try:
        value = reader.read(path, case.family)
        outcome = Outcome("accepted")
    except DiffLoRAError as error:
        outcome = _message(str(error))
        valid = not case.edits and case.family not in reader.refused
        if valid and outcome.verdict == "refused":
            outcome = Outcome("nonsense", f"a valid file was refused: {error}")
    except Exception as error:  # whatever else comes is what this looks for
        outcome = Outcome("raw", _place(error))
    seconds, grown = time.process_time() - start, _peak() - memory
    if grown > MEMORY and len(content) < 10**6:
        return Outcome("memory", f"{outcome.verdict} after {'+'.join(case.edits)}")
    if seconds > SECONDS:
        return Outcome("slow", f"{outcome.verdict} after {'+'.join(case.edits)}")
    if outcome.verdict != "accepted":
        return outcome
    try:
        reader.check(value, path)
    except Exception as error:
        return Outcome("nonsense", _place(error))
    return outcome


def _message(text: str) -> Outcome:
    """Whether what a refusal says can be shown."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return Outcome("raw", "a message that cannot be encoded")
    if not text.strip() or len(text) > LONGEST_MESSAGE:
        return Outcome("raw", f"a message of {len(text) // 1000 * 1000} characters or more")
    return Outcome("refused")


def _place(error: Exception) -> str:
    """Kind and place of an exception: its innermost line of ours."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if "difflora_core" in f.filename or "tests" in f.filename]
    frame = (ours or list(frames))[-1]
    text = str(error).splitlines()[0][:80] if str(error) else ""
    digits = "".join("#" if c.isdigit() else c for c in text[:60])
    what = digits if isinstance(error, AssertionError) else type(error).__name__
    return f"{what} at {Path(frame.filename).name}:{frame.lineno}"


def _peak(reset: bool = False) -> int:
    """Most memory of this process in bytes; `reset` begins anew and gives what it has now."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    return _status("VmHWM")


def _status(name: str) -> int:
    """Bytes of a line of Linux's account of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024


def as_json(tallies: Sequence[Tally]) -> str:
    """All counts, and the cases that failed."""
    rows = [
        {
            "reader": tally.reader,
            "files": tally.files,
            **{name: tally.counts[name] for name in ("refused", "accepted", *FAILURES)},
            "failures": {why: [asdict(c) for c in cases] for why, cases in tally.failures.items()},
        }
        for tally in tallies
    ]
    return json.dumps(rows, indent=1)
