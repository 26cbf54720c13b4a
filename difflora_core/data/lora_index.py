"""The index of a corpus of LoRAs: a row a LoRA, and a digest by which an edited one is noticed."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..config import build, parse_json
from ..errors import ConfigError, DatasetError, shown
from ..limits import JSON_BYTES
from ..storage.atomic import replacing, write_text
from .libraries import arrow_library
from .lora_checks import LoRACheckSettings, why_unlike_others

INDEX, INDEX_FACTS = "index.parquet", "index.json"


@dataclass(frozen=True)
class IndexFacts:
    """What `index.json` says: the digest of the index, LoRAs in it, and how they were judged."""

    digest: str
    rows: int
    kept: int
    checks: LoRACheckSettings


@dataclass(frozen=True)
class IndexRow:
    """What is known of a LoRA.

    Attributes:
        identity, likeness, source: see `NewLoRA`.
        shard: name of its file; empty in the file itself.
        place: its number there; -1 where it was not worth keeping.
        norm: of delta W.
        digest: SHA-256 of its values.
        reason: why it is not used; empty where it is.
    """

    identity: str
    shard: str
    place: int
    norm: float
    likeness: float | None
    digest: str
    source: str
    reason: str

    def __post_init__(self) -> None:
        if not math.isfinite(self.norm) or self.norm < 0 or not self.identity:
            raise ConfigError("a row of the index makes no sense")


def write_index(folder: Path, rows: Sequence[IndexRow], checks: LoRACheckSettings) -> None:
    """Judges LoRAs by each other and writes the index of a store.

    Args:
        folder: of the store.
        rows: everything in it, sorted by identity.
        checks: which LoRAs are kept.

    Raises:
        DatasetError: it cannot be written.
    """
    judged = _judged(rows, checks)
    (folder / INDEX_FACTS).unlink(missing_ok=True)
    arrow, parquet = arrow_library(), arrow_library("parquet")
    with replacing(folder / INDEX, DatasetError) as temporary:
        table = arrow.Table.from_pylist([asdict(row) for row in judged], schema=_schema())
        parquet.write_table(table, temporary)
        digest = hashlib.sha256(temporary.read_bytes()).hexdigest()
    facts = IndexFacts(digest, len(judged), sum(not row.reason for row in judged), checks)
    write_text(folder / INDEX_FACTS, json.dumps(asdict(facts)) + "\n", DatasetError)


def read_index(folder: Path) -> tuple[IndexFacts, list[IndexRow]]:
    """The index, checked against its digest.

    Raises:
        DatasetError: it is missing or was changed.
    """
    facts: IndexFacts = read_json(IndexFacts, folder / INDEX_FACTS, "The corpus is not indexed")
    arrow, parquet = arrow_library(), arrow_library("parquet")
    place = shown(str(folder / INDEX), 300)
    try:
        data = (folder / INDEX).read_bytes()
        if hashlib.sha256(data).hexdigest() != facts.digest:
            raise DatasetError(
                f"{place} was changed since it was made. Nothing in it is edited by hand: index "
                "the corpus again, with other settings where LoRAs should go or stay."
            )
        # read_table leaves threads, with which one in five programs ended in an abort
        table = parquet.ParquetFile(arrow.BufferReader(data)).read(use_threads=False)
        rows: tuple[IndexRow, ...] = build(tuple[IndexRow, ...], table.to_pylist(), place)
    except (OSError, ConfigError, arrow.ArrowException) as damage:
        raise DatasetError(
            f"{place} cannot be read ({damage}). Index the corpus again."
        ) from damage
    return facts, list(rows)


def read_json(kind: type, path: Path, missing: str) -> Any:
    """A record of a JSON file.

    Args:
        kind: of the record.
        path: of the file.
        missing: what to say first where it cannot be read.

    Raises:
        DatasetError: it cannot be read, or is no such record.
    """
    try:
        with path.open("rb") as file:
            return build(kind, parse_json(file.read(JSON_BYTES), path.name), path.name)
    except (OSError, ConfigError) as damage:
        raise DatasetError(
            f"{missing} in {shown(str(path.parent), 300)}: {path.name} cannot be read ({damage})."
        ) from damage


def _judged(rows: Sequence[IndexRow], checks: LoRACheckSettings) -> list[IndexRow]:
    """Rows with the reasons that the others give."""
    sound = [row for row in rows if not row.reason]
    reasons = why_unlike_others(
        [row.norm for row in sound], [row.likeness for row in sound], checks
    )
    found = {row.identity: reason for row, reason in zip(sound, reasons, strict=True)}
    return [replace(row, reason=row.reason or found[row.identity]) for row in rows]


def _schema() -> Any:
    """Columns of the index."""
    arrow = arrow_library()
    text, number = arrow.string(), arrow.float64()
    columns = {"identity": text, "shard": text, "place": arrow.int32(), "norm": number}
    columns |= {"likeness": number, "digest": text, "source": text, "reason": text}
    return arrow.schema(list(columns.items()))
