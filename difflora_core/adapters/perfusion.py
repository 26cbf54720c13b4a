"""Perfusion: gated, key-locked rank-one edits of cross-attention keys and values.

arXiv 2305.01644, section 4. With the concept's direction i*, its covector c = C^-1 i* / i*'C^-1 i*
and an encoding e, the similarity is a = c' e, the gate g = sigmoid((a - bias) / temperature), and

    h = W (e - a i*) + g o*

Keys are locked to the super-class word: o* = W_K i_super, so the key's input alone changes. Values
have a learned o* for each layer. No layer's weight is ever read.
"""

from __future__ import annotations

from torch import Tensor

from ..errors import LayoutError, counted
from .base import LayerAdapter
from .token_gate import ConceptMatcher


class PerfusionKeyAdapter(LayerAdapter):
    """Local key lock: the key sees e_perp + g i_super, so W_K itself makes o*_K = W_K i_super.

    `matcher` is shared by all layers.
    """

    def __init__(self, matcher: ConceptMatcher) -> None:
        self.matcher = matcher

    def substitute(self, x: Tensor) -> Tensor:
        """Encodings (B, L, in) with the concepts replaced by their super-class words."""
        return self.matcher(x).locked


class PerfusionValueAdapter(LayerAdapter):
    """The value path: W_V e_perp + sum over concepts of g o*.

    Args:
        matcher: shared by all layers.
        targets: o* (J, out) of this layer, one row per concept; gradients flow into it.

    Raises:
        LayoutError: not one target for each concept.
    """

    def __init__(self, matcher: ConceptMatcher, targets: Tensor) -> None:
        if targets.ndim != 2 or len(targets) != len(matcher.concepts):
            count, got = len(matcher.concepts), tuple(targets.shape)
            raise LayoutError(f"{counted(count, 'concept')} need as many value targets, got {got}.")
        self.matcher, self.targets = matcher, targets

    def substitute(self, x: Tensor) -> Tensor:
        """Encodings (B, L, in) without the concepts."""
        return self.matcher(x).rest

    def edit(self, x: Tensor, y: Tensor) -> Tensor:
        """y + sum of g o*; x (B, L, in), y (B, L, out).

        Raises:
            LayoutError: the value targets have another width than y.
        """
        if y.shape[-1] != self.targets.shape[-1]:
            raise LayoutError(
                f"This concept has values of width {self.targets.shape[-1]}, but the layer gives "
                f"{y.shape[-1]}. Use the base model it was trained on."
            )
        return self.matcher(x).added(y, self.targets)


class GlobalKeyAdapter(LayerAdapter):
    """Global key lock: keys see the encoding of the whole prompt with the super-class word.

    Args:
        context: (1 or B, L, in), made by the same text encoders.
    """

    def __init__(self, context: Tensor) -> None:
        self.context = context

    def substitute(self, x: Tensor) -> Tensor:
        """The super-class encoding; x (B, L, in).

        ComfyUI repeats the shorter one of two prompts that share a batch, and so is this one.

        Raises:
            LayoutError: the two prompts differ in length, width or batch.
        """
        context = self.context.to(x)
        if x.shape[-2] > context.shape[-2] and x.shape[-2] % context.shape[-2] == 0:
            context = context.repeat(1, x.shape[-2] // context.shape[-2], 1)
        if context.shape[-2:] != x.shape[-2:] or len(context) not in (1, len(x)):
            raise LayoutError(
                f"The super-class prompt has the shape {tuple(context.shape)}, the prompt itself "
                f"{tuple(x.shape)}: encode both with the same CLIP, and make them equally long."
            )
        return context.expand_as(x)
