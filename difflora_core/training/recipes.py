"""Which recipes a style can be distilled with: those whose settings say how."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

from ..errors import ConfigError
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
    """The recipe whose `Config` says `default_for_distillation`, else the first one.

    Raises:
        ConfigError: there is none.
    """
    recipes = distillation_recipes()
    wanted = [n for n, r in recipes.items() if getattr(r.Config, "default_for_distillation", False)]
    for name in (*wanted, *recipes):
        return name
    raise ConfigError("No method that is registered can be distilled.")
