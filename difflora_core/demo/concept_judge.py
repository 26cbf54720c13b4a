"""The judge of concepts: reads off a picture which things are in it, and their two colours.

It conditions nothing and has never met a concept of CONCEPTS: it learns from hats, cups, cats and
flowers in random colours on people of the split `judge`, one or two of them in a picture.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional as F

from .concepts import CONCEPTS, ITEM_PHRASES, DemoConcept, render_items
from .identities import split_seeds
from .judges import PLAIN_LOOKS, JudgeNetwork, JudgeRecipe, save_judge
from .renderer import COLOURS
from .scenes import PICTURE_SIZE, random_scenes
from .views import (
    Report,
    Schedule,
    as_planes,
    disturb,
    fit,
    initialise,
    square_matrices,
    uniform,
    warp,
)

KINDS = tuple(ITEM_PHRASES)
PRESENT = 0.5
COLOUR_DISTANCE = 0.2
RECIPE = JudgeRecipe(
    outputs=len(KINDS) * 7,
    widths=(24, 48, 64, 96),
    people=96,
    schedule=Schedule(steps=700, rate=3e-3),
    seed=71,
)
PICTURES = 6000
COLOUR_WEIGHT = 20.0
_CHUNK = 256


@dataclass(frozen=True, eq=False)
class Sighting:
    """What the judge sees: `present` (N, 4) in [0, 1]; `colours` (N, 4, 6), main and mark."""

    present: Tensor
    colours: Tensor

    def likeness(self, concept: DemoConcept) -> Tensor:
        """How like a concept the thing of its kind is: (N,) in [0, 1] (ours).

        Its presence, times exp(-(d / COLOUR_DISTANCE)^2 / 2) for the mean distance d of its two
        colours.
        """
        kind = KINDS.index(concept.kind)
        wanted = torch.tensor([concept.main, concept.mark])
        apart = (self.colours[:, kind].unflatten(1, (2, 3)) - wanted).norm(dim=2).mean(1)
        return self.present[:, kind] * torch.exp(-((apart / COLOUR_DISTANCE) ** 2) / 2)

    def recognised(self, concept: DemoConcept) -> Tensor:
        """True where the thing is there, and looks like this concept rather than like another one
        of its kind or like one in a plain colour: (N,)."""
        kind = KINDS.index(concept.kind)
        others = [other for other in CONCEPTS if other.kind == concept.kind and other != concept]
        looks = [concept, *others, *(plain_concept(concept.kind, name) for name in COLOURS)]
        known = torch.tensor([[*look.main, *look.mark] for look in looks])
        nearest = torch.cdist(self.colours[:, kind], known).argmin(1)
        return (self.present[:, kind] >= PRESENT) & (nearest == 0)


@dataclass(frozen=True)
class ConceptJudge:
    """The trained judge."""

    network: JudgeNetwork

    @torch.no_grad()
    def look(self, images: Tensor) -> Sighting:
        """What is on pictures (N, 64, 64, 3) in [0, 1]."""
        parts = [self.network(as_planes(part)) for part in images.split(_CHUNK)]
        return Sighting(*_answers(torch.cat(parts)))


@dataclass(frozen=True, eq=False)
class JudgedPictures:
    """Training pictures: `images` (N, H, W, 3); `present` (N, 4); `colours` (N, 4, 6)."""

    images: Tensor
    present: Tensor
    colours: Tensor


def plain_concept(kind: str, colour: str) -> DemoConcept:
    """A thing as captions know it: one colour, and the mark that the renderer then gives it."""
    main = COLOURS[colour]
    marks = {
        "hat": tuple(0.55 * part + 0.3 for part in main),
        "cup": main,
        "cat": tuple(0.92 * part for part in main),
        "flower": (0.95, 0.8, 0.2),
    }
    return DemoConcept(f"<{colour}-{kind}>", kind, main, marks[kind])  # type: ignore[arg-type]


def judged_pictures(count: int, seed: int, split: str = "judge") -> JudgedPictures:
    """People of a split with nothing, one thing or two, in random or plain colours.

    Args:
        count: how many.
        seed: of everything that is random.
        split: whose people.
    """
    generator = torch.Generator().manual_seed(seed)
    draws = torch.rand(count, 8, generator=generator)
    scenes = [replace(s, item="none") for s in random_scenes(draws, PLAIN_LOOKS)]
    things = [_things(generator) for _ in range(count)]
    people = split_seeds(split, count, seed * count)
    parts = [slice(k, k + _CHUNK) for k in range(0, count, _CHUNK)]
    numbers = range(count)
    drawn = [render_items(people[p], numbers[p], scenes[p], things[p]) for p in parts]
    images = torch.cat(drawn)
    present, colours = torch.zeros(count, len(KINDS)), torch.zeros(count, len(KINDS), 6)
    for row, several in enumerate(things):
        for thing in several:
            kind = KINDS.index(thing.kind)
            present[row, kind] = 1
            colours[row, kind] = torch.tensor([*thing.main, *thing.mark])
    return JudgedPictures(images, present, colours)


def _things(generator: torch.Generator) -> list[DemoConcept]:
    """None, one or two things that do not cover each other."""
    count = int(torch.randint(4, (), generator=generator))
    order = torch.randperm(len(KINDS), generator=generator).tolist()
    kinds = [KINDS[k] for k in order[: (0, 1, 1, 2)[count]]]
    if set(kinds) == {"cup", "flower"}:  # both in the same hand
        kinds = kinds[:1]
    return [_thing(kind, generator) for kind in kinds]


def _thing(kind: str, generator: torch.Generator) -> DemoConcept:
    if float(torch.rand((), generator=generator)) < 0.3:
        names = list(COLOURS)
        return plain_concept(kind, names[int(torch.randint(8, (), generator=generator))])
    r, g, b, *mark = torch.rand(6, generator=generator).tolist()
    return DemoConcept(f"<{kind}>", kind, (r, g, b), (mark[0], mark[1], mark[2]))


@dataclass
class JudgeOfConceptsTraining:
    """One training run.

    `pictures`: training pictures; `recipe`: sizes and length.
    """

    pictures: JudgedPictures
    recipe: JudgeRecipe = field(default_factory=lambda: RECIPE)

    def __post_init__(self) -> None:
        self.model = JudgeNetwork(self.recipe.widths, self.recipe.outputs)
        initialise(self.model, self.recipe.seed)
        self.generator = torch.Generator().manual_seed(self.recipe.seed + 1)

    def run(self, progress: Report | None = None) -> ConceptJudge:
        """Train."""
        self.model.train()
        fit(list(self.model.parameters()), self.loss, self.recipe.schedule, progress=progress)
        return ConceptJudge(self.model.eval())

    def loss(self, step: int) -> Tensor:
        """Cross-entropy of what is there, and squared error of the colours of what is."""
        del step
        count = self.recipe.people
        index = torch.randint(len(self.pictures.images), (count,), generator=self.generator)
        logits, colours = _parts(self.model(self._views(index)).float())
        there = self.pictures.present[index]
        apart = (colours - self.pictures.colours[index]).square().sum(-1) * there
        presence = F.binary_cross_entropy_with_logits(logits, there)
        return presence + COLOUR_WEIGHT / 6 * apart.sum() / there.sum().clamp_min(1)

    def _views(self, index: Tensor) -> Tensor:
        """Slightly shifted, scaled and disturbed pictures (B, 3, 64, 64)."""
        planes, count = as_planes(self.pictures.images[index]), len(index)
        side = PICTURE_SIZE * uniform(count, 0.95, 1.05, self.generator)
        offset = (2 * torch.rand(count, 2, generator=self.generator) - 1) * self.recipe.shift
        matrices = square_matrices(PICTURE_SIZE / 2 + offset, side, PICTURE_SIZE)
        return disturb(warp(planes, matrices, PICTURE_SIZE), self.generator)


def _parts(said: Tensor) -> tuple[Tensor, Tensor]:
    """The network's answer (N, 28) as logits (N, 4) and colours (N, 4, 6)."""
    rows = said.unflatten(1, (len(KINDS), 7))
    return rows[..., 0], rows[..., 1:]


