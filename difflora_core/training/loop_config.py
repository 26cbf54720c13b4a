"""How to run a recipe: length, learning rates, precision, and when to validate."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from ..config import Config, check_range, check_ranges
from ..errors import ConfigError
from .fingerprint import LATER, SAME_COURSE

Schedule = Literal["plateau", "constant", "linear", "cosine", "one_cycle"]
Precision = Literal["no", "bf16", "fp16"]
MAX_TRAINING_SEED = 2**31 - 1
"""The loop mixes it with the step in 64 bits."""


@dataclass(frozen=True)
class LoopConfig(Config):
    """How to run a recipe.

    Args:
        steps: optimiser steps in total.
        learning_rate: peak, after `warmup` steps.
        matrix_rate: when not 0, the weights of linear layers are trained by Muon at this rate
            (orthogonalised momentum; far fewer steps than AdamW for transformers), the rest by
            AdamW.
        warmup: steps over which the rates rise.
        schedule: their course after that: `plateau` falls linearly to zero over the last `decay`
            share of the steps; `constant` stays; `linear` and `cosine` (half a cosine) fall to
            zero from the first step on, `one_cycle` by half a cosine after the warm-up.
        decay: see `plateau`.
        weight_decay, betas: of AdamW.
        eps: of AdamW, beside the size of a gradient. Far above that size, steps follow the gradient
            as plain descent does, where else every number moves equally far.
        clip: largest gradient norm; 0 leaves gradients alone.
        ema: decay of the running average of the weights; 0 is off.
        checkpoint_every, log_every: steps.
        precision: `no`, `bf16`, or `fp16` with a scaled loss; the trained weights stay float32. A
            processor that would have to imitate bfloat16 takes float32 for it.
        seed: of batches and noise.
        compile: use torch.compile.
        accumulate: parts of a batch that are computed one after the other, to save memory.
        checkpointing: compute the base model's layers again in the backward pass, to save memory.
        validate_every: steps between validations, where the recipe has one.
        patience: validations without a new best before training stops; 0 never stops early.
        validate_first: also validate the weights before the first step.
        ema_on_cpu: keep the average in the computer's memory, to save the device's.
        shard: of several processes each keeps a part of weights, gradients, moments and average
            (FSDP); `accelerate launch --use_fsdp` asks for it too.

    Raises:
        ConfigError: a value is out of range or unknown.
    """

    steps: int
    learning_rate: float = 1e-3
    matrix_rate: float = 0.0
    warmup: int = 50
    decay: float = 0.3
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = field(default=1e-8, metadata=LATER)
    clip: float = 1.0
    ema: float = 0.0
    checkpoint_every: int = field(default=500, metadata=SAME_COURSE)
    log_every: int = field(default=50, metadata=SAME_COURSE)
    precision: Precision = "no"
    seed: int = 0
    compile: bool = field(default=False, metadata=SAME_COURSE)
    schedule: Schedule = "plateau"
    accumulate: int = field(default=1, metadata=SAME_COURSE)
    checkpointing: bool = field(default=False, metadata=SAME_COURSE)
    validate_every: int = 250
    patience: int = 8
    validate_first: bool = False
    ema_on_cpu: bool = field(default=False, metadata=SAME_COURSE)
    shard: bool = field(default=False, metadata=SAME_COURSE)

    def __post_init__(self) -> None:
        self.check_choices("Training")
        counts = ("steps", "checkpoint_every", "log_every", "accumulate", "validate_every")
        check_ranges("Training", self, 1, 2**40, *counts)
        check_ranges("Training", self, 0, 2**40, "warmup", "weight_decay", "clip", "patience")
        check_ranges("Training", self, 0, 10, "learning_rate", "matrix_rate")
        check_ranges("Training", self, 0, MAX_TRAINING_SEED, "seed")
        check_range("Training", "decay", self.decay, 0, 1)
        check_range("Training", "eps", self.eps, 1e-12, 1000)
        for value in (self.ema, *self.betas):
            if not 0 <= value < 1:
                raise ConfigError(f"Training: ema and betas must lie in [0, 1), got {value}.")

    def rate(self, peak: float, step: int) -> float:
        """A learning rate at step number `step`, from 0.

        Args:
            peak: the rate after the warm-up.
            step: of the optimiser.
        """
        return peak * min(1.0, (step + 1) / max(self.warmup, 1)) * self._course(step)

    def _course(self, step: int) -> float:
        """What the schedule leaves of the peak."""
        left = 1.0 - step / self.steps
        if self.schedule == "plateau":
            start = self.steps * (1 - self.decay)
            fall = (self.steps - step) / max(self.steps - start, 1) if step > start else 1.0
            return max(fall, 0.0)
        if self.schedule == "one_cycle":
            done = max(0.0, (step - self.warmup) / max(1, self.steps - self.warmup))
            return 0.5 * (1 + math.cos(math.pi * done))
        if self.schedule == "cosine":
            return 0.5 - 0.5 * math.cos(math.pi * left)
        return left if self.schedule == "linear" else 1.0
