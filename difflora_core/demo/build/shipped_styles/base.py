"""What a method's file says of the style that ships with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ....training.adaptation_run import AdaptationTraining


@dataclass(frozen=True)
class ShippedStyle:
    """A style that ships.

    `name`: of its file, without suffix; `recipe`: makes the objective of a task and settings;
    `config`: those settings; rates are high because the base is tiny.
    """

    name: str
    recipe: Any
    config: AdaptationTraining
