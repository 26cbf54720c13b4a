"""METHODS: method name to class."""

from __future__ import annotations

from .base import Method
from .difflora import DiffLoRAModel

METHODS: dict[str, type[Method]] = {DiffLoRAModel.name: DiffLoRAModel}
