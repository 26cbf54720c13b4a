"""Guided sampling over a diffusers scheduler, with one random generator per sample."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..config import Config
from ..errors import ConfigError
from .objective import Solver

MAX_SEED = 2**64 - 1
StepCallback = Callable[[int, int, Tensor], None]


class Denoiser(Protocol):
    """A network bound to its condition."""

    def __call__(self, z: Tensor, timestep: Tensor, conditional: bool) -> Tensor:
        """Predicts for z (B, ...) at timestep (B,), with the condition or with the null one."""
        ...


@dataclass(frozen=True)
class SampleSettings(Config):
    """Settings of one sampling run.

    Args:
        steps: solver steps, 1 or more.
        guidance_scale: 1 follows the condition, above 1 exaggerates it, 0 ignores it
            (classifier-free guidance, Eq. 6 of arXiv:2207.12598 in the w+1 convention).
        strength: how far back into the noise an initial latent goes (SDEdit, arXiv:2108.01073):
            0 leaves it, 1 forgets it and starts from noise alone.
        solver: of a model that brings its own noise schedule, see `NoiseSchedule.solver`; the same
            seed gives another result under another solver. `sample` itself is given a scheduler.

    Raises:
        ConfigError: a value is out of range.
    """

    steps: int = 20
    guidance_scale: float = 1.0
    strength: float = 1.0
    solver: Solver = "ddim"

    def __post_init__(self) -> None:
        self.check_choices("Sampling")
        if self.steps < 1:
            raise ConfigError(f"Sampling needs at least 1 step; got {self.steps}.")
        if not 0.0 <= self.guidance_scale <= 100.0:
            raise ConfigError(f"Guidance must lie in 0 to 100; got {self.guidance_scale}.")
        if not 0.0 <= self.strength <= 1.0:
            raise ConfigError(f"The strength of the noise must lie in 0 to 1; got {self.strength}.")

    def spaced(self, train_steps: int) -> tuple[int, int]:
        """Steps from pure noise to set, and how many of the last of them to take."""
        if self.strength == 1.0:
            return self.steps, self.steps
        total = min(train_steps, math.ceil(self.steps / max(self.strength, 1e-6)))
        return total, min(self.steps, round(total * self.strength))


def seeded_generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """Makes one CPU generator per sample, so that batch size and device never alter a result.

    Args:
        seeds: one integer per sample, 0 to 2**64 - 1.

    Raises:
        ConfigError: no seed at all, or one out of range.
    """
    if len(seeds) == 0:
        raise ConfigError("Sampling needs at least one seed; the list is empty.")
    for seed in seeds:
        if not 0 <= int(seed) <= MAX_SEED:
            raise ConfigError(f"Seed {seed} is outside the range 0 to {MAX_SEED}.")
    return [torch.Generator(device="cpu").manual_seed(int(seed)) for seed in seeds]


def initial_noise(generators: Sequence[torch.Generator], shape: Sequence[int]) -> Tensor:
    """Draws standard normal noise (B, *shape) float32 on the CPU, row i from generator i."""
    return torch.stack([torch.randn(tuple(shape), generator=g) for g in generators])


def guided(denoiser: Denoiser, z: Tensor, timestep: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance: null + scale (conditional - null); scale 1 and 0 need one call.

    Eq. 6 of arXiv:2207.12598 in the w+1 convention.

    Args:
        denoiser: network bound to its condition.
        z: (B, ...) noisy samples.
        timestep: (B,) their noise levels.
        scale: any number; see `SampleSettings.guidance_scale`.

    Returns:
        The prediction (B, ...), of the denoiser's own type.
    """
    if scale == 1.0:
        return denoiser(z, timestep, True)
    null = denoiser(z, timestep, False)
    if scale == 0.0:
        return null
    return null + scale * (denoiser(z, timestep, True) - null)


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    noise: Tensor,
    scheduler: Any,
    settings: SampleSettings,
    *,
    generators: Sequence[torch.Generator] | None = None,
    callback: StepCallback | None = None,
    initial: Tensor | None = None,
) -> Tensor:
    """Denoises a batch with a diffusers scheduler (DDIM, arXiv:2010.02502, or any with `step`).

    Args:
        denoiser: network bound to its condition; its prediction type is the scheduler's.
        noise: (B, ...) standard normal start, on the device to work on.
        scheduler: a diffusers scheduler; its timesteps are set here.
        settings: steps and guidance.
        generators: per-sample CPU generators for schedulers that add noise on the way.
        callback: called as `callback(step, total, z)` after each step, step from 1; what it raises
            passes through, which is how a host interrupts.
        initial: (B, ...) clean latents to vary, for a strength below 1.

    Returns:
        (B, ...) sampled latents.

    Raises:
        ConfigError: a strength below 1 without initial latents.
    """
    total, count = settings.spaced(scheduler.config.num_train_timesteps)
    scheduler.set_timesteps(total)
    timesteps = scheduler.timesteps[total - count :]
    if settings.strength == 1.0:
        z = noise * float(getattr(scheduler, "init_noise_sigma", 1.0))
    elif initial is None:
        raise ConfigError("A strength below 1 needs a latent to vary.")
    elif count == 0:
        return initial
    else:
        z = scheduler.add_noise(initial, noise, timesteps[:1].expand(len(noise)))
    takes_generator = "generator" in inspect.signature(scheduler.step).parameters
    extra = {"generator": list(generators)} if takes_generator and generators else {}
    for index, step in enumerate(timesteps):
        seen = scheduler.scale_model_input(z, step)
        timestep = torch.full((z.shape[0],), float(step), device=z.device)
        prediction = guided(denoiser, seen, timestep, settings.guidance_scale)
        z = scheduler.step(prediction, step, z, **extra).prev_sample
        if callback is not None:
            callback(index + 1, len(timesteps), z)
    return z
