"""The judges of the demo world: networks that measure pictures and condition nothing.

They share neither weights, architecture nor people (split `judge`) with the encoders. Their
training pictures are blurred, shifted and tinted a little, so that generated pictures, which are
never as crisp as rendered ones, are not foreign to them. Residual networks on raw 64 px pictures:

- embedder: two pictures of one person lie together (cosine), whatever else they show;
- parameters: regresses the renderer's identity parameters;
- attributes: names look, expression, background, pattern, shirt, item and the item's colour.

A photograph and a cartoon show hues truly, a painting veils them: the first two judges see few
paintings in training and should be asked about photo and cartoon pictures only.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...config import Config, check_ranges, parse_json
from ...storage.safetensors_io import read_file, write_atomic
from ...training.fingerprint import fingerprint
from ...training.loop import Batch, ByStep, Hooks, Progress
from ...vision.preprocess import resize_square
from ..world.identities import PARAMETERS
from ..world.pool import PicturePool
from ..world.renderer import LOOKS
from ..world.scenes import PICTURE_SIZE
from .recogniser import recognition_figures
from .stored import building, load_strictly
from .views import (
    ATTRIBUTES,
    NO_LABEL,
    PersonSampler,
    Schedule,
    as_planes,
    attribute_labels,
    contrastive_loss,
    disturb,
    explained,
    fit,
    initialise,
    lay_out,
    square_matrices,
    uniform,
    warp,
)

logger = logging.getLogger(__name__)

PLAIN_LOOKS = ("photo", "cartoon")
"""Looks that show the person's colours truly; judge likeness on these."""

_CHUNK = 256


@dataclass(frozen=True)
class JudgeRecipe(Config):
    """One judge.

    `outputs`: numbers per picture; `widths`: channels of the stages; `people`: people in a batch
    (two pictures each); `paintings`: share of the paintings that it sees in training; `shift`:
    pixels by which views move.
    """

    outputs: int
    widths: tuple[int, ...]
    people: int = 64
    paintings: float = 0.25
    shift: float = 2.0
    temperature: float = 0.1
    schedule: Schedule = field(default_factory=lambda: Schedule(steps=1200, rate=3e-3))
    seed: int = 41

    def __post_init__(self) -> None:
        check_ranges("Judge", self, 1, 65_536, "outputs", "people")
        check_ranges("Judge", self, 0, 1, "paintings")
        check_ranges("Judge", self, 0, 1000, "shift")
        check_ranges("Judge", self, 1e-4, 100, "temperature")
        check_ranges("Judge", self, 0, 2**62, "seed")


EMBEDDER = JudgeRecipe(
    outputs=96,
    widths=(32, 48, 96, 128),
    people=96,
    schedule=Schedule(steps=500, rate=3e-3),
    seed=41,
)
REGRESSOR = JudgeRecipe(outputs=len(PARAMETERS), widths=(32, 64, 96, 160), seed=51)
CLASSIFIER = JudgeRecipe(
    outputs=sum(len(answers) for answers in ATTRIBUTES.values()),
    widths=(24, 48, 64, 96),
    paintings=1.0,
    schedule=Schedule(steps=500, rate=3e-3),
    seed=61,
)
PROMPTS = replace(CLASSIFIER, widths=(32, 48, 64, 96), schedule=Schedule(steps=2500, rate=3e-3))
"""A slower classifier, for pictures that went through the VAE; see `stages_concepts`."""
RECIPES = {"embedder": EMBEDDER, "parameters": REGRESSOR, "attributes": CLASSIFIER}


class Residual(nn.Module):
    """Two convolutions beside a shortcut; halves the picture when `stride` is 2."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.first_norm = nn.BatchNorm2d(after)
        self.second = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.second_norm = nn.BatchNorm2d(after)
        self.shortcut = nn.Conv2d(before, after, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(B, before, H, W) to (B, after, H / stride, W / stride)."""
        y = F.silu(self.first_norm(self.first(x)))  # B after H/stride W/stride
        return F.silu(self.second_norm(self.second(y)) + self.shortcut(x))


