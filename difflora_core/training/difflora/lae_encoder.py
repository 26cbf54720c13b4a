"""Functional training of the LAE encoder: an encoded LoRA must draw its person, not its numbers.

LoRAs of a corpus are encoded and decoded, and the decoded ones are attached to the frozen base
model, whose denoising loss on the persons' pictures is the loss (ours; Text-to-LoRA,
arXiv:2506.06105, finds the same for language models). So existing LoRAs enter the latent space of
a decoder that was itself trained through the base model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...adapters.attach import attach
from ...adapters.lora import lora_adapter_set
from ...base_model.protocol import BaseModel, TextCondition
from ...config import Config
from ...diffusion.objective import stratified_timesteps
from ...errors import ConfigError
from ...lora.statistics import WeightStatistics
from ...lora.weights import LoRAWeights
from ...models.lae.autoencoder import LoRAAutoencoder
from ...models.lae.structured import MirrorEncoder, StructuredDecoder
from ..dreambooth import DreamBoothExamples
from ..fingerprint import fingerprint
from ..loop import Hooks, LoopConfig, Progress, train
from ..losses import NoisedBatch, denoising_error
from .linear_baselines import best_ridge

MIRROR_RIDGES = tuple(10.0**k for k in range(-3, 5))


@dataclass(frozen=True)
class EncoderTrainConfig(Config):
    """Settings of the functional encoder recipe.

    Args:
        loop: the run, and how often to validate where validation people are given.
        batch: people per step, each with one picture.
        train_decoder: let decoder and shared `down` follow; off, the latent space stays as it is.
        denoising: weight of the denoising loss; 0 leaves the base model out, which is fast.
        anchor: weight of the squared distance to known latents of the same people, if given.
        weighting: of the denoising loss.

    Raises:
        ConfigError: a value out of range.
    """

    loop: LoopConfig = field(default_factory=lambda: LoopConfig(steps=1000, ema=0.99))
    batch: int = 32
    train_decoder: bool = False
    denoising: float = 1.0
    anchor: float = 0.1
    weighting: str = "high_noise"

    def __post_init__(self) -> None:
        if self.batch < 1 or min(self.denoising, self.anchor) < 0:
            raise ConfigError("Encoder: the batch must be at least 1, no weight below 0.")


@dataclass(frozen=True, eq=False)
class EncoderExamples:
    """People with their LoRA, pictures, and perhaps the latent where they belong.

    Args:
        weights: B LoRAs, batched.
        pictures: of the same B people.
        latents: (B, K, Dz) raw latents, for instance the mean prediction from their photos.

    Raises:
        ConfigError: the counts differ.
    """

    weights: LoRAWeights
    pictures: DreamBoothExamples
    latents: Tensor | None = None

    def __post_init__(self) -> None:
        counts = {len(self.pictures), *self.weights.batch_shape}
        counts |= set() if self.latents is None else {len(self.latents)}
        if len(counts) != 1:
            raise ConfigError(f"LoRAs, pictures and latents are of different people: {counts}.")


class EncoderObjective(nn.Module):
    """Denoising loss of the base under encoded and decoded LoRAs."""

    def __init__(self, lae: LoRAAutoencoder, base: BaseModel, config: EncoderTrainConfig) -> None:
        super().__init__()
        self.lae, self.base, self.config = lae, base, config
        self.unet = base.unet.requires_grad_(False)
        lae.encoder.requires_grad_(True)
        lae.decoder.requires_grad_(config.train_decoder)
        lae.shared_down.requires_grad_(False)

    def forward(self, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of a batch of `encoder_batches`."""
        z = self.lae.encode(batch["tokens"])
        loss, metrics = z.new_zeros(()), {}
        if self.config.denoising:
            metrics["denoising"] = self._denoising(z, batch)
            loss = loss + self.config.denoising * metrics["denoising"]
        if "anchor" in batch:
            metrics["anchor"] = (z - batch["anchor"]).float().square().mean()
            loss = loss + self.config.anchor * metrics["anchor"]
        return loss, {name: value.detach() for name, value in metrics.items()}

    def _denoising(self, z: Tensor, batch: Mapping[str, Any]) -> Tensor:
        """Mean denoising loss under the LoRAs that z decodes to."""
        weights = self.lae.decode_weights(z)
        text = TextCondition(batch["context"], batch["pooled"])
        noised = NoisedBatch(batch["latents"], batch["noise"], batch["timesteps"], text)
        names = self.lae.layout.module_names
        with attach(self.unet, lora_adapter_set(weights), names=names):
            return denoising_error(self.base, noised, self.config.weighting).mean()


