"""What reading a LoRA file gave: the report, and the layers brought to a layout."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F

from ...errors import LayoutError, counted, percent
from ..canonical import truncated_layer
from ..distance import layer_inner_product
from ..layout import LayerShape, LoRALayout
from ..weights import LoRALayer, LoRAWeights

# Width of the text context gives the base model family of a cross-attention key or value layer.
_CONTEXT_WIDTHS = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "SDXL"}


@dataclass(frozen=True)
class ReadReport:
    """What happened to the keys of a LoRA file.

    Args:
        layers: number of layers read.
        ranks: the ranks found in the file, ascending.
        errors: canonical name to relative error of delta W, for layers that were approximated.
        total_error: relative error of all layers together.
        missing: layers of the layout that the file lacks; they are zero.
        skipped: stem to the reason why it could not be read.
        unused: stems or keys that belong to no layer asked for, and what each changes.
    """

    layers: int
    ranks: tuple[int, ...] = ()
    errors: Mapping[str, float] = field(default_factory=dict)
    total_error: float = 0.0
    missing: tuple[str, ...] = ()
    skipped: Mapping[str, str] = field(default_factory=dict)
    unused: Mapping[str, str] = field(default_factory=dict)

    def summary(self) -> str:
        """One readable sentence per thing worth knowing."""
        lines = [f"{counted(self.layers, 'layer')} read, ranks {', '.join(map(str, self.ranks))}."]
        if self.errors:
            lines.append(
                f"{counted(len(self.errors), 'layer')} approximated: relative error "
                f"{percent(self.total_error, 1)} together, "
                f"{percent(max(self.errors.values()), 1)} at worst."
            )
        if self.missing:
            lines.append(f"{counted(len(self.missing), 'layer')} not in the file, left at zero.")
        if self.skipped:
            reasons = ", ".join(sorted(set(self.skipped.values())))
            lines.append(f"{counted(len(self.skipped), 'layer')} left out: {reasons}.")
        if self.unused:
            counts = ", ".join(
                f"{n} of {part}" for part, n in Counter(self.unused.values()).items()
            )
            example = next(iter(self.unused))[:80]
            lines.append(f"Other entries were left out: {counts} (for example {example}).")
        return " ".join(lines)


@dataclass(frozen=True)
class ReadResult:
    """Weights of a LoRA file and the report of reading it."""

    weights: LoRAWeights
    report: ReadReport


def _fitted(layer: LoRALayer, shape: LayerShape, layout: LoRALayout) -> tuple[LoRALayer, float]:
    """Layer at the layout's rank and the relative error of getting there.

    Raises:
        LayoutError: when the layer is for another width.
    """
    if math.prod(layer.kernel) == 1:
        layer = replace(layer, kernel=())  # some files store linear layers as convolutions
    got, wanted = (layer.out_features, layer.in_features), (shape.out_features, shape.in_features)
    if got != wanted:
        cross = shape.name.endswith(("attn2.to_k", "attn2.to_v"))
        family = _CONTEXT_WIDTHS.get(got[1]) if cross else None
        raise LayoutError(
            f"This LoRA does not fit {layout.base}: layer {shape.name} is made for {got[1]} to "
            f"{got[0]} features, the base model has {wanted[1]} to {wanted[0]}."
            f"{f' It looks like a LoRA for {family}.' if family else ''} "
            f"Use a LoRA made for {layout.base}."
        )
    if layer.rank > layout.rank:
        small, error = truncated_layer(layer, layout.rank)
        return small, float(error)
    extra = layout.rank - layer.rank
    if extra:  # zeros change nothing but the rank, so alpha / r is folded first
        whole = layer.folded()
        down, up = F.pad(whole.down, (0, 0, 0, extra)), F.pad(whole.up, (0, extra))
        return LoRALayer(down, up, float(layout.rank)), 0.0
    return layer, 0.0


def conform(
    layers: Mapping[str, LoRALayer], layout: LoRALayout, errors: dict[str, float]
) -> tuple[dict[str, LoRALayer], tuple[str, ...]]:
    """Layers in the layout's order, shapes and rank; absent ones are zero.

    Args:
        layers: what the file held.
        layout: what is wanted.
        errors: relative errors by name; errors of truncation are added to it.

    Returns:
        Layers that satisfy ``layout.check``, names of the absent ones.

    Raises:
        LayoutError: when a layer has another width.
    """
    fitted: dict[str, LoRALayer] = {}
    missing = []
    for shape in layout:
        if shape.name not in layers:
            missing.append(shape.name)
            down = torch.zeros(layout.rank, shape.in_features)
            up = torch.zeros(shape.out_features, layout.rank)
            fitted[shape.name] = LoRALayer(down, up, float(layout.rank))
            continue
        fitted[shape.name], error = _fitted(layers[shape.name], shape, layout)
        before = errors.get(shape.name, 0.0)
        # both cut orthogonal parts of delta W, so the squares add
        together = math.sqrt(before**2 + (1 - before**2) * error**2)
        if together > 0:
            errors[shape.name] = together
    return fitted, tuple(missing)


def total_error(weights: LoRAWeights, errors: Mapping[str, float]) -> float:
    """Relative error of all layers together, from the stored deltas and the per-layer errors."""
    lost = whole = 0.0
    for name, layer in weights.layers.items():
        stored = float(layer_inner_product(layer, layer))
        share = errors.get(name, 0.0) ** 2
        total = stored / max(1 - share, 1e-12)
        whole += total
        lost += total * share
    return math.sqrt(lost / whole) if whole > 0 else 0.0
