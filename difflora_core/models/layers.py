"""Layers shared by the networks: attention, MLP, timestep embedding, modulation, initialisation.

`operations` is any namespace with Linear, LayerNorm, Embedding, Conv1d and ConvTranspose1d:
`torch.nn` by default, or a host's variants that cast weights on the fly. Bare parameters are cast
to their input where they are used, so that both work.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

EMBEDDING_STD = 0.02  # learned positions and queries, as in DiT and ViT
LOG_VARIANCE_FLOOR = -20.0  # of an autoencoder whose encoder draws no number
_DRAWS = frozenset(("uniform_", "normal_", "bernoulli_", "rand", "randn", "randint", "randperm"))


def initialise(module: nn.Module, generator: torch.Generator | None) -> None:
    """Fills every linear and convolution weight: Xavier uniform, biases zero (DiT, models.py).

    Drawing again from `generator` is what makes a network reproducible without global seeding.
    Parameters on the meta device and layers that a host fills later are left alone.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv1d | nn.ConvTranspose1d):
            if layer.weight is None or layer.weight.is_meta:
                continue
            nn.init.xavier_uniform_(layer.weight, generator=generator)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


class DrawnFrom(TorchFunctionMode):
    """While active, what draws from torch's global random state draws from `generator` instead.

    For the constructors of other libraries, which take no generator: the weights are those that
    seeding the global state would give, and that state stays as it was.

    Args:
        generator: on the CPU, where modules are built.
    """

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.generator = generator

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls `func` with the generator where it draws numbers and was given none."""
        kwargs = dict(kwargs or {})
        draws = getattr(func, "__name__", "") in _DRAWS or "generator" in kwargs
        if draws and kwargs.get("generator") is None:
            kwargs["generator"] = self.generator
        return func(*args, **kwargs)


def zero(layer: nn.Module) -> None:
    """Zeroes a layer, so that the branch it ends computes nothing at initialisation."""
    for name in ("weight", "bias"):
        value = getattr(layer, name, None)
        if value is not None and not value.is_meta:
            nn.init.zeros_(value)


def certain_posterior(mean: Tensor, latent: tuple[int, int]) -> Tensor:
    """Means (B, K Dz) beside a log variance at its floor, for a latent of (K, Dz): (B, K, 2 Dz)."""
    mean = mean.unflatten(-1, latent)
    return torch.cat([mean, torch.full_like(mean, LOG_VARIANCE_FLOOR)], dim=-1)


def normal_parameter(
    *shape: int, std: float = EMBEDDING_STD, generator: torch.Generator | None = None
) -> nn.Parameter:
    """Makes a learned tensor drawn from N(0, std^2); on the meta device nothing is drawn."""
    value = torch.empty(*shape)
    if not value.is_meta:
        value.normal_(0.0, std, generator=generator)
    return nn.Parameter(value)


def timestep_embedding(timestep: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """Sinusoidal embedding of diffusion timesteps (section 3.5 of arXiv:1706.03762).

    Args:
        timestep: (B,) any real numbers.
        dim: even number of features.
        max_period: longest wavelength in steps.

    Returns:
        (B, dim) float32: cosines, then sines.
    """
    half = dim // 2
    order = torch.arange(half, dtype=torch.float32, device=timestep.device)
    angle = timestep.float()[:, None] * torch.exp(-math.log(max_period) * order / half)
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Adaptive layer norm's affine part: x (B, K, D) with shift and scale (B, D)."""
    return x * (1.0 + scale[:, None]) + shift[:, None]


def plain_norm(x: Tensor) -> Tensor:
    """Layer norm over the last dimension of (..., D), without learned parameters."""
    return F.layer_norm(x, (x.shape[-1],), eps=1e-6)


class MLP(nn.Module):
    """Linear, SiLU, Linear; optionally a layer norm first (difflora.md section 4's expert).

    Args:
        sizes: (input, hidden, output) features.
        norm: start with a layer norm.
        operations: namespace of layer classes.
    """

    def __init__(
        self, sizes: tuple[int, int, int], norm: bool = False, operations: Any = nn
    ) -> None:
        super().__init__()
        self.norm = operations.LayerNorm(sizes[0]) if norm else nn.Identity()
        self.up = operations.Linear(sizes[0], sizes[1])
        self.down = operations.Linear(sizes[1], sizes[2])

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., input) to (..., output)."""
        out: Tensor = self.down(F.silu(self.up(self.norm(x))))
        return out


class Attention(nn.Module):
    """Multi-head attention, to itself or to a context (arXiv:1706.03762).

    Args:
        width: features of the input and the output.
        heads: number of heads; must divide `inner_dim`.
        inner_dim: features of the heads together; `width` unless given. It lets a width that
            cannot be split (1454) be used.
        context_dim: features of the context; `width` unless given.
        operations: namespace of layer classes.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        inner_dim: int | None = None,
        context_dim: int | None = None,
        operations: Any = nn,
    ) -> None:
        super().__init__()
        inner = inner_dim or width
        self.heads = heads
        self.to_q = operations.Linear(width, inner)
        self.to_kv = operations.Linear(context_dim or width, 2 * inner)
        self.to_out = operations.Linear(inner, width)

    def forward(
        self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Attends from x (B, T, D) to context (B, S, C); mask (B, S) is True where visible."""
        q = self.to_q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # B h T d
        k, v = self.to_kv(x if context is None else context).chunk(2, dim=-1)
        k = k.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # B h S d
        v = v.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # B h S d
        visible = None if mask is None else mask[:, None, None, :]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)  # B h T d
        mixed: Tensor = self.to_out(out.transpose(1, 2).flatten(-2))  # B T D
        return mixed


class TransformerBlock(nn.Module):
    """Pre-norm attention and MLP with residuals; with a context it attends to that instead.

    Args:
        width: features.
        heads: attention heads.
        mlp_ratio: hidden width of the MLP relative to `width`.
        operations: namespace of layer classes.
    """

    def __init__(
        self, width: int, heads: int, mlp_ratio: float = 2.0, operations: Any = nn
    ) -> None:
        super().__init__()
        self.norm = operations.LayerNorm(width)
        self.attention = Attention(width, heads, operations=operations)
        self.mlp = MLP((width, int(width * mlp_ratio), width), norm=True, operations=operations)

    def forward(
        self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Maps (B, T, D) to (B, T, D)."""
        x = x + self.attention(self.norm(x), context, mask)
        out: Tensor = x + self.mlp(x)
        return out
