"""The rows of the table: for every person one LoRA per row, and what it cost."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

import torch
from torch import Tensor

from difflora_core.config import Config
from difflora_core.diffusion.sampler import SampleSettings
from difflora_core.lora.weights import LoRALayer, LoRAWeights
from difflora_core.models.difflora import DiffLoRAModel
from difflora_core.models.lae.autoencoder import LoRALatent
from difflora_core.training.difflora.refine import refine, refinement_config
from difflora_core.training.lora.dreambooth import DreamBoothConfig

from .artefacts import Artefacts
from .drawing import Adaptation, groups, select
from .dreambooth import CORPUS_SETTINGS, GROUP, SETTINGS, concatenate
from .people import PHOTOS, People, RealPictures

BASE = "base"
HEADLINE = "functional, 1 photo"
REAL, REAL_VAE = "real pictures", "real pictures through the VAE"
ANOTHER, MEAN, WRONG = "another identity's LoRA", "mean LoRA", "wrong photo"
CONTROLS = (ANOTHER, MEAN, WRONG)
CORPUS_LORA = f"LoRA as in the corpus, {PHOTOS} photos"
ONE, FOUR, ALL = "1 photo", "4 photos", f"{PHOTOS} photos"
SEEN = {ONE: 1, FOUR: 4}
"""Photos that a prediction is made from, by their name in the table."""
SOURCES = {"face": (1.0, 0.0), "picture": (0.0, 1.0)}
"""The MIF gate held to one source, without training anew."""
TIMED_PEOPLE = 5
TIMES = " x "
"""Between a row's name and its strength."""


@dataclass(frozen=True)
class Row:
    """One LoRA per person: `weights` batched (I, ...), `seconds` from photo to LoRA for one person.

    `weights` may be what another method has in place of LoRAs, see `drawing.Personal`. `like`: the
    row whose validation-chosen strength it takes; its own name unless it is a control; `megabytes`:
    of the file that serves all people.
    """

    name: str
    weights: Adaptation
    seconds: float | None = None
    like: str = ""
    megabytes: float | None = None

    @property
    def strength_of(self) -> str:
        """Name under which its strength is stored."""
        return self.like or self.name

    def chosen(self, strengths: Mapping[str, float]) -> float:
        """The strength that validation people chose for it; 1 where none is known."""
        return strengths.get(self.strength_of, 1.0)


