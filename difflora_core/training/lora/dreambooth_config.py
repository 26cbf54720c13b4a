"""What a DreamBooth run is given: settings and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from ...config import Config, check_range
from ...diffusion.objective import LossWeight
from ...errors import ConfigError, counted
from ..fingerprint import LATER, SAME_COURSE
from ..loop_config import LoopConfig, Precision


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
        eps: see `LoopConfig`. A person's normalised gradient has a norm of 1, so of n numbers each
            has about 1 / sqrt(n).
        weight_decay: of AdamW.
        precision: see `LoopConfig`.
        seed: together with each identity's seed it fixes start and draws.
        same_start: draw one start for everybody. LoRAs that begin at one place stay comparable
            factor by factor, which is what an autoencoder of LoRAs learns from (ours).
        targets: layers that the LoRA edits, see `lora.layout.TARGETS`, beside those of the LoRA or
            the `down` that it starts from.
        checkpoint_every: steps between checkpoints, when a folder is given.
        accumulate, checkpointing: see `LoopConfig`; both save memory.

    Raises:
        ConfigError: a value is out of range or unknown.
    """

    rank: int = 4
    steps: int = 300
    samples_per_step: int = 4
    learning_rate: float = 1e-2
    decay: Literal["constant", "linear", "cosine"] = "constant"
    warmup: int = 0
    train_down: bool = True
    loss_weighting: LossWeight = "high_noise"
    snapshots: tuple[int, ...] = ()
    normalise_gradient: bool = True
    clip: float = 1.0
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = field(default=1e-8, metadata=LATER)
    weight_decay: float = 0.0
    precision: Precision = "no"
    seed: int = 0
    same_start: bool = False
    targets: Literal["attention", "transformer"] = field(default="attention", metadata=LATER)
    checkpoint_every: int = field(default=500, metadata=SAME_COURSE)
    accumulate: int = field(default=1, metadata=SAME_COURSE)
    checkpointing: bool = field(default=False, metadata=SAME_COURSE)

    def __post_init__(self) -> None:
        for name in ("rank", "steps", "samples_per_step", "checkpoint_every", "accumulate"):
            check_range("DreamBooth", name, getattr(self, name), 1, 10_000_000)
        for name in ("warmup", "clip", "weight_decay", "seed"):
            check_range("DreamBooth", name, getattr(self, name), 0, 2**62)
        check_range("DreamBooth", "learning_rate", self.learning_rate, 1e-9, 10)
        check_range("DreamBooth", "eps", self.eps, 1e-12, 1000)
        for step in self.snapshots:
            check_range("DreamBooth", "snapshots", step, 1, self.steps)
        self.check_choices("DreamBooth")
        if len(self.betas) != 2:
            raise ConfigError("DreamBooth: Adam needs two betas.")

    @property
    def loop(self) -> LoopConfig:
        """The run, for `loop.train`; gradients are scaled by the recipe."""
        return LoopConfig(
            steps=self.steps,
            learning_rate=self.learning_rate,
            warmup=self.warmup,
            schedule=self.decay,
            weight_decay=self.weight_decay,
            betas=self.betas,
            eps=self.eps,
            clip=0.0,
            checkpoint_every=self.checkpoint_every,
            log_every=1,
            precision=self.precision,
            accumulate=self.accumulate,
            checkpointing=self.checkpointing,
        )


@dataclass(frozen=True, eq=False)
class DreamBoothExamples:
    """Pictures of B people, at most M of each, with their captions.

    Args:
        latents: (B, M, C, h, w) scaled latents. Who has fewer than M captions has as many pictures:
            what stands behind them is not looked at.
        prompts: B lists of captions, one a picture; the longest has M.
        seeds: one integer of 0 or more per person, which fixes this person's random draws whatever
            the group; 0 to B - 1 unless given.
        time_ids: (B, M, 6) what SDXL is told of the pictures, see `TextCondition`; None: whole
            pictures of the size that is drawn.

    Raises:
        ConfigError: the counts do not agree, or there is no picture.
    """

    latents: Tensor
    prompts: Sequence[Sequence[str]]
    seeds: Sequence[int] = ()
    time_ids: Tensor | None = None

    def __post_init__(self) -> None:
        if not self.seeds:
            object.__setattr__(self, "seeds", tuple(range(len(self.latents))))
        shape = tuple(self.latents.shape)
        counts = {len(row) for row in self.prompts}
        fits = len(shape) == 5 and len(self.prompts) == shape[0] == len(self.seeds)
        told = self.time_ids is None or tuple(self.time_ids.shape) == (*shape[:2], 6)
        if not fits or not told or 0 in {*shape, *counts} or max(counts) != shape[1]:
            raise ConfigError(
                f"The training pictures do not fit: latents {shape}, expected (people, pictures, "
                f"channels, height, width); captions for {counted(len(self.prompts), 'person')} "
                f"with {sorted(counts)} pictures; {len(self.seeds)} seeds."
            )

    def __len__(self) -> int:
        return len(self.latents)

    def select(self, rows: Sequence[int]) -> DreamBoothExamples:
        """The people of these rows."""
        few, prompts = list(rows), [self.prompts[row] for row in rows]
        most = max(map(len, prompts))
        told = None if self.time_ids is None else self.time_ids[few, :most]
        seeds = [self.seeds[row] for row in rows]
        return DreamBoothExamples(self.latents[few, :most], prompts, seeds, told)
