"""The rows of the table: for every person one LoRA per row, and what it cost."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median

import torch
from torch import Tensor

from difflora_core.lora.weights import LoRALayer, LoRAWeights
from difflora_core.methods.difflora import DiffLoRAModel
from difflora_core.models.lae import LoRALatent
from difflora_core.training.refine import refine, refinement_config

from .drawing import groups, select
from .dreambooth import GROUP, SETTINGS, concatenate
from .linear import photo_rows, up_vectors, with_up_vectors
from .people import PHOTOS, People, RealPictures
from .world import World

BASE = "base"
BEST = f"DreamBooth, {PHOTOS} photos, {{steps}} steps"
HEADLINE = "functional, 1 photo"
REAL, REAL_VAE = "real pictures", "real pictures through the VAE"
ANOTHER, MEAN, WRONG = "another identity's LoRA", "mean LoRA", "wrong photo"
CONTROLS = (ANOTHER, MEAN, WRONG)
TIMED_PEOPLE = 5


@dataclass(frozen=True)
class Row:
    """One LoRA per person: `weights` batched (I, ...), `seconds` from photo to LoRA for one person.

    `like`: the row whose validation-chosen strength it takes; its own name unless it is a control.
    """

    name: str
    weights: LoRAWeights
    seconds: float | None = None
    like: str = ""

    @property
    def strength_of(self) -> str:
        """Name under which its strength is stored."""
        return self.like or self.name


@dataclass(frozen=True)
class Effort:
    """How much DreamBooth to train: snapshots (rising) from one photo and from all photos."""

    one_photo: tuple[int, ...] = (100, 300)
    all_photos: tuple[int, ...] = (100, 300)


def build_rows(world: World, people: People, effort: Effort) -> list[Row]:
    """Every row that the artefacts allow, in the order of the table."""
    features = world.features(people.photos.images[:, :4])
    trained = dreambooth_rows(world, people, effort)
    best = trained[-1]
    rows = controls(best)
    functional = world.models.get("functional")
    if functional is not None:
        guess = predict(functional, [row.select([0]) for row in features])
        rows.append(Row(WRONG, rolled(guess), None, HEADLINE))
    for name, model in world.models.items():
        if learned_to_encode(model):
            again = model.decode(model.encode(best.weights))
            rows.append(Row(f"LAE reconstruction, {name}", detached(again)))
    for name, model in world.models.items():
        rows += predicted_rows(world, name, model, features, people)
    rows += trained
    if functional is not None:
        rows.append(refined_row(world, people, guess, rows))
    return rows + linear_rows(world, features, best)


def controls(best: Row) -> list[Row]:
    """The LoRA of the next person, and the mean of all other people's LoRAs."""
    return [
        Row(ANOTHER, rolled(best.weights), None, best.name),
        Row(MEAN, mean_of_others(best.weights), None, best.name),
    ]


def predicted_rows(
    world: World, name: str, model: DiffLoRAModel, features: list, people: People
) -> list[Row]:
    """From one and from four photos, and a DiT sample where the best guess is not one."""
    one = [row.select([0]) for row in features]
    seconds = seconds_to_lora(world, model, people.photos.images[:, :1])
    four_seconds = seconds_to_lora(world, model, people.photos.images[:, :4])
    rows = [
        Row(f"{name}, 1 photo", predict(model, one), seconds),
        Row(f"{name}, 4 photos", predict(model, features), four_seconds),
    ]
    if model.config.preset != "paper" and trained_dit(model):
        sampled = detached(model.decode(sampled_latent(model, one)))
        rows.append(Row(f"{name}, 1 photo, sampled", sampled))
    return rows


@torch.no_grad()
def predict(model: DiffLoRAModel, features: list) -> LoRAWeights:
    """The best guess of each person, as `DiffLoRAModel.adapters` makes it."""
    if model.config.preset == "paper":
        latent = sampled_latent(model, features)
    else:
        latent = model.mean_latent(model.condition(features))
    return detached(model.decode(latent))


@torch.no_grad()
def sampled_latent(model: DiffLoRAModel, features: list) -> LoRALatent:
    """One DiT sample per person; every person has the same seed, as the node's default."""
    return model.sample_latent(model.condition(features), [0] * len(features))


def seconds_to_lora(world: World, model: DiffLoRAModel, photos: Tensor) -> float:
    """Median seconds from the photos (I, N, H, W, 3) of one person to LoRA factors, warm."""

    def once(images: Tensor) -> float:
        started = time.perf_counter()
        predict(model, [world.photo_features(images)])
        return time.perf_counter() - started

    once(photos[0])
    return median(once(images) for images in photos[:TIMED_PEOPLE])