class EncoderBatches:
    """Draws people with one picture each."""

    def __init__(
        self, lae: LoRAAutoencoder, base: BaseModel, examples: EncoderExamples, batch: int
    ) -> None:
        with torch.no_grad():
            self.tokens = lae.tokens(examples.weights).float()
        self.examples, self.batch, self.steps = examples, batch, len(base.alphas_cumprod)
        prompts = [prompt for row in examples.pictures.prompts for prompt in row]
        unique = list(dict.fromkeys(prompts))
        number = {prompt: index for index, prompt in enumerate(unique)}
        self.text = base.encode_prompts(unique)
        self.caption = torch.tensor([[number[p] for p in row] for row in examples.pictures.prompts])

    def __call__(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Makes a batch."""
        pictures = self.examples.pictures.latents
        people = torch.randint(len(pictures), (self.batch,), generator=generator)
        which = torch.randint(pictures.shape[1], (self.batch,), generator=generator)
        latents = pictures[people, which].float()
        text = self.text.select(self.caption[people, which])
        made = {
            "tokens": self.tokens[people],
            "latents": latents,
            "noise": torch.randn(latents.shape, generator=generator),
            "timesteps": stratified_timesteps(self.batch, generator, self.steps),
            "context": text.context,
            "pooled": text.pooled,
        }
        if self.examples.latents is not None:
            made["anchor"] = self.examples.latents[people].float()
        return made


@torch.no_grad()
def adopt_statistics(lae: LoRAAutoencoder, tokens: Tensor) -> None:
    """Gives the encoder the statistics of a corpus without changing what any latent decodes to.

    A decoder that was trained through the base model kept mean 0 and scale 1, but the encoder needs
    inputs of unit size. For the structured decoder the change is exact:

        mean + scale * (offset + c @ basis) = mean' + scale' * (offset' + c @ basis')

    The conv1d decoder cannot absorb it and is left alone.

    Args:
        lae: changed in place.
        tokens: (M, T, L) raw tokens of the corpus.
    """
    decoder = lae.decoder
    if not isinstance(decoder, StructuredDecoder):
        return
    lengths = lae.groups.lengths
    before = [
        (lae.get_buffer(f"mean_{n}").clone(), lae.get_buffer(f"scale_{n}").clone()) for n in lengths
    ]
    statistics = WeightStatistics.fit(tokens, lae.groups.grid.mask(), center=True)
    lae.set_statistics(statistics.mean, statistics.scale[:, 0])
    for n, (mean, scale) in zip(lengths, before, strict=True):
        new_mean, new_scale = lae.get_buffer(f"mean_{n}"), lae.get_buffer(f"scale_{n}")
        offset, basis = decoder.offset[str(n)], decoder.basis[str(n)]
        offset.copy_((mean + scale * offset - new_mean) / new_scale)
        basis.mul_((scale / new_scale)[..., None])


@torch.no_grad()
def fit_mirror(
    lae: LoRAAutoencoder, examples: EncoderExamples, validation: EncoderExamples
) -> dict[str, float]:
    """Fit a mirror encoder in closed form: ridge regression from readings to known latents.

    Args:
        lae: with `encoder="mirror"` and a trained decoder; changed in place.
        examples: people of the corpus, with latents.
        validation: other people, with latents; they choose the strength of the ridge.

    Returns:
        `ridge`, the chosen strength, and `unexplained`, the share of the validation latents'
        variance that the encoder misses.

    Raises:
        ConfigError: another encoder, or examples without latents.
    """
    if not isinstance(lae.encoder, MirrorEncoder) or not isinstance(lae.decoder, StructuredDecoder):
        raise ConfigError("Only a mirror encoder can be fitted in closed form.")
    if examples.latents is None or validation.latents is None:
        raise ConfigError("A mirror encoder is fitted to known latents; the examples have none.")
    tokens = [lae.tokens(people.weights).float() for people in (examples, validation)]
    adopt_statistics(lae, tokens[0])
    readings = [lae.decoder.readings(lae.normalise(values)).double() for values in tokens]
    latents = [z.double().flatten(1) for z in (examples.latents, validation.latents)]
    ridge, strength = best_ridge(
        (readings[0], latents[0]), (readings[1], latents[1]), MIRROR_RIDGES
    )
    weight = ridge.weight / ridge.spread[:, None]
    lae.encoder.mean_out.weight.copy_(weight.mT)
    lae.encoder.mean_out.bias.copy_(ridge.bias - ridge.mean @ weight)
    missed = (ridge.predict(readings[1]) - latents[1]).square().mean()
    return {"ridge": strength, "unexplained": float(missed / latents[1].var(0).mean())}


def fit(
    lae: LoRAAutoencoder,
    base: BaseModel,
    examples: EncoderExamples,
    config: EncoderTrainConfig,
    folder: Path,
    validation: EncoderExamples | None = None,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Train the encoder (and the decoder, if asked) through the base model's loss; resumable.

    Args:
        lae: changed in place.
        base: frozen base model.
        examples: people of the corpus.
        config: settings.
        folder: of checkpoints and log.
        validation: other people; the weights of their lowest loss are kept.
        progress: as in `loop.train`.

    Returns:
        Metrics of the run.
    """
    draw = EncoderBatches(lae, base, examples, config.batch)
    adopt_statistics(lae, draw.tokens)
    objective = EncoderObjective(lae, base, config)
    hooks = Hooks(
        progress=progress,
        validate=None if validation is None else _validation(objective, validation),
        base=base if config.denoising else None,
        fingerprint=fingerprint(config, examples, validation),
    )
    return train(objective, draw, config.loop, folder, hooks)


def _validation(objective: EncoderObjective, examples: EncoderExamples) -> Callable[[], float]:
    """Loss on one fixed batch of other people."""
    config = objective.config
    draw = EncoderBatches(objective.lae, objective.base, examples, 4 * config.batch)
    fixed = draw(torch.Generator().manual_seed(config.loop.seed + 1))

    @torch.no_grad()
    def validate() -> float:
        device = next(objective.lae.parameters()).device
        there = {key: value.to(device) for key, value in fixed.items()}
        return float(objective(there)[0])

    return validate
