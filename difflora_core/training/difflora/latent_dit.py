"""Latent diffusion recipe: the DiT learns the latents of people, given their photos.

Two presets share it. `paper` (arXiv:2408.06740): the latents are LAE encodings of a LoRA corpus,
and MIF learns together with the DiT. `functional` (ours): the latents are what MIF and predictor
make of *another* photo of the same person, and MIF stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...config import Config, check_ranges
from ...data.lora_rows import LoRARows
from ...diffusion.objective import (
    LossWeight,
    abar_at,
    add_noise,
    loss_weight,
    stratified_timesteps,
    training_target,
)
from ...errors import ConfigError, counted
from ...lora.weights import LoRAWeights
from ...models.difflora import DiffLoRAModel
from ...models.mif import IdentityCondition, balance_loss
from ...vision.features import ImageFeatures
from ..fingerprint import LATER, fingerprint
from ..loop import Hooks, LoopConfig, Progress, train
from . import lae_stream

VALIDATION_DRAWS = 8  # batches of fixed noise that one judgement averages over


@dataclass(frozen=True)
class LatentDiTConfig(Config):
    """Settings of the latent diffusion recipe.

    Args:
        loop: the run; memorising is the danger, so weight decay and EMA are high.
        batch: people per step.
        photos: most photos in one condition; their number is drawn anew for each batch.
        condition_dropout: share of rows that see the learned null condition.
        feature_noise: noise on the photo features, in units of their spread over people.
        weighting: kind of `diffusion.objective.loss_weight`. By default all noise counts the same:
            from pure noise the DiT learns what the photos alone say, which the best guess of the
            `paper` preset is, and there `min_snr` weighs nothing.
        balance: weight of the gate's load balance, where MIF is trained.
        mixup: share of rows that are two people in one, their conditions and latents mixed by one
            uniform weight (arXiv:1806.05236). Few people are learned by heart less quickly.

    Raises:
        ConfigError: a value out of range.
    """

    loop: LoopConfig = field(
        default_factory=lambda: LoopConfig(steps=4000, weight_decay=0.1, ema=0.999)
    )
    batch: int = 64
    photos: int = 4
    condition_dropout: float = 0.1
    feature_noise: float = 0.1
    weighting: LossWeight = "uniform"
    balance: float = 1e-2
    mixup: float = field(default=0.0, metadata=LATER)

    def __post_init__(self) -> None:
        if self.batch < 1 or self.photos < 1 or min(self.feature_noise, self.balance) < 0:
            raise ConfigError("Latent DiT: batch and photos must be at least 1, noise 0 or more.")
        check_ranges("Latent DiT", self, 0, 1000, "feature_noise", "balance")
        check_ranges("Latent DiT", self, 0, 1, "mixup")
        self.check_choices("Latent DiT")
        if not 0 <= self.condition_dropout < 1:
            raise ConfigError("Latent DiT: condition_dropout must lie in [0, 1).")


@dataclass(frozen=True, eq=False)
class LatentExamples:
    """People with photos and latents.

    Args:
        features: of P * N photos, person by person, N photos each.
        latents: (P, A, K, Dz) raw latents. With A = N > 1 latent a was made from photo a, which is
            then not shown beside it; with A = 1 it belongs to the person.

    Raises:
        ConfigError: the counts do not agree.
    """

    features: ImageFeatures
    latents: Tensor

    def __post_init__(self) -> None:
        people = len(self.latents)
        whole = self.latents.ndim == 4 and people > 0 and len(self.features) % people == 0
        if not whole or self.latents.shape[1] not in (1, self.photos) or not len(self.features):
            raise ConfigError(
                f"{counted(len(self.features), 'photo')} and latents {tuple(self.latents.shape)} "
                "do not fit: every person needs the same number of photos and either one latent "
                "or one each."
            )

    @property
    def photos(self) -> int:
        """N, photos per person."""
        return len(self.features) // len(self.latents)


@torch.no_grad()
def corpus_latents(model: DiffLoRAModel, weights: LoRAWeights | LoRARows) -> Tensor:
    """Targets of the `paper` preset: encodings of P LoRAs, raw, (P, 1, K, Dz)."""
    parts = weights.parts(lae_stream.AT_ONCE) if isinstance(weights, LoRARows) else [weights]
    found = [model.lae.encode_weights(part.to(torch.float32, model.device)) for part in parts]
    return torch.cat(found)[:, None].cpu()


@torch.no_grad()
def photo_latents(model: DiffLoRAModel, features: ImageFeatures, people: int) -> Tensor:
    """Targets of the `functional` preset: the best guess from each photo, raw, (P, N, K, Dz).

    Args:
        model: with MIF and predictor trained.
        features: of P * N photos, person by person.
        people: P.
    """
    parts = []
    for rows in torch.arange(len(features)).split(256):
        photo = features.select(rows).to(model.device, torch.float32)
        condition = model.mif(
            photo.face[:, None],
            photo.face_found[:, None],
            photo.image[:, None],
            photo.image_tokens[:, None],
        )
        parts.append(model.predictor(condition).cpu())
    return torch.cat(parts).unflatten(0, (people, -1))


class LatentDiTObjective(nn.Module):
    """Denoising loss of the DiT on normalised latents; MIF learns too where the preset says so."""

    def __init__(self, model: DiffLoRAModel, config: LatentDiTConfig) -> None:
        super().__init__()
        self.model, self.config = model, config
        self.train_mif = model.config.preset == "paper"
        model.requires_grad_(False)
        model.dit.requires_grad_(True)
        model.mif.requires_grad_(self.train_mif)
        abar = model.config.schedule.scheduler().alphas_cumprod
        self.register_buffer("alphas_cumprod", abar, persistent=False)

    def forward(self, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss () of a batch of `LatentBatches`, and its metrics."""
        model, kind = self.model, self.model.config.schedule.prediction
        with torch.set_grad_enabled(self.train_mif and torch.is_grad_enabled()):
            condition = model.mif(
                batch["face"], batch["face_found"], batch["image"], batch["image_tokens"]
            )
        z = model.latent(batch["latents"]).z
        if "mix" in batch:
            condition, z = _mixed(condition, z, batch["mix"])
        abar = abar_at(self.get_buffer("alphas_cumprod"), batch["timesteps"], z)
        noisy = add_noise(z, batch["noise"], abar)
        prediction = model.dit(noisy, batch["timesteps"], condition, batch["drop"])
        target = training_target(z, batch["noise"], abar, kind)
        error = (prediction.float() - target.float()).square().flatten(1).mean(1)
        loss = (loss_weight(self.config.weighting, abar.flatten(), kind) * error).mean()
        metrics = {"denoising": loss.detach()}
        if self.train_mif and self.config.balance:
            loss = loss + self.config.balance * balance_loss(condition.gate.float())
        return loss, metrics


