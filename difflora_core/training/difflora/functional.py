"""The functional recipe: photo to LoRA, trained through the frozen base model's denoising loss.

Each sample is conditioned on one or more photos of a person and denoises *another* picture of the
same person, so what the LoRA learns to carry is the person and not the photo (ours; close in
spirit to HyperLoRA, arXiv:2503.16944, and LoFA, arXiv:2512.08785). No corpus of LoRAs is needed.

The denoising loss alone ends in a cautious LoRA, the mean over all that the photo leaves open. With
a FaceReader a likeness loss on the base's estimate of the clean picture makes it commit (ours,
after the identity loss of PuLID, arXiv:2404.16022).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...adapters.attach import attach
from ...adapters.lora import lora_adapter_set
from ...base_model.diffusers_base import DiffusersBase
from ...base_model.protocol import TextCondition
from ...config import Config, check_ranges
from ...diffusion.objective import LossWeight, loss_weight, stratified_timesteps
from ...errors import ConfigError
from ...models.difflora import DiffLoRAModel
from ...models.face_reader import FaceReader
from ...models.mif import IdentityCondition, balance_loss
from ...vision.features import ImageFeatures
from ..fingerprint import SAME_COURSE, fingerprint, weights_digest
from ..loop import Hooks, LoopConfig, Progress, train
from ..losses import Denoised, NoisedBatch, denoise
from .face_reader import face_centroids, likeness_error
from .person_choice import Latents, PersonChoice

VALIDATION_DRAWS = 4
"""Batches of fixed people and noise that one judgement averages over."""


@dataclass(frozen=True)
class FunctionalConfig(Config):
    """Settings of the functional recipe.

    `batch`: identities per step, each with its own LoRA; `photos`: most photos of a person per
    condition; `feature_noise`: noise on the standardised condition; `latent_noise`: noise on the
    latent, which gives it a scale together with `latent_weight` (of its mean square);
    `balance`: weight of the gate's load balance; `weighting`: of the denoising loss; `likeness`:
    weight of the likeness loss, which counts an estimate from noise level abar sqrt(abar) times.
    """

    batch: int = 64
    photos: int = 4
    feature_noise: float = 0.1
    latent_noise: float = 0.1
    latent_weight: float = 1e-4
    balance: float = 1e-3
    weighting: LossWeight = "uniform"
    likeness: float = 1.0

    def __post_init__(self) -> None:
        if self.batch < 1 or self.photos < 1:
            raise ConfigError("batch and photos must be at least 1")
        if self.likeness < 0:
            raise ConfigError("likeness must be 0 or more")
        weights = ("feature_noise", "latent_noise", "latent_weight", "balance", "likeness")
        self.check_choices("Functional")
        check_ranges("Functional", self, 0, 1000, *weights)


@dataclass(frozen=True)
class PersonPictures:
    """Pictures of many people, ready for training.

    `latents`: (M, C, h, w) scaled, or of several sizes; `text`: encoded unique prompts;
    `prompts`: (M,) row of `text`; `features`: of every picture as a reference photo, M rows;
    `people`: (P, Q) picture numbers of each person, one or more; whoever has less than Q has -1 at
    the end; `boxes`: (M, 4) of the faces, in shares of the picture, for the likeness loss;
    `time_ids`: (M, 6) what the base is told of each picture's size, see `TextCondition`.
    """

    latents: Latents
    text: TextCondition
    prompts: Tensor
    features: ImageFeatures
    people: Tensor
    time_ids: Tensor | None = None
    boxes: Tensor | None = field(default=None, metadata=SAME_COURSE)  # counts where there are any

    def __post_init__(self) -> None:
        if self.people.ndim != 2 or bool((self.people < 0).all(1).any()):
            raise ConfigError("every person needs a picture")

    def check_pairs(self) -> None:
        """Raises ConfigError where somebody has one picture alone."""
        if bool(((self.people >= 0).sum(1) < 2).any()):
            raise ConfigError("every person needs at least two pictures: one to see, one to draw")


class FunctionalObjective(nn.Module):
    """Denoising loss of the base under the LoRA predicted from other photos.

    Args:
        model: MIF, predictor and decoder are trained; DiT and LAE encoder are left alone.
        base: frozen base model.
        config: settings.
        reader: frozen reader of the likeness loss; None leaves that loss out.
    """

    def __init__(
        self,
        model: DiffLoRAModel,
        base: DiffusersBase,
        config: FunctionalConfig,
        reader: FaceReader | None = None,
    ) -> None:
        super().__init__()
        self.model, self.config = model, config
        self.reader = None if reader is None else reader.requires_grad_(False)
        self.unet = base.unet
        self.base = base
        model.dit.requires_grad_(False)
        model.lae.encoder.requires_grad_(False)
        self.unet.requires_grad_(False)

    def forward(self, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss () of a batch of `person_batches`, and its metrics."""
        condition: IdentityCondition = self.model.mif(
            batch["face"],
            batch["face_found"],
            batch["image"],
            batch["image_tokens"],
            photo_mask=batch["photo_mask"],
        )
        noisy = IdentityCondition(
            condition.pooled + self.config.feature_noise * batch["feature_noise"],
            condition.tokens,
            condition.gate,
        )
        mean = self.model.predictor(noisy)
        z = mean + self.config.latent_noise * batch["latent_noise"]
        weights = self.model.lae.decode_weights(z)
        names = self.model.layout.module_names
        with attach(self.unet, lora_adapter_set(weights), names=names):
            made = self._denoise(batch)
        weight = loss_weight(self.config.weighting, made.abar, self.base.prediction_type)
        error = (made.error * weight).mean()
        spread = mean.float().pow(2).mean()
        loss = error + self.config.latent_weight * spread
        loss = loss + self.config.balance * balance_loss(condition.gate.float())
        metrics = {"denoising": error.detach(), "latent": spread.detach()}
        if self.reader is not None:
            place = batch["centroids"], batch.get("boxes")
            misses = likeness_error(self.reader, made.estimate, *place)
            unlike = (misses * made.abar.sqrt()).mean()
            loss = loss + self.config.likeness * unlike
            metrics["unlike"] = unlike.detach()
        return loss, metrics | {"face_gate": condition.gate[:, 0].mean().detach()}

    def without_lora(self, batch: Mapping[str, Any]) -> Tensor:
        """Mean unweighted denoising loss () of the same batch under the untouched base."""
        return self._denoise(batch).error.mean()

    def _denoise(self, batch: Mapping[str, Any]) -> Denoised:
        text = TextCondition(batch["context"], batch["pooled"], batch.get("time_ids"))
        pictures = NoisedBatch(batch["latents"], batch["noise"], batch["timesteps"], text)
        return denoise(self.base, pictures)


