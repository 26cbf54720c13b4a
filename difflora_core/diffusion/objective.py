"""Prediction targets, their conversions and loss weights, for any diffusers noise schedule.

One forward process is used everywhere: `noisy = alpha * clean + sigma * noise` with
`alpha = sqrt(abar)`, `sigma = sqrt(1 - abar)` (Eq. 4 of arXiv:2006.11239); `abar` is an entry of a
scheduler's `alphas_cumprod`. Prediction names are diffusers' own: `epsilon` (the noise),
`sample` (x0, the clean latent) and `v_prediction` (Eq. 10 of arXiv:2202.00512).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from ..config import Config
from ..errors import ConfigError, counted

if TYPE_CHECKING:
    from diffusers import DDIMScheduler, SchedulerMixin

Prediction = Literal["epsilon", "sample", "v_prediction"]
LossWeight = Literal["uniform", "min_snr", "high_noise"]
Solver = Literal["ddim", "second_order"]

MIN_SNR_GAMMA = 5.0  # arXiv:2303.09556, section 4
HIGH_NOISE_CAP = 20.0  # ours: identity is drawn at high noise; the cap keeps the variance finite
TINY = 1e-12


@dataclass(frozen=True)
class NoiseSchedule(Config):
    """How latents are noised and what the network predicts (ours; names as in diffusers).

    Args:
        train_steps: number of discrete timesteps, 2 to 10000.
        beta_schedule: diffusers' name; `squaredcos_cap_v2` is the cosine schedule.
        prediction: what the network returns; the paper predicts the clean latent (`sample`).

    Raises:
        ConfigError: a value is outside its range or unknown.
    """

    train_steps: int = 1000
    beta_schedule: str = "squaredcos_cap_v2"
    prediction: str = "sample"

    def __post_init__(self) -> None:
        if not 2 <= self.train_steps <= 10_000:
            raise ConfigError(
                f"The noise schedule has {counted(self.train_steps, 'step')}; it needs 2 to 10000."
            )
        known = ("linear", "scaled_linear", "squaredcos_cap_v2")
        if self.beta_schedule not in known:
            raise ConfigError(
                f"Unknown noise schedule {self.beta_schedule!r}; use one of {', '.join(known)}."
            )
        check_prediction(self.prediction)

    def scheduler(self) -> DDIMScheduler:
        """Builds the DDIM scheduler (arXiv:2010.02502) both training and sampling use.

        Trailing spacing starts at the noisiest step and no value is clipped, because LoRA latents
        are not pictures in [-1, 1].
        """
        from diffusers import DDIMScheduler

        return DDIMScheduler(
            num_train_timesteps=self.train_steps,
            beta_schedule=self.beta_schedule,
            prediction_type=self.prediction,
            clip_sample=False,
            timestep_spacing="trailing",
        )

    def solver(self, kind: Solver = "ddim") -> SchedulerMixin:
        """Builds the scheduler that samples.

        DDIM is of first order: of 20 steps its samples spread 6 to 16 % less than the data
        (Gaussians of deviation 1 to 0.2). `second_order` is DPM-Solver++(2M) (arXiv:2211.01095),
        whose samples spread 0 to 8 % less for the same number of steps.

        Raises:
            ConfigError: there is no such solver.
        """
        if kind == "ddim":
            return self.scheduler()
        if kind not in get_args(Solver):
            known = ", ".join(get_args(Solver))
            raise ConfigError(f"Unknown solver {kind!r}; use one of {known}.")
        from diffusers import DPMSolverMultistepScheduler

        return DPMSolverMultistepScheduler(
            num_train_timesteps=self.train_steps,
            beta_schedule=self.beta_schedule,
            prediction_type=self.prediction,
            solver_order=2,
            solver_type="heun",
            timestep_spacing="trailing",
        )


def check_prediction(kind: str) -> None:
    """Raises ConfigError unless `kind` is a known prediction type."""
    if kind not in get_args(Prediction):
        raise ConfigError(
            f"Unknown prediction type {kind!r}; use one of {', '.join(get_args(Prediction))}."
        )


def abar_at(alphas_cumprod: Tensor, timestep: Tensor, like: Tensor) -> Tensor:
    """Picks `abar` for each sample, shaped to broadcast against `like`.

    Args:
        alphas_cumprod: (train_steps,) from a diffusers scheduler, values in [0, 1].
        timestep: (B,) integer steps.
        like: (B, ...) tensor whose device, dtype and number of dimensions the result takes.

    Returns:
        (B, 1, ..., 1).
    """
    abar = alphas_cumprod.to(timestep.device)[timestep.long()]
    return abar.to(device=like.device, dtype=like.dtype).reshape(-1, *([1] * (like.ndim - 1)))


def add_noise(clean: Tensor, noise: Tensor, abar: Tensor) -> Tensor:
    """Noises a clean latent: Eq. 4 of arXiv:2006.11239; all shapes (B, ...) broadcastable."""
    return abar.sqrt() * clean + (1.0 - abar).sqrt() * noise


def to_x0(prediction: Tensor, noisy: Tensor, abar: Tensor, kind: str) -> Tensor:
    """Converts any prediction to the clean latent x0.

    Source: x0 = (z - sigma eps)/alpha (Eq. 9 of arXiv:2010.02502); x0 = alpha z - sigma v
    (appendix D of arXiv:2202.00512).

    Args:
        prediction: (B, ...) what the network returned.
        noisy: (B, ...) the noisy latent it saw.
        abar: broadcastable to (B, ...), in [0, 1]; for `epsilon` it must not be 0.
        kind: prediction type.

    Returns:
        (B, ...) clean latent.
    """
    check_prediction(kind)
    if kind == "sample":
        return prediction
    if kind == "v_prediction":
        return abar.sqrt() * noisy - (1.0 - abar).sqrt() * prediction
    return (noisy - (1.0 - abar).sqrt() * prediction) / abar.sqrt().clamp_min(TINY)


def training_target(clean: Tensor, noise: Tensor, abar: Tensor, kind: str) -> Tensor:
    """Returns what a network of this prediction type should output; (B, ...)."""
    check_prediction(kind)
    if kind == "epsilon":
        return noise
    if kind == "sample":
        return clean
    return abar.sqrt() * noise - (1.0 - abar).sqrt() * clean


def loss_weight(kind: str, abar: Tensor, prediction: str = "epsilon") -> Tensor:
    """Weight of one sample's squared error, given in the space the network predicts.

    Errors convert by eps = alpha v and eps = (alpha/sigma) x0, so one definition serves all three:
    `min_snr` is min(SNR, 5) on the x0 loss (arXiv:2303.09556); `high_noise` is min(1/abar, 20) on
    the epsilon loss (ours: identity is decided at high noise); `uniform` is 1 in every space.

    Args:
        kind: one of `uniform`, `min_snr`, `high_noise`.
        abar: any shape, in [0, 1].
        prediction: the space in which the squared error is taken.

    Returns:
        Weights shaped like `abar`, finite for every abar in [0, 1).

    Raises:
        ConfigError: unknown kind or prediction.
    """
    check_prediction(prediction)
    if kind == "uniform":
        return torch.ones_like(abar)
    if kind == "high_noise":
        # min(1/abar, cap) * abar written without the division, finite at abar = 0
        if prediction == "epsilon":
            return 1.0 / abar.clamp_min(1.0 / HIGH_NOISE_CAP)
        on_v = (HIGH_NOISE_CAP * abar).clamp_max(1.0)
        return on_v if prediction == "v_prediction" else on_v / (1.0 - abar).clamp_min(TINY)
    if kind == "min_snr":
        snr = abar / (1.0 - abar).clamp_min(TINY)
        on_x0 = snr.clamp_max(MIN_SNR_GAMMA)
        if prediction == "sample":
            return on_x0
        if prediction == "v_prediction":
            return on_x0 * (1.0 - abar)
        return (MIN_SNR_GAMMA / snr.clamp_min(TINY)).clamp_max(1.0)
    raise ConfigError(
        f"Unknown loss weight {kind!r}; use one of {', '.join(get_args(LossWeight))}."
    )


def stratified_timesteps(count: int, generator: torch.Generator, steps: int) -> Tensor:
    """Uniform timesteps, one from each of `count` equal strata: less variance, same mean.

    In place of the evenly spaced times of arXiv:2107.00630, App. I.1, each is free in its stratum.

    Args:
        count: how many, 1 or more.
        generator: of their places, then of their order.
        steps: length of the noise schedule.

    Returns:
        (count,) int64 in 0 to steps - 1, shuffled.
    """
    strata = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    order = torch.randperm(count, generator=generator)
    return (strata * steps).long().clamp(max=steps - 1)[order]
