"""Infusion: a learned residual on the value of the concept's token, nothing else.

arXiv 2404.14007: attention maps stay those of the original model with the super-class word; in
every cross-attention layer V_t = W_V e_t + v where t is the concept's token. Its word keeps the
super-class word's embedding, so the prompt's own keys already are the super-class keys.
"""

from __future__ import annotations

from torch import Tensor

from ..errors import LayoutError, counted
from .base import LayerAdapter, Strength
from .token_gate import ConceptMatcher, GatedConcept, TokenGate


def token_concept(
    direction: Tensor,
    covector: Tensor,
    threshold: float,
    strength: Strength = 1.0,
    since: Tensor | None = None,
) -> GatedConcept:
    """A concept that acts on its own token alone.

    Args:
        direction: (in,), see `GatedConcept`.
        covector: (in,).
        threshold: least similarity of that token.
        strength: 0 leaves the model alone; one number, or one for each sample (B,).
        since: where its word stands, see `GatedConcept`.
    """
    gate = TokenGate(threshold)
    return GatedConcept(direction, covector, direction, gate, strength, reach=0, since=since)


class InfusionValueAdapter(LayerAdapter):
    """W_V e + v at the concept's token (arXiv 2404.14007, value residual).

    Args:
        matcher: of concepts made by `token_concept`, shared by all layers.
        residuals: v (J, out) of this layer; gradients flow into it. Zero changes nothing.

    Raises:
        LayoutError: not one residual for each concept.
    """

    def __init__(self, matcher: ConceptMatcher, residuals: Tensor) -> None:
        if residuals.ndim != 2 or len(residuals) != len(matcher.concepts):
            raise LayoutError(
                f"{counted(len(matcher.concepts), 'concept')} need as many residuals, got "
                f"{tuple(residuals.shape)}."
            )
        self.matcher, self.residuals = matcher, residuals

    def edit(self, x: Tensor, y: Tensor) -> Tensor:
        """y + v at the concept's token; x (B, L, in), y (B, L, out).

        Raises:
            LayoutError: the residuals have another width than y.
        """
        if y.shape[-1] != self.residuals.shape[-1]:
            raise LayoutError(
                f"This concept has residuals of width {self.residuals.shape[-1]}, but the layer "
                f"gives {y.shape[-1]}. Use the base model it was trained on."
            )
        return self.matcher(x).added(y, self.residuals)