class LatentBatches:
    """Draws people, photos to show and a latent to denoise."""

    def __init__(
        self, model: DiffLoRAModel, examples: LatentExamples, config: LatentDiTConfig
    ) -> None:
        self.examples, self.config = examples, config
        self.steps = model.config.schedule.train_steps
        self.spread = {
            name: model.mif.get_buffer(f"{name}_scale").cpu().clone() for name in ("face", "image")
        }

    def __call__(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Makes a batch of B people.

        `face` (B, N, Df), `face_found` (B, N) bool, `image` (B, N, Di) and `image_tokens`
        (B, N, L, Dt) of the photos; `latents` (B, K, Dz), not normalised, and unit `noise` of the
        same shape; `timesteps` (B,); `drop` (B,) bool, where the condition is left out; with
        mixup `mix` (B,), how much of a row is its own person, the rest being the next row's.
        """
        c, latents, photos = self.config, self.examples.latents, self.examples.photos
        count, own = c.batch, latents.shape[1] > 1
        people = torch.randint(len(latents), (count,), generator=generator)
        order = torch.rand(count, photos, generator=generator).argsort(1)
        most = min(c.photos, photos - 1 if own else photos)
        # an artist has one photo more often than several
        alone = bool(torch.rand((), generator=generator) < 0.5)
        seen = 1 if alone else int(torch.randint(1, most + 1, (1,), generator=generator))
        shown = order[:, own : own + seen]  # the first one made the latent
        made_from = order[:, 0] if own else torch.zeros_like(people)
        rows = (people[:, None] * photos + shown).flatten()
        features = self.examples.features.select(rows).to(dtype=torch.float32)
        z = latents[people, made_from].float()
        batch = {
            "face": self._noisy("face", features.face, generator).unflatten(0, (count, seen)),
            "face_found": features.face_found.unflatten(0, (count, seen)),
            "image": self._noisy("image", features.image, generator).unflatten(0, (count, seen)),
            "image_tokens": features.image_tokens.unflatten(0, (count, seen)),
            "latents": z,
            "noise": torch.randn(z.shape, generator=generator),
            "timesteps": stratified_timesteps(count, generator, self.steps),
            "drop": torch.rand(count, generator=generator) < c.condition_dropout,
        }
        if c.mixup:
            alone, weight = torch.rand(2, count, generator=generator)
            batch["mix"] = torch.where(alone < c.mixup, weight, 1.0)
        return batch

    def _noisy(self, name: str, value: Tensor, generator: torch.Generator) -> Tensor:
        """Unit-length embeddings with noise, as MIF will see them."""
        noise = torch.randn(value.shape, generator=generator) * self.spread[name]
        return F.normalize(value, dim=-1) + self.config.feature_noise * noise


def fit(
    model: DiffLoRAModel,
    examples: LatentExamples,
    config: LatentDiTConfig,
    folder: Path,
    validation: LatentExamples | None = None,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Train the DiT (in the `paper` preset MIF too) of a model in place; resumable.

    Sets the latent statistics, and in the `paper` preset those of the features, from `examples`.

    Args:
        model: LAE trained; in the `functional` preset MIF and predictor as well.
        examples: training people.
        config: settings.
        folder: of checkpoints and log.
        validation: other people; the weights of their lowest loss are kept.
        progress: as in `loop.train`.

    Returns:
        Metrics of the run.

    Raises:
        ConfigError: latents of another size, or one photo per person where another is needed.
    """
    if examples.latents.shape[2:] != model.get_buffer("latent_mean").shape:
        raise ConfigError(
            f"Latents of size {tuple(examples.latents.shape[2:])} do not fit this model's "
            f"{tuple(model.get_buffer('latent_mean').shape)}."
        )
    if model.config.preset == "functional" and examples.latents.shape[1] < 2:
        raise ConfigError("The functional preset needs the latents of two photos of a person.")
    model.fit_latent_statistics(examples.latents.flatten(0, 1).to(model.device))
    if model.config.preset == "paper":
        some = examples.features.select(
            torch.arange(0, len(examples.features), 1 + len(examples.features) // 4000)
        ).to(model.device, torch.float32)
        model.mif.fit_statistics(some.face, some.face_found, some.image, some.image_tokens)
    objective = LatentDiTObjective(model, config)
    draw = LatentBatches(model, examples, config)
    validate = None
    if validation is not None:
        validate = _validation(objective, LatentBatches(model, validation, config))
    hooks = Hooks(
        progress,
        validate,
        splits=not (config.balance or config.mixup),  # a row is more than itself
        fingerprint=fingerprint(config, examples, validation),
    )
    return train(objective, draw, config.loop, folder, hooks)


def _validation(objective: LatentDiTObjective, draw: LatentBatches) -> Callable[[], float]:
    """Loss on fixed batches of validation people, each alone and with its condition."""
    generator = torch.Generator().manual_seed(objective.config.loop.seed + 1)
    batches = [draw(generator) for _ in range(VALIDATION_DRAWS)]

    @torch.no_grad()
    def validate() -> float:
        device = objective.model.device
        losses = []
        for batch in batches:
            there = {key: value.to(device) for key, value in batch.items()}
            there["drop"] = torch.zeros_like(there["drop"])
            there.pop("mix", None)
            losses.append(float(objective(there)[1]["denoising"]))
        return sum(losses) / len(losses)

    return validate


def _mixed(
    condition: IdentityCondition, z: Tensor, weight: Tensor
) -> tuple[IdentityCondition, Tensor]:
    """Conditions and latents (B, K, Dz) of two people in one row, by the weight (B,) of the first.

    The gate (B, 2) stays each row's own: it is no input of the DiT.
    """

    def mix(value: Tensor) -> Tensor:
        own = weight.to(value).view(-1, *[1] * (value.ndim - 1))
        return own * value + (1 - own) * value.roll(-1, 0)

    both = IdentityCondition(mix(condition.pooled), mix(condition.tokens), condition.gate)
    return both, mix(z)
