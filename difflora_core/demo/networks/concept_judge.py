"""The judge of concepts: a network that reads which things a picture shows, and in what colours.

It conditions nothing and knows no concept: it learned from people of the split `judge` with things
in any colours, drawn, and seen through the base's VAE, which cannot show every colour on a few
pixels; the answer is always what was painted. A concept is recognised where its kind is seen and
its two colours are nearer to what is read than those of any other concept and any plain thing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...storage.safetensors_io import read_file, write_atomic
from ...training.fingerprint import fingerprint
from ...training.loop import Batch, ByStep, Hooks, Progress
from ..world.concepts import KNOWN, DemoConcept
from ..world.identities import split_seeds
from ..world.renderer import COLOURS
from ..world.things import draw_things
from .judges import JudgeRecipe, Residual, read_judge, save_judge
from .stored import building, load_strictly
from .views import Schedule, as_planes, disturb, fit, initialise, lay_out

KINDS = ("hat", "cup", "cat", "flower")
RECIPE = JudgeRecipe(
    outputs=len(KINDS),
    widths=(24, 32, 48),
    schedule=Schedule(steps=1500, rate=3e-3),
    seed=71,
)
BATCH, PICTURES, CHUNK = 96, 16_000, 250
COLOUR_SPREAD = 0.25
"""Distance of both colours together at which likeness has fallen to 0.61."""
COLOUR_WEIGHT = 10.0


class ThingReader(nn.Module):
    """Pictures to the things on them: a small U-Net that points at each colour's pixels."""

    def __init__(self, widths: tuple[int, ...] = RECIPE.widths) -> None:
        super().__init__()
        fine, middle, coarse = widths
        self.stem = nn.Conv2d(5, fine, 5, 2, 2)
        self.fine = Residual(fine, fine, 1)
        self.middle = nn.Sequential(Residual(fine, middle, 2), Residual(middle, middle, 1))
        self.coarse = nn.Sequential(Residual(middle, coarse, 2), Residual(coarse, coarse, 1))
        self.join = Residual(coarse + middle, middle, 1)
        self.out = Residual(middle + fine, fine, 1)
        self.point = nn.Conv2d(fine, 4 * 2 * len(KINDS), 1)
        self.there = nn.Linear(coarse * 16, len(KINDS))
        self.correct = nn.Linear(coarse * 16, 2 * 3 * len(KINDS))

    def forward(self, planes: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, 64, 64) in [0, 1] to logits of kinds (B, 4) and their colours (B, 4, 2, 3).

        A colour is the mean of the pixels that the network points at, slightly corrected.
        """
        line = torch.linspace(-1, 1, planes.shape[-1], device=planes.device)
        place = torch.stack(torch.meshgrid(line, line, indexing="ij"))
        place = place.expand(len(planes), -1, -1, -1)  # B 2 64 64
        fine = self.fine(F.silu(self.stem(torch.cat([planes * 2 - 1, place], 1))))  # B w0 32 32
        middle = self.middle(fine)  # B w1 16 16
        coarse = self.coarse(middle)  # B w2 8 8
        up = F.interpolate(coarse, scale_factor=2.0)  # B w2 16 16
        up = self.join(torch.cat([up, middle], 1))  # B w1 16 16
        up = F.interpolate(up, scale_factor=2.0)  # B w1 32 32
        up = self.out(torch.cat([up, fine], 1))  # B w0 32 32
        weight = F.pixel_shuffle(self.point(up), 2).flatten(2).float().softmax(-1)  # B 8 HW
        colours = weight @ planes.float().flatten(2).mT  # B 8 3
        whole = F.adaptive_avg_pool2d(coarse, 4).flatten(1)  # B 16*w2
        colours = colours + self.correct(whole).float().unflatten(1, (-1, 3))
        return self.there(whole).float(), colours.unflatten(1, (len(KINDS), 2))


class ConceptJudge:
    """Recognises concepts among things in plain colours.

    Args:
        network: reads things.
        concepts: what it recognises; a thing in a plain colour has the colour's word.
    """

    def __init__(self, network: ThingReader, concepts: Sequence[DemoConcept] = KNOWN) -> None:
        self.network = network
        self.words = [*(concept.word for concept in concepts), *COLOURS]
        own = [(concept.main, concept.accent) for concept in concepts]
        plain = [(colour, colour) for colour in COLOURS.values()]
        self.looks = torch.tensor([*own, *plain])  # K 2 3

    @torch.no_grad()
    def read(self, images: Tensor, kind: str) -> tuple[Tensor, Tensor]:
        """Pictures (N, 64, 64, 3) to probability (N,) of a kind and its colours (N, 2, 3)."""
        parts = [self.network(as_planes(part)) for part in images.split(CHUNK)]
        there, colours = (torch.cat(column) for column in zip(*parts, strict=True))
        place = KINDS.index(kind)
        return there[:, place].sigmoid(), colours[:, place]

    def likeness(self, images: Tensor, concept: DemoConcept) -> Tensor:
        """How like a concept pictures (N, 64, 64, 3) are: (N,) in [0, 1] (ours).

        The probability of its kind times exp(-(distance of both colours / COLOUR_SPREAD)^2 / 2).
        """
        return self.judge(images, concept)[0]

    def recognised(self, images: Tensor, concept: DemoConcept) -> Tensor:
        """True where pictures (N, 64, 64, 3) show this concept rather than another look: (N,)."""
        return self.judge(images, concept)[1]

    def judge(self, images: Tensor, concept: DemoConcept) -> tuple[Tensor, Tensor, Tensor]:
        """`likeness`, `recognised`, and whether its kind is there, from one reading.

        Three answers (N,) to pictures (N, 64, 64, 3) in [0, 1]; the last two are bool.
        """
        there, colours = self.read(images, concept.kind)
        apart = (colours[:, None] - self.looks).square().sum((2, 3))  # N K
        place = self.words.index(concept.word)
        likeness = there * torch.exp(-apart[:, place] / (2 * COLOUR_SPREAD**2))
        seen = there > 0.5
        return likeness, seen & (apart.argmin(1) == place), seen


def judge_pictures(
    through: Callable[[Tensor], Tensor], path: Path, progress: Progress | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """What the judge learns from, kept on disk: every second picture went through the VAE.

    Returns:
        pictures (M, 64, 64, 3) 8-bit, kinds that are there (M, 4), their colours (M, 4, 2, 3).
    """
    if not path.exists():
        parts = []
        for start in range(0, PICTURES, CHUNK):
            images, there, paint = _chunk(start)
            images[::2] = through(images[::2])
            parts.append(((images * 255).round().byte(), there, paint))
            if progress is not None:
                progress(start, PICTURES, {})
        rows = zip(("images", "there", "paint"), zip(*parts, strict=True), strict=True)
        write_atomic({name: torch.cat(row) for name, row in rows}, {}, path)
    stored, _ = read_file(path, "pictures of the judge")
    return stored["images"], stored["there"], stored["paint"]


def _chunk(start: int) -> tuple[Tensor, Tensor, Tensor]:
    """People with a hat or not, a cat or not, and a cup, a flower or nothing."""
    generator = torch.Generator().manual_seed(start)
    choices = (("hat", "none"), ("cat", "none"), ("cup", "flower", "none"))
    kinds = [
        [names[k] for k in torch.randint(len(names), (CHUNK,), generator=generator).tolist()]
        for names in choices
    ]
    people = split_seeds("judge", CHUNK, start % 8000)
    drawn = draw_things(people, range(300, 300 + CHUNK), kinds, generator)
    there, paint = torch.zeros(CHUNK, len(KINDS)), torch.zeros(CHUNK, len(KINDS), 2, 3)
    for place, names in enumerate(kinds):
        for row, name in enumerate(names):
            if name != "none":
                there[row, KINDS.index(name)] = 1
                paint[row, KINDS.index(name)] = drawn.paint[row, place]
    return drawn.images, there, paint


class ThingTraining(nn.Module):
    """Loss of the judge on `judge_pictures`; forward maps a batch to (loss, metrics)."""

    def __init__(self, pictures: tuple[Tensor, Tensor, Tensor], recipe: JudgeRecipe) -> None:
        super().__init__()
        self.images, self.there, self.paint = pictures
        self.model = ThingReader(recipe.widths)
        initialise(self.model, recipe.seed)
        self.generator = torch.Generator().manual_seed(recipe.seed + 1)

    def draw(self, step: int) -> dict[str, Tensor]:
        """Disturbed pictures with what is on them.

        `planes` (B, 3, 64, 64); `there` (B, 4), 1 for a kind that is shown, else 0; `paint`
        (B, 4, 2, 3) colours in [0, 1].
        """
        del step
        index = torch.randint(len(self.images), (BATCH,), generator=self.generator)
        planes = disturb(as_planes(self.images[index]), self.generator, 0.5)
        return {"planes": planes, "there": self.there[index], "paint": self.paint[index]}

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss () of a batch of `draw`: which things are there, and their colours there."""
        there = batch["there"]
        said, colours = self.model(batch["planes"].contiguous(memory_format=torch.channels_last))
        wrong = (colours - batch["paint"]).square().sum((2, 3))
        colour = (wrong * there).sum() / there.sum()
        seen = F.binary_cross_entropy_with_logits(said, there)
        return seen + COLOUR_WEIGHT * colour, {}


