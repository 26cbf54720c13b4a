"""HyperLoRA as an identity model: photos to mixing coefficients, and those to LoRA (2503.16944).

A LoRA factor is a mixture of learned basis matrices, M = sum_k c_k M_k. The latent holds the
coefficients, one token of unit length for each factor: `down`, then `up` of every layer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ConfigError, EncoderError, LayoutError
from ...lora.layout import LoRALayout
from ...lora.weights import LoRALayer, LoRAWeights
from ...vision.face_choice import IMAGE_REGIONS
from ...vision.features import SEVERAL, ImageFeatures
from ..identity_model import IdentityModel, one_each
from ..lae.autoencoder import LoRALatent
from ..mif import IdentityCondition
from .config import HyperLoRAConfig
from .resampler import FaceProjector, Resampler

LICENSE = "HyperLoRA weights: CC-BY-NC 4.0, not for commercial use, nor is what they make."
NORM_EPSILON = 1e-8  # under the root of a token's length


class HyperLoRAModel(IdentityModel):
    """The whole model for SDXL; its scale alpha / rank is 1/2.

    Args:
        config: sizes.
        layout: LoRA layout, layers in the order of the weights.
        operations: namespace of layer classes.
    """

    license = LICENSE
    image_region = "face_on_grey"

    def __init__(self, config: HyperLoRAConfig, layout: LoRALayout, operations: Any = nn) -> None:
        super().__init__()
        self.config, self.layout = config, layout
        self.id_projector = FaceProjector(config, operations)
        self.resampler = Resampler(config, 2 * len(layout), operations)
        self.basis = nn.ParameterList(
            nn.Parameter(torch.empty(config.basis_size, *shape)) for shape in basis_shapes(layout)
        )
        # Without values, and so in no file: it only says where the model computes.
        self.register_buffer("place", torch.empty(0, device="cpu"), persistent=False)

    @property
    def anchor(self) -> Tensor:
        """See `IdentityModel.anchor`."""
        return self.get_buffer("place")

    @property
    def latent_space(self) -> str:
        """Digest of the layout, the last layer before the latent, and one basis matrix."""
        digest = hashlib.sha256(self.layout.hash.encode())
        for part in (self.resampler.proj_out.weight, self.basis[0][0]):
            values = part.detach().to("cpu", torch.float32)
            digest.update(values.contiguous().numpy().tobytes())
        return digest.hexdigest()[:32]

    def complete(self, features: ImageFeatures) -> ImageFeatures:
        """Checks that both encoders looked at the photos; it was trained with both.

        Raises:
            EncoderError: one was not connected, is another one, or saw the square around the face,
                which is what it is shown unless somebody asks for more.
        """
        lacking = "face analysis" if features.face.shape[1] == 0 else ""
        if features.image_tokens.shape[-1] == 0:
            lacking = "CLIP vision (ViT-L/14)"
        if lacking:
            raise EncoderError(
                "This model looks at the face and at the photo, as it was trained: connect a "
                f"{lacking} too."
            )
        self.config.feature_sizes(features.sizes).check(features.sizes)
        if features.image_region in (IMAGE_REGIONS[0], SEVERAL):
            raise EncoderError(
                f"CLIP vision was shown {features.image_region}, but this model was trained on "
                f"faces cut out on grey: set image_region to {self.image_region} in Extract "
                "Identity Features."
            )
        return features

    def condition(
        self,
        features: ImageFeatures | Sequence[ImageFeatures],
        gate_override: Tensor | None = None,
    ) -> IdentityCondition:
        """The resampler's coefficients, a mean over photos: tokens (B, T, basis_size).

        `pooled` is empty, (B, 0). The gate's own weights are 1 and 1; others multiply what every
        layer reads of that source. A photo without a face counts by its image alone.

        Raises:
            EncoderError, ConfigError: see `IdentityModel.condition`; a negative gate.
        """
        people = [self.complete(person) for person in one_each(features)]
        found = torch.tensor([bool(person.face_found.any()) for person in people])
        gate = _gate(found.to(self.device), gate_override)  # B 2
        tokens = [self._read(p, g[None]) for p, g in zip(people, gate, strict=True)]
        return IdentityCondition(gate.new_zeros(len(gate), 0), torch.cat(tokens), gate)

    def _read(self, person: ImageFeatures, gate: Tensor) -> Tensor:
        """Mean coefficients (1, T, basis_size) of N photos, one after the other to save memory."""
        person = person.to(self.device, torch.float32)
        total = torch.zeros((), device=self.device)
        for photo in range(len(person)):
            one = person.select(photo)
            face = self.id_projector(one.face) if bool(one.face_found) else None
            total = total + self.resampler(face, one.image_tokens, gate)
        return total / len(person)

    def mean_latent(self, condition: IdentityCondition) -> LoRALatent:
        """The coefficients with every token brought to unit length.

        Raises:
            ConfigError: the condition was made by a model of another kind.
        """
        tokens, expected = condition.tokens, (2 * len(self.layout), self.config.basis_size)
        if tuple(tokens.shape[1:]) != expected:
            raise ConfigError(
                f"This condition has tokens of size {tuple(tokens.shape[1:])}, but this model "
                f"works with {expected}: mix the features with the model that is to use them."
            )
        length = (tokens.square().sum(-1, keepdim=True) + NORM_EPSILON).sqrt()
        return self.wrap(tokens / length)

    def wrap(self, z: Tensor) -> LoRALatent:
        """Tokens z (B, T, basis_size) of unit length as a latent of this model."""
        return LoRALatent(z, self.layout.hash, self.latent_space, True, self.license)

    def decode(self, latent: LoRALatent) -> LoRAWeights:
        """Mixes the basis: down (B, r, in), up (B, out, r), in float32.

        Raises:
            LayoutError: the latent belongs to another model.
        """
        self.check_latent(latent)
        z = latent.z.to(self.device, torch.float32)
        expected = (2 * len(self.layout), self.config.basis_size)
        if tuple(z.shape[1:]) != expected:
            raise LayoutError(
                f"The LoRA latent has size {tuple(z.shape[1:])}; this model decodes {expected}."
            )
        scratch = z.new_empty(max(basis.numel() for basis in self.basis))
        place = None if z.requires_grad else scratch
        factors = [_mix(z[:, t], basis, place) for t, basis in enumerate(self.basis)]
        alpha = self.layout.rank / 2
        pairs = zip(self.layout, factors[::2], factors[1::2], strict=True)
        return LoRAWeights({shape.name: LoRALayer(down, up, alpha) for shape, down, up in pairs})


def basis_shapes(layout: LoRALayout) -> list[tuple[int, int]]:
    """Shape of a basis matrix for each token: (in, r), then (r, out), of every layer."""
    rank = layout.rank
    pairs = [((layer.in_features, rank), (rank, layer.out_features)) for layer in layout]
    return [shape for pair in pairs for shape in pair]


def _mix(coefficients: Tensor, basis: Tensor, scratch: Tensor | None) -> Tensor:
    """sum_k c_k M_k, transposed: coefficients (B, K) and basis (K, x, y) to (B, y, x).

    `scratch` holds the basis in float32 for a moment. Its memory serves every layer: fresh memory
    for each takes ten times as long, and systems give it back late.
    """
    flat = basis.flatten(1)
    if scratch is None:  # what is kept for the way back must not be overwritten
        values = flat.to(coefficients)
    else:
        values = scratch[: flat.numel()].view(flat.shape).copy_(flat)
    return (coefficients @ values).unflatten(-1, basis.shape[1:]).mT.contiguous()


def _gate(face_found: Tensor, override: Tensor | None) -> Tensor:
    """Weights (B, 2) of face and image: 1 unless asked for; 0 where B people show no face (B,)."""
    gate = torch.ones(len(face_found), 2, device=face_found.device)
    if override is not None:
        asked = override.to(gate).expand_as(gate)
        if bool(((asked < 0) | asked.isinf()).any()):
            raise ConfigError("Gate weights must be 0 or more; got a negative or infinite one.")
        gate = torch.where(asked.isnan(), gate, asked)
    return torch.stack([gate[:, 0] * face_found, gate[:, 1]], -1)
