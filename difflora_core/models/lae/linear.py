"""Linear LAE: a mean and the directions in which the LoRAs of a corpus differ most (ours).

Fitted in closed form to the principal components of a corpus it is, under squared error, the best
autoencoder of so many numbers that is linear. There is nothing in it to overtrain, so a few hundred
LoRAs are enough, where networks learn them by heart. It holds every direction whole: for a base of
SDXL's size that is too much.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ...errors import ConfigError
from ..layers import certain_posterior, zero
from .config import LAEConfig
from .tokens import TokenGroups

MOST_NUMBERS = 2**29
"""Of one map; in float32 they take 2 GB."""


class LinearEncoder(nn.Module):
    """One linear map to the mean; the log variance is at its floor. Before training it gives 0.

    Files hold one of before LinearMirror, which needs none.
    """

    def __init__(self, config: LAEConfig, groups: TokenGroups, operations: Any) -> None:
        super().__init__()
        self.groups, self.latent = groups, (config.latent_tokens, config.latent_dim)
        self.mean_out = _map(operations, groups.numel, config)
        zero(self.mean_out)

    def forward(self, tokens: Tensor) -> Tensor:
        """Maps normalised tokens (B, T, L) to mean and log variance (B, K, 2 Dz)."""
        return certain_posterior(self.mean_out(self.groups.flatten(tokens)), self.latent)


class LinearMirror(nn.Module):
    """The linear decoder read backwards: its readings are the mean. It has no weights."""

    def __init__(self, config: LAEConfig) -> None:
        super().__init__()
        self.latent = config.latent_tokens, config.latent_dim

    def forward(self, readings: Tensor) -> Tensor:
        """Maps `LinearDecoder.readings` (B, K Dz) to mean and log variance (B, K, 2 Dz)."""
        return certain_posterior(readings, self.latent)


class LinearDecoder(nn.Module):
    """value = mean + scale * (z @ directions); the directions start at zero."""

    def __init__(self, config: LAEConfig, groups: TokenGroups, operations: Any) -> None:
        super().__init__()
        self.groups = groups
        self.directions = _map(operations, groups.numel, config, out=True)
        zero(self.directions)

    def forward(self, z: Tensor, statistics: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """Maps z (B, K, Dz) to raw values per group, (B, T_g, L_g)."""
        return self.groups.raw(self.directions(z.flatten(1)), statistics)

    def readings(self, tokens: Tensor, spread: Tensor) -> Tensor:
        """What a LoRA's difference from the mean holds of every direction, (B, K Dz).

        The directions of raw values are orthonormal after `fit_components`, so this is the nearest
        latent.

        Args:
            tokens: normalised, (B, T, L).
            spread: (P,) the scale by which every value was divided.
        """
        directions = self.directions.get_parameter("weight").to(tokens)  # P K*Dz
        spread = spread.to(tokens)
        return (self.groups.flatten(tokens) * spread) @ (directions * spread[:, None])


def _map(operations: Any, values: int, config: LAEConfig, out: bool = False) -> nn.Module:
    """Between all values and the latent, without a bias.

    Raises:
        ConfigError: it would not fit into memory.
    """
    latent = config.latent_tokens * config.latent_dim
    if values * latent > MOST_NUMBERS:
        raise ConfigError(
            f"A linear autoencoder from {values} numbers of a LoRA to {latent} is too large; take "
            "the kind structured, or a smaller latent."
        )
    sizes = (latent, values) if out else (values, latent)
    made: nn.Module = operations.Linear(*sizes, bias=False)
    return made