def person_batches(
    data: PersonPictures, model: DiffLoRAModel, config: FunctionalConfig, steps: int
) -> Callable[[torch.Generator], dict[str, Tensor]]:
    """Batches of people: N photos to see, another picture to draw at one of `steps` noises.

    What is drawn has one size in a batch; photos to see may be of any. Raises as `check_pairs`.

    Returns:
        From a generator to a batch. Of the photos: what `MixedImageFeatures.forward` takes, (B, N,
        ...), and `centroids` (B, Df), unit faces. Of the picture to draw: scaled `latents` and
        `noise` (B, C, h, w), `timesteps` (B,), `context` (B, L, C), `pooled` (B, P), its number
        `pictures` (B,), and `time_ids` (B, 6) and `boxes` (B, 4) where they are known. And unit
        `feature_noise` (B, D) and `latent_noise` (B, K, Dz) for condition and LoRA latent.
    """
    data.check_pairs()
    count, width, lae = config.batch, model.config.mif.width, model.config.lae
    latent = (count, lae.latent_tokens, lae.latent_dim)
    most = min(config.photos, data.people.shape[1] - 1)
    centroids = face_centroids(data.features, data.people)
    choose = PersonChoice(data.people, data.latents)

    def draw(generator: torch.Generator) -> dict[str, Tensor]:
        people, pictures = choose(count, generator)  # B Q, shuffled; -1 comes last
        target = pictures[:, 0]
        # One photo is what artists have most often; so half of the batches see one alone.
        alone = bool(torch.rand((), generator=generator) < 0.5)
        seen = 1 if alone else int(torch.randint(1, most + 1, (1,), generator=generator))
        reference = pictures[:, 1 : 1 + seen]  # B N
        flat = data.features.select(reference.clamp(min=0).flatten())
        latents, text = data.latents[target].float(), data.text.select(data.prompts[target])
        rows = (count, seen)
        told = {"time_ids": data.time_ids, "boxes": data.boxes}
        return {name: of[target] for name, of in told.items() if of is not None} | {
            "face": flat.face.float().unflatten(0, rows),
            "face_found": flat.face_found.unflatten(0, rows),
            "image": flat.image.float().unflatten(0, rows),
            "image_tokens": flat.image_tokens.float().unflatten(0, rows),
            "photo_mask": reference >= 0,
            "feature_noise": torch.randn(count, width, generator=generator),
            "latent_noise": torch.randn(latent, generator=generator),
            "centroids": centroids[people],
            "pictures": target,
            "latents": latents,
            "noise": torch.randn(latents.shape, generator=generator),
            "timesteps": stratified_timesteps(count, generator, steps),
            "context": text.context,
            "pooled": text.pooled,
        }

    return draw


