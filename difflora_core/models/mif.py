"""Mixed image features (MIF): gated mixture of face and image features, plus image tokens.

Source: DiffLoRA (arXiv:2408.06740) names a gate network, inspired by mixtures of experts, that
weighs a face embedding against a general image embedding; its formula is not public, so the one
here (difflora.md, section 4) is ours. The image tokens, pooled by learned queries, are ours too:
pooled embeddings alone carry hue, eyes and mouth badly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import Config, check_range
from ..errors import ConfigError, counted
from .layers import MLP, TransformerBlock, initialise, normal_parameter

SOURCES = ("face", "image", "tokens")


@dataclass(frozen=True)
class MIFConfig(Config):
    """Sizes of the MIF network.

    Args:
        face_dim: features of the face embedding (ArcFace: 512).
        image_dim: features of the pooled CLIP embedding.
        token_dim: features of CLIP's penultimate states.
        image_token_count: tokens per photo that the encoder gives (ViT-L/14 at 224: 257).
        width: D, features of the condition.
        tokens: S, condition tokens made from the image tokens.
        depth: resampler blocks.
        heads: attention heads of the resampler.
        temperature: of the gate's softmax; higher mixes more evenly.
        sources: which inputs are used; leaving one out is an ablation.

    Raises:
        ConfigError: a value out of range, an unknown source, or none at all.
    """

    face_dim: int = 512
    image_dim: int = 768
    token_dim: int = 1024
    image_token_count: int = 257
    width: int = 192
    tokens: int = 4
    depth: int = 1
    heads: int = 4
    temperature: float = 1.0
    sources: tuple[str, ...] = SOURCES

    def __post_init__(self) -> None:
        for name in ("face_dim", "image_dim", "token_dim", "image_token_count", "width"):
            check_range("MIF", name, getattr(self, name), 1, 16_384)
        check_range("MIF", "tokens", self.tokens, 1, 1024)
        check_range("MIF", "depth", self.depth, 1, 64)
        check_range("MIF", "heads", self.heads, 1, 256)
        check_range("MIF", "temperature", self.temperature, 1e-3, 1e3)
        if self.width % self.heads:
            raise ConfigError(f"MIF: width {self.width} cannot be split into {self.heads} heads.")
        unknown = set(self.sources) - set(SOURCES)
        if unknown or not self.sources or len(set(self.sources)) != len(self.sources):
            raise ConfigError(f"MIF: sources must be chosen from {SOURCES}; got {self.sources}.")

    @property
    def condition_tokens(self) -> int:
        """S, the number of condition tokens that come out (0 without the source `tokens`)."""
        return self.tokens if "tokens" in self.sources else 0


@dataclass(frozen=True)
class IdentityCondition:
    """Who the LoRA is for.

    Args:
        pooled: (B, D) mixed features.
        tokens: (B, S, D) condition tokens; S may be 0.
        gate: (B, 2) weights of the face and the image source.
    """

    pooled: Tensor
    tokens: Tensor
    gate: Tensor

    def __len__(self) -> int:
        return self.pooled.shape[0]

    def select(self, rows: Any) -> IdentityCondition:
        """Picks batch rows by any index that keeps the batch dimension (list, slice, tensor)."""
        return IdentityCondition(self.pooled[rows], self.tokens[rows], self.gate[rows])

    def expand(self, batch: int) -> IdentityCondition:
        """Repeats a condition of one identity to a batch; a batch of that size is kept.

        Raises:
            ConfigError: there are several identities, but not `batch`.
        """
        if len(self) == batch:
            return self
        if len(self) != 1:
            raise ConfigError(
                f"{counted(len(self), 'identity')} were given for {counted(batch, 'sample')}; "
                "give one, or one each."
            )
        return self.select([0] * batch)

    def to(self, like: Tensor) -> IdentityCondition:
        """The same condition on the device and in the dtype of `like` (...)."""
        return IdentityCondition(self.pooled.to(like), self.tokens.to(like), self.gate.to(like))


class MixedImageFeatures(nn.Module):
    """Turns the features of a person's photos into one condition; photo order never matters.

    Face and image embeddings are averaged over photos, L2-normalised, standardised with stored
    statistics and sent through one expert each; `pooled = g1 face + g2 image`, where g is a softmax
    over the sources that exist. A missing face takes its expert out of the softmax. Photo tokens
    are gathered by learned queries that also see the two experts' outputs.

    Args:
        config: sizes.
        operations: namespace of layer classes.
        generator: draws the initial weights.
    """

    def __init__(
        self, config: MIFConfig, operations: Any = nn, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.config = config
        d = config.width
        self.face_expert = MLP((config.face_dim, 2 * d, d), norm=True, operations=operations)
        self.image_expert = MLP((config.image_dim, 2 * d, d), norm=True, operations=operations)
        self.gate_face = operations.LayerNorm(config.face_dim)
        self.gate_image = operations.LayerNorm(config.image_dim)
        self.gate = operations.Linear(config.face_dim + config.image_dim, 2)
        if "tokens" in config.sources:
            self.token_norm = operations.LayerNorm(config.token_dim)
            self.token_in = operations.Linear(config.token_dim, d)
            self.token_position = normal_parameter(config.image_token_count, d, generator=generator)
            self.queries = normal_parameter(config.tokens, d, std=1.0, generator=generator)
            self.blocks = nn.ModuleList(
                TransformerBlock(d, config.heads, operations=operations)
                for _ in range(config.depth)
            )
            self.token_out = operations.LayerNorm(d)
        for name, size in zip(SOURCES, _source_sizes(config), strict=True):
            self.register_buffer(f"{name}_mean", torch.zeros(size))
            self.register_buffer(f"{name}_scale", torch.ones(size))
        initialise(self, generator)

    def forward(
        self,
        face: Tensor,
        face_found: Tensor,
        image: Tensor,
        image_tokens: Tensor,
        photo_mask: Tensor | None = None,
        gate_override: Tensor | None = None,
    ) -> IdentityCondition:
        """Mixes the features of N photos per person.

        Args:
            face: (B, N, face_dim); rows without a face are ignored.
            face_found: (B, N) bool.
            image: (B, N, image_dim).
            image_tokens: (B, N, L, token_dim).
            photo_mask: (B, N) bool, False for padding; all photos count unless given.
            gate_override: (2,) or (B, 2) weights for (face, image), 0 or more, used as they are;
                NaN keeps the learned weight. A missing face stays out whatever is asked.

        Returns:
            The condition; pooled is 0 where no source exists (only faces are used, none found).

        Raises:
            ConfigError: wrong sizes, or a bad override.
        """
        self._check(face, image, image_tokens)
        present = torch.ones_like(face_found).bool() if photo_mask is None else photo_mask.bool()
        has_face = face_found.bool() & present
        pooled_face = self._standardise("face", _average(face, has_face))  # B Df
        pooled_image = self._standardise("image", _average(image, present))  # B Di
        u_face = self.face_expert(pooled_face)  # B D
        u_image = self.image_expert(pooled_image)  # B D
        usable = torch.stack(
            [
                has_face.any(1) & ("face" in self.config.sources),
                present.any(1) & ("image" in self.config.sources),
            ],
            dim=-1,
        )  # B 2
        seen = [self.gate_face(pooled_face * usable[:, :1]), self.gate_image(pooled_image)]
        logits = self.gate(torch.cat(seen, -1))  # B 2
        gate = _masked_softmax(logits / self.config.temperature, usable)  # B 2
        gate = _apply_override(gate, usable, gate_override)  # B 2
        pooled = gate[:, :1] * u_face + gate[:, 1:] * u_image  # B D
        experts = torch.stack([u_face, u_image], dim=1)  # B 2 D
        tokens = self._gather(image_tokens, present, experts, usable)  # B S D
        return IdentityCondition(pooled, tokens, gate)

    def _gather(
        self, image_tokens: Tensor, present: Tensor, experts: Tensor, usable: Tensor
    ) -> Tensor:
        """Learned queries read the tokens of all photos and the experts; (B, S, D)."""
        batch, _, d = experts.shape
        if "tokens" not in self.config.sources:
            return experts.new_zeros(batch, 0, d)
        x = image_tokens.masked_fill(~present[..., None, None], 0.0)  # B N L Dt
        x = self.token_norm(self._standardise("tokens", x))
        x = self.token_in(x) + self.token_position.to(x)  # B N L D
        context = torch.cat([x.flatten(1, 2), experts], dim=1)  # B N*L+2 D
        visible = torch.cat([present.repeat_interleave(x.shape[2], dim=1), usable], 1)  # B N*L+2
        # a row that sees nothing would become NaN in the softmax
        visible = visible | ~visible.any(1, keepdim=True)
        tokens = self.queries.to(x).expand(batch, -1, -1)  # B S D
        for block in self.blocks:
            tokens = block(tokens, context, visible)
        out: Tensor = self.token_out(tokens)
        return out

    @torch.no_grad()
    def fit_statistics(
        self, face: Tensor, face_found: Tensor, image: Tensor, image_tokens: Tensor
    ) -> None:
        """Stores mean and spread of the training features; each row (M, ...) is one photo.

        Standardised inputs let small experts see what differs between people instead of what all
        share. Statistics are taken after L2 normalisation, as `forward` applies them.
        """
        found = face_found.bool()
        rows = {"image": F.normalize(image.float(), dim=-1), "tokens": image_tokens.flatten(0, 1)}
        if bool(found.any()):
            rows["face"] = F.normalize(face[found].float(), dim=-1)
        for name, value in rows.items():
            getattr(self, f"{name}_mean").copy_(value.mean(0))
            spread = value.var(0, unbiased=False).mean().sqrt().clamp_min(1e-6)
            getattr(self, f"{name}_scale").copy_(spread.expand(value.shape[-1]))

    def _standardise(self, name: str, value: Tensor) -> Tensor:
        """Subtracts the stored mean and divides by the stored spread."""
        mean, scale = getattr(self, f"{name}_mean"), getattr(self, f"{name}_scale")
        return (value - mean.to(value)) / scale.to(value)

    def _check(self, face: Tensor, image: Tensor, image_tokens: Tensor) -> None:
        """Raises ConfigError when an encoder does not fit this model."""
        c = self.config
        for what, got, expected in (
            ("face embedding", face.shape[2:], (c.face_dim,)),
            ("CLIP vision embedding", image.shape[2:], (c.image_dim,)),
            ("CLIP vision token grid", image_tokens.shape[2:], (c.image_token_count, c.token_dim)),
        ):
            if tuple(got) != expected:
                raise ConfigError(
                    f"The {what} has size {tuple(got)}, but this DiffLoRA model was trained with "
                    f"{expected}: load the encoder that belongs to the model."
                )


def balance_loss(gate: Tensor) -> Tensor:
    """Load balance of the gate: CV^2 of the mean weights (arXiv:1701.06538, Eq. 7); gate (B, 2)."""
    load = gate.mean(0)
    return load.var(unbiased=False) / load.mean().pow(2).clamp_min(1e-8)


def _source_sizes(config: MIFConfig) -> tuple[int, int, int]:
    """Feature counts in the order of SOURCES."""
    return config.face_dim, config.image_dim, config.token_dim


def _average(x: Tensor, mask: Tensor) -> Tensor:
    """Mean over the photos that count, then L2 normalisation; (B, N, D) to (B, D)."""
    present = x.masked_fill(~mask[..., None], 0.0)
    return F.normalize(present.sum(1) / mask.sum(1, keepdim=True).clamp_min(1), dim=-1)


def _masked_softmax(logits: Tensor, usable: Tensor) -> Tensor:
    """Softmax over usable sources; all zero when there is none."""
    top = logits.masked_fill(~usable, -1e30).amax(-1, keepdim=True)
    weights = (logits - top).masked_fill(~usable, 0.0).exp() * usable
    return weights / weights.sum(-1, keepdim=True).clamp_min(1e-20)


def _apply_override(gate: Tensor, usable: Tensor, override: Tensor | None) -> Tensor:
    """Replaces learned weights by the finite ones asked for."""
    if override is None:
        return gate
    asked = override.to(gate).expand_as(gate)
    if bool(((asked < 0) | asked.isinf()).any()):
        raise ConfigError("Gate weights must be 0 or more; got a negative or infinite one.")
    return torch.where(asked.isnan(), gate, asked) * usable
