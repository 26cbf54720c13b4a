"""Which kind of source a place is."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from ..errors import DatasetError, shown
from .folder_sources import KOHYA, METADATA, FolderSource, MetadataSource
from .sources import Source, name_of
from .table_sources import ArrowSource, ParquetSource, TableNames, is_arrow

Kind = Literal["auto", "folders", "kohya", "metadata", "parquet", "arrow"]


def find_source(place: str | Path, kind: Kind = "auto", names: TableNames | None = None) -> Source:
    """The source of pictures at a place.

    Args:
        place: a folder, or a parquet file.
        kind: see `folder_sources` and `table_sources`; "auto" looks at what is there.
        names: columns of tables; by default the usual ones.

    Raises:
        DatasetError: there is nothing, or nothing of that kind.
    """
    root = Path(place)
    if not root.exists():
        raise DatasetError(f"There is nothing at {shown(str(root), 300)}.")
    kind = _kind(root) if kind == "auto" else kind
    if kind == "parquet":
        return ParquetSource.at(root, names or TableNames())
    if kind == "arrow":
        return ArrowSource.at(root, names or TableNames())
    if not root.is_dir():
        raise DatasetError(f"{shown(str(root), 300)} is no folder.")
    if kind == "metadata":
        if not (root / METADATA).is_file():
            raise DatasetError(f"There is no {METADATA} in {shown(str(root), 300)}.")
        return MetadataSource(str(root))
    return FolderSource(str(root), kind == "kohya")


def _kind(root: Path) -> Kind:
    """What a place looks like."""
    if root.is_file():
        return "parquet"
    if is_arrow(root) or any(is_arrow(path) for path in root.glob("*") if path.is_dir()):
        return "arrow"
    if (root / METADATA).is_file():
        return "metadata"
    if next(root.rglob("*.parquet"), None) is not None:
        return "parquet"
    with os.scandir(os.fsencode(root)) as found:
        folders = [entry.name for entry in found if entry.is_dir() and entry.name[:1] != b"."]
    named = [KOHYA.fullmatch(name_of(folder)) for folder in folders]
    return "kohya" if named and all(named) else "folders"
