"""What a DreamBooth run is given: settings and pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ..config import Config, check_range
from ..errors import ConfigError

DECAYS = ("constant", "linear", "cosine")


@dataclass(frozen=True)
class DreamBoothConfig(Config):
    """Settings of one DreamBooth run.

    Args:
        rank: LoRA rank.
        steps: optimiser steps.
        samples_per_step: noised pictures per identity and step.
        learning_rate: peak rate of Adam.
        decay: course of the rate: `constant`, or down to zero at the last step along a line
            (`linear`) or half a cosine (`cosine`).
        warmup: steps of linear rise at the start.
        train_down: train both factors; False trains `up` alone over a fixed `down`.
        loss_weighting: kind of `diffusion.objective.loss_weight`.
        snapshots: steps whose weights are returned beside the last step's. With a decay they are
            taken in the middle of its course: a shorter run that ends well is a run of its own.
        normalise_gradient: scale each identity's gradient to norm 1 (ours; pictures and timesteps
            with large errors then count no more than others).
        clip: else the largest gradient norm of an identity; 0 leaves gradients alone.
        betas: of Adam.
        weight_decay: of AdamW.
        precision: `no`, or `bf16` for autocast.
        seed: together with each identity's seed it fixes start and draws.
        checkpoint_every: steps between checkpoints, when a folder is given.

    Raises:
        ConfigError: a value is out of range or unknown.
    """

    rank: int = 4
    steps: int = 300
    samples_per_step: int = 4
    learning_rate: float = 1e-2
    decay: str = "constant"
    warmup: int = 0
    train_down: bool = True
    loss_weighting: str = "high_noise"
    snapshots: tuple[int, ...] = ()
    normalise_gradient: bool = True
    clip: float = 1.0
    betas: tuple[float, ...] = (0.9, 0.99)
    weight_decay: float = 0.0
    precision: str = "no"
    seed: int = 0
    checkpoint_every: int = 500

    def __post_init__(self) -> None:
        for name in ("rank", "steps", "samples_per_step", "checkpoint_every"):
            check_range("DreamBooth", name, getattr(self, name), 1, 10_000_000)
        for name in ("warmup", "clip", "weight_decay", "seed"):
            check_range("DreamBooth", name, getattr(self, name), 0, 2**62)
        check_range("DreamBooth", "learning_rate", self.learning_rate, 1e-9, 10)
        for step in self.snapshots:
            check_range("DreamBooth", "snapshots", step, 1, self.steps)
        for name, known in (("decay", DECAYS), ("precision", ("no", "bf16"))):
            if getattr(self, name) not in known:
                raise ConfigError(
                    f"DreamBooth: unknown {name} {getattr(self, name)!r}; use one of "
                    f"{', '.join(known)}."
                )
        if len(self.betas) != 2:
            raise ConfigError("DreamBooth: Adam needs two betas.")

    def rate(self, step: int) -> float:
        """Learning rate of step number `step`, from 0."""
        rise = min(1.0, (step + 1) / max(self.warmup, 1))
        left = 1.0 - step / self.steps
        course = {"constant": 1.0, "linear": left, "cosine": 0.5 - 0.5 * math.cos(math.pi * left)}
        return self.learning_rate * rise * course[self.decay]


@dataclass(frozen=True, eq=False)
class DreamBoothExamples:
    """Pictures of B people, M of each, with their captions.

    Args:
        latents: (B, M, C, h, w) scaled latents.
        prompts: B lists of M captions.
        seeds: one integer of 0 or more per person, which fixes this person's random draws whatever
            the group; 0 to B - 1 unless given.

    Raises:
        ConfigError: the counts do not agree, or there is no picture.
    """

    latents: Tensor
    prompts: Sequence[Sequence[str]]
    seeds: Sequence[int] = ()

    def __post_init__(self) -> None:
        if not self.seeds:
            object.__setattr__(self, "seeds", tuple(range(len(self.latents))))
        shape = tuple(self.latents.shape)
        counts = {len(row) for row in self.prompts}
        fits = len(shape) == 5 and len(self.prompts) == shape[0] == len(self.seeds)
        if not fits or 0 in shape or counts != {shape[1]}:
            raise ConfigError(
                f"The training pictures do not fit: latents {shape}, expected (people, pictures, "
                f"channels, height, width); captions for {len(self.prompts)} people with "
                f"{sorted(counts)} pictures; {len(self.seeds)} seeds."
            )

    def __len__(self) -> int:
        return len(self.latents)

    def select(self, rows: Sequence[int]) -> DreamBoothExamples:
        """The people of these rows."""
        prompts = [self.prompts[row] for row in rows]
        return DreamBoothExamples(
            self.latents[list(rows)], prompts, [self.seeds[row] for row in rows]
        )
