"""DiT: the transformer that denoises LoRA latents (arXiv:2212.09748 with DiffLoRA's condition).

DiffLoRA (arXiv:2408.06740) states a 16-layer DiT whose condition enters through adaptive layer
norm and whose target is the clean latent. The paper's "1454-dimension" cannot be split into heads
(1454 = 2 * 727); taken as the width it needs an `inner_dim` of, say, 1536. Condition tokens in
front of the latent tokens are ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import Config, check_range
from ..errors import ConfigError
from .layers import (
    MLP,
    Attention,
    initialise,
    modulate,
    normal_parameter,
    plain_norm,
    timestep_embedding,
    zero,
)
from .mif import IdentityCondition

FREQUENCIES = 256  # features of the sinusoidal timestep embedding, as in DiT

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class DiTConfig(Config):
    """Sizes of the denoiser.

    Args:
        latent_tokens: K.
        latent_dim: Dz.
        condition_dim: D of the condition.
        condition_tokens: S, condition tokens in front of the latent tokens.
        width: features of a token inside.
        depth: blocks.
        heads: attention heads; must divide `inner_dim` (or `width`).
        inner_dim: features of all heads together; `width` unless given.
        mlp_ratio: hidden width of the block's MLP relative to `width`.
        condition_rank: r of `LowRankCondition` in every block; 0 leaves the condition to adaptive
            layer norm alone.

    Raises:
        ConfigError: a value out of range, or heads that do not divide.
    """

    latent_tokens: int = 8
    latent_dim: int = 16
    condition_dim: int = 192
    condition_tokens: int = 4
    width: int = 128
    depth: int = 4
    heads: int = 4
    inner_dim: int | None = None
    mlp_ratio: float = 4.0
    condition_rank: int = 0

    def __post_init__(self) -> None:
        for name in ("latent_tokens", "latent_dim", "condition_dim", "width"):
            check_range("DiT", name, getattr(self, name), 1, 16_384)
        check_range("DiT", "condition_tokens", self.condition_tokens, 0, 1024)
        check_range("DiT", "depth", self.depth, 1, 128)
        check_range("DiT", "heads", self.heads, 1, 256)
        check_range("DiT", "mlp_ratio", self.mlp_ratio, 0.5, 16)
        check_range("DiT", "condition_rank", self.condition_rank, 0, 256)
        inner = self.width if self.inner_dim is None else self.inner_dim
        check_range("DiT", "inner_dim", inner, 1, 16_384)
        if inner % self.heads:
            raise ConfigError(
                f"DiT: {inner} features cannot be split into {self.heads} heads; "
                "choose other heads or give inner_dim."
            )

    @classmethod
    def full_size(cls) -> Self:
        """The SDXL-scale denoiser: 16 layers, width 1024, 64 x 64 latent (difflora.md 5)."""
        return cls(
            latent_tokens=64,
            latent_dim=64,
            condition_dim=1024,
            condition_tokens=16,
            width=1024,
            depth=16,
            heads=16,
        )


class LowRankCondition(nn.Module):
    """A linear map of low rank whose factors the condition makes, beside a block's MLP.

    So the condition changes how tokens are mixed, where adaptive layer norm only scales and shifts
    them. After the conditioning of LoRA Diffusion (arXiv:2412.02352), whose code is not public. It
    adds nothing before training.
    """

    def __init__(self, config: DiTConfig, operations: Any = nn) -> None:
        super().__init__()
        self.shape = (config.condition_rank, config.width)
        self.down = operations.Linear(config.width, config.condition_rank * config.width)
        self.up = operations.Linear(config.width, config.condition_rank * config.width)

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        """Maps tokens h (B, N, D) under the condition c (B, D) to what is added to them."""
        down, up = (part(c).unflatten(-1, self.shape) for part in (self.down, self.up))  # B r D
        out: Tensor = h @ down.mT / self.shape[1] ** 0.5 @ up
        return out


class DiTBlock(nn.Module):
    """AdaLN-zero block (section 3.2 of arXiv:2212.09748); the identity before training.

    Args:
        config: sizes.
        operations: namespace of layer classes.
    """

    def __init__(self, config: DiTConfig, operations: Any = nn) -> None:
        super().__init__()
        d = config.width
        self.attention = Attention(d, config.heads, config.inner_dim, operations=operations)
        self.mlp = MLP((d, int(d * config.mlp_ratio), d), operations=operations)
        self.modulation = operations.Linear(d, 6 * d)
        self.low_rank = LowRankCondition(config, operations) if config.condition_rank else None

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        """Maps tokens h (B, S+K, D) under the condition c (B, D) to (B, S+K, D)."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(c).chunk(6, dim=-1)
        h = h + gate_a[:, None] * self.attention(modulate(plain_norm(h), shift_a, scale_a))
        seen = modulate(plain_norm(h), shift_m, scale_m)
        out: Tensor = h + gate_m[:, None] * self.mlp(seen)
        return out if self.low_rank is None else out + self.low_rank(seen, c)


