"""Infusion: a learned residual on the value of the concept's token, nothing else.

arXiv 2404.14007: attention maps stay those of the original model with the super-class word; in
every cross-attention layer V_t = W_V e_t + v where t is the concept's token. Its word keeps the
super-class word's embedding, so the prompt's own keys already are the super-class keys.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import ConfigError, LayoutError
from .base import LayerAdapter
from .perfusion import ConceptMatcher, GatedConcept


class TokenGate:
    """1 at similarities of at least `threshold`, else 0: a gate that switches.

    Args:
        threshold: similarity from which a token can be the concept's, above 0.
    """

    def __init__(self, threshold: float = 0.7) -> None:
        if not 0.0 < threshold <= 3.0:
            raise ConfigError(f"The threshold must lie in 0 to 3, got {threshold}.")
        self.threshold = threshold

    def __call__(self, similarity: Tensor) -> Tensor:
        """Gate of similarities, same shape."""
        return (similarity >= self.threshold).to(similarity)


def token_concept(
    direction: Tensor, covector: Tensor, threshold: float = 0.7, strength: float = 1.0
) -> GatedConcept:
    """A concept that acts on its own token alone, see `first_match`.

    Args:
        direction: (in,), see `GatedConcept`.
        covector: (in,).
        threshold: least similarity of that token.
        strength: 0 leaves the model alone.
    """
    return GatedConcept(direction, covector, direction, TokenGate(threshold), strength, reach=0)


class InfusionValueAdapter(LayerAdapter):
    """W_V e + v at the concept's token (arXiv 2404.14007, value residual).

    Args:
        matcher: of concepts made by `token_concept`, shared by all layers.
        residuals: v (J, out) of this layer; gradients flow into it. Zero changes nothing.
    """

    def __init__(self, matcher: ConceptMatcher, residuals: Tensor) -> None:
        if residuals.ndim != 2 or len(residuals) != len(matcher.concepts):
            raise LayoutError(
                f"{len(matcher.concepts)} concepts need as many residuals, got "
                f"{tuple(residuals.shape)}."
            )
        self.matcher, self.residuals = matcher, residuals

    def edit(self, x: Tensor, y: Tensor) -> Tensor:
        """y + v at the concept's token; x (B, L, in), y (B, L, out)."""
        if y.shape[-1] != self.residuals.shape[-1]:
            raise LayoutError(
                f"This concept has residuals of width {self.residuals.shape[-1]}, but the layer "
                f"gives {y.shape[-1]}. Use the base model it was trained on."
            )
        return self.matcher(x).added(y, self.residuals)

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors of the concepts and the ``residuals`` of this layer."""
        concepts = self.matcher.concepts
        gates = [c.gate.threshold if isinstance(c.gate, TokenGate) else 0.7 for c in concepts]
        return {
            "direction": torch.stack([c.direction for c in concepts]),
            "covector": torch.stack([c.covector for c in concepts]),
            "settings": torch.tensor(
                [(gate, c.strength) for gate, c in zip(gates, concepts, strict=True)],
                dtype=torch.float64,
            ),
            "residuals": self.residuals,
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> InfusionValueAdapter:
        """Adapter from the tensors of ``state_dict``."""
        rows = zip(state["direction"], state["covector"], state["settings"].tolist(), strict=True)
        concepts = [token_concept(i, c, *numbers) for i, c, numbers in rows]
        return cls(ConceptMatcher(concepts), state["residuals"])
