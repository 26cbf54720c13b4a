"""A disk that fails in the middle: full, read-only, or a folder that another program took away.

A job must end in an error of ours, leave what was saved as it was and no half of a file, and go on
to the same result when the disk is well again.
"""

from __future__ import annotations

import os
import resource
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .jobs import JOBS
from .kills import attempt

FULL_AT = 64
"""Bytes beyond which a file cannot grow on a full disk."""
NOBODY = 65_534


@dataclass
class DiskFault:
    """What a fault did to a job.

    `refused`: it ended in an error of ours; `kept`: what it had acknowledged is there; `halves`:
    temporary files that it left; `goes_on`: to the result of an undisturbed run; `words`: its
    error.
    """

    refused: bool
    kept: bool
    halves: int
    goes_on: bool
    words: str

    @property
    def sound(self) -> bool:
        """True when all of that is as it should be."""
        return self.refused and self.kept and not self.halves and self.goes_on


def full(folder: Path) -> None:
    """No file can grow: every write fails as on a full disk, under another name."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (FULL_AT, resource.RLIM_INFINITY))


def read_only(folder: Path) -> None:
    """Nothing can be written to the folder; root, whom no mode stops, becomes nobody."""
    for part in (folder, *folder.rglob("*")):
        part.chmod(0o555 if part.is_dir() else 0o444)
    if os.geteuid() == 0:
        os.seteuid(NOBODY)


def gone(folder: Path) -> None:
    """The folder is away, and a file has its name."""
    shutil.move(folder, folder.with_name(f"{folder.name} away"))
    folder.write_text("something else")


FAULTS: dict[str, Callable[[Path], None]] = {"full": full, "read-only": read_only, "gone": gone}


def suffer(name: str, fault: str) -> DiskFault:
    """Let a fault happen to a job, mend it, and let the job go on.

    Args:
        name: of JOBS.
        fault: of FAULTS.
    """
    with tempfile.TemporaryDirectory() as place:
        os.chmod(place, 0o755)
        alone = attempt(name, Path(place) / "alone")
        folder = Path(place) / "run"
        hurt = attempt(name, folder, fault=FAULTS[fault])
        _mend(folder)
        kept = JOBS[name].saved(folder) >= hurt.saved
        halves = len(list(folder.rglob("*.tmp")))
        again = attempt(name, folder)
    return DiskFault(
        bool(hurt.error) and hurt.ours,
        kept,
        halves,
        bool(alone.digest) and again.digest == alone.digest,
        hurt.error or "it ended as if nothing had happened",
    )


def _mend(folder: Path) -> None:
    """The disk as it was."""
    away = folder.with_name(f"{folder.name} away")
    if away.exists():
        folder.unlink()
        shutil.move(away, folder)
    for part in (folder, *folder.rglob("*")):
        part.chmod(0o755 if part.is_dir() else 0o644)