class DiT(nn.Module):
    """Denoiser of normalised LoRA latents.

    Before training every block is the identity and the output is exactly zero. With x0-prediction
    zero is the mean latent, so an untrained DiT says "the average person".

    Args:
        config: sizes.
        operations: namespace of layer classes.
        generator: draws the initial weights.
    """

    def __init__(
        self, config: DiTConfig, operations: Any = nn, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.config = config
        d = config.width
        self.latent_in = operations.Linear(config.latent_dim, d)
        self.position = normal_parameter(config.latent_tokens, d, generator=generator)
        self.time = MLP((FREQUENCIES, d, d), operations=operations)
        self.condition_in = operations.Linear(config.condition_dim, d)
        self.null_pooled = normal_parameter(config.condition_dim, generator=generator)
        if config.condition_tokens:
            self.token_in = operations.Linear(config.condition_dim, d)
            self.null_tokens = normal_parameter(
                config.condition_tokens, config.condition_dim, generator=generator
            )
            self.token_position = normal_parameter(config.condition_tokens, d, generator=generator)
        self.blocks = nn.ModuleList(DiTBlock(config, operations) for _ in range(config.depth))
        self.final_modulation = operations.Linear(d, 2 * d)
        self.latent_out = operations.Linear(d, config.latent_dim)
        initialise(self, generator)
        for block in self.blocks:
            if isinstance(block, DiTBlock):
                zero(block.modulation)
                if block.low_rank is not None:
                    zero(block.low_rank.up)
        zero(self.final_modulation)
        zero(self.latent_out)

    def forward(
        self,
        z: Tensor,
        timestep: Tensor,
        condition: IdentityCondition | None = None,
        drop_mask: Tensor | None = None,
    ) -> Tensor:
        """Predicts from noisy latents.

        Args:
            z: (B, K, Dz) noisy latent, unit variance when clean.
            timestep: (B,) diffusion step.
            condition: B identities; None uses the learned null condition for all.
            drop_mask: (B,) bool, True rows use the null condition (classifier-free dropout).

        Returns:
            (B, K, Dz) prediction of the type the model was trained for.
        """
        pooled, tokens = self._condition(z, condition, drop_mask)  # B D', B S D'
        c = self.time(timestep_embedding(timestep, FREQUENCIES).to(z))  # B D
        c = F.silu(c + self.condition_in(pooled))  # B D
        h = self.latent_in(z) + self.position.to(z)  # B K D
        if self.config.condition_tokens:
            h = torch.cat([self.token_in(tokens) + self.token_position.to(z), h], dim=1)
        for block in self.blocks:
            h = block(h, c)  # B S+K D
        h = h[:, self.config.condition_tokens :]  # B K D
        shift, scale = self.final_modulation(c).chunk(2, dim=-1)
        out: Tensor = self.latent_out(modulate(plain_norm(h), shift, scale))  # B K Dz
        return out

    def _condition(
        self, z: Tensor, condition: IdentityCondition | None, drop_mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Pooled condition and tokens with the learned null in place of dropped rows."""
        batch, count = len(z), self.config.condition_tokens
        null_pooled = self.null_pooled.to(z).expand(batch, -1)
        null_tokens = z.new_zeros(batch, 0, self.config.condition_dim)
        if count:
            null_tokens = self.null_tokens.to(z).expand(batch, -1, -1)
        if condition is None:
            return null_pooled, null_tokens
        expected = (batch, count, self.config.condition_dim)
        if tuple(condition.tokens.shape) != expected:
            raise ConfigError(
                f"The identity condition has shape {tuple(condition.tokens.shape)}; "
                f"this denoiser expects {expected}."
            )
        if drop_mask is None:
            return condition.pooled, condition.tokens
        drop = drop_mask.bool().to(z.device)
        return (
            torch.where(drop[:, None], null_pooled, condition.pooled),
            torch.where(drop[:, None, None], null_tokens, condition.tokens),
        )
