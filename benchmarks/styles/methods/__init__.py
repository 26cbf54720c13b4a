"""The ways to learn a style that are compared: one file a method, with its rows and claims.

The library's methods come from its registry, those that have a file here by their name. The
baselines are files like the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from importlib import import_module
from importlib.util import find_spec

from difflora_core.methods.registry import METHODS as REGISTRY

from . import deft, full
from .base import StyleRow

REGISTERED = tuple(
    import_module(f".{name}", __package__)
    for name in REGISTRY
    if find_spec(f".{name}", __package__)
)
MODULES = (full, deft, *REGISTERED)

ROWS: Mapping[str, StyleRow] = {row.name: row for module in MODULES for row in module.ROWS}
CLAIMS: tuple[tuple[str, str], ...] = tuple(
    claim for module in MODULES for claim in getattr(module, "CLAIMS", ())
)
"""What papers find: the first row of a pair is better than the second."""


def rows_named(patterns: Sequence[str]) -> list[str]:
    """Names of rows, "*" standing for anything.

    Raises:
        SystemExit: a pattern that no row has.
    """
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in ROWS):
            raise SystemExit(f"No row is named {pattern!r}; there are: {'; '.join(ROWS)}.")
    return [name for name in ROWS if any(fnmatchcase(name, pattern) for pattern in patterns)]
