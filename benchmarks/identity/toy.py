"""`make bench name=toy`: are a LoRA's weights easier to compress and to predict than a network's?

The premise of DiffLoRA (arXiv:2408.06740), in the smallest setting that can deny it. Each person is
a function from a place on a portrait to its colour, learned by a perceptron: by one of the person's
own, or by a change to one perceptron that draws the mean of many people. Then the weights of people
that nobody learned from are squeezed through the principal components of the others', and predicted
from one other photo by ridge regression; what counts is what such weights still draw.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor

from difflora_core.demo.build.features import demo_encoders
from difflora_core.demo.world.identities import split_seeds
from difflora_core.demo.world.scenes import Scene, render_portraits
from difflora_core.evaluation.report import Report, crossed_interval
from difflora_core.training.difflora.linear_baselines import (
    best_ridge,
    feature_matrix,
    pca_autoencoder,
)
from difflora_core.vision.face_choice import FaceOptions
from difflora_core.vision.features import extract_features

from ..command import benchmark_console, command_parser, commit, machine, set_threads, write_report

WIDTH, HIDDEN, WAVES, RANK = 32, 2, 8, 2
"""Of the perceptron: width, hidden layers, frequencies of each coordinate; rank of its LoRAs."""
SIDE = 32
"""Of the portraits, in pixels."""
PLACES, RATE = 256, 1e-2
"""Places in a step, and the learning rate, which falls to zero by half a cosine."""
SHARE = 0.8
"""Of the people are learned from; a tenth chooses the ridge's penalty, a tenth is judged."""

Weights = list[Tensor]
"""Of N people: (N, out, in) and (N, out) of every layer, or the two factors of its LoRA."""
Draw = Callable[[Weights, Tensor], Tensor]
"""From the weights of N people and places (P, F) to colours (N, P, 3)."""


@dataclass(frozen=True)
class Faces:
    """Portraits of N people.

    `colours`: (N, P, 3) in [0, 1] at `places` (P, F), every pixel; `features`: (N, D) of another
    photo of each.
    """

    colours: Tensor
    places: Tensor
    features: Tensor


@dataclass(frozen=True)
class Kind:
    """One way to make a person's weights: where training starts, and what draws with them."""

    name: str
    start: Weights
    draw: Draw
    learned: tuple[int, ...]

    def numbers(self) -> int:
        """Of a person that are learned."""
        return sum(self.start[k][0].numel() for k in self.learned)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = command_parser("Compress and predict the weights of perceptrons and of their LoRAs.")
    parser.add_argument("--people", type=int, default=320)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--components", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args(arguments)
    set_threads(options.threads)
    console, faces = benchmark_console(), known_faces(options.people)
    found: dict[str, list[dict[str, Tensor]]] = {}
    for seed in track(range(options.seeds), "seeds", console=console, transient=True):
        mean = mean_network(faces, options.steps, seed)
        before = errors(perceptron, mean, faces)
        for kind in kinds(mean, len(faces.colours), seed):
            trained = learn(kind, faces, options.steps, seed)
            made = judge(kind, trained, faces, options.components)
            made |= {"before": before, "numbers": torch.tensor(float(kind.numbers()))}
            found.setdefault(kind.name, []).append(made)
    rows = {name: columns(seeds) for name, seeds in found.items()}
    facts = {name: vars(options)[name] for name in ("people", "steps", "components", "seeds")}
    report = Report(rows, {**facts, "commit": commit(), "machine": machine()})
    console.print(report.to_markdown({"numbers": 0, "error": 5}))
    write_report(report, options.json, console)
    return 0


def known_faces(count: int) -> Faces:
    """Portraits in one scene and pose of training people, and what encoders see of a photo."""
    seeds = split_seeds("train", count)
    scene = Scene("cartoon", "neutral", "grey", "plain", "blue", "none", "red")
    shown = render_portraits(seeds, [0] * count, [scene] * count, spread=0.0).images
    small = F.interpolate(shown.permute(0, 3, 1, 2), (SIDE, SIDE), mode="area")
    photos = render_portraits(seeds, [1] * count, looks=("photo",)).images
    seen = extract_features(photos, *demo_encoders(), FaceOptions(on_missing="skip")).features
    people = feature_matrix([seen.select(k) for k in range(count)])
    return Faces(small.flatten(2).mT, waves(SIDE), people)


def waves(side: int) -> Tensor:
    """Every pixel's place as sines and cosines (side^2, 4 * WAVES) of both coordinates."""
    line = (torch.arange(side) + 0.5) / side * 2 - 1
    y, x = torch.meshgrid(line, line, indexing="ij")
    angles = torch.stack([y, x], -1).flatten(0, 1)[..., None] * torch.arange(1, WAVES + 1) * 1.5
    return torch.cat([angles.sin(), angles.cos()], -1).flatten(1)