def dreambooth_rows(world: World, people: People, effort: Effort) -> list[Row]:
    """DreamBooth from one photo and from all of them, after each snapshot; the longest last."""
    rows = []
    for count, snapshots in ((1, effort.one_photo), (PHOTOS, effort.all_photos)):
        if not snapshots:
            continue
        config = replace(SETTINGS, steps=snapshots[-1], snapshots=snapshots[:-1])
        pictures = first_photos(people, count)
        trained = world.workshop.train(pictures, people.seeds, config)
        per_step = world.workshop.seconds_alone(pictures, config)
        photos = "1 photo" if count == 1 else f"{count} photos"
        rows += [
            Row(f"DreamBooth, {photos}, {step} steps", weights, per_step * step)
            for step, weights in trained.snapshots.items()
        ]
    return rows


def refined_row(world: World, people: People, guess: LoRAWeights, rows: list[Row]) -> Row:
    """The prediction after 25 steps on its one photo."""
    config = replace(refinement_config(world.layout.rank), precision=SETTINGS.precision)
    pictures = first_photos(people, 1)
    parts = []
    for group in groups(len(people), GROUP):
        chosen = RealPictures(pictures.images[group], [pictures.captions[k] for k in group])
        examples = world.workshop.examples(chosen, [people.seeds[k] for k in group])
        parts.append(refine(world.base, select(guess, group), examples, config))
    per_step = world.workshop.seconds_alone(pictures, config)
    start = next(row.seconds for row in rows if row.name == HEADLINE)
    seconds = (start or 0.0) + per_step * config.steps
    return Row(f"{HEADLINE}, {config.steps} refinement steps", concatenate(parts), seconds)


def linear_rows(world: World, features: list, best: Row) -> list[Row]:
    """Ridge regression from one photo, and the PCA reconstruction of the DreamBooth LoRA."""
    linear = world.linear
    if linear is None:
        return []
    started = time.perf_counter()
    predicted = linear.predict(torch.cat([photo_rows(row.select([0])) for row in features]))
    seconds = (time.perf_counter() - started) / len(features)
    vectors = linear.project(up_vectors(best.weights))
    return [
        Row("ridge regression, 1 photo", with_up_vectors(predicted, best.weights), seconds),
        Row(f"PCA-{len(linear.basis)} reconstruction", with_up_vectors(vectors, best.weights)),
    ]


def first_photos(people: People, count: int) -> RealPictures:
    """The first `count` reference pictures of everybody."""
    photos = people.photos
    return RealPictures(photos.images[:, :count], [row[:count] for row in photos.captions])


def rolled(weights: LoRAWeights) -> LoRAWeights:
    """Everybody gets the LoRA of the next person."""
    count = weights.batch_shape[0]
    return select(weights, torch.arange(count).roll(-1))


def mean_of_others(weights: LoRAWeights) -> LoRAWeights:
    """For each person the mean of delta W over all others, exactly.

    Over a shared `down` that is the mean of the `up` factors; else the components lie side by
    side, which raises the rank.
    """
    count = weights.batch_shape[0]
    layers = {}
    for name, layer in weights.folded().layers.items():
        if bool((layer.down == layer.down[:1]).all()):
            up = (layer.up.sum(0, keepdim=True) - layer.up) / max(count - 1, 1)
            layers[name] = LoRALayer(layer.down, up, layer.alpha)
            continue
        others = torch.tensor([[k for k in range(count) if k != i] for i in range(count)])
        down = layer.down[others].flatten(1, 2)  # (I, (I-1) r, in)
        up = layer.up[others].transpose(1, 2).flatten(2) / max(count - 1, 1)
        layers[name] = LoRALayer(down, up, float(down.shape[1]))
    return LoRAWeights(layers)


def learned_to_encode(model: DiffLoRAModel) -> bool:
    """Whether the autoencoder's encoder was trained: its corpus statistics are set."""
    statistics = [b for n, b in model.lae.named_buffers() if n.startswith("scale_")]
    return any(bool((buffer != 1).any()) for buffer in statistics)


def trained_dit(model: DiffLoRAModel) -> bool:
    """Whether latents were normalised for the DiT, the first thing its training does."""
    return bool((model.get_buffer("latent_scale") != 1).any())


def detached(weights: LoRAWeights) -> LoRAWeights:
    """Values only."""
    return weights.detach()


Builder = Callable[[World, People, Effort], list[Row]]
