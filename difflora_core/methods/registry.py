"""METHODS: method name to class."""

from __future__ import annotations

from .base import Method
from .difflora import DiffLoRAModel
from .infusion import Infusion
from .perfusion import Perfusion

METHODS: dict[str, type[Method]] = {
    method.name: method for method in (DiffLoRAModel, Perfusion, Infusion)
}