class JudgeNetwork(nn.Module):
    """(B, 3, 64, 64) in [0, 1] to (B, outputs)."""

    def __init__(self, widths: tuple[int, ...], outputs: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, widths[0], 5, 2, 2)
        blocks = [Residual(widths[0], widths[0], 1)]
        blocks += [Residual(before, after, 2) for before, after in pairwise(widths)]
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(widths[-1] * 16)
        self.read = nn.Linear(widths[-1] * 16, outputs)

    def forward(self, planes: Tensor) -> Tensor:
        """Pictures (B, 3, 64, 64) to answers (B, outputs)."""
        return self.read(self.features(planes))

    def features(self, planes: Tensor) -> Tensor:
        """What the answers are read from: (B, 16 w3) of pictures (B, 3, 64, 64)."""
        return self.norm(self.places(planes).flatten(1))  # B 16*w3

    def places(self, planes: Tensor) -> Tensor:
        """The last features by place: (B, w3, 4, 4) of pictures (B, 3, 64, 64)."""
        x = F.silu(self.stem(planes * 4 - 2))  # B w0 32 32
        return self.blocks(x)  # B w3 4 4


class JudgeTraining(nn.Module):
    """Loss of one judge on people of the split `judge`; forward maps a batch to (loss, metrics).

    Args:
        name: key of RECIPES, which decides the loss.
        pool: portraits.
        recipe: sizes and length.
    """

    def __init__(self, name: str, pool: PicturePool, recipe: JudgeRecipe) -> None:
        super().__init__()
        self.name, self.recipe, self.pool = name, recipe, pool
        self.model = JudgeNetwork(recipe.widths, recipe.outputs)
        initialise(self.model, recipe.seed)
        self.generator = torch.Generator().manual_seed(recipe.seed + 1)
        self.labels = attribute_labels(pool.scenes)
        chosen = self.labels["look"] != LOOKS.index("painting")
        chosen |= torch.rand(len(pool), generator=self.generator) < recipe.paintings
        self.index = chosen.nonzero().flatten()
        self.sampler = PersonSampler(pool.identities[self.index], self.generator)
        self.truth = pool.parameters()
        self.spread = self.truth.std(0)

    def run(self, folder: Path, progress: Progress | None = None) -> None:
        """Train the model in place; `folder` holds the state of a stopped run."""
        lay_out(self.model.train(), torch.channels_last)
        hooks = Hooks(progress, fingerprint=fingerprint(self.name, self.recipe, self.pool.images))
        fit(self, ByStep(self.draw, self.generator), self.recipe.schedule, folder, hooks)
        if self.name == "parameters":  # it was trained on parameters of unit deviation
            with torch.no_grad():
                self.model.read.weight.mul_(self.spread[:, None])
                self.model.read.bias.mul_(self.spread)
        self.model.eval()

    def draw(self, step: int) -> dict[str, Tensor]:
        """Two views of each of `people` people with what is to be said about them.

        `views` (B, 3, 64, 64) in [0, 1]; `truth` (B, P) identity parameters in units of their
        deviation; `labels` (B, questions) int64, NO_LABEL where a question has no answer.
        """
        del step
        index = self.index[self.sampler.draw(self.recipe.people)]
        labels = torch.stack([column[index] for column in self.labels.values()], 1)
        return {
            "views": self.views(index),
            "truth": self.truth[index] / self.spread,
            "labels": labels,
        }

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The judge's own loss () of a batch of `draw`."""
        said = self.model(batch["views"].contiguous(memory_format=torch.channels_last)).float()
        if self.name == "embedder":
            return contrastive_loss(said, self.recipe.temperature), {}
        if self.name == "parameters":
            return F.mse_loss(said, batch["truth"]), {}
        answers = said.split([len(a) for a in ATTRIBUTES.values()], 1)
        terms = [
            F.cross_entropy(answer, labels, ignore_index=NO_LABEL)
            for answer, labels in zip(answers, batch["labels"].unbind(1), strict=True)
        ]
        return torch.stack(terms).mean(), {}

    def views(self, index: Tensor) -> Tensor:
        """Slightly shifted, scaled and disturbed (B, 3, 64, 64) of pictures `index` (B,)."""
        planes, count = as_planes(self.pool.images[index]), len(index)
        side = PICTURE_SIZE * uniform(count, 0.95, 1.05, self.generator)
        offset = (2 * torch.rand(count, 2, generator=self.generator) - 1) * self.recipe.shift
        matrices = square_matrices(PICTURE_SIZE / 2 + offset, side, PICTURE_SIZE)
        return disturb(warp(planes, matrices, PICTURE_SIZE), self.generator)


