"""The methods that the concept benchmarks compare: one entry each, one file a method.

The library's methods come from its registry: an entry has the name of its method. The baselines
are entries like the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module

from difflora_core.methods.base import ConceptMethod
from difflora_core.methods.registry import METHODS as REGISTRY

from .base import ComparedMethod
from .baselines import DREAMBOOTH, INVERSION

REGISTERED: Mapping[str, ComparedMethod] = {
    name: import_module(f".{name}", __package__).METHOD
    for name, kind in REGISTRY.items()
    if issubclass(kind, ConceptMethod)
}
METHODS: Mapping[str, ComparedMethod] = {
    entry.name: entry for entry in (*REGISTERED.values(), DREAMBOOTH, INVERSION)
}
