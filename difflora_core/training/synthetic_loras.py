"""Synthetic LoRAs: a decoded latent plus what training leaves behind in real LoRAs (ours).

A trained LoRA is, roughly, the LoRA that the decoder draws for its person plus a fit to the few
pictures it saw. A corpus of a few hundred is too small to teach an encoder what to overlook; but
the latent of any photo plus the fit that any corpus LoRA shows makes a further example.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..models.lae import LoRAAutoencoder


class SyntheticLoRAs:
    """Draws tokens of LoRAs whose latent is known.

    Args:
        lae: decoder that says what a latent draws; it must not change afterwards.
        tokens: (M, T, L) raw tokens of a corpus.
        own: (M, K, Dz) latents of the same M people.
        latents: (P, K, Dz) latents to draw from.
    """

    def __init__(self, lae: LoRAAutoencoder, tokens: Tensor, own: Tensor, latents: Tensor) -> None:
        self.lae, self.latents = lae, latents
        with torch.no_grad():
            decoded = lae.decode(own)
        size = decoded.square().sum((1, 2)).clamp_min(torch.finfo(decoded.dtype).tiny)
        self.amplitude = (tokens * decoded).sum((1, 2)) / size  # M
        noise = tokens - self.amplitude[:, None, None] * decoded
        self.common = noise.mean(0)
        self.noise = noise - self.common

    @torch.no_grad()
    def __call__(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Makes `count` examples: tokens (count, T, L) and latents (count, K, Dz)."""

        def rows(n: int) -> Tensor:
            return torch.randint(n, (count,), generator=generator)

        z = self.latents[rows(len(self.latents))]
        amplitude = self.amplitude[rows(len(self.amplitude))][:, None, None]
        sign = 2.0 * rows(2)[:, None, None] - 1
        noise = self.common + sign * self.noise[rows(len(self.noise))]
        return amplitude * self.lae.decode(z) + noise, z
