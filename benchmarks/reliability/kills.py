"""Kill -9 at any moment: a job is started again until it ends, and compared with one left alone.

Half of the kills come after a random time, the other half at a random change of a file: Python's
audit hook sees every opening, renaming and removing before it happens, so that the moments between
two of them are met as well, however short they are. Children are forked from a server that has
imported everything, so an attempt costs what the job costs.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

from difflora_core.errors import DiffLoRAError

from ..command import Log, silent
from .jobs import JOBS

CHANGES = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod"}
"""Events after which files may differ; see Python's table of audit events."""
PATIENCE = 120.0
"""Seconds after which an attempt counts as hanging."""


@dataclass
class Attempt:
    """One run of a job in a process of its own.

    `digest`: of its result, when it ended; `error`: what it raised, `ours` when in our words;
    `saved`: the largest number that it acknowledged; `changes`: of files; `seconds`: until it ended
    or was killed.
    """

    digest: str = ""
    error: str = ""
    ours: bool = False
    saved: int = 0
    changes: int = 0
    seconds: float = 0.0

    @property
    def killed(self) -> bool:
        """True when it neither ended nor raised."""
        return not self.digest and not self.error


@dataclass
class Tally:
    """What became of a job that was killed again and again.

    `kills`: how many; `at_changes`: of those, at the change of a file; `finished`: runs that came
    to their end; `equal`: of those, runs with the result of an unkilled one; `lost`: kills after
    which something acknowledged was not there; `errors`: what a run that goes on raised.
    """

    kills: int = 0
    at_changes: int = 0
    finished: int = 0
    equal: int = 0
    lost: int = 0
    errors: list[str] = field(default_factory=list)

    @property
    def sound(self) -> bool:
        """Nothing lost, nothing refused, every result the same."""
        return self.finished > 0 and self.equal == self.finished and not (self.lost or self.errors)


def kill_often(name: str, kills: int, seed: int = 0, log: Log = silent) -> Tally:
    """Kill a job so often, in as many runs as that takes; the last run is left to its end.

    Args:
        name: of JOBS.
        kills: how often.
        seed: of the moments.
        log: told of everything that went wrong.
    """
    rng, tally = random.Random(f"{name} {seed}"), Tally()
    with tempfile.TemporaryDirectory() as place:
        alone = attempt(name, Path(place) / "alone")
        if alone.killed or alone.error:
            raise RuntimeError(f"{name} fails when it is left alone: {alone.error}")
        while tally.kills < kills:
            folder = Path(place) / f"run {tally.finished + len(tally.errors)}"
            _one_run(name, folder, alone, kills, rng, tally)
    for error in tally.errors:
        log(f"{name}: {error}")
    return tally


def _one_run(
    name: str, folder: Path, alone: Attempt, kills: int, rng: random.Random, tally: Tally
) -> None:
    """Start a job in a folder until it ends, killing it while there are kills left."""
    known = 0
    while True:
        at, after = 0, PATIENCE
        if tally.kills < kills and rng.random() < 0.5:
            at = rng.randint(1, alone.changes)
        elif tally.kills < kills:
            after = rng.uniform(0, alone.seconds)
        made = attempt(name, folder, at, after)
        if made.killed and after == PATIENCE and not at:
            made.error = f"it hangs for {PATIENCE:g} seconds"
        if made.error:
            tally.errors.append(made.error)
            return
        if not made.killed:
            tally.finished += 1
            tally.equal += made.digest == alone.digest
            return
        tally.kills += 1
        tally.at_changes += at > 0
        known = max(known, made.saved)
        tally.lost += JOBS[name].saved(folder) < known


def attempt(
    name: str,
    folder: Path,
    at: int = 0,
    after: float = PATIENCE,
    fault: Callable[[Path], None] | None = None,
) -> Attempt:
    """Run a job in a process of its own.

    Args:
        name: of JOBS.
        folder: of the job; made when it is missing.
        at: number of the change of a file before which it is killed; 0 never.
        after: seconds after which it is killed.
        fault: what happens to its folder, in its own process, when something is saved there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.reliability.jobs"])
    here, there = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(name, folder, at, fault, there))
    child.start()
    there.close()
    made, began, end = Attempt(), 0.0, time.monotonic() + PATIENCE
    while here.poll(max(0.0, end - time.monotonic())):
        try:
            kind, value = here.recv()
        except EOFError:
            break
        if kind == "began":
            began = time.monotonic()
            end = began + after
        elif kind == "saved":
            made.saved = max(made.saved, value)
        else:
            setattr(made, kind, value)
    made.seconds = time.monotonic() - began
    child.kill()
    child.join()
    here.close()
    return made


def _child(
    name: str, folder: Path, at: int, fault: Callable[[Path], None] | None, parent: Connection
) -> None:
    """Run a job, telling the parent; at a change of a file, die."""
    changes, due = 0, fault

    def audit(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal changes
        if event not in CHANGES or (event == "open" and str(folder) not in str(arguments[0])):
            return
        changes += 1
        if changes == at:
            os.kill(os.getpid(), signal.SIGKILL)

    def saved(number: int) -> None:
        nonlocal due
        parent.send(("saved", number))
        if due is not None and number >= 2:
            happens, due = due, None
            happens(folder)

    parent.send(("began", None))
    sys.addaudithook(audit)
    try:
        digest = JOBS[name].run(folder, saved)
    except Exception as error:
        parent.send(("ours", isinstance(error, DiffLoRAError)))
        parent.send(("error", f"{type(error).__name__}: {error}"))
    else:
        parent.send(("changes", changes))
        parent.send(("digest", digest))
