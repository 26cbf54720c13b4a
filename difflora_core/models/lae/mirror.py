"""Mirror encoder: the structured decoder read backwards (ours).

What a LoRA holds of every basis vector of the decoder, then one linear map to the latent. Being
linear it can be fitted in closed form, and a corpus of a few hundred LoRAs suffices, where the
transformer encoder learns them by heart.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..layers import zero
from .tokens import TokenGroups

if TYPE_CHECKING:
    from .autoencoder import LAEConfig


class MirrorEncoder(nn.Module):
    """Readings of the decoder's basis to mean and log variance.

    Before training the mean is 0 and the log variance is at its floor, whatever the LoRA.

    Args:
        config: sizes.
        groups: token order of the layout.
        operations: namespace of layer classes.
    """

    def __init__(self, config: LAEConfig, groups: TokenGroups, operations: Any = nn) -> None:
        super().__init__()
        self.latent_tokens, self.latent_dim = config.latent_tokens, config.latent_dim
        rows = len(groups.slots) * config.basis_size
        self.mean_out = operations.Linear(rows, config.latent_tokens * config.latent_dim)
        zero(self.mean_out)

    def forward(self, readings: Tensor) -> Tensor:
        """Maps readings (B, T*Kb) to mean and log variance (B, K, 2 Dz)."""
        mean = self.mean_out(readings).unflatten(-1, (self.latent_tokens, self.latent_dim))
        return torch.cat([mean, torch.full_like(mean, -20.0)], dim=-1)
