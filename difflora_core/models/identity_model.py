"""IdentityModel: what everything after the loader relies on, whoever trained the model.

Photos become a condition, a condition a latent, a latent a LoRA. What a model cannot do it refuses
in a sentence: here stand the refusals, and a model replaces those that it can.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

from torch import Tensor, device, nn

from ..diffusion.sampler import SampleSettings, StepCallback
from ..errors import ConfigError, LayoutError
from ..lora.layout import LoRALayout
from ..lora.weights import LoRAWeights
from ..vision.features import ImageFeatures
from .lae.autoencoder import LoRAAutoencoder, LoRALatent
from .mif import IdentityCondition


class IdentityModel(nn.Module):
    """A network from photos of a person to a LoRA.

    Attributes:
        layout: LoRA layout of the base model.
        license: terms of the weights that also bind what is made with them, in words; empty where
            there are none beyond the pack's own.
        image_region: what CLIP vision saw in training, one of `face_choice.IMAGE_REGIONS`.
        face_encoder: package and file of the face recogniser of training; empty if nobody knows.
    """

    layout: LoRALayout
    license: str = ""
    image_region: str = "crop"
    face_encoder: str = ""

    @property
    @abstractmethod
    def anchor(self) -> Tensor:
        """A small float32 tensor of the model's own, where and in which type inputs are wanted."""

    @property
    def device(self) -> device:
        """Where the model computes."""
        return self.anchor.device

    @property
    @abstractmethod
    def latent_space(self) -> str:
        """Digest by which latents of this model differ from another's of the same layout."""

    @abstractmethod
    def complete(self, features: ImageFeatures) -> ImageFeatures:
        """Fills the part of an encoder that was not connected, when the model can do without it.

        Raises:
            EncoderError: it cannot, or the features come from other encoders than the model's.
        """

    @abstractmethod
    def condition(
        self,
        features: ImageFeatures | Sequence[ImageFeatures],
        gate_override: Tensor | None = None,
    ) -> IdentityCondition:
        """Mixes photos into one condition per person: pooled (B, D), tokens (B, S, D), gate (B, 2).

        Args:
            features: photos of one person, or a list with one record per person.
            gate_override: (2,) or (B, 2) weights of face and image, 0 or more; NaN keeps the
                model's own.

        Raises:
            EncoderError: the features come from other encoders than the model's.
            ConfigError: no person or no photo at all.
        """

    @abstractmethod
    def mean_latent(self, condition: IdentityCondition) -> LoRALatent:
        """The single best guess for each of B identities."""

    @abstractmethod
    def decode(self, latent: LoRALatent) -> LoRAWeights:
        """Decodes B latents to batched LoRA weights; differentiable.

        Raises:
            LayoutError: the latent belongs to another model.
        """

    @abstractmethod
    def wrap(self, z: Tensor) -> LoRALatent:
        """z (B, K, Dz), as latents of this model are kept, as one."""

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
        """Samples one latent per seed, see `DiffLoRAModel.sample_latent`.

        Raises:
            ConfigError: this model has nothing to sample from.
        """
        raise ConfigError(
            "This model knows one LoRA for a person and cannot draw variants or invent people: it "
            "has no DiT. Set the mode to best_guess, or blend people instead."
        )

    def agreement(self, latent: LoRALatent, condition: IdentityCondition) -> Tensor:
        """How well B latents agree with the photos of a person, (B,); higher is better.

        Raises:
            ConfigError: this model cannot tell.
        """
        raise ConfigError("This model has no DiT, so it cannot tell how well an identity fits.")

    @property
    def autoencoder(self) -> LoRAAutoencoder:
        """Between LoRAs and latents, for those that read an existing LoRA.

        Raises:
            ConfigError: this model cannot read one.
        """
        raise ConfigError(
            "This model makes LoRAs of photos and cannot read one: it has no encoder. Personalize "
            "photos of the person instead, or load a DiffLoRA model."
        )

    def other_recogniser(self, features: ImageFeatures) -> str:
        """A sentence where faces were read by another recogniser than in training; else empty."""
        trained = PurePosixPath(self.face_encoder).name
        if not trained.endswith(".onnx") or features.recogniser in ("", trained):
            return ""
        return (
            f"The faces were read by {features.recogniser}, but this DiffLoRA model was trained "
            f"with {self.face_encoder}: it will make another person. Load that package in Load "
            "Face Analysis."
        )

    def check_latent(self, latent: LoRALatent) -> None:
        """Refuses a latent of another model.

        Raises:
            LayoutError: the latent belongs to a model of another layout, or to another model.
        """
        if latent.layout_hash != self.layout.hash:
            raise LayoutError(
                "This LoRA latent was made for another base model or LoRA layout; use the model "
                "that made it."
            )
        if latent.space not in ("", self.latent_space):
            raise LayoutError(
                "This LoRA latent was made by another identity model, where the same numbers are "
                "another person; use the model that made it."
            )


def one_each(features: ImageFeatures | Sequence[ImageFeatures]) -> list[ImageFeatures]:
    """The features as one record (N photos) per person.

    Raises:
        ConfigError: no person or no photo at all.
    """
    people = [features] if isinstance(features, ImageFeatures) else list(features)
    if not people or min(len(person) for person in people) == 0:
        raise ConfigError("There is no photo to make an identity condition from.")
    return people