def network(count: int, seed: int, alike: bool) -> Weights:
    """Untrained weights of `count` perceptrons, all alike or each drawn for itself."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [4 * WAVES, *[WIDTH] * HIDDEN, 3]
    weights: Weights = []
    for inner, outer in pairwise(sizes):
        shape = (1 if alike else count, outer, inner)
        drawn = torch.randn(shape, generator=generator) * (2 / inner) ** 0.5
        weights += [drawn.expand(count, -1, -1).clone(), torch.zeros(count, outer)]
    return weights


def perceptron(weights: Weights, places: Tensor) -> Tensor:
    """Colours (N, P, 3) that N perceptrons give places (P, F)."""
    h = places.expand(len(weights[0]), -1, -1)
    for k in range(0, len(weights), 2):
        h = torch.baddbmm(weights[k + 1][:, None], h, weights[k].mT)
        h = F.relu(h) if k + 2 < len(weights) else h
    return h


def changed_by_lora(mean: Weights, places: Tensor, factors: Weights) -> Tensor:
    """Colours (N, P, 3) of the mean perceptron with LoRAs, `down` and `up` of every layer."""
    count, layers = len(factors[0]), []
    for k in range(0, len(mean), 2):
        layers += [mean[k] + factors[k + 1] @ factors[k], mean[k + 1].expand(count, -1)]
    return perceptron(layers, places)


def kinds(mean: Weights, count: int, seed: int) -> list[Kind]:
    """What is compared."""
    whole = tuple(range(len(mean)))
    generator = torch.Generator().manual_seed(seed + 500)
    factors: Weights = []
    for weight in mean[::2]:
        outer, inner = weight.shape[1:]
        down = torch.randn(1, RANK, inner, generator=generator) / inner**0.5
        factors += [down.expand(count, -1, -1).clone(), torch.zeros(count, outer, RANK)]

    def with_lora(weights: Weights, places: Tensor) -> Tensor:
        return changed_by_lora(mean, places, weights)

    copies = [part.expand(count, *part.shape[1:]).clone() for part in mean]
    return [
        Kind("perceptron, a start for each", network(count, seed, False), perceptron, whole),
        Kind("perceptron, one start for all", network(count, seed, True), perceptron, whole),
        Kind("perceptron, from the mean one", copies, perceptron, whole),
        Kind("LoRA on the mean one", factors, with_lora, whole),
        Kind("LoRA, one down for all", factors, with_lora, whole[1::2]),
    ]


def learn(kind: Kind, faces: Faces, steps: int, seed: int) -> Weights:
    """Weights of everybody, each fitted to the person's own portrait."""
    weights = [part.clone() for part in kind.start]
    learned = [weights[k].requires_grad_() for k in kind.learned]
    optimizer = torch.optim.Adam(learned, lr=RATE)
    course = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        some = torch.randint(len(faces.places), (PLACES,), generator=generator)
        drawn = kind.draw(weights, faces.places[some])
        error = (drawn - faces.colours[:, some]).square().mean((1, 2)).sum()
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        course.step()
    return [part.detach() for part in weights]


def mean_network(faces: Faces, steps: int, seed: int) -> Weights:
    """One perceptron (1, ...) that draws the mean of the people that are learned from."""
    known = split(faces)[0]
    mean = Faces(faces.colours[known].mean(0, keepdim=True), faces.places, faces.features[:1])
    every = tuple(range(2 * (HIDDEN + 1)))
    return learn(Kind("mean", network(1, seed, True), perceptron, every), mean, steps, seed)


def split(faces: Faces) -> tuple[slice, slice, slice]:
    """The people that are learned from, those that choose the penalty, those that are judged."""
    count = len(faces.colours)
    first, second = round(SHARE * count), round((1 + SHARE) / 2 * count)
    return slice(0, first), slice(first, second), slice(second, count)


@torch.no_grad()
def errors(draw: Draw, weights: Weights, faces: Faces) -> Tensor:
    """(I,) mean squared error of the colours of the people that are judged."""
    judged = split(faces)[2]
    return (draw(weights, faces.places) - faces.colours[judged]).square().mean((1, 2))


def judge(kind: Kind, trained: Weights, faces: Faces, components: int) -> dict[str, Tensor]:
    """Of every judged person: (I,) error of the own weights, of compressed and of predicted ones;
    and the share of the weights' variation that the components keep, ()."""
    shapes = [trained[k].shape[1:] for k in kind.learned]
    flat = torch.cat([trained[k].flatten(1) for k in kind.learned], 1)  # N L
    parts = [flat[part] for part in split(faces)]
    pca = pca_autoencoder(parts[0][:, None], components)
    codes = [pca.encode(part[:, None]) for part in parts]
    seen = [faces.features[part] for part in split(faces)]
    ridge, _ = best_ridge((seen[0], codes[0]), (seen[1], codes[1]))

    def error(rows: Tensor) -> Tensor:
        pieces = rows.split([shape.numel() for shape in shapes], 1)
        weights = [part[split(faces)[2]] for part in trained]
        for k, piece, shape in zip(kind.learned, pieces, shapes, strict=True):
            weights[k] = piece.unflatten(1, tuple(shape))
        return errors(kind.draw, weights, faces)

    again = pca.decode(codes[2])[:, 0]
    left = (again - parts[2]).square().sum() / (parts[2] - pca.mean[0]).square().sum()
    return {
        "error": error(parts[2]),
        "compressed": error(again),
        "predicted": error(pca.decode(ridge.predict(seen[2]))[:, 0]),
        "variation": 1 - left,
    }


def columns(seeds: Sequence[dict[str, Tensor]]) -> dict[str, float]:
    """A row of the table: gains over the mean perceptron as shares of what the own weights gain,
    with intervals that resample seeds and people."""
    row = {
        "numbers": float(seeds[0]["numbers"]),
        "error": float(torch.stack([seed["error"] for seed in seeds]).mean()),
        "variation": float(torch.stack([seed["variation"] for seed in seeds]).mean()),
    }
    for name in ("compressed", "predicted"):
        shares = [
            (seed["before"] - seed[name]) / (seed["before"] - seed["error"]).mean()
            for seed in seeds
        ]
        found = crossed_interval(torch.stack(shares))
        row |= {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high}
    return row
