"""LoRA files that others trained, of any family, to a corpus."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import DatasetError, DiffLoRAError, counted, percent, shown
from ..lora.formats.report import ReadReport
from ..storage.file_digest import hashed
from ..storage.lora_file import load_lora
from .lora_store import NewLoRA, StoreWriter

SHARD = 16
"""LoRAs of a shard: 750 MB at SDXL's rank 8."""
MOST_LOST = 0.5
"""Relative error of delta W from which on a LoRA that is cut to the corpus's rank is not itself."""

Report = Callable[[str, int, int], None]


@dataclass(eq=False)
class Collected:
    """What became of LoRA files.

    Attributes:
        refused: name to reason of each file that was not added.
        files: how many were read.
        partly: how many of those change more than the layers of the corpus.
        beside: what that is, and how many layers.
    """

    refused: dict[str, str] = field(default_factory=dict)
    files: int = 0
    partly: int = 0
    beside: Counter[str] = field(default_factory=Counter)

    def count(self, report: ReadReport) -> None:
        """Counts a file that was read."""
        beside = [*report.unused.values(), *report.skipped.values()]
        self.files += 1
        self.partly += bool(beside)
        self.beside.update(beside)

    def summary(self) -> str:
        """A sentence on what was left out of files that were read; empty without any."""
        if not self.partly:
            return ""
        what = ", ".join(f"{number} of {kind}" for kind, number in self.beside.most_common())
        return (
            f"{self.partly} of {counted(self.files, 'LoRA file')} change more than the layers of "
            f"the corpus; that was left out: {what}."
        )


def collect_loras(
    files: Sequence[Path],
    names: Sequence[str],
    writer: StoreWriter,
    most_lost: float = MOST_LOST,
    report: Report | None = None,
) -> Collected:
    """Adds LoRA files to a store; those that are in it, by their content, are not read again.

    Args:
        files: of any family that is read, see `lora.formats`.
        names: of the identities, one a file.
        writer: of the store; its layout says which layers and what rank.
        most_lost: relative error of delta W that bringing one to the layout may cost.
        report: told what is being done.

    Returns:
        What became of them; of files that were in the store before nothing is counted.

    Raises:
        DatasetError: the store cannot be written.
    """
    there = {(row.identity, row.source) for row in writer.rows()}
    collected = Collected()
    waiting: list[NewLoRA] = []
    for number, (path, name) in enumerate(zip(files, names, strict=True)):
        try:
            source = _digest(path)
            if (name, source) not in there:
                waiting.append(_read(path, name, source, writer, most_lost, collected))
        except DiffLoRAError as reason:
            collected.refused[name] = str(reason)
        if len(waiting) == SHARD:
            writer.add(waiting)
            waiting = []
        if report is not None:
            report("reading LoRA files", number + 1, len(files))
    if waiting:
        writer.add(waiting)
    return collected


def _read(
    path: Path,
    name: str,
    source: str,
    writer: StoreWriter,
    most_lost: float,
    collected: Collected,
) -> NewLoRA:
    """One file in the layout of the store."""
    result = load_lora(path, writer.layout, writer.layout.rank)
    if result.report.total_error > most_lost:
        raise DatasetError(
            f"{shown(path.name)} loses {percent(result.report.total_error)} of its change at rank "
            f"{writer.layout.rank}."
        )
    if len(result.report.missing) == len(writer.layout):
        raise DatasetError(f"{shown(path.name)} has no layer of the corpus.")
    collected.count(result.report)
    return NewLoRA(name, result.weights, source=source)


def _digest(path: Path) -> str:
    """SHA-256 of a file.

    Raises:
        DatasetError: it cannot be read.
    """
    try:
        return hashed(path).hexdigest()
    except OSError as closed:
        raise DatasetError(f"{shown(path.name)} cannot be read: {closed.strerror}.") from closed
