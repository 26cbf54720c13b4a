"""Structured LAE: one token per LoRA matrix, a transformer encoder, a basis decoder (ours).

The decoder follows HyperLoRA (arXiv:2503.16944): every factor is a mean plus a combination of
learned basis vectors of its own layer. It is one batched product, so it can sit inside a training
loop that runs the base model.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Generator, Tensor, nn

from ..layers import (
    MLP,
    TransformerBlock,
    certain_posterior,
    initialise,
    normal_parameter,
    zero,
)
from .config import LAEConfig
from .tokens import TokenGroups


class StructuredEncoder(nn.Module):
    """Tokens with layer and role embeddings, a transformer, learned queries that pool."""

    def __init__(
        self, config: LAEConfig, groups: TokenGroups, operations: Any, generator: Generator | None
    ) -> None:
        super().__init__()
        self.groups = groups
        d = config.width
        self.value_in = nn.ModuleList(operations.Linear(n, d) for n in groups.lengths)
        names = [shape.name for shape in groups.layout.layers]
        roles = sorted({slot.role for slot in groups.slots})
        order = [t for n in groups.lengths for t in groups.members[n]]
        self.layer_rows = [names.index(groups.slots[t].layer) for t in order]
        self.role_rows = [roles.index(groups.slots[t].role) for t in order]
        self.layer_embedding = normal_parameter(len(names), d, generator=generator)
        self.role_embedding = normal_parameter(len(roles), d, generator=generator)
        self.blocks = nn.ModuleList(
            TransformerBlock(d, config.heads, operations=operations) for _ in range(config.depth)
        )
        self.queries = normal_parameter(config.latent_tokens, d, std=1.0, generator=generator)
        self.pool = TransformerBlock(d, config.heads, operations=operations)
        self.norm = operations.LayerNorm(d)
        self.latent_out = operations.Linear(d, 2 * config.latent_dim)
        initialise(self, generator)

    def forward(self, tokens: Tensor) -> Tensor:
        """Maps normalised tokens (B, T, L) to mean and log variance (B, K, 2 Dz)."""
        parts = zip(self.value_in, self.groups.split(tokens), strict=True)
        h = torch.cat([layer(values) for layer, values in parts], dim=1)  # B T D
        h = h + self.layer_embedding[self.layer_rows].to(h)  # T D, the same for all LoRAs
        h = h + self.role_embedding[self.role_rows].to(h)
        for block in self.blocks:
            h = block(h)  # B T D
        latent = self.pool(self.queries.to(h).expand(len(h), -1, -1), h)  # B K D
        out: Tensor = self.latent_out(self.norm(latent))  # B K 2Dz
        return out


TOKENS_AT_ONCE = 64
"""Tokens whose scaled basis is in memory together: at SDXL's size all of them would take 2.5 GB."""


class StructuredDecoder(nn.Module):
    """value = mean + scale * (offset + coefficients(z) @ basis), one basis per token.

    Basis and offset start at zero and the coefficients do not: before training the value is the
    stored mean, yet basis and offset receive a gradient at the first step.
    """

    def __init__(
        self, config: LAEConfig, groups: TokenGroups, operations: Any, generator: Generator | None
    ) -> None:
        super().__init__()
        self.groups, self.basis_size = groups, config.basis_size
        d = config.decoder_width
        self.latent_in = operations.Linear(config.latent_tokens * config.latent_dim, d)
        self.blocks = nn.ModuleList(
            MLP((d, 2 * d, d), norm=True, operations=operations)
            for _ in range(config.decoder_depth)
        )
        self.coefficients = operations.Linear(d, len(groups.slots) * config.basis_size)
        self.basis, self.offset = nn.ParameterDict(), nn.ParameterDict()
        for n in groups.lengths:
            count = len(groups.members[n])
            self.basis[str(n)] = nn.Parameter(torch.zeros(count, config.basis_size, n))
            self.offset[str(n)] = nn.Parameter(torch.zeros(count, n))
        initialise(self, generator)
        for block in self.blocks:
            if isinstance(block, MLP):
                zero(block.down)
        weight = self.coefficients.weight
        if weight is not None and not weight.is_meta:
            nn.init.normal_(weight, 0.0, 1.0 / math.sqrt(d), generator=generator)

    def forward(self, z: Tensor, statistics: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """Maps z (B, K, Dz) to raw values per group, (B, T_g, L_g)."""
        h = self.latent_in(z.flatten(1))  # B D
        for block in self.blocks:
            h = h + block(h)  # B D
        mix = self.coefficients(h).unflatten(-1, (-1, self.basis_size))  # B T Kb
        mix = mix.transpose(0, 1) / math.sqrt(self.basis_size)  # T B Kb
        out, first = [], 0
        for n, (mean, scale) in zip(self.groups.lengths, statistics, strict=True):
            count = len(self.groups.members[n])
            centre = mean + scale * self.offset[str(n)].to(z)  # T_g L_g
            own = mix[first : first + count]  # T_g B Kb
            values = []
            for start in range(0, count, TOKENS_AT_ONCE):
                rows = slice(start, start + TOKENS_AT_ONCE)
                basis = scale[rows, :, None] * self.basis[str(n)][rows].to(z)  # T Kb L_g
                values.append(torch.baddbmm(centre[rows, None], own[rows], basis))  # T B L_g
            out.append(torch.cat(values).transpose(0, 1))  # B T_g L_g
            first += count
        return out

    def readings(self, tokens: Tensor) -> Tensor:
        """Inner products of normalised tokens (B, T, L) with the basis, (B, T*Kb), without offset.

        The adjoint of `forward`'s last product, up to the factor 1 / sqrt(Kb).
        """
        parts = []
        for n, values in zip(self.groups.lengths, self.groups.split(tokens), strict=True):
            rest = values - self.offset[str(n)].to(values)  # B T_g L_g
            parts.append(torch.einsum("btn,tkn->btk", rest, self.basis[str(n)].to(values)))
        return torch.cat(parts, dim=1).flatten(1)


class MirrorEncoder(nn.Module):
    """The structured decoder read backwards: readings of its basis to mean and log variance (ours).

    What a LoRA holds of every basis vector of the decoder, then one linear map to the latent. Being
    linear it can be fitted in closed form, and a corpus of a few hundred LoRAs suffices, where the
    transformer encoder learns them by heart.

    Before training the mean is 0 and the log variance is at its floor, whatever the LoRA: no number
    is drawn.
    """

    def __init__(self, config: LAEConfig, groups: TokenGroups, operations: Any) -> None:
        super().__init__()
        self.latent_tokens, self.latent_dim = config.latent_tokens, config.latent_dim
        rows = len(groups.slots) * config.basis_size
        self.mean_out = operations.Linear(rows, config.latent_tokens * config.latent_dim)
        zero(self.mean_out)

    def forward(self, readings: Tensor) -> Tensor:
        """Maps readings (B, T*Kb) to mean and log variance (B, K, 2 Dz)."""
        return certain_posterior(self.mean_out(readings), (self.latent_tokens, self.latent_dim))