def fit(
    objective: FunctionalObjective,
    data: PersonPictures,
    loop: LoopConfig,
    folder: Path,
    progress: Progress | None = None,
    validation: PersonPictures | None = None,
) -> dict[str, float]:
    """Train MIF, predictor and decoder of the objective's model in place; see `loop.train`.

    `validation` are other people: the weights of their lowest loss are kept.
    """
    model, photos = objective.model, data.features
    if not bool(model.mif.get_buffer("image_mean").any()):
        sample = photos.select(torch.arange(0, len(photos), max(1, len(photos) // 2000)))
        model.mif.fit_statistics(
            sample.face, sample.face_found, sample.image.float(), sample.image_tokens.float()
        )
    parts = [objective.config, data, weights_digest(objective.base.unet)]
    parts += [] if data.boxes is None else [data.boxes]
    identity = fingerprint(*parts, *([] if validation is None else [validation]))
    judged = None if validation is None else _validation(objective, validation, loop.seed)
    hooks = Hooks(progress, judged, base=objective.base, fingerprint=identity)
    steps = len(objective.base.alphas_cumprod)
    draw = person_batches(data, model, objective.config, steps)
    return train(objective, draw, loop, folder, hooks)


def _validation(
    objective: FunctionalObjective, data: PersonPictures, seed: int
) -> Callable[[], float]:
    """Loss on fixed batches of other people, without noise on condition and latent."""
    config = replace(objective.config, batch=min(objective.config.batch, len(data.people)))
    draw = person_batches(data, objective.model, config, len(objective.base.alphas_cumprod))
    generator = torch.Generator().manual_seed(seed + 1)
    batches = [draw(generator) for _ in range(VALIDATION_DRAWS)]

    @torch.no_grad()
    def validate() -> float:
        losses = []
        for batch in batches:
            there = {name: value.to(objective.model.device) for name, value in batch.items()}
            quiet = {name: there[name] * 0 for name in ("feature_noise", "latent_noise")}
            found = objective({**there, **quiet})[1]
            unlike = found.get("unlike", torch.zeros(()))
            losses.append(float(found["denoising"] + config.likeness * unlike))
        return sum(losses) / len(losses)

    return validate
