"""A prepared dataset on disk: what lies in its folder, and the reader that training uses.

prepare.json          DatasetFacts, written last: without it there is no dataset
data-00000.arrow ...  rows of `records.columns`, SHARD_ROWS in each; `datasets.load_from_disk`
                      reads the folder too
dropped.jsonl         what was left out, and why
sheet-000.png ...     contact sheets
encoded/              see `encodings`
work/                 what is known of the sources, for going on and for the next time
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ..config import build, parse_json
from ..errors import CheckpointError, ConfigError, DatasetError, counted, shown
from ..limits import JSON_BYTES
from ..storage.file_digest import hashed
from .libraries import arrow_library
from .records import PreparedPicture, from_row

FACTS = "prepare.json"
FORMAT, VERSION = "difflora-dataset", 1
SHARD_ROWS = 256
"""Pictures of one Arrow file: some 80 MB at 1024 x 1024 pixels."""
OPEN_SHARDS = 8


@dataclass(frozen=True)
class ShardFile:
    """One Arrow file: its name in the folder, bytes, rows, and SHA-256 of its bytes."""

    name: str
    bytes: int
    rows: int
    digest: str


@dataclass(frozen=True)
class DatasetFacts:
    """What `prepare.json` says.

    Attributes:
        format: FORMAT.
        version: of the format.
        settings: `PrepareConfig`, as a table.
        digest: of all rows; what was computed from another dataset does not fit this one.
        face_encoder: which package found the faces, e.g. "antelopev2/glintr100.onnx"; empty: none.
        files: the Arrow files, in the order of the rows.
        people: how many there are.
        counts: pictures in the sources, and how many were left out for which kind of reason.
        notes: sentences about people of whom it is not clear who is meant.

    Raises:
        ConfigError: another format or version, or files that are not shards of SHARD_ROWS rows.
    """

    format: str
    version: int
    settings: Mapping[str, Any]
    digest: str
    face_encoder: str
    files: tuple[ShardFile, ...]
    people: int
    counts: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.format != FORMAT or self.version != VERSION:
            raise ConfigError(
                f"it is of format {shown(self.format)} {self.version}, not {FORMAT} {VERSION}"
            )
        if any(file.rows != SHARD_ROWS for file in self.files[:-1]):
            raise ConfigError("its files do not have the rows that they should")
        if any("/" in file.name or "\\" in file.name or file.rows < 1 for file in self.files):
            raise ConfigError("it names a file that is none of its own")

    def to_json(self) -> str:
        """The text of `prepare.json`; `read_facts` is the way back."""
        return json.dumps(asdict(self), sort_keys=True, indent=1) + "\n"


@dataclass(frozen=True)
class PersonRows:
    """Rows `first` to `first + count - 1` of a dataset show the person `name`."""

    name: str
    first: int
    count: int

    @property
    def rows(self) -> range:
        """The numbers of the person's pictures."""
        return range(self.first, self.first + self.count)


