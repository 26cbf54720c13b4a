"""Pictures in tables: parquet files, and datasets that `datasets` saved to disk.

A picture is a column of `datasets`' Image kind ({"bytes", "path"}) or of plain bytes. Paths are not
followed: a table from somewhere must not read files of this machine.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..errors import DatasetError, shown
from .libraries import arrow_library, datasets_library
from .sources import (
    CAPTION_NAMES,
    MOST_REPEATS,
    PERSON_NAMES,
    Entry,
    captions_in,
    checked_bytes,
    person_in,
)

PICTURE_NAMES = ("image", "picture", "img", "jpg")
_ROWS = 1000


@dataclass(frozen=True)
class TableNames:
    """Columns of a table; the usual names where one is empty."""

    picture: str = ""
    person: str = ""
    caption: str = ""

    def picture_in(self, columns: list[str], where: str) -> str:
        """The column of pictures among those that there are.

        Raises:
            DatasetError: there is none.
        """
        wanted = (self.picture,) if self.picture else PICTURE_NAMES
        for name in wanted:
            if name in columns:
                return name
        raise DatasetError(
            f"{shown(where, 300)} has no column {' or '.join(map(shown, wanted))}; its columns are "
            f"{shown(', '.join(columns), 300)}. Say which one holds the pictures."
        )

    def others_in(self, columns: list[str]) -> list[str]:
        """The columns that say something of a picture, among those that there are."""
        known = (*self.person_names, *self.caption_names, "repeats")
        return [name for name in columns if name in known]

    @property
    def person_names(self) -> tuple[str, ...]:
        """Columns that may hold the person."""
        return (self.person,) if self.person else PERSON_NAMES

    @property
    def caption_names(self) -> tuple[str, ...]:
        """Columns that may hold captions."""
        return (self.caption,) if self.caption else CAPTION_NAMES

    def entry(self, key: str, place: bytes, values: dict[str, Any]) -> Entry:
        """The entry of a row."""
        repeats = values.get("repeats", 1)
        if not isinstance(repeats, int) or not 1 <= repeats <= MOST_REPEATS:
            repeats = 1
        person = person_in(values, self.person_names)
        captions = captions_in(values, self.caption_names)
        return Entry(key, place, person, int(repeats), captions)


@dataclass(frozen=True)
class ParquetSource:
    """Parquet files.

    Attributes:
        root: the folder.
        files: their paths in it, with / between folders.
        names: of the columns.
    """

    root: str
    files: tuple[str, ...]
    names: TableNames

    @staticmethod
    def at(place: Path, names: TableNames) -> ParquetSource:
        """The parquet files of a folder and the folders in it, or one file.

        Raises:
            DatasetError: there is none.
        """
        root = place if place.is_dir() else place.parent
        found = root.rglob("*.parquet") if place.is_dir() else [place]
        files = sorted(path.relative_to(root).as_posix() for path in found if path.is_file())
        if not files:
            raise DatasetError(f"There is no parquet file in {shown(str(place), 300)}.")
        return ParquetSource(str(root), tuple(files), names)

    def entries(self) -> Iterator[Entry]:
        """Every row of every file; pictures are not read."""
        _parquet.cache_clear()
        _pictures.cache_clear()
        for file in self.files:
            table = _parquet(os.path.join(self.root, file))
            columns = table.schema_arrow.names
            self.names.picture_in(columns, file)
            others = self.names.others_in(columns)
            for group in range(table.num_row_groups):
                count = table.metadata.row_group(group).num_rows
                rows = table.read_row_group(group, columns=others).to_pylist() if others else []
                for row in range(count):
                    place = f"{file}\0{group}\0{row}".encode()
                    key = f"{file}#{group:06d}.{row:07d}"
                    yield self.names.entry(key, place, rows[row] if others else {})

    def read(self, place: bytes) -> bytes:
        """The picture of a row; the row group that it lies in stays in memory for the next one."""
        file, group, row = place.decode().split("\0")
        path = os.path.join(self.root, file)
        column = _pictures(path, int(group), self.names)
        return _bytes(column[int(row)].as_py())


@dataclass(frozen=True)
class ArrowSource:
    """A dataset on disk, or several splits of one.

    Attributes:
        folders: each with a `state.json`.
        names: of the columns.
    """

    folders: tuple[str, ...]
    names: TableNames

    @staticmethod
    def at(place: Path, names: TableNames) -> ArrowSource:
        """The dataset in a folder, or its splits.

        Raises:
            DatasetError: there is none.
        """
        places = [place, *sorted(path for path in place.glob("*") if path.is_dir())]
        folders = tuple(str(path) for path in places if is_arrow(path))
        if not folders:
            raise DatasetError(f"There is no dataset on disk in {shown(str(place), 300)}.")
        return ArrowSource(folders, names)

    def entries(self) -> Iterator[Entry]:
        """Every row of every split; pictures are not read."""
        _dataset.cache_clear()
        for number, folder in enumerate(self.folders):
            table, _ = _dataset(folder, self.names)
            others = table.select_columns(self.names.others_in(table.column_names))
            split = f"{Path(folder).name}#" if len(self.folders) > 1 else "#"
            for start in range(0, len(table), _ROWS):
                rows = others[start : start + _ROWS] if others.column_names else {}
                for row in range(start, min(start + _ROWS, len(table))):
                    values = {name: column[row - start] for name, column in rows.items()}
                    place = f"{number}\0{row}".encode()
                    yield self.names.entry(f"{split}{row:09d}", place, values)

    def read(self, place: bytes) -> bytes:
        """The picture of a row."""
        number, row = map(int, place.split(b"\0"))
        table, column = _dataset(self.folders[number], self.names)
        return _bytes(table[row][column])


def is_arrow(folder: Path) -> bool:
    """Whether `datasets` saved a dataset in a folder."""
    return (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()


def _bytes(value: Any) -> bytes:
    """The bytes of a picture's cell.

    Raises:
        DatasetError: it holds none.
    """
    data = value.get("bytes") if isinstance(value, dict) else value
    if isinstance(value, dict) and not data and value.get("path"):
        raise DatasetError("the table holds a path instead of the picture")
    if data is not None and not isinstance(data, bytes):
        raise DatasetError("the column holds no picture")
    return checked_bytes(data)


@lru_cache(4)
def _parquet(path: str) -> Any:
    """An open parquet file."""
    arrow, parquet = arrow_library(), arrow_library("parquet")
    try:
        return parquet.ParquetFile(path, memory_map=True)
    except (arrow.ArrowException, OSError, ValueError) as damage:
        place = shown(os.path.basename(path), 120)
        raise DatasetError(f"{place} cannot be read as parquet: {damage}.") from damage


@lru_cache(1)
def _pictures(path: str, group: int, names: TableNames) -> Any:
    """The pictures of a row group."""
    table, arrow = _parquet(path), arrow_library()
    column = names.picture_in(table.schema_arrow.names, path)
    try:
        return table.read_row_group(group, columns=[column]).column(column)
    except (arrow.ArrowException, OSError, ValueError) as damage:
        raise DatasetError(f"its row group is damaged: {damage}") from damage


@lru_cache(4)
def _dataset(folder: str, names: TableNames) -> tuple[Any, str]:
    """A dataset whose pictures are left as bytes, and their column."""
    library = datasets_library()
    try:
        table = library.load_from_disk(folder)
        column = names.picture_in(table.column_names, folder)
        if isinstance(table.features[column], library.Image):
            table = table.cast_column(column, library.Image(decode=False))
    except DatasetError:
        raise
    except Exception as damage:  # the library raises what it meets
        raise DatasetError(
            f"{shown(folder, 300)} cannot be read as a dataset: {shown(str(damage), 300)}."
        ) from damage
    return table, column
