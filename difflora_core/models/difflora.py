"""DiffLoRA: photos to features, condition, LoRA latent and LoRA weights (arXiv:2408.06740).

The paper samples the latent with a DiT (`sample_latent`). There is also a single best guess
(`mean_latent`): in the functional preset a deterministic predictor gives it, around which the DiT
models a distribution; in the paper's it is the mean of that distribution. All end in the same
autoencoder's decoder.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..diffusion.sampler import (
    SampleSettings,
    StepCallback,
    initial_noise,
    sample,
    seeded_generators,
)
from ..errors import EncoderError
from ..lora.layout import LoRALayout
from ..lora.weights import LoRAWeights
from ..vision.features import ImageFeatures
from .difflora_config import DiffLoRAConfig
from .dit import DiT
from .identity_model import IdentityModel, one_each
from .lae.autoencoder import LoRAAutoencoder, LoRALatent
from .latent_agreement import condition_gain
from .mif import IdentityCondition, MixedImageFeatures
from .predictor import LatentPredictor

__all__ = ["DiffLoRAConfig", "DiffLoRAModel"]

MEAN_DRAWS = 8
"""Of the noise from which the DiT tells the mean of a distribution."""


class DiffLoRAModel(IdentityModel):
    """The whole model for one base family: condition, latent, LoRA.

    Latents are kept in two scales: the autoencoder's own (`z`) and the normalised one of
    `LoRALatent`, (z - latent_mean) / latent_scale, in which the DiT works.

    Args:
        config: sizes.
        layout: LoRA layout of the base model.
        operations: namespace of layer classes (a host may pass weight-casting ones).
        generator: draws the initial weights.
    """

    def __init__(
        self,
        config: DiffLoRAConfig,
        layout: LoRALayout,
        operations: Any = nn,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.config, self.layout = config, layout
        self.face_encoder = config.face_encoder
        self.mif = MixedImageFeatures(config.mif, operations, generator)
        self.predictor = LatentPredictor(config.predictor, operations, generator)
        self.dit = DiT(config.dit, operations, generator)
        self.lae = LoRAAutoencoder(config.lae, layout, operations, generator)
        shape = (config.lae.latent_tokens, config.lae.latent_dim)
        self.register_buffer("latent_mean", torch.zeros(shape))
        self.register_buffer("latent_scale", torch.ones(shape))

    @property
    def anchor(self) -> Tensor:
        """See `IdentityModel.anchor`."""
        return self.get_buffer("latent_mean")

    def complete(self, features: ImageFeatures) -> ImageFeatures:
        """See `IdentityModel.complete`."""
        sizes, sources = self.config.feature_sizes, self.config.mif.sources
        face, image, tokens = features.face, features.image, features.image_tokens
        if face.shape[1] == 0:
            if sources == ("face",):
                raise EncoderError(
                    "This DiffLoRA model knows people by their face only: connect a face analysis."
                )
            face = face.new_zeros(len(face), sizes.face)
        if image.shape[1] == 0:
            if sources != ("face",):
                raise EncoderError(
                    "This DiffLoRA model also looks at the whole photo: connect its CLIP vision."
                )
            image = image.new_zeros(len(image), sizes.image)
            tokens = tokens.new_zeros(len(image), sizes.tokens, sizes.token_dim)
        about = (features.image_region, features.recogniser)
        complete = ImageFeatures(face, features.face_found, image, tokens, *about)
        sizes.check(complete.sizes)
        return complete

    def condition(
        self,
        features: ImageFeatures | Sequence[ImageFeatures],
        gate_override: Tensor | None = None,
    ) -> IdentityCondition:
        """Mixes photos into one condition per person: pooled (B, D), tokens (B, S, D), gate (B, 2).

        Args:
            features: photos of one person, or a list with one record per person.
            gate_override: see `MixedImageFeatures.forward`.

        Raises:
            EncoderError: the features come from other encoders than the model's.
            ConfigError: no person or no photo at all.
        """
        people = one_each(features)
        for person in people:
            self.config.feature_sizes.check(person.sizes)
        photos = max(len(person) for person in people)
        lengths = torch.tensor([len(person) for person in people])
        result: IdentityCondition = self.mif(
            _pad_photos([person.face for person in people], photos).to(self.device),
            _pad_photos([person.face_found for person in people], photos).to(self.device),
            _pad_photos([person.image for person in people], photos).to(self.device),
            _pad_photos([person.image_tokens for person in people], photos).to(self.device),
            photo_mask=(torch.arange(photos)[None] < lengths[:, None]).to(self.device),
            gate_override=gate_override,
        )
        return result

    def mean_latent(self, condition: IdentityCondition) -> LoRALatent:
        """The single best guess for each of B identities.

        That of a predictor is differentiable. A model that was trained on weights alone has none:
        there it is the mean of what the DiT samples. From pure noise the DiT predicts that mean
        in one step; a few draws of the noise are averaged, because networks are not exact.
        """
        if self.config.preset != "paper":
            return self.latent(self.predictor(condition))
        count, once = len(condition), SampleSettings(steps=1)
        draws = [
            self.sample_latent(condition, [seed] * count, once).z for seed in range(MEAN_DRAWS)
        ]
        return self.wrap(torch.stack(draws).mean(0))

    def latent(self, z: Tensor) -> LoRALatent:
        """Wraps autoencoder latents z (B, K, Dz) as normalised latents."""
        mean, scale = self.get_buffer("latent_mean"), self.get_buffer("latent_scale")
        return self.wrap((z - mean.to(z)) / scale.to(z))

    @property
    def latent_space(self) -> str:
        """Digest by which latents of this model differ from another's of the same layout (ours).

        It covers the layout and the latent statistics, which every training run sets and every
        storage type keeps exactly.
        """
        digest = hashlib.sha256(self.layout.hash.encode())
        for name in ("latent_mean", "latent_scale"):
            values = self.get_buffer(name).detach().to("cpu", torch.float32)
            digest.update(values.contiguous().numpy().tobytes())
        return digest.hexdigest()[:32]

    def wrap(self, z: Tensor) -> LoRALatent:
        """Normalised z (B, K, Dz) as a latent of this model."""
        return LoRALatent(z, self.layout.hash, self.latent_space, license=self.license)

    def raw_latent(self, latent: LoRALatent) -> Tensor:
        """Inverse of `latent`: the autoencoder's z (B, K, Dz).

        Raises:
            LayoutError: the latent belongs to another model.
        """
        self.check_latent(latent)
        z = latent.z.to(self.device)
        mean, scale = self.get_buffer("latent_mean"), self.get_buffer("latent_scale")
        return z * scale.to(z) + mean.to(z)

    @torch.no_grad()
    def fit_latent_statistics(self, z: Tensor, whiten: bool = False) -> None:
        """Sets the normalisation from training latents z (M, K, Dz).

        Args:
            z: autoencoder latents of many identities.
            whiten: give every number its own scale; by default one scale serves all, because with
                few identities the weak directions are noise that whitening would amplify.
        """
        scale = z.std(0, unbiased=False) if whiten else z.var(0, unbiased=False).mean().sqrt()
        self.get_buffer("latent_mean").copy_(z.mean(0))
        self.get_buffer("latent_scale").copy_(scale.clamp_min(1e-6).expand_as(z[0]))

    def sample_latent(
        self,
        condition: IdentityCondition | None,
        seeds: Sequence[int],
        settings: SampleSettings | None = None,
        *,
        callback: StepCallback | None = None,
        scheduler: Any = None,
        initial: LoRALatent | None = None,
    ) -> LoRALatent:
        """Samples one latent per seed from the DiT.

        Args:
            condition: one identity for all seeds or one per seed; None invents people.
            seeds: B seeds; the same seed gives the same latent whatever the batch or device.
            settings: steps and guidance.
            callback: `callback(step, total, z)`, may raise to interrupt.
            scheduler: a diffusers scheduler to use instead of `settings.solver`.
            initial: latents to vary by `settings.strength`, one for all seeds or one per seed.

        Raises:
            LayoutError: `initial` belongs to another model.
            ConfigError: a strength below 1 without `initial`.
        """
        if initial is not None:
            self.check_latent(initial)
        settings = settings or SampleSettings()
        generators = seeded_generators(seeds)
        shape = (self.config.lae.latent_tokens, self.config.lae.latent_dim)
        noise = initial_noise(generators, shape).to(self.device)
        bound = None if condition is None else condition.expand(len(seeds)).to(noise)

        def denoise(z: Tensor, timestep: Tensor, conditional: bool) -> Tensor:
            prediction: Tensor = self.dit(z, timestep, bound if conditional else None)
            return prediction

        z = sample(
            denoise,
            noise,
            scheduler or self.config.schedule.solver(settings.solver),
            settings,
            generators=generators,
            callback=callback,
            initial=None if initial is None else initial.z.to(noise).expand_as(noise),
        )
        return self.wrap(z)

    def agreement(self, latent: LoRALatent, condition: IdentityCondition) -> Tensor:
        """How well B latents agree with the photos of a person, (B,); higher is better.

        See models/latent_agreement.py; it needs the DiT alone, so it serves every preset.

        Raises:
            LayoutError: the latents belong to another model.
        """
        self.check_latent(latent)
        z = latent.z.to(self.device)
        bound = condition.to(z).expand(len(z))
        fixed = torch.Generator().manual_seed(0)
        return condition_gain(self.dit, self.config.schedule, z, bound, fixed)

    @property
    def autoencoder(self) -> LoRAAutoencoder:
        """See `IdentityModel.autoencoder`."""
        return self.lae

    def encode(self, weights: LoRAWeights) -> LoRALatent:
        """Brings an existing LoRA, single or batched, into the latent space."""
        return self.latent(self.lae.encode_weights(weights))

    def decode(self, latent: LoRALatent) -> LoRAWeights:
        """Decodes B latents to batched LoRA weights; differentiable."""
        return self.lae.decode_weights(self.raw_latent(latent))


def _pad_photos(rows: list[Tensor], photos: int) -> Tensor:
    """Stacks per-person (N, ...) tensors to (B, photos, ...), padding with zeros."""
    return torch.stack(
        [F.pad(row, [0, 0] * (row.ndim - 1) + [0, photos - len(row)]) for row in rows]
    )
