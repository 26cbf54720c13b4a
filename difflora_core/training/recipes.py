"""Which recipes a style can be distilled with: those whose settings say how."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

from ..methods.registry import METHODS


def distillation_recipes() -> dict[str, Any]:
    """Method name to its `RECIPE`, where its `Config` has `for_distillation(rank, **course)`."""
    found = {}
    for name in METHODS:
        if find_spec(f".{name}", __package__) is None:
            continue
        recipe = getattr(import_module(f".{name}", __package__), "RECIPE", None)
        if hasattr(getattr(recipe, "Config", None), "for_distillation"):
            found[name] = recipe
    return found


def default_distillation() -> str:
    """The recipe whose `Config` says `default_for_distillation`, wherever it is registered."""
    return next(
        name
        for name, recipe in distillation_recipes().items()
        if getattr(recipe.Config, "default_for_distillation", False)
    )