def train_concept_judge(
    pictures: tuple[Tensor, Tensor, Tensor],
    path: Path,
    run: Path,
    recipe: JudgeRecipe = RECIPE,
    progress: Progress | None = None,
) -> ConceptJudge:
    """Train the judge on pictures and write it.

    Args:
        pictures: images (M, 64, 64, 3), kinds (M, 4) and colours (M, 4, 2, 3) of `judge_pictures`.
        path: the file.
        run: folder of the training's state.
        recipe: size and length.
        progress: as in `loop.train`.
    """
    training = ThingTraining(pictures, recipe)
    lay_out(training.model.train(), torch.channels_last)
    hooks = Hooks(progress, fingerprint=fingerprint(recipe, pictures))
    fit(training, ByStep(training.draw, training.generator), recipe.schedule, run, hooks)
    save_judge(training.model.eval(), recipe, path)
    return load_concept_judge(path)


def load_concept_judge(path: Path, concepts: Sequence[DemoConcept] = KNOWN) -> ConceptJudge:
    """Read the shipped judge; `concepts` are those that it recognises.

    Raises:
        CheckpointError: the file cannot be read, or its tensors are not those of its recipe.
    """
    recipe, tensors = read_judge(path)
    with building(path):
        network = ThingReader(tuple(recipe["widths"]))
    load_strictly(network, tensors, path)
    return ConceptJudge(network.float().eval(), concepts)
