"""What a recipe hands to the training loop beside its objective."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..base_model.protocol import BaseModel
from ..config import Config
from ..errors import InterruptedTraining

Batch = Mapping[str, Any]
Progress = Callable[[int, int, dict[str, float]], None]


@dataclass(frozen=True)
class ByStep:
    """Batches by a recipe's own random numbers.

    Args:
        make: step number, from 0, to the batch of all processes.
        generator: what `make` draws from, if that goes on from step to step; its state becomes
            part of the checkpoint.
    """

    make: Callable[[int], Batch]
    generator: torch.Generator | None = None


Draw = Callable[[torch.Generator], Batch] | ByStep
"""Makes the batch of a step from a generator that belongs to the step."""


@dataclass(frozen=True)
class Hooks:
    """What a recipe adds to the loop.

    Args:
        progress: called on the main process as (step, steps, metrics) at every log; it may raise
            InterruptedTraining, which saves first.
        validate: loss of the objective as it is now on what it is not trained on. It is asked on
            every process, with the averaged weights in place and without autocast.
        stop: asked on every process before every step; True stops the run.
        after_step: called on every process with the number of steps done.
        scale_gradients: changes the gradients of the whole batch in place, instead of `clip`.
        matrices: what Muon trains; the weights of all linear layers unless given.
        splits: False when the loss compares the samples of a batch with each other: every process
            then computes the whole batch.
        base: the frozen base model that the loss runs through. Its layers are computed again in
            the backward pass where `checkpointing` says so, and the loss is scaled where it
            computes in float16.
        fingerprint: of settings and data, see `fingerprint`; a folder with another one is refused.
        settings: of the recipe, which are part of that fingerprint: they say what differs there.
    """

    progress: Progress | None = None
    validate: Callable[[], float] | None = None
    stop: Callable[[], bool] | None = None
    after_step: Callable[[int], None] | None = None
    scale_gradients: Callable[[], None] | None = None
    matrices: list[nn.Parameter] | None = None
    splits: bool = True
    base: BaseModel | None = None
    fingerprint: str = ""
    settings: tuple[Config, ...] = ()


class Stopped(InterruptedTraining):
    """A run was stopped after `step`. `result` is what `train` would have returned there."""

    def __init__(self, step: int, result: dict[str, float]) -> None:
        super().__init__(f"stopped after step {step}; run it again to go on")
        self.step, self.result = step, result
