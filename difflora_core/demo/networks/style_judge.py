"""The judge of art styles: which style a picture is in, by statistics of its light and colour.

It sees no network that is trained or measured by it: linear discriminant analysis (Fisher 1936) of
numbers that a painter would name, contrast, colourfulness, outlines, flatness.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from ...config import parse_json
from ...errors import CheckpointError
from ...storage.safetensors_io import read_file, write_atomic
from .views import as_planes

SIDE = 64
"""Pictures are judged at this size."""
FORMAT = "difflora-demo-style-judge-1"


def style_statistics(images: Tensor) -> Tensor:
    """What a style changes, without what is shown: (N, 19) float32 of pictures (N, H, W, 3).

    Five quantiles of lightness, saturation and slope each, their shares of dark and of colourful
    pixels, and how light edges are against the rest; 8-bit or in [0, 1].
    """
    planes = F.interpolate(as_planes(images), (SIDE, SIDE), mode="area")
    light = planes.mean(1)
    colour = planes.amax(1) - planes.amin(1)
    x, y = light.diff(dim=2)[:, 1:], light.diff(dim=1)[:, :, 1:]
    slope = (x.square() + y.square()).sqrt()
    at = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95])
    parts = [torch.quantile(each.flatten(1), at, dim=1).T for each in (light, colour, slope)]
    edge = slope.flatten(1) / slope.flatten(1).sum(1, keepdim=True).clamp_min(1e-6)
    at_edges = (edge * light[:, 1:, 1:].flatten(1)).sum(1)
    shares = [
        (light < 0.35).float().mean((1, 2)),
        (colour > 0.5).float().mean((1, 2)),
        at_edges - light.mean((1, 2)),
        light.std((1, 2)),
    ]
    return torch.cat([*parts, torch.stack(shares, 1)], 1)


@dataclass(frozen=True)
class StyleJudge:
    """Tells styles apart.

    Args:
        styles: S names. weight: (19, S). bias: (S,).
    """

    styles: tuple[str, ...]
    weight: Tensor
    bias: Tensor

    def probabilities(self, images: Tensor) -> Tensor:
        """How probable each style is for each of pictures (N, H, W, 3): (N, S)."""
        return (style_statistics(images) @ self.weight + self.bias).softmax(-1)

    def share(self, images: Tensor, style: str) -> float:
        """Share of pictures (N, H, W, 3) that are in a style rather than in any other."""
        chosen = self.probabilities(images).argmax(-1) == self.styles.index(style)
        return float(chosen.float().mean())

    def save(self, path: Path) -> None:
        """Write it."""
        facts = {"format": FORMAT, "styles": json.dumps(self.styles)}
        write_atomic({"weight": self.weight, "bias": self.bias}, facts, path)


def train_style_judge(examples: Mapping[str, Tensor]) -> StyleJudge:
    """A judge from pictures (N, H, W, 3) of each style.

    Args:
        examples: style to pictures, hundreds of each.
    """
    statistics = {name: style_statistics(images).double() for name, images in examples.items()}
    centres = torch.stack([each.mean(0) for each in statistics.values()])
    within = torch.cat([each - each.mean(0) for each in statistics.values()])
    spread = within.T @ within / len(within)
    ridge = 1e-4 * spread.diagonal().mean() * torch.eye(len(spread), dtype=spread.dtype)
    weight = torch.linalg.solve(spread + ridge, centres.T)
    bias = -0.5 * (centres.T * weight).sum(0)
    return StyleJudge(tuple(examples), weight.float(), bias.float())


def load_style_judge(path: Path) -> StyleJudge:
    """The judge in a file.

    Raises:
        CheckpointError: the file holds none.
    """
    tensors, facts = read_file(path, "judge of styles")
    if facts.get("format") != FORMAT:
        raise CheckpointError(f"{path} is no judge of styles.")
    return StyleJudge(tuple(parse_json(facts["styles"], "the styles")), **tensors)
