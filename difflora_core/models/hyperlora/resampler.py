"""The resampler of HyperLoRA: learned queries read a face and a picture, and mix basis matrices.

Source: arXiv:2503.16944, section 3. Modules have the names of the public weights, which are read
without a conversion.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import HyperLoRAConfig


class FaceProjector(nn.ModuleDict):
    """A face embedding to tokens: one linear layer, cut into tokens, normalised.

    Args:
        config: sizes.
        operations: namespace of layer classes.
    """

    def __init__(self, config: HyperLoRAConfig, operations: Any = nn) -> None:
        features = config.face_tokens * config.image_dim
        linear = operations.Linear(config.face_dim, features)
        super().__init__({"0": linear, "2": operations.LayerNorm(config.image_dim)})
        self.tokens = config.face_tokens

    def forward(self, face: Tensor) -> Tensor:
        """Maps unit vectors (B, face_dim) to tokens (B, face_tokens, image_dim)."""
        tokens: Tensor = self["2"](self["0"](face).unflatten(-1, (self.tokens, -1)))
        return tokens


class _Attention(nn.Module):
    """Multi-head attention without biases."""

    def __init__(self, config: HyperLoRAConfig, operations: Any) -> None:
        super().__init__()
        self.heads, inner = config.heads, config.heads * config.head_dim

        def linear(inputs: int, outputs: int) -> nn.Module:
            layer: nn.Module = operations.Linear(inputs, outputs, bias=False)
            return layer

        self.to_q, self.to_k, self.to_v = (linear(config.width, inner) for _ in range(3))
        self.to_out = nn.ModuleList([linear(inner, config.width)])

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """From x (B, T, D) to context (B, S, D)."""
        projected = (self.to_q(x), self.to_k(context), self.to_v(context))
        q, k, v = (p.unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in projected)  # B h . d
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)  # B T h*d
        out: Tensor = self.to_out[0](mixed)
        return out


class _FeedForward(nn.Module):
    """Linear, exact GELU, linear; the names are those of diffusers' module."""

    def __init__(self, width: int, operations: Any) -> None:
        super().__init__()
        first = nn.ModuleDict({"proj": operations.Linear(width, 4 * width)})
        self.net = nn.ModuleList([first, nn.Identity(), operations.Linear(4 * width, width)])

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., D) to (..., D)."""
        out: Tensor = self.net[2](F.gelu(self.net[0]["proj"](x)))  # type: ignore[index]
        return out


class _Layer(nn.Module):
    """The queries read themselves, the face and the picture, each with a residual."""

    def __init__(self, config: HyperLoRAConfig, operations: Any) -> None:
        super().__init__()
        self.norm_attn1 = operations.LayerNorm(config.width)
        self.norm_attn2_l = operations.LayerNorm(config.width)
        self.norm_attn2_x = operations.LayerNorm(config.width)
        self.norm_attn3_l = operations.LayerNorm(config.width)
        self.norm_attn3_y = operations.LayerNorm(config.width)
        self.norm_ff = operations.LayerNorm(config.width)
        self.attn1 = _Attention(config, operations)
        self.attn2 = _Attention(config, operations)
        self.attn3 = _Attention(config, operations)
        self.ff = _FeedForward(config.width, operations)

    def forward(self, x: Tensor, face: Tensor | None, image: Tensor, gate: Tensor) -> Tensor:
        """Maps queries x (B, T, D); face (B, F, D) or None, image (B, L, D), gate (B, 2)."""
        own = self.norm_attn1(x)  # B T D
        x = x + self.attn1(own, own)  # B T D
        if face is not None:
            read = self.attn2(self.norm_attn2_l(x), self.norm_attn2_x(face))  # B T D
            x = x + gate[:, :1, None] * read
        read = self.attn3(self.norm_attn3_l(x), self.norm_attn3_y(image))  # B T D
        x = x + gate[:, 1:, None] * read
        out: Tensor = x + self.ff(self.norm_ff(x))
        return out


class Resampler(nn.Module):
    """Face tokens and image tokens of a photo to coefficients of the basis.

    Args:
        config: sizes.
        latent_tokens: T, one for each LoRA factor.
        operations: namespace of layer classes.
    """

    def __init__(self, config: HyperLoRAConfig, latent_tokens: int, operations: Any = nn) -> None:
        super().__init__()
        width = config.width
        self.latents = nn.Parameter(torch.zeros(1, latent_tokens, width))
        self.proj_in = operations.Linear(config.image_dim, width)
        self.proj_in_2 = operations.Linear(config.image_dim, width)
        self.layers = nn.ModuleList(_Layer(config, operations) for _ in range(config.depth))
        self.proj_out = operations.Linear(width, config.basis_size)

    def forward(self, face: Tensor | None, image: Tensor, gate: Tensor) -> Tensor:
        """Coefficients (B, T, basis_size), not normalised.

        Args:
            face: (B, face_tokens, image_dim), or None where there is no face.
            image: (B, L, image_dim) penultimate states of CLIP vision, class token first.
            gate: (B, 2) factors on what is read of the face and of the picture; 1 as trained.
        """
        x = self.latents.to(image).expand(len(image), -1, -1)  # B T D
        face = None if face is None else self.proj_in(face)  # B F D
        image = self.proj_in_2(image)  # B L D
        for layer in self.layers:
            x = layer(x, face, image, gate)
        out: Tensor = self.proj_out(x)  # B T Kb
        return out
