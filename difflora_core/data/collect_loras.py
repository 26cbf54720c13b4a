"""LoRA files that others trained, of any family, to a corpus."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from ..errors import DatasetError, DiffLoRAError, percent, shown
from ..storage.file_digest import hashed
from ..storage.lora_file import load_lora
from .lora_store import NewLoRA, StoreWriter

SHARD = 16
"""LoRAs of a shard: 750 MB at SDXL's rank 8."""
MOST_LOST = 0.5
"""Relative error of delta W from which on a LoRA that is cut to the corpus's rank is not itself."""

Report = Callable[[str, int, int], None]


def collect_loras(
    files: Sequence[Path],
    names: Sequence[str],
    writer: StoreWriter,
    most_lost: float = MOST_LOST,
    report: Report | None = None,
) -> dict[str, str]:
    """Adds LoRA files to a store; those that are in it, by their content, are not read again.

    Args:
        files: of any family that is read, see `lora.formats`.
        names: of the identities, one a file.
        writer: of the store; its layout says which layers and what rank.
        most_lost: relative error of delta W that bringing one to the layout may cost.
        report: told what is being done.

    Returns:
        Name to reason of each file that was not added.

    Raises:
        DatasetError: the store cannot be written.
    """
    there = {(row.identity, row.source) for row in writer.rows()}
    refused: dict[str, str] = {}
    waiting: list[NewLoRA] = []
    for number, (path, name) in enumerate(zip(files, names, strict=True)):
        try:
            source = _digest(path)
            if (name, source) not in there:
                waiting.append(_read(path, name, source, writer, most_lost))
        except DiffLoRAError as reason:
            refused[name] = str(reason)
        if len(waiting) == SHARD:
            writer.add(waiting)
            waiting = []
        if report is not None:
            report("reading LoRA files", number + 1, len(files))
    if waiting:
        writer.add(waiting)
    return refused


def _read(path: Path, name: str, source: str, writer: StoreWriter, most_lost: float) -> NewLoRA:
    """One file in the layout of the store."""
    result = load_lora(path, writer.layout, writer.layout.rank)
    if result.report.total_error > most_lost:
        raise DatasetError(
            f"{shown(path.name)} loses {percent(result.report.total_error)} of its change at rank "
            f"{writer.layout.rank}."
        )
    if len(result.report.missing) == len(writer.layout):
        raise DatasetError(f"{shown(path.name)} has no layer of the corpus.")
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