@dataclass(frozen=True)
class DreamBoothRuns(Config):
    """How much DreamBooth to train: runs of so many steps from one photo and from all photos."""

    one_photo: tuple[int, ...] = (100, 300)
    all_photos: tuple[int, ...] = (100, 300)

    def only(self, wanted: Sequence[str] | None) -> DreamBoothRuns:
        """The runs whose rows are wanted."""

        def chosen(photos: str, lengths: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(n for n in lengths if wanted_row(dreambooth_name(photos, n), wanted))

        return DreamBoothRuns(chosen(ONE, self.one_photo), chosen(ALL, self.all_photos))


def wanted_row(name: str, wanted: Sequence[str] | None) -> bool:
    """Whether a row is wanted: all are, unless texts are given, of which its name must contain one.

    A text that starts with = must be the whole name.
    """
    return wanted is None or any(
        text[1:] == name if text.startswith("=") else text in name for text in wanted
    )


def labelled(name: str, strength: float) -> str:
    """Row name in the table; the strength 0 is that of rows without a LoRA."""
    return name if strength in (0.0, 1.0) else f"{name}{TIMES}{strength:g}"


def dreambooth_name(photos: str, steps: int) -> str:
    """Name of a DreamBooth row."""
    return f"DreamBooth, {photos}, {steps} steps"


def build_rows(
    artefacts: Artefacts,
    people: People,
    runs: DreamBoothRuns,
    wanted: Sequence[str] | None = None,
) -> list[Row]:
    """Every row that the artefacts allow, in the order of the table.

    Of rows that are not `wanted` (see `wanted_row`) those are left out that would be trained.
    """
    features = artefacts.features(people.photos.images[:, : SEEN[FOUR]])
    trained = dreambooth_rows(artefacts, people, runs)
    of_corpus = (CORPUS_LORA, MEAN, *reconstruction_names(artefacts))
    asked = any(wanted_row(name, wanted) for name in of_corpus)
    original = corpus_row(artefacts, people) if asked else None
    predicted = [
        row
        for name, model in artefacts.models.items()
        for row in predicted_rows(artefacts, name, model, features, people)
    ]
    rows = controls(trained[-1], original) if trained else []
    rows += [
        Row(WRONG, rolled(row.weights), None, HEADLINE) for row in predicted if row.name == HEADLINE
    ]
    if original is not None:
        rows += [original, *reconstructions(artefacts, original)]
    rows += predicted + trained
    if "functional" in artefacts.models:
        rows += refined_rows(artefacts, people, rows, wanted)
    return rows + ridge_row(artefacts, [row.select([0]) for row in features])


def controls(best: Row, original: Row | None) -> list[Row]:
    """The LoRA of the next person, and the mean of all other people's LoRAs."""
    source = best if original is None else original
    return [
        Row(ANOTHER, rolled(best.weights), None, best.name),
        Row(MEAN, mean_of_others(source.weights), None, source.name),
    ]


def corpus_row(artefacts: Artefacts, people: People) -> Row | None:
    """LoRAs trained like the corpus of the autoencoders, whose originals they reconstruct."""
    if artefacts.linear is None:  # it knows their `down`
        return None
    weights = artefacts.trainer.train(people.photos, people.seeds, CORPUS_SETTINGS)
    per_step = artefacts.trainer.seconds_alone(people.photos, CORPUS_SETTINGS)
    return Row(CORPUS_LORA, weights, per_step * CORPUS_SETTINGS.steps)


@torch.no_grad()
def reconstructions(artefacts: Artefacts, original: Row) -> list[Row]:
    """The originals through every autoencoder whose encoder was trained, and through PCA."""
    rows = []
    for name, model in reconstruction_names(artefacts).items():
        if model is not None:
            again = model.decode(model.encode(original.weights))
        else:
            again = artefacts.linear.reconstruct(original.weights, artefacts.layout)
        rows.append(Row(name, again))
    return rows


def reconstruction_names(artefacts: Artefacts) -> dict[str, DiffLoRAModel | None]:
    """Rows of reconstructions and the model of each; None is PCA.

    A model of LoRAs on other layers than the corpus's has nothing to reconstruct.
    """
    names: dict[str, DiffLoRAModel | None] = {
        f"LAE reconstruction, {name}": model
        for name, model in artefacts.models.items()
        if learned_to_encode(model) and model.layout == artefacts.layout
    }
    if artefacts.linear is not None:
        names[f"PCA-{artefacts.linear.size} reconstruction"] = None
    return names


def predicted_rows(
    artefacts: Artefacts, name: str, model: DiffLoRAModel, features: list, people: People
) -> list[Row]:
    """From one and from four photos, and a DiT sample where the best guess is not one."""
    one = [row.select([0]) for row in features]
    seconds = seconds_to_lora(artefacts, model, people.photos.images[:, :1])
    four_seconds = seconds_to_lora(artefacts, model, people.photos.images[:, : SEEN[FOUR]])
    size, kind = artefacts.megabytes.get(name), name.split(", seed ")[0]
    made = {ONE: (one, seconds), FOUR: (features, four_seconds)}
    rows = [
        Row(
            f"{name}, {photos}",
            predict(model, seen),
            took,
            "" if kind == name else f"{kind}, {photos}",
            size,
        )
        for photos, (seen, took) in made.items()
    ]
    if name == "functional":
        for source, gate in SOURCES.items():
            guess = predict(model, one, torch.tensor(gate))
            rows.append(Row(f"{name}, 1 photo, {source} alone", guess, None, HEADLINE))
    if trained_dit(model):
        sampled = model.decode(sampled_latent(model, one)).detach()
        rows.append(Row(f"{name}, 1 photo, sampled", sampled))
    return rows


@torch.no_grad()
def predict(
    model: DiffLoRAModel, features: list, gate_override: Tensor | None = None
) -> LoRAWeights:
    """The best guess of each person, as `DiffLoRAModel.adapters` makes it."""
    return model.decode(model.mean_latent(model.condition(features, gate_override))).detach()


@torch.no_grad()
def sampled_latent(model: DiffLoRAModel, features: list) -> LoRALatent:
    """One DiT sample per person, all of one seed, that spread as the latents of people do."""
    settings = SampleSettings(solver="second_order")
    return model.sample_latent(model.condition(features), [0] * len(features), settings)


def seconds_to_lora(artefacts: Artefacts, model: DiffLoRAModel, photos: Tensor) -> float:
    """Median seconds from the photos (I, N, H, W, 3) of one person to LoRA factors, warm."""

    def once(images: Tensor) -> float:
        started = time.perf_counter()
        predict(model, [artefacts.photo_features(images)])
        return time.perf_counter() - started

    once(photos[0])
    return median(once(images) for images in photos[:TIMED_PEOPLE])


def dreambooth_rows(artefacts: Artefacts, people: People, runs: DreamBoothRuns) -> list[Row]:
    """DreamBooth from one photo and from all of them, every length a run of its own."""
    rows = []
    for count, lengths in ((1, runs.one_photo), (PHOTOS, runs.all_photos)):
        pictures = first_photos(people, count)
        per_step = artefacts.trainer.seconds_alone(pictures, SETTINGS) if lengths else 0.0
        photos = ONE if count == 1 else ALL
        for steps in lengths:
            config = replace(SETTINGS, steps=steps)
            weights = artefacts.trainer.train(pictures, people.seeds, config)
            rows.append(Row(dreambooth_name(photos, steps), weights, per_step * steps))
    return rows


def refined_rows(
    artefacts: Artefacts, people: People, rows: Sequence[Row], wanted: Sequence[str] | None
) -> list[Row]:
    """Predictions of the functional model, of `rows`, after 25 steps on the photos of each."""
    config = replace(refinement_config(artefacts.layout.rank), precision=SETTINGS.precision)
    guesses, made = {row.name: row for row in rows}, []
    for photos, count in SEEN.items():
        guess = guesses[f"functional, {photos}"]
        name = f"{guess.name}, {config.steps} refinement steps"
        if wanted_row(name, wanted):
            pictures = first_photos(people, count)
            weights = refined(artefacts, people, guess.weights, pictures, config)
            per_step = artefacts.trainer.seconds_alone(pictures, config)
            made.append(Row(name, weights, (guess.seconds or 0.0) + per_step * config.steps))
    return made


def refined(
    artefacts: Artefacts,
    people: People,
    guess: LoRAWeights,
    pictures: RealPictures,
    config: DreamBoothConfig,
) -> LoRAWeights:
    """Predictions, one for each of the people, tuned on pictures of them, group by group."""
    parts = []
    for group in groups(len(people), GROUP):
        chosen = RealPictures(pictures.images[group], [pictures.captions[k] for k in group])
        examples = artefacts.trainer.examples(chosen, [people.seeds[k] for k in group])
        parts.append(refine(artefacts.base, select(guess, group), examples, config))
    return concatenate(parts)


def ridge_row(artefacts: Artefacts, photos: list) -> list[Row]:
    """Ridge regression on the features of one photo."""
    if artefacts.linear is None:
        return []
    started = time.perf_counter()
    weights = artefacts.linear.predict(photos, artefacts.layout)
    seconds = (time.perf_counter() - started) / len(photos)
    return [Row("ridge regression, 1 photo", weights, seconds)]


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
