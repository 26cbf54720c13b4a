"""The Method protocol and the request it answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from torch import Tensor

from ..adapters.base import AdapterSet
from ..errors import ConfigError
from ..vision.features import ImageFeatures


@dataclass(frozen=True, eq=False)
class AdaptationRequest:
    """What a method is asked for; a method ignores what it has no use for (ours).

    Args:
        features: photos of one person, for methods that work from photos.
        seed: of the variant to draw, 0 to 2**64 - 1.
        variation: False takes the single best guess, True samples a variant.
        steps: sampling steps.
        guidance_scale: 1 follows the photos, above 1 exaggerates them.
        strength: of the adaptation, 1 as trained.
        gate_override: (2,) weights of face and image features; NaN keeps the learned one.
        callback: called as `callback(step, total, latent)`; may raise to interrupt.

    Raises:
        ConfigError: the strength is not between -10 and 10.
    """

    features: ImageFeatures | None = None
    seed: int = 0
    variation: bool = False
    steps: int = 20
    guidance_scale: float = 1.0
    strength: float = 1.0
    gate_override: Tensor | None = None
    callback: Callable[[int, int, Tensor], None] | None = None

    def __post_init__(self) -> None:
        if not -10.0 <= self.strength <= 10.0:
            raise ConfigError(f"Strength must lie in -10 to 10; got {self.strength}.")


class Method(Protocol):
    """A way to adapt a base model: a name, a configuration, and adapters for a request."""

    name: ClassVar[str]
    Config: ClassVar[type[Any]]

    def adapters(self, request: AdaptationRequest) -> AdapterSet:
        """Returns the adapters that answer the request."""
        ...
