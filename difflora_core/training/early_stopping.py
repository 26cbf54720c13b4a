"""Training that is judged on people it has not seen, and keeps the best weights (ours).

The first DiT of our study memorised its few hundred identities: without this, so will yours.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..errors import ConfigError, InterruptedTraining
from ..storage.safetensors_io import write_atomic
from .loop import Batch, LoopConfig, Progress, train

STATE = "state.safetensors"  # written by the loop
BEST = "best.safetensors"


@dataclass(frozen=True)
class EarlyStopping:
    """When to judge and when to give up.

    Args:
        every: steps between two judgements; a multiple of the loop's `log_every`.
        patience: judgements without a new best before training stops; 0 never stops early.

    Raises:
        ConfigError: a value out of range.
    """

    every: int = 250
    patience: int = 8

    def __post_init__(self) -> None:
        if self.every < 1 or self.patience < 0:
            raise ConfigError("every must be at least 1 and patience at least 0.")


class _Judgement(InterruptedTraining):
    """Pauses the loop, which saves; the averaged weights are then on disk."""


def train_validated(
    objective: nn.Module,
    draw: Callable[[torch.Generator], Batch],
    loop: LoopConfig,
    folder: Path,
    validate: Callable[[], float],
    stopping: EarlyStopping | None = None,
    progress: Progress | None = None,
) -> dict[str, float]:
    """`loop.train`, leaving the objective at the (averaged) weights of the best validation loss.

    Args:
        objective: as in `loop.train`.
        draw: as in `loop.train`.
        loop: the run; `stopping.every` must be a multiple of its `log_every`.
        folder: as in `loop.train`; the best weights lie there too.
        validate: loss of the objective as it is now, on people it is not trained on.
        stopping: when to judge and when to give up.
        progress: as in `loop.train`.

    Returns:
        `validation`, `best_step`, `steps` (done), and the metrics of the last log if any.

    Raises:
        InterruptedTraining: stopped from outside; the same call goes on, with the same result.
    """
    stopping = _checked(stopping or EarlyStopping(), loop)
    record = _Record(objective, folder, stopping)
    metrics: dict[str, float] = {}

    def watch(step: int, steps: int, values: dict[str, float]) -> None:
        if progress is not None:
            progress(step, steps, values)
        if step % stopping.every == 0 and step < steps:
            raise _Judgement(f"validation at step {step}")

    done = record.step_on_disk()
    if done % stopping.every == 0 and done > record.judged:
        record.judge(done, validate)  # stopped from outside between a pause and its judgement
    while not record.finished(loop.steps):
        try:
            metrics = train(objective, draw, loop, folder, watch)
        except InterruptedTraining as stop:
            if not isinstance(stop.__cause__, _Judgement):
                raise
        record.judge(record.step_on_disk(), validate)
    record.restore()
    result = {"validation": record.value, "best_step": record.best_step}
    return {**metrics, **result, "steps": record.judged}


def _checked(stopping: EarlyStopping, loop: LoopConfig) -> EarlyStopping:
    """The settings, if they meet those of the loop."""
    if stopping.every % loop.log_every:
        raise ConfigError(
            f"Validation every {stopping.every} steps does not meet the log every "
            f"{loop.log_every} steps: choose a multiple."
        )
    return stopping


class _Record:
    """The best weights so far and the course of the judgements, kept in a file."""

    def __init__(self, objective: nn.Module, folder: Path, stopping: EarlyStopping) -> None:
        self.folder, self.stopping = folder, stopping
        self.trained = {n: p for n, p in objective.named_parameters() if p.requires_grad}
        self.value, self.best_step, self.judged = math.inf, 0, 0
        self.best: dict[str, Tensor] = {}
        if (folder / BEST).exists():
            with safe_open(folder / BEST, "pt") as file:
                self.best = {key: file.get_tensor(key) for key in file.keys()}
                facts = file.metadata()
            self.value = float.fromhex(facts["value"])
            self.best_step, self.judged = int(facts["best_step"]), int(facts["judged"])

    def finished(self, steps: int) -> bool:
        """True when all steps are done or patience has run out."""
        waited = (self.judged - self.best_step) // self.stopping.every
        return self.judged >= steps or 0 < self.stopping.patience <= waited

    def step_on_disk(self) -> int:
        """Steps in the loop's checkpoint."""
        if not (self.folder / STATE).exists():
            return 0
        with safe_open(self.folder / STATE, "pt") as file:
            return int(file.metadata()["step"])

    def judge(self, step: int, validate: Callable[[], float]) -> None:
        """Evaluate the averaged weights of the checkpoint; the loop reloads its own later."""
        with safe_open(self.folder / STATE, "pt") as file:
            names = set(file.keys())
            for name, parameter in self.trained.items():
                key = f"ema.{name}" if f"ema.{name}" in names else f"model.{name}"
                parameter.detach().copy_(file.get_tensor(key))
        value = validate()
        self.judged = step
        if value < self.value:
            self.value, self.best_step = value, step
            self.best = {n: p.detach().cpu().clone() for n, p in self.trained.items()}
        facts = {"value": float(self.value).hex(), "best_step": str(self.best_step)}
        write_atomic(self.best, {**facts, "judged": str(step)}, self.folder / BEST)

    def restore(self) -> None:
        """Put the best weights in place."""
        for name, value in self.best.items():
            self.trained[name].detach().copy_(value)
