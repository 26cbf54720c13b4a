"""LoRAWeights: canonical layer name to (down, up, alpha), optionally with a batch dimension."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from torch import Tensor

from ..errors import LayoutError


@dataclass(frozen=True, eq=False)
class LoRALayer:
    """One low-rank edit: delta W = alpha / r * up @ down (LoRA, arXiv 2106.09685, section 4.1).

    Args:
        down: (..., r, in) floating point; leading dimensions are a batch of LoRAs.
        up: (..., out, r), same leading dimensions.
        alpha: numerator of the scale; ``alpha == r`` means scale 1.
        kernel: (height, width) of a convolution's kernel, empty for a linear layer. The last
            dimension of ``down`` is then that of its weight, (in, height, width), flattened.

    Raises:
        LayoutError: when the two factors do not fit together.
    """

    down: Tensor
    up: Tensor
    alpha: float
    kernel: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        fits = self.down.ndim >= 2 and self.up.ndim >= 2
        fits = fits and self.up.shape[-1] == self.down.shape[-2] and self.down.shape[-2] > 0
        if not fits or self.up.shape[:-2] != self.down.shape[:-2]:
            raise LayoutError(
                f"The two LoRA factors do not fit: down has shape {tuple(self.down.shape)}, "
                f"up has {tuple(self.up.shape)}; expected (..., rank, in) and (..., out, rank)."
            )

    @property
    def rank(self) -> int:
        """Number of components r."""
        return self.down.shape[-2]

    @property
    def in_features(self) -> int:
        """Width of the layer's input; of a convolution, of the patch that its kernel sees."""
        return self.down.shape[-1]

    @property
    def out_features(self) -> int:
        """Width of the layer's output."""
        return self.up.shape[-2]

    @property
    def scaling(self) -> float:
        """Factor alpha / r in front of up @ down."""
        return self.alpha / self.rank

    @property
    def batch_shape(self) -> torch.Size:
        """Leading dimensions: empty for one LoRA, (B,) for a batch."""
        return self.down.shape[:-2]

    def delta(self) -> Tensor:
        """Weight change alpha / r * up @ down, shape (..., out, in)."""
        return self.scaling * (self.up @ self.down)

    def folded(self) -> LoRALayer:
        """Equal edit with alpha = r: the scale is moved into ``up``."""
        if self.alpha == self.rank:
            return self
        return replace(self, up=self.up * self.scaling, alpha=float(self.rank))


@dataclass(frozen=True, eq=False)
class LoRAWeights:
    """An ordered set of LoRA layers, keyed by canonical layer name.

    Canonical name: the LDM dotted path inside the UNet without ``.weight``
    (``input_blocks.4.1.transformer_blocks.0.attn1.to_q``); text encoder layers start with
    ``te1.`` or ``te2.``. Ours.
    """

    layers: Mapping[str, LoRALayer]

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", MappingProxyType(dict(self.layers)))

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __getitem__(self, name: str) -> LoRALayer:
        return self.layers[name]

    @property
    def batch_shape(self) -> torch.Size:
        """Leading dimensions shared by all layers.

        Raises:
            LayoutError: when the layers do not agree.
        """
        shapes = {layer.batch_shape for layer in self.layers.values()}
        if len(shapes) > 1:
            raise LayoutError(f"The layers of this LoRA have different batch sizes: {shapes}.")
        return shapes.pop() if shapes else torch.Size()

    def numel(self) -> int:
        """Number of values in all factors (alpha not counted)."""
        return sum(layer.down.numel() + layer.up.numel() for layer in self.layers.values())

    def to(
        self, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> LoRAWeights:
        """Same LoRA in another dtype or on another device."""
        return LoRAWeights(
            {
                name: replace(
                    layer,
                    down=layer.down.to(device=device, dtype=dtype),
                    up=layer.up.to(device=device, dtype=dtype),
                )
                for name, layer in self.layers.items()
            }
        )

    def detach(self) -> LoRAWeights:
        """Same values, cut off from autograd."""
        return LoRAWeights(
            {
                name: replace(layer, down=layer.down.detach(), up=layer.up.detach())
                for name, layer in self.layers.items()
            }
        )

    def scaled(self, strength: float) -> LoRAWeights:
        """Every delta W multiplied by ``strength`` (exact: only alpha changes)."""
        return LoRAWeights(
            {
                name: replace(layer, alpha=layer.alpha * strength)
                for name, layer in self.layers.items()
            }
        )

    def folded(self) -> LoRAWeights:
        """Equal edits with alpha = r in every layer."""
        return LoRAWeights({name: layer.folded() for name, layer in self.layers.items()})

    def batch_item(self, index: int) -> LoRAWeights:
        """LoRA number ``index`` of a batch: factors (B, ...) to (...).

        Raises:
            LayoutError: when there is no batch dimension or the index is outside it.
        """
        shape = self.batch_shape
        if not shape or not -shape[0] <= index < shape[0]:
            raise LayoutError(
                f"There is no LoRA number {index} in a batch of shape {tuple(shape)}."
            )
        return LoRAWeights(
            {
                name: replace(layer, down=layer.down[index], up=layer.up[index])
                for name, layer in self.layers.items()
            }
        )

    @staticmethod
    def stack(items: Sequence[LoRAWeights]) -> LoRAWeights:
        """Batch of equally shaped LoRAs: factors (...) to (B, ...).

        Differing alphas are folded into ``up``.

        Raises:
            LayoutError: when the list is empty or layers or shapes differ.
        """
        if not items:
            raise LayoutError("There is no LoRA to stack: the list is empty.")
        first = items[0]
        for number, item in enumerate(items):
            if set(item.layers) != set(first.layers):
                raise LayoutError(f"LoRA number {number} has other layers than the first one.")
        stacked = {}
        for name in first:
            group = [item[name] for item in items]
            if len({layer.alpha for layer in group}) > 1:
                group = [layer.folded() for layer in group]
            if len({(layer.down.shape, layer.up.shape) for layer in group}) > 1:
                raise LayoutError(f"The LoRAs have different shapes in layer {name}.")
            stacked[name] = replace(
                group[0],
                down=torch.stack([layer.down for layer in group]),
                up=torch.stack([layer.up for layer in group]),
            )
        return LoRAWeights(stacked)
