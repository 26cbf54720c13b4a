"""TokenGroups: how the values of a LoRA layout are laid out for the autoencoder (ours).

A layout gives one token per layer and part (`lora/tokens.py`). Tokens of equal length form a
group, so that a decoder can work on a few dense tensors without padding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...lora.layout import LoRALayout
from ...lora.tokens import TokenGrid
from ...lora.weights import LoRALayer, LoRAWeights


@dataclass(frozen=True)
class TokenSlot:
    """One token: a factor of one layer.

    Args:
        layer: canonical layer name.
        part: `down` or `up`.
        rows: rows of the factor (r for down, out for up).
        columns: columns of the factor (in for down, r for up).
    """

    layer: str
    part: str
    rows: int
    columns: int

    @property
    def length(self) -> int:
        """Number of values."""
        return self.rows * self.columns

    @property
    def role(self) -> str:
        """What the layer does, shared by all blocks: for example `attn1.to_q up`."""
        words = [word for word in self.layer.split(".") if not word.isdigit()]
        return f"{'.'.join(words[-2:])} {self.part}"


class TokenGroups:
    """Token order and groups of one layout.

    Args:
        layout: the LoRA layout.
        parts: `("up",)` or `("down", "up")`; the order of tokens is layer by layer, part by part.

    Raises:
        LayoutError: unknown parts.
    """

    def __init__(self, layout: LoRALayout, parts: tuple[str, ...]) -> None:
        self.layout, self.parts, r = layout, parts, layout.rank
        self.grid = TokenGrid(layout, parts)
        columns = {(s.name, "down"): s.in_features for s in layout} | {
            (s.name, "up"): r for s in layout
        }
        self.slots = tuple(
            TokenSlot(*name, length // columns[name], columns[name])
            for name, length in zip(self.grid.names, self.grid.lengths, strict=True)
        )
        lengths = self.grid.lengths
        self.longest = self.grid.length
        self.lengths = tuple(sorted(set(lengths)))
        self.members = {
            length: tuple(t for t, own in enumerate(lengths) if own == length)
            for length in self.lengths
        }

    @property
    def numel(self) -> int:
        """Number of values in all tokens together."""
        return sum(slot.length for slot in self.slots)

    def split(self, tokens: Tensor) -> list[Tensor]:
        """Cuts padded tokens (B, T, L) into groups (B, T_g, L_g), shortest first."""
        return [tokens[:, list(self.members[n]), :n] for n in self.lengths]

    def join(self, groups: list[Tensor]) -> Tensor:
        """Inverse of `split`: groups to padded tokens (B, T, L)."""
        padded = [F.pad(g, (0, self.longest - g.shape[-1])) for g in groups]
        order = [t for n in self.lengths for t in self.members[n]]
        back = torch.tensor(order, device=groups[0].device).argsort()
        return torch.cat(padded, dim=1)[:, back]

    def flatten(self, tokens: Tensor) -> Tensor:
        """Concatenates the real values of padded tokens (B, T, L) to (B, P)."""
        rows = zip(tokens.unbind(1), self.slots, strict=True)
        return torch.cat([row[:, : slot.length] for row, slot in rows], dim=1)

    def unflatten(self, flat: Tensor) -> Tensor:
        """Inverse of `flatten`: (B, P) to padded tokens (B, T, L)."""
        pieces = flat.split([slot.length for slot in self.slots], dim=1)
        return torch.stack([F.pad(p, (0, self.longest - p.shape[1])) for p in pieces], dim=1)

    def raw(self, flat: Tensor, statistics: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """Normalised values (B, P) to raw ones per group, (B, T_g, L_g).

        Args:
            flat: as `flatten` gives them.
            statistics: mean (T_g, L_g) and scale (T_g, 1) of every group.
        """
        pairs = zip(self.split(self.unflatten(flat)), statistics, strict=True)
        return [values * scale + mean for values, (mean, scale) in pairs]

    def weights(self, groups: list[Tensor], shared_down: Mapping[str, Tensor]) -> LoRAWeights:
        """Cuts groups into layers without copying.

        Args:
            groups: raw values, (B, T_g, L_g) each.
            shared_down: layer name to (r, in); used when only `up` is generated.

        Returns:
            Batched weights: down (B, r, in), up (B, out, r), alpha = r.
        """
        factors: dict[tuple[str, str], Tensor] = {}
        for length, values in zip(self.lengths, groups, strict=True):
            # unbind, not indexing: its backward is one stack
            for t, row in zip(self.members[length], values.unbind(1), strict=True):
                slot = self.slots[t]
                factors[slot.layer, slot.part] = row.unflatten(-1, (slot.rows, slot.columns))
        layers: dict[str, LoRALayer] = {}
        for shape in self.layout.layers:
            up = factors[shape.name, "up"]
            down = factors.get((shape.name, "down"))
            if down is None:
                down = shared_down[shape.name].to(up).expand(len(up), -1, -1)
            layers[shape.name] = LoRALayer(down=down, up=up, alpha=float(self.layout.rank))
        return LoRAWeights(layers)
