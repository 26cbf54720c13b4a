"""LatentPredictor: the deterministic path from an identity condition to a LoRA latent (ours).

HyperLoRA (arXiv:2503.16944) and our own study train such a map through the base model's denoising
loss; its output is the single best guess for a person, and the DiT then models the distribution.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..config import Config, check_range
from .layers import MLP, initialise, zero
from .mif import IdentityCondition


@dataclass(frozen=True)
class PredictorConfig(Config):
    """Sizes of the predictor.

    Args:
        condition_dim: D of the condition.
        condition_tokens: S.
        latent_tokens: K.
        latent_dim: Dz.
        width: hidden features.
        depth: residual MLP blocks.

    Raises:
        ConfigError: a value out of range.
    """

    condition_dim: int = 192
    condition_tokens: int = 4
    latent_tokens: int = 8
    latent_dim: int = 16
    width: int = 256
    depth: int = 2

    def __post_init__(self) -> None:
        for name in ("condition_dim", "latent_tokens", "latent_dim", "width"):
            check_range("Predictor", name, getattr(self, name), 1, 16_384)
        check_range("Predictor", "condition_tokens", self.condition_tokens, 0, 1024)
        check_range("Predictor", "depth", self.depth, 0, 64)


class LatentPredictor(nn.Module):
    """Residual MLP from pooled features and condition tokens to one latent.

    Before training the residual blocks are the identity, so the map starts as two linear layers.

    Args:
        config: sizes.
        operations: namespace of layer classes.
        generator: draws the initial weights.
    """

    def __init__(
        self,
        config: PredictorConfig,
        operations: Any = nn,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        d, rows = config.width, 1 + config.condition_tokens
        self.condition_in = operations.Linear(rows * config.condition_dim, d)
        self.blocks = nn.ModuleList(
            MLP((d, 2 * d, d), norm=True, operations=operations) for _ in range(config.depth)
        )
        self.latent_out = operations.Linear(d, config.latent_tokens * config.latent_dim)
        initialise(self, generator)
        for block in self.blocks:
            if isinstance(block, MLP):
                zero(block.down)

    def forward(self, condition: IdentityCondition) -> Tensor:
        """Maps B identities to latents (B, K, Dz), not normalised."""
        rows = torch.cat([condition.pooled[:, None], condition.tokens], dim=1)  # B 1+S D'
        h = self.condition_in(rows.flatten(1))  # B D
        for block in self.blocks:
            h = h + block(h)  # B D
        z: Tensor = self.latent_out(h)  # B K*Dz
        return z.unflatten(-1, (self.config.latent_tokens, self.config.latent_dim))
