"""How well latents agree with photos, by the DiT alone: no picture is drawn.

Ours, after the diffusion classifier (arXiv:2303.16203): a latent is noised at several levels and
the DiT restores it twice, with the photos' condition and without one. The more the condition helps,
the more the latent is that person and not just any plausible one. The two errors share their noise,
and all latents of a batch too, so that only the latents make a difference.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..diffusion.objective import NoiseSchedule, abar_at, add_noise, to_x0
from .dit import DiT
from .mif import IdentityCondition

LEVELS = 8


@torch.no_grad()
def condition_gain(
    dit: DiT,
    schedule: NoiseSchedule,
    z: Tensor,
    condition: IdentityCondition,
    generator: torch.Generator,
) -> Tensor:
    """Mean squared error of restoring z that the condition saves, per value.

    Args:
        dit: the denoiser.
        schedule: its noise.
        z: (B, K, Dz) normalised latents.
        condition: B identities.
        generator: on the CPU, draws the noise.

    Returns:
        (B,); above 0 when the condition helps.
    """
    abars = schedule.scheduler().alphas_cumprod
    gain = z.new_zeros(len(z))
    for level in range(LEVELS):
        step = int((level + 0.5) / LEVELS * schedule.train_steps)
        timestep = torch.full((len(z),), step, device=z.device)
        noise = torch.randn(z.shape[1:], generator=generator).to(z).expand_as(z)
        abar = abar_at(abars, timestep, z)
        noisy = add_noise(z, noise, abar)
        errors = []
        for given in (None, condition):
            said = dit(noisy, timestep.float(), given)
            restored = to_x0(said, noisy, abar, schedule.prediction)
            errors.append((restored - z).square().mean((1, 2)))
        gain += (errors[0] - errors[1]) / LEVELS
    return gain
