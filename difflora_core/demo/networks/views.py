"""What the encoders and judges of the demo world share: views of pictures, labels, a schedule.

A view is a picture cut, turned and resized in one bilinear or bicubic step, for whole batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...config import Config, check_ranges
from ...training.loop import ByStep, Hooks, LoopConfig, train
from ..world.renderer import BACKGROUNDS, COLOURS, EXPRESSIONS, LOOKS, OBJECTS, PATTERNS
from ..world.scenes import Scene

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "look": LOOKS,
    "expression": EXPRESSIONS,
    "background": tuple(BACKGROUNDS),
    "pattern": PATTERNS,
    "shirt": tuple(COLOURS),
    "item": OBJECTS,
    "item_colour": tuple(COLOURS),
}
"""What a classifier can be asked about a scene, with the possible answers."""

NO_LABEL = -100
"""Label of a question without an answer: the colour of an item that is not there."""


def attribute_labels(scenes: Sequence[Scene]) -> dict[str, Tensor]:
    """Index of each scene's answer to each question of ATTRIBUTES: name to (M,) int64."""
    labels = {
        name: torch.tensor([answers.index(getattr(scene, name)) for scene in scenes])
        for name, answers in ATTRIBUTES.items()
    }
    labels["item_colour"][labels["item"] == 0] = NO_LABEL
    return labels


class PersonSampler:
    """Draws two different pictures of each of several different people.

    Args:
        identities: (M,) seed of the person on each picture.
        generator: source of the draws.
    """

    def __init__(self, identities: Tensor, generator: torch.Generator) -> None:
        order = torch.argsort(identities, stable=True)
        counts = torch.unique(identities[order], return_counts=True)[1]
        self._order, self._counts = order, counts
        self._starts = counts.cumsum(0) - counts
        self._generator = generator

    def draw(self, people: int) -> Tensor:
        """Indices (2 * people,): one picture of everybody, then another one in the same order."""
        who = torch.randperm(len(self._counts), generator=self._generator)[:people]
        counts = self._counts[who]
        draws = torch.rand(2, len(who), generator=self._generator)
        first = (draws[0] * counts).long()
        step = 1 + (draws[1] * (counts - 1).clamp(min=1)).long()
        chosen = torch.stack([first, (first + step) % counts]) + self._starts[who]
        return self._order[chosen.flatten()]


def as_planes(images: Tensor) -> Tensor:
    """Pictures (B, H, W, 3), 8-bit or in [0, 1], as (B, 3, H, W) float32 in [0, 1]."""
    planes = images.permute(0, 3, 1, 2)
    return planes.float() / 255 if images.dtype == torch.uint8 else planes.float()


