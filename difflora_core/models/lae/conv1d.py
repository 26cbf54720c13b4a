"""Conv1d LAE: the paper's 1-D convolutions over the concatenated LoRA vector.

DiffLoRA (arXiv:2408.06740) says only that 1-D convolutions do the compression. Pairs of a
stride-1 and a stride-fold convolution follow its likely ancestor p-diff (arXiv:2402.13144); its
instance norms are left out, because they erase the amplitude of a LoRA (ours).
"""

from __future__ import annotations

import math
from typing import Any

import torch.nn.functional as F
from torch import Generator, Tensor, nn

from ..layers import initialise, zero
from .config import LAEConfig
from .tokens import TokenGroups

KERNEL = 5  # of the stride-1 convolutions, as in p-diff's medium network
SLOPE = 0.2


def strides(values: int, latent_tokens: int, fold: int) -> list[int]:
    """Strides whose product times K covers the vector; the last one takes what is left.

    Args:
        values: length P of the vector.
        latent_tokens: K, length after the last convolution.
        fold: stride of every level but the last.
    """
    need = max(2, math.ceil(values / latent_tokens))
    levels = []
    while need > fold:
        levels.append(fold)
        need = math.ceil(need / fold)
    return [*levels, max(need, 1)]


class Conv1dEncoder(nn.Module):
    """Folds the vector level by level until K positions with 2 Dz channels remain."""

    def __init__(
        self, config: LAEConfig, groups: TokenGroups, operations: Any, generator: Generator | None
    ) -> None:
        super().__init__()
        self.groups, c = groups, config.conv_channels
        folds = strides(groups.numel, config.latent_tokens, config.conv_fold)
        self.padded = config.latent_tokens * math.prod(folds)
        self.mix, self.fold = nn.ModuleList(), nn.ModuleList()
        for level, fold in enumerate(folds):
            last = level == len(folds) - 1
            self.mix.append(operations.Conv1d(c if level else 1, c, KERNEL, padding=KERNEL // 2))
            self.fold.append(
                operations.Conv1d(c, 2 * config.latent_dim if last else c, fold, stride=fold)
            )
        initialise(self, generator)

    def forward(self, tokens: Tensor) -> Tensor:
        """Maps normalised tokens (B, T, L) to mean and log variance (B, K, 2 Dz)."""
        x = self.groups.flatten(tokens)  # B P
        x = F.pad(x, (0, self.padded - x.shape[1]))[:, None]  # B 1 P'
        for level, (mix, fold) in enumerate(zip(self.mix, self.fold, strict=True)):
            x = mix(x if level == 0 else F.leaky_relu(x, SLOPE))  # B C P'
            x = fold(F.leaky_relu(x, SLOPE))  # B C P'/fold
        return x.transpose(1, 2)  # B K 2Dz


class Conv1dDecoder(nn.Module):
    """Mirror of the encoder; its last convolution starts at zero, so delta W starts at the mean."""

    def __init__(
        self, config: LAEConfig, groups: TokenGroups, operations: Any, generator: Generator | None
    ) -> None:
        super().__init__()
        self.groups, c = groups, config.conv_channels
        folds = strides(groups.numel, config.latent_tokens, config.conv_fold)[::-1]
        self.unfold, self.mix = nn.ModuleList(), nn.ModuleList()
        for level, fold in enumerate(folds):
            last = level == len(folds) - 1
            self.unfold.append(
                operations.ConvTranspose1d(c if level else config.latent_dim, c, fold, stride=fold)
            )
            self.mix.append(operations.Conv1d(c, 1 if last else c, KERNEL, padding=KERNEL // 2))
        initialise(self, generator)
        zero(self.mix[-1])

    def forward(self, z: Tensor, statistics: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """Maps z (B, K, Dz) to raw values per group, (B, T_g, L_g)."""
        x = z.transpose(1, 2)  # B Dz K
        for level, (unfold, mix) in enumerate(zip(self.unfold, self.mix, strict=True)):
            x = unfold(x if level == 0 else F.leaky_relu(x, SLOPE))  # B C K*fold
            x = mix(F.leaky_relu(x, SLOPE))  # the same; B 1 P' at the last
        return self.groups.raw(x[:, 0, : self.groups.numel], statistics)
