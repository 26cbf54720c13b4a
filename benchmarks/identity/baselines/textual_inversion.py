"""Textual Inversion: one person's word, learned on that person's photos (arXiv:2208.01618)."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from difflora_core.base_model.diffusers_base import DiffusersBase
from difflora_core.base_model.protocol import TextCondition
from difflora_core.config import Config
from difflora_core.demo import paths
from difflora_core.demo.networks.concept_text import demo_concept_text
from difflora_core.diffusion.objective import stratified_timesteps
from difflora_core.storage.atomic import write_text
from difflora_core.text.clip_pair import ClipPairText
from difflora_core.training.fingerprint import fingerprint
from difflora_core.training.loop import Hooks, LoopConfig, Progress, train
from difflora_core.training.losses import NoisedBatch, denoising_error

from ..artefacts import Artefacts
from ..people import PHOTOS, People, RealPictures
from ..rows import ALL, ONE, Row, first_photos, wanted_row

SOURCE = "Textual Inversion (arXiv:2208.01618): one token in both text encoders, from 'person'"
CLASS = "person"


@dataclass(frozen=True)
class InversionConfig(Config):
    """`steps`, `rate` of AdamW, `batch` pictures of each person a step."""

    steps: int = 300
    rate: float = 0.02
    batch: int = 4
    seed: int = 0

    @property
    def loop(self) -> LoopConfig:
        """The run. People share nothing, so their gradients are not clipped together."""
        return LoopConfig(
            steps=self.steps,
            learning_rate=self.rate,
            warmup=10,
            schedule="cosine",
            weight_decay=0.0,
            clip=0.0,
            precision="bf16",
            seed=self.seed,
        )


class LearnedPeople(nn.Module):
    """A word for each of I people; forward maps a batch to (loss, metrics). See also `Personal`.

    Args:
        base: frozen base. text: its text encoders. people: how many.

    `seconds`: what learning took for one person in the group.
    """

    def __init__(self, base: DiffusersBase, text: ClipPairText, people: int) -> None:
        super().__init__()
        self.base, self.text, self.seconds = base, text, 0.0
        self.start = text.embedding(text.tokens(CLASS)[0])
        self.shifts = nn.ParameterList(
            torch.zeros(people, len(vector), device=vector.device) for vector in self.start
        )

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Denoising loss, summed over people: each has a word of its own."""
        text = self.encode(self.base, batch["captions"], batch["owner"], 1.0)
        pictures = NoisedBatch(batch["latents"], batch["noise"], batch["timesteps"], text)
        error = denoising_error(self.base, pictures, "uniform").mean()
        return len(self.shifts[0]) * error, {"denoising": error.detach()}

    def encode(
        self, base: DiffusersBase, captions: Sequence[str], owner: Tensor, strength: float
    ) -> TextCondition:
        """Captions (B) in which "person" is the word of the person `owner` (B,) of each."""
        del base
        names = [f"<person-{number}>" for number in owner.tolist()]
        words = {
            f"<person-{k}>": tuple(
                start + strength * shift[k]
                for start, shift in zip(self.start, self.shifts, strict=True)
            )
            for k in owner.unique().tolist()
        }
        prompts = [c.replace(CLASS, name, 1) for c, name in zip(captions, names, strict=True)]
        encoded = self.text.encode(prompts, words)
        return TextCondition(encoded.context, encoded.pooled)

    @contextmanager
    def steered(
        self, base: DiffusersBase, owner: Tensor, strength: float
    ) -> Iterator[DiffusersBase]:
        """The base as it is."""
        del owner, strength
        yield base

    def tensors(self) -> dict[str, Tensor]:
        """See `Personal`."""
        return {f"{k} {CLASS}": start + s for k, (start, s) in enumerate(self._pairs())}

    @property
    def kilobytes(self) -> float:
        """Of one word in half precision."""
        return sum(2 * len(vector) for vector in self.start) / 1024

    def _pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(self.start, (shift.detach() for shift in self.shifts), strict=True)


def learn_people(
    base: DiffusersBase,
    text: ClipPairText,
    pictures: RealPictures,
    config: InversionConfig,
    cache: Path,
    progress: Progress | None = None,
) -> LearnedPeople:
    """A word for everybody from their pictures (I, M, H, W, 3); a stopped run goes on.

    `cache`: folder of the runs.
    """
    people, count = pictures.images.shape[:2]
    objective = LearnedPeople(base, text, people)
    latents = base.encode_images(pictures.images.flatten(0, 1)).unflatten(0, (people, count))

    def draw(generator: torch.Generator) -> dict[str, object]:
        owner = torch.arange(people).repeat_interleave(config.batch)
        chosen = torch.randint(count, (len(owner),), generator=generator)
        clean = latents[owner, chosen]
        return {
            "latents": clean,
            "noise": torch.randn(clean.shape, generator=generator),
            "timesteps": stratified_timesteps(len(owner), generator, len(base.alphas_cumprod)),
            "captions": [pictures.captions[i][m] for i, m in zip(owner, chosen, strict=True)],
            "owner": owner,
        }

    digest = fingerprint(config, latents, pictures.captions)
    hooks, folder = Hooks(progress, fingerprint=digest), cache / digest[:32]
    took, started = folder / "seconds.txt", time.perf_counter()
    train(objective, draw, config.loop, folder, hooks)
    if not took.exists():
        write_text(took, str(time.perf_counter() - started))
    objective.seconds = float(took.read_text()) / people
    return objective.requires_grad_(False)


def rows(
    artefacts: Artefacts, people: People, steps: int, wanted: Sequence[str] | None
) -> Iterator[Row]:
    """A word for everybody from the first photo, and from all; seconds of one in the group."""
    config = InversionConfig(steps=steps)
    for count, photos in ((1, ONE), (PHOTOS, ALL)):
        name = f"Textual Inversion, {photos}, {steps} steps"
        if wanted_row(name, wanted):
            pictures, folder = first_photos(people, count), artefacts.cache / "inversion"
            made = learn_people(artefacts.base, text_encoders(), pictures, config, folder)
            yield Row(name, made, made.seconds)


def text_encoders() -> ClipPairText:
    """The text encoders of the demo base, which can learn words."""
    return demo_concept_text(paths.BASE)