def uniform(count: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    """(count,) uniform draws."""
    return low + (high - low) * torch.rand(count, generator=generator)


def warp(
    planes: Tensor, matrices: Tensor, size: int, mode: str = "bilinear", padding: str = "border"
) -> Tensor:
    """Sample a square view of every picture.

    Args:
        planes: (B, 3, H, W).
        matrices: (B, 2, 3) from view pixels (x, y, 1) to picture pixels, both with pixel centres
            at whole numbers.
        size: side of the view.
        mode: interpolation, as in `grid_sample`.
        padding: what lies outside, as in `grid_sample`.

    Returns:
        (B, 3, size, size).
    """
    axis = torch.arange(size, dtype=torch.float32)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    points = torch.stack([x, y, torch.ones_like(x)], -1).reshape(-1, 3)
    source = points @ matrices.transpose(1, 2)
    height, width = planes.shape[-2:]
    grid = (2 * source + 1) / torch.tensor([width, height]) - 1
    grid = grid.reshape(-1, size, size, 2)
    return F.grid_sample(planes, grid, mode, padding, align_corners=False).clamp(0, 1)


def square_matrices(centre: Tensor, side: Tensor, size: int) -> Tensor:
    """Matrices for `warp` that cut squares: (B, 2, 3) from centres (B, 2) and sides (B,)."""
    scale = side / size
    shift = centre - (side / 2)[:, None] + (scale / 2)[:, None] - 0.5
    matrices = torch.zeros(len(side), 2, 3)
    matrices[:, 0, 0] = matrices[:, 1, 1] = scale
    matrices[:, :, 2] = shift
    return matrices


def map_points(matrices: Tensor, points: Tensor) -> Tensor:
    """Picture points (B, P, 2) as pixel indices of the view that `matrices` (B, 2, 3) cut."""
    linear, shift = matrices[:, :, :2], matrices[:, None, :, 2]
    return torch.linalg.solve(linear, (points - 0.5 - shift).transpose(1, 2)).transpose(1, 2)


def disturb(planes: Tensor, generator: torch.Generator, amount: float = 1.0) -> Tensor:
    """Blur, noise and colour shifts of random strength, as a generated picture might have.

    Args:
        planes: (B, 3, H, W) in [0, 1].
        generator: source of the draws.
        amount: scale of all disturbances; at 1 colours move by up to 3 %, noise has a deviation
            of up to 4 %, and half of the pictures get blurred.
    """
    count = len(planes)

    def column(low: float, high: float) -> Tensor:
        return uniform(count, low, high, generator)[:, None, None, None]

    soft = F.avg_pool2d(F.pad(planes, (1, 1, 1, 1), mode="replicate"), 3, 1)
    planes = torch.lerp(planes, soft, column(-0.8, 0.8).clamp(min=0) * amount)
    tint = (torch.rand(count, 3, 1, 1, generator=generator) - 0.5) * 0.06 * amount
    noise = torch.randn(planes.shape, generator=generator) * column(0, 0.04) * amount
    return (planes * (1 + column(-0.04, 0.04) * amount) + tint + noise).clamp(0, 1)


def contrastive_loss(features: Tensor, temperature: float) -> Tensor:
    """Two-view contrastive loss (NT-Xent, arXiv 2002.05709, Eq. 1).

    Args:
        features: (2 * P, E); row k and row k + P show the same person.
        temperature: divisor of the cosines.
    """
    unit = F.normalize(features.float(), dim=1)
    cosines = unit @ unit.T / temperature
    cosines = cosines.masked_fill(torch.eye(len(unit), dtype=torch.bool), -torch.inf)
    partner = torch.arange(len(unit)).roll(len(unit) // 2)
    return F.cross_entropy(cosines, partner)


def explained(predicted: Tensor, truth: Tensor) -> Tensor:
    """Share of variance explained (R squared) of every column: (P,)."""
    error = ((predicted - truth) ** 2).mean(0)
    return 1 - error / truth.var(0, correction=0).clamp(min=1e-9)


def initialise(module: nn.Module, seed: int) -> None:
    """Set all parameters from a seed: unit-gain fan-in normal weights, zero biases, unit norms."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in module.named_parameters():
        with torch.no_grad():
            if "embedding" in name and "patch" not in name:
                value.normal_(0, 0.02, generator=generator)
            elif value.ndim >= 2:
                value.normal_(0, value[0].numel() ** -0.5, generator=generator)
            else:
                value.fill_(float(name.endswith("weight")))


def convolution_block(before: int, after: int, stride: int) -> list[nn.Module]:
    """Convolution, batch norm, ReLU."""
    convolution = nn.Conv2d(before, after, 3, stride, 1, bias=False)
    return [convolution, nn.BatchNorm2d(after), nn.ReLU()]


def lay_out(module: nn.Module, memory_format: torch.memory_format) -> None:
    """Store the weights of convolutions in a memory format; channels last trains faster here."""
    for value in module.parameters():
        if value.ndim == 4:
            value.data = value.data.contiguous(memory_format=memory_format)


@dataclass(frozen=True)
class Schedule(Config):
    """How long and how fast to train a network of the demo world.

    `steps`; `rate`: peak of AdamW's one-cycle learning rate; `matrix_rate`: peak for Muon, which
    trains the matrices named to `fit`; `decay`: weight decay of both.
    """

    steps: int
    rate: float = 2e-3
    matrix_rate: float = 0.02
    decay: float = 0.02

    def __post_init__(self) -> None:
        check_ranges("Schedule", self, 1, 10_000_000, "steps")
        check_ranges("Schedule", self, 0, 10, "rate", "matrix_rate", "decay")

    def loop(self, with_matrices: bool) -> LoopConfig:
        """The run: a warm-up, a cosine decay to zero, and bfloat16 products."""
        return LoopConfig(
            steps=self.steps,
            learning_rate=self.rate,
            matrix_rate=self.matrix_rate if with_matrices else 0.0,
            warmup=max(1, self.steps // 20),
            schedule="one_cycle",
            weight_decay=self.decay,
            precision="bf16",
            checkpoint_every=100,
            log_every=20,
        )


def fit(objective: nn.Module, draw: ByStep, schedule: Schedule, folder: Path, hooks: Hooks) -> None:
    """Train in place; resumable. Batches are whole: batch norms and losses compare their pictures.

    Args:
        objective: see `loop.train`.
        draw: makes the batches.
        schedule: how long and how fast.
        folder: of the run's state.
        hooks: see `loop.train`; `matrices` are 2-D weights of a transformer for Muon
            (orthogonalised momentum): after 200 steps CLIP vision explained .24 of the identity
            with it, .09 without.
    """
    loop = schedule.loop(with_matrices=hooks.matrices is not None)
    train(objective, draw, loop, folder, replace(hooks, splits=False))