@dataclass(frozen=True)
class Judges:
    """Judges under the keys of RECIPES: all three, or those that will be asked."""

    networks: Mapping[str, JudgeNetwork]

    def embed(self, images: Tensor) -> Tensor:
        """Unit embeddings (N, E) of pictures (N, H, W, 3) in [0, 1]; likeness is their product."""
        return F.normalize(self._ask("embedder", images), dim=1)

    def parameters(self, images: Tensor) -> Tensor:
        """Identity parameters (N, P), clipped to [-1, 1], of pictures (N, H, W, 3) in [0, 1]."""
        return self._ask("parameters", images).clamp(-1, 1)

    def attributes(self, images: Tensor) -> dict[str, list[str]]:
        """One answer per picture (N, H, W, 3) in [0, 1] to every question of ATTRIBUTES.

        `item_colour` means something only where `item` is not "none".
        """
        said = self._ask("attributes", images).split([len(a) for a in ATTRIBUTES.values()], 1)
        return {
            name: [answers[k] for k in part.argmax(1).tolist()]
            for (name, answers), part in zip(ATTRIBUTES.items(), said, strict=True)
        }

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """What FID and KID compare (N, w3) of pictures (N, H, W, 3) in [0, 1].

        The last features of the attributes judge, mean over places, as pool3 is of Inception.
        """
        network = self.networks["attributes"]
        parts = [network.places(as_planes(part)) for part in _sized(images).split(_CHUNK)]
        return torch.cat(parts).mean((2, 3))

    @torch.no_grad()
    def _ask(self, name: str, images: Tensor) -> Tensor:
        """Run one network in chunks; pictures of other sizes are brought to 64 px first."""
        network = self.networks[name]
        return torch.cat([network(as_planes(part)) for part in _sized(images).split(_CHUNK)])


def _sized(images: Tensor) -> Tensor:
    """Pictures (N, H, W, 3) at the size that the judges read."""
    if images.shape[1:3] == (PICTURE_SIZE, PICTURE_SIZE):
        return images
    return torch.stack([resize_square(image, PICTURE_SIZE) for image in images])


def judge_figures(judges: Judges, pool: PicturePool) -> dict[str, dict[str, float]]:
    """Measure the judges on real pictures of other people.

    Returns:
        Per judge: recognition figures on photo and cartoon pictures, R squared per parameter on
        the same, accuracy per attribute on all looks.
    """
    labels = attribute_labels(pool.scenes)
    plain = labels["look"] != LOOKS.index("painting")
    images = pool.images.float() / 255
    read = explained(judges.parameters(images[plain]), pool.parameters()[plain])
    figures = {
        "embedder": recognition_figures(judges.embed(images[plain]), pool.identities[plain]),
        "parameters": dict(zip(PARAMETERS, read.tolist(), strict=True)),
    }
    return {**figures, "attributes": attribute_accuracy(judges, images, labels)}


def attribute_accuracy(
    judges: Judges, images: Tensor, labels: Mapping[str, Tensor]
) -> dict[str, float]:
    """Share of right answers to each question about pictures (N, H, W, 3) in [0, 1]."""
    accuracy = {}
    for name, said in judges.attributes(images).items():
        truth, asked = labels[name], labels[name] != NO_LABEL
        right = torch.tensor([ATTRIBUTES[name].index(word) for word in said]) == truth
        accuracy[name] = float(right[asked].float().mean())
    return accuracy


def train_judge(
    name: str,
    pool: PicturePool,
    recipe: JudgeRecipe,
    folder: Path,
    run: Path,
    progress: Progress | None = None,
) -> nn.Module:
    """Train one judge on people of the split `judge` and write `name.safetensors` to `folder`.

    `run` is the folder of the training's state.
    """
    training = JudgeTraining(name, pool, recipe)
    training.run(run, progress)
    save_judge(training.model, recipe, folder / f"{name}.safetensors")
    return training.model


def save_judge(model: nn.Module, recipe: JudgeRecipe, path: Path) -> None:
    """Write the weights in half precision with the recipe in the metadata."""
    tensors = {
        key: (value.half() if value.is_floating_point() else value).contiguous()
        for key, value in model.state_dict().items()
    }
    write_atomic(tensors, {"recipe": json.dumps(asdict(recipe))}, path)
    logger.info("wrote %s", path.name)


def read_judge(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Recipe and state dict of a file that `save_judge` wrote.

    Raises:
        CheckpointError: it cannot be read, or has no recipe.
    """
    tensors, facts = read_file(path, "judge")
    with building(path):
        return parse_json(facts["recipe"], "the recipe"), tensors


def load_judges(folder: Path) -> Judges:
    """Read the three shipped judges."""
    return Judges({name: load_judge(folder / f"{name}.safetensors") for name in RECIPES})


def load_judge(path: Path) -> JudgeNetwork:
    """Read one judge.

    Raises:
        CheckpointError: the file cannot be read, or its tensors are not those of its recipe.
    """
    recipe, tensors = read_judge(path)
    with building(path):
        network = JudgeNetwork(tuple(recipe["widths"]), recipe["outputs"])
    load_strictly(network, tensors, path)
    return network.float().eval()
