"""LoRAWeights to a padded token matrix and back: one token per layer and factor, exact inverse."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import LayoutError
from .layout import LoRALayout
from .weights import LoRALayer, LoRAWeights

PARTS = ("down", "up")


class TokenGrid:
    """Fixed reading order of a layout's values: T tokens of at most L values. Ours.

    Token order: layer by layer, within a layer in the order of ``parts``; each token is the
    row-major factor, padded with zeros to the longest.

    Args:
        layout: layers, shapes and rank.
        parts: ``("down", "up")``, or ``("up",)`` when every LoRA shares one fixed ``down``.

    Raises:
        LayoutError: other parts.
    """

    def __init__(self, layout: LoRALayout, parts: tuple[str, ...] = PARTS) -> None:
        if parts not in (PARTS, ("up",)):
            raise LayoutError(f"Tokens are made of ('down', 'up') or ('up',), got {parts}.")
        self.layout = layout
        self.parts = parts
        rank = layout.rank
        self.lengths: tuple[int, ...] = tuple(
            rank * (layer.in_features if part == "down" else layer.out_features)
            for layer in layout
            for part in parts
        )
        self.names: tuple[tuple[str, str], ...] = tuple(
            (layer.name, part) for layer in layout for part in parts
        )
        self.tokens = len(self.lengths)
        self.length = max(self.lengths)

    def mask(self, device: torch.device | str | None = None) -> Tensor:
        """(T, L) bool, True where a token holds a value."""
        lengths = torch.tensor(self.lengths, device=device)
        return torch.arange(self.length, device=device)[None, :] < lengths[:, None]

    def encode(self, weights: LoRAWeights) -> tuple[Tensor, Tensor]:
        """Token matrix of one LoRA or a batch; the scale alpha / r is folded into ``up``.

        Args:
            weights: factors (r, in), (out, r) or with a leading batch dimension.

        Returns:
            tokens (B, T, L) in the dtype of the weights (B = 1 for a single LoRA), mask (T, L).

        Raises:
            LayoutError: when layers, shapes or rank differ from the layout.
        """
        self.layout.check(weights)
        if len(weights.batch_shape) > 1:
            raise LayoutError(f"Tokens take one batch dimension, got {weights.batch_shape}.")
        rows = []
        for layer in self.layout:
            factors = weights[layer.name].folded()
            for part in self.parts:
                value: Tensor = getattr(factors, part)
                flat = value.reshape(-1, value.shape[-2] * value.shape[-1])  # (B, r * width)
                rows.append(F.pad(flat, (0, self.length - flat.shape[1])))
        tokens = torch.stack(rows, dim=1)  # (B, T, L)
        return tokens, self.mask(tokens.device)

    def decode(
        self, tokens: Tensor, shared_down: Mapping[str, Tensor] | None = None
    ) -> LoRAWeights:
        """Inverse of ``encode``; alpha = r. Padding is ignored.

        Args:
            tokens: (B, T, L), any floating dtype; gradients flow through.
            shared_down: canonical name to (r, in); needed when ``parts`` is ``("up",)``.

        Returns:
            LoRAWeights with factors (B, r, in) and (B, out, r).

        Raises:
            LayoutError: when the token shape is wrong or a shared ``down`` is missing.
        """
        if tokens.ndim != 3 or tuple(tokens.shape[1:]) != (self.tokens, self.length):
            raise LayoutError(
                f"Expected LoRA tokens of shape (B, {self.tokens}, {self.length}), "
                f"got {tuple(tokens.shape)}."
            )
        batch, rank = tokens.shape[0], self.layout.rank
        # unbind, not slicing: its backward is one stack instead of T full-size zero matrices
        rows = iter(tokens.unbind(dim=1))
        layers = {}
        for shape in self.layout:
            if "down" in self.parts:
                flat = next(rows)[:, : rank * shape.in_features]
                down = flat.reshape(batch, rank, shape.in_features)
            else:
                down = self._shared(shape.name, shape.in_features, shared_down).to(tokens)
                down = down.expand(batch, -1, -1)
            flat = next(rows)[:, : rank * shape.out_features]
            up = flat.reshape(batch, shape.out_features, rank)
            layers[shape.name] = LoRALayer(down, up, float(rank))
        return LoRAWeights(layers)

    def _shared(self, name: str, width: int, shared_down: Mapping[str, Tensor] | None) -> Tensor:
        """Checked shared factor of one layer."""
        down = (shared_down or {}).get(name)
        if down is None or tuple(down.shape) != (self.layout.rank, width):
            got = None if down is None else tuple(down.shape)
            raise LayoutError(
                f"The shared down factor of {name} must be "
                f"({self.layout.rank}, {width}), got {got}."
            )
        return down
