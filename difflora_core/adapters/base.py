"""LayerAdapter: the contract of every trained edit of one layer; AdapterSet: ordered edits.

Blending is done once for all methods, in ``attach``. With layer f, strength s and original input x:

    x' = x + s * (substitute(x) - x)      y = f(x')      y' = y + s * (edit(x, y) - y)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor, nn

Strength = float | Tensor
"""One number, or one for each sample of the batch: (B,)."""


class LayerAdapter(Protocol):
    """What a method does to one layer. Neither function sees the weight. Ours.

    Subclass it and override what the method needs; the defaults change nothing.
    """

    def on(self, layer: nn.Module) -> LayerAdapter:
        """The adapter as it acts on a live layer; for those that need its bias or its kind."""
        del layer
        return self

    def substitute(self, x: Tensor) -> Tensor:
        """Input that the layer should see instead of ``x``; (B, ..., in) to the same shape."""
        return x

    def edit(self, x: Tensor, y: Tensor) -> Tensor:
        """Output instead of ``y``, given the original input ``x``; (B, ..., out), same shape."""
        del x
        return y


@dataclass(frozen=True, eq=False)
class AdapterEntry:
    """One adapter on one layer, with its own strength."""

    layer: str
    adapter: LayerAdapter
    strength: Strength = 1.0


@dataclass(frozen=True, eq=False)
class AdapterSet:
    """Ordered adapters; order matters because some edits (PaRa) do not commute.

    A layer may appear several times; its adapters then act in the order of the entries.
    """

    entries: tuple[AdapterEntry, ...]

    def __len__(self) -> int:
        return len(self.entries)

    def __iter__(self) -> Iterator[AdapterEntry]:
        return iter(self.entries)

    def __add__(self, other: AdapterSet) -> AdapterSet:
        return AdapterSet(self.entries + other.entries)

    @property
    def layers(self) -> tuple[str, ...]:
        """Layer names without repetition, in order of first appearance."""
        return tuple(dict.fromkeys(entry.layer for entry in self.entries))

    def by_layer(self, factor: Callable[[str], float]) -> AdapterSet:
        """Every entry's strength multiplied by a factor of its layer's name."""
        return AdapterSet(tuple(replace(e, strength=e.strength * factor(e.layer)) for e in self))

    def scaled(self, strength: Strength) -> AdapterSet:
        """Every entry's strength multiplied by ``strength``."""
        return AdapterSet(
            tuple(AdapterEntry(e.layer, e.adapter, e.strength * strength) for e in self.entries)
        )
