"""METHODS: the ways to adapt a base model, by name. A method is registered by its line here."""

from __future__ import annotations

from ..errors import ConfigError
from .base import Method
from .infusion import Infusion
from .lora import LoRA
from .para import PaRa
from .perfusion import Perfusion
from .styleinject import StyleInject

METHODS: dict[str, type[Method]] = {
    LoRA.name: LoRA,
    Perfusion.name: Perfusion,
    Infusion.name: Infusion,
    PaRa.name: PaRa,
    StyleInject.name: StyleInject,
}


def method(name: str) -> type[Method]:
    """The method of this name.

    Raises:
        ConfigError: there is none.
    """
    if name not in METHODS:
        raise ConfigError(
            f"The method {name!r} is not known here; known are {', '.join(METHODS)}. Update the "
            "node pack, or install the one that brings this method."
        )
    return METHODS[name]