def _answers(said: Tensor) -> tuple[Tensor, Tensor]:
    logits, colours = _parts(said)
    return logits.sigmoid(), colours.clamp(0, 1)


def train_concept_judge(path: Path, progress: Report | None = None) -> dict[str, object]:
    """Train the judge, write it, and measure it on other people; see `judge_figures`."""
    judge = JudgeOfConceptsTraining(judged_pictures(PICTURES, 1)).run(progress)
    save_judge(judge.network, RECIPE, path)
    return dict(concept_figures(judge, judged_pictures(600, 2, "validation")))


def concept_figures(judge: ConceptJudge, pictures: JudgedPictures) -> dict[str, float]:
    """Accuracy of presence, and mean distance in RGB of the colours of what is there."""
    seen = judge.look(pictures.images)
    there = pictures.present > PRESENT
    apart = (seen.colours - pictures.colours).unflatten(2, (2, 3)).norm(dim=3)[there].mean(0)
    right = ((seen.present >= PRESENT) == there).float().mean()
    return {"present": float(right), "main_error": float(apart[0]), "mark_error": float(apart[1])}


def load_concept_judge(path: Path) -> ConceptJudge:
    """Read the shipped judge."""
    with safe_open(path, "pt") as file:
        recipe = json.loads(file.metadata()["recipe"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    network = JudgeNetwork(tuple(recipe["widths"]), recipe["outputs"])
    network.load_state_dict(tensors)
    return ConceptJudge(network.float().eval().requires_grad_(False))
