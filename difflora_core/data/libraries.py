"""Hugging Face `datasets` and `pyarrow`: optional, imported when something is prepared or read."""

from __future__ import annotations

import importlib
from typing import Any

from ..errors import DatasetError

INSTALL = "pip install 'difflora[train]'"


def datasets_library() -> Any:
    """The module `datasets`, which brings `pyarrow`."""
    return _module("datasets")


def arrow_library(part: str = "") -> Any:
    """The module `pyarrow`, or a part of it: "parquet"."""
    return _module(f"pyarrow.{part}" if part else "pyarrow")


def _module(name: str) -> Any:
    """A module, or a sentence that says what to install.

    Raises:
        DatasetError: it cannot be imported.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise DatasetError(
            f"Datasets need the package {name}, which could not be loaded ({error}). Run: {INSTALL}"
        ) from error