class PreparedDataset:
    """A prepared dataset, read row by row; nothing but the people's names stays in memory.

    Args:
        folder: what `prepare` wrote.

    Attributes:
        folder: the same.
        facts: what the dataset says of itself.

    Raises:
        DatasetError: there is no complete dataset, or a file was changed since it was written.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.facts = read_facts(self.folder)
        for file in self.facts.files:
            path = self.folder / file.name
            if not path.is_file() or path.stat().st_size != file.bytes:
                raise DatasetError(
                    f"{shown(str(path), 300)} is missing or was changed. Prepare the dataset again."
                )
        self._shard = lru_cache(OPEN_SHARDS)(self._open)

    def __len__(self) -> int:
        return sum(file.rows for file in self.facts.files)

    def __getitem__(self, row: int) -> PreparedPicture:
        """The picture of a row.

        Raises:
            IndexError: there is no such row.
            DatasetError: it is damaged.
        """
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        number, place = divmod(row, SHARD_ROWS)
        (values,) = self._shard(number).slice(place, 1).to_pylist()
        return from_row(row, values)

    def __iter__(self) -> Iterator[PreparedPicture]:
        return (self[row] for row in range(len(self)))

    def column(self, name: str) -> Iterator[Any]:
        """One column, row after row, without touching the pictures."""
        for number in range(len(self.facts.files)):
            yield from self._shard(number).column(name).to_pylist()

    def check_file(self, number: int) -> None:
        """Reads one of `facts.files` from end to end; its size alone is looked at before.

        Raises:
            DatasetError: it does not hold the bytes that were written.
        """
        file = self.facts.files[number]
        try:
            whole = hashed(self.folder / file.name).hexdigest() == file.digest
        except OSError:
            whole = False
        if not whole:
            raise DatasetError(
                f"{shown(file.name)} is damaged: it does not hold what was written. Prepare the "
                "dataset again."
            )

    @cached_property
    def people(self) -> tuple[PersonRows, ...]:
        """Everybody, in the order of the rows."""
        found: list[PersonRows] = []
        for row, name in enumerate(self.column("person")):
            if found and found[-1].name == name:
                found[-1] = PersonRows(name, found[-1].first, found[-1].count + 1)
            else:
                found.append(PersonRows(name, row, 1))
        return tuple(found)

    @cached_property
    def buckets(self) -> Mapping[tuple[int, int], np.ndarray[Any, Any]]:
        """Height and width to the rows (n,) int64 of that size, the smallest number first."""
        sizes = np.array(list(self.column("size")), dtype=np.int64).reshape(-1, 2)
        kinds, which = np.unique(sizes, axis=0, return_inverse=True)
        return {
            (int(height), int(width)): np.flatnonzero(which.reshape(-1) == k)
            for k, (height, width) in enumerate(kinds)
        }

    def _open(self, number: int) -> Any:
        """The memory-mapped table of a shard."""
        arrow, file = arrow_library(), self.facts.files[number]
        try:
            table = arrow.ipc.open_stream(arrow.memory_map(str(self.folder / file.name))).read_all()
        except (arrow.ArrowException, OSError) as damage:
            raise DatasetError(f"{shown(file.name)} is damaged: {damage}.") from damage
        if table.num_rows != file.rows:
            raise DatasetError(f"{shown(file.name)} has {table.num_rows} rows, not {file.rows}.")
        return table


def read_facts(folder: Path) -> DatasetFacts:
    """What a dataset says of itself.

    Raises:
        DatasetError: there is no complete dataset, or its facts were edited to nonsense.
    """
    path = folder / FACTS
    try:
        with path.open("rb") as file:
            text = file.read(JSON_BYTES + 1)
    except (OSError, ValueError) as missing:
        raise DatasetError(
            f"There is no prepared dataset in {shown(str(folder), 300)}: {FACTS} cannot be read. "
            "Run prepare, or let it go on to its end."
        ) from missing
    try:
        facts: DatasetFacts = build(DatasetFacts, parse_json(text, FACTS), FACTS)
    except ConfigError as damage:
        raise DatasetError(f"{shown(str(path), 300)} is damaged: {damage}") from damage
    return facts


def dataset_problem(folder: Path) -> str:
    """Why there is no usable dataset in a folder; empty when there is one."""
    try:
        PreparedDataset(folder)
    except (DatasetError, CheckpointError) as problem:
        return str(problem)
    return ""


def summary(facts: DatasetFacts) -> str:
    """A dataset in a sentence: "12 pictures of 3 people; left out: 2 duplicates, 1 unreadable"."""
    rows = sum(file.rows for file in facts.files)
    people = counted(facts.people, "person").replace("persons", "people")
    left = {name: n for name, n in facts.counts.items() if name != "pictures" and n}
    out = ", ".join(f"{n} {name}" for name, n in left.items()) or "nothing"
    return f"{counted(rows, 'picture')} of {people}; left out: {out}"
