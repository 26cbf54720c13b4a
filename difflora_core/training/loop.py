"""The one training loop: every recipe hands it a module whose forward is the loss.

**The batch of a step is a function of seed and step alone.** Every process draws the same batch and
computes its own rows of it, part by part where `accumulate` says so; gradients are averaged. So a
run on 1, 2 or 4 processes, with any `accumulate`, gives the same weights to rounding, as long as
the loss is a mean over samples. What else it needs of the whole batch, a norm for example, the
drawing function puts into it as a scalar or a tuple, which all parts share. A loss that compares
samples with each other says so with `Hooks.splits`: every process then computes the whole batch.
Every part of a step starts from the buffers that the step before left; what the parts make of them
is averaged.

A run that was stopped and resumed, on as many processes or others, repeats exactly what the
uninterrupted run would have done.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler

from ..base_model.attention import training_attention
from ..base_model.checkpointing import gradient_checkpointing
from ..base_model.precision import autocast, needs_loss_scale
from ..base_model.protocol import BaseModel
from ..errors import ConfigError, InterruptedTraining
from .average import Average
from .event_log import append_event, forget_events_after
from .fingerprint import fingerprint
from .hooks import Batch, ByStep, Draw, Hooks, Progress, Stopped
from .loop_config import LoopConfig
from .loop_state import (
    BEST,
    Best,
    Meter,
    RunState,
    on_cpu,
    optimizers,
    put,
    read_best,
    state_of,
    write_best,
)
from .processes import Processes, deferred_interrupt, launched, split
from .sharding import gathered, is_sharded, shard
from .state_file import STATE, RunIdentity, settings_that_count
from .step import Step

__all__ = ["Batch", "ByStep", "Draw", "Hooks", "LoopConfig", "Progress", "Stopped", "train"]


def train(
    objective: nn.Module,
    draw: Draw,
    config: LoopConfig,
    folder: Path | None,
    hooks: Hooks | None = None,
    device: torch.device | None = None,
) -> dict[str, float]:
    """Train until `config.steps`, from the last checkpoint in `folder` if there is one.

    Args:
        objective: module whose forward maps a batch to (loss, metrics); its parameters that
            require a gradient are trained. Afterwards it holds the averaged weights when
            `config.ema` is set; with `hooks.validate` those of the lowest validation loss, also
            when the run was stopped.
        draw: makes the batch of a step for all processes: tensors and lists hold one entry for
            each sample, anything else is shared.
        config: the run.
        folder: of the checkpoint (state.safetensors), the best weights (best.safetensors) and the
            event log (events.jsonl); all processes must see it. None keeps nothing.
        hooks: what the recipe adds.
        device: where to train; by default what the launcher of several processes chose, else
            where the objective is.

    Returns:
        The metrics of the last log; with `hooks.validate` also `validation`, the lowest loss,
        `best_step`, its step, and `steps`, how many were done.

    Raises:
        InterruptedTraining: the run was stopped; call again to go on.
        CheckpointError: the checkpoint in `folder` is damaged or belongs to another run.
        ConfigError: the loss is not a finite number, or the batch cannot be split.
    """
    processes, hooks = launched(), hooks or Hooks()
    device = device or processes.device or next(objective.parameters()).device
    objective.to(device)
    with (
        _checkpointing(config, hooks.base),
        training_attention(hooks.base, config.precision),
        deferred_interrupt() as interrupted,
    ):
        run = _Run(objective, draw, config, folder, hooks, processes)
        try:
            run.begin()
            while not run.finished:
                run.step(interrupted)
        except InterruptedTraining as stop:
            raise run.stopped() from stop
        return run.end()


class _Run:
    """What a run holds: the module, the optimisers, the average and the meter."""

    def __init__(
        self,
        objective: nn.Module,
        draw: Draw,
        config: LoopConfig,
        folder: Path | None,
        hooks: Hooks,
        processes: Processes,
    ) -> None:
        self.objective, self.draw, self.config = objective, draw, config
        self.folder, self.hooks, self.processes = folder, hooks, processes
        self.device = next(objective.parameters()).device
        self.whole_again = shard(objective, config, hooks, processes)
        scaled = needs_loss_scale(config.precision, hooks.base)
        self.state = RunState(
            objective,
            optimizers(objective, config, hooks.matrices),
            Average(objective, config.ema, torch.device("cpu") if config.ema_on_cpu else None),
            GradScaler(self.device.type, enabled=scaled),
            draw.generator if isinstance(draw, ByStep) else None,
            config.steps,
        )
        self.work = Step(self.state, config, hooks, processes)
        self.best, self.value = Best(), math.inf
        self.metrics: dict[str, float] = {}
        self.identity = RunIdentity(
            fingerprint(config, hooks.fingerprint), settings_that_count(config, *hooks.settings)
        )
        self.processes.together(self._resume)
        self.processes.together(self._check)

    @property
    def finished(self) -> bool:
        """True when all steps are done or patience has run out."""
        waited = (self.state.judged - self.best.step) // self.config.validate_every
        patience = self.config.patience if self.hooks.validate is not None else 0
        return self.state.done >= self.config.steps or 0 < patience <= waited

    def begin(self) -> None:
        """The validation before the first step, or the one that a stop came before."""
        if self._due() or (self.config.validate_first and self.state.judged < 0):
            self._judge()

    def step(self, interrupted: Callable[[], bool]) -> None:
        """One step: batch, loss, gradient, update; then what is due after it."""
        stop = self.hooks.stop or (lambda: False)

        def batch() -> Batch:
            if interrupted() or stop():
                raise InterruptedTraining("stopped between two steps")
            return self._batch()

        try:
            self.work.gradients(batch)
        except torch.cuda.OutOfMemoryError:  # with settings that need less it can go on from here
            if self.processes.count == 1:
                self._save()
            raise
        self.work.update()
        self._after()

    def stopped(self) -> Stopped:
        """Save, and leave the objective at the best state, which may be the present one."""
        self._save()
        if self.hooks.validate is not None and self.state.judged >= 0:
            self._compare_present()
            self._restore()
        self.whole_again()
        return Stopped(self.state.done, self._result())

    def end(self) -> dict[str, float]:
        """Leave the objective at the best weights, or at the average."""
        self._restore()
        self.whole_again()
        return self._result()

    def _after(self) -> None:
        """Count the step; validate, report and save what is due."""
        config, after_step = self.config, self.hooks.after_step
        self.state.done += 1
        for metrics in self.work.metrics:
            self.state.meter.add(metrics)
        if after_step is not None:
            with gathered(self.objective):
                self.processes.together(lambda: after_step(self.state.done))
        if self._due():
            self._judge()
        if self.state.done % config.log_every == 0 or self.finished:
            self._report()
        if self.state.done % config.checkpoint_every == 0 or self.finished:
            self._save()

    def _due(self) -> bool:
        """True when this step is to be validated and is not yet."""
        at = self.state.done > 0 and self.state.done % self.config.validate_every == 0
        asked = self.hooks.validate is not None and self.state.judged < self.state.done
        return asked and (at or self.state.done == self.config.steps)

    def _judge(self) -> None:
        """Validate the averaged weights; keep them when they are the best so far."""
        self.value, self.state.judged = self._validate(), self.state.done
        if self.value < self.best.value:
            self._keep()
            if self.folder is not None:
                path = self.folder / BEST
                self.processes.on_main(lambda: write_best(path, self.best, self.identity))
                self.state.lowest = self.value

    def _compare_present(self) -> None:
        """A run stopped between validations may be at its best: keep that, but not on disk."""
        if self.state.judged == self.state.done:
            return
        try:
            value = self._validate()
        except InterruptedTraining:
            return
        if value < self.best.value:
            self.value = value
            self._keep()

    def _validate(self) -> float:
        """The main process's validation loss; every process computes it."""
        validate = self.hooks.validate or (lambda: math.inf)
        with self.state.average.in_place(self.objective), gathered(self.objective):
            value = self.processes.together(validate)
        return self.processes.from_main(value)

    def _keep(self) -> None:
        """Remember the present weights as the best."""
        with self.state.average.in_place(self.objective):
            self.best = Best(self.value, self.state.done, on_cpu(state_of(self.objective)))

    def _restore(self) -> None:
        """Put the best weights in place, or the average where nothing was validated."""
        if self.best.tensors:
            put(self.objective, self.best.tensors)
        else:
            self.state.average.copy_to(self.objective)

    def _result(self) -> dict[str, float]:
        if self.hooks.validate is None or self.state.judged < 0:
            return self.metrics
        best = {"validation": self.best.value, "best_step": float(self.best.step)}
        return {**self.metrics, **best, "steps": float(self.state.done)}

    def _report(self) -> None:
        """Write the event log and tell the caller."""
        self._join_meters()
        self.metrics = self.state.meter.pop()
        if self.state.judged == self.state.done:
            self.metrics["validation"] = self.value
        with gathered(self.objective):  # what is shown on the way, previews, needs all of it
            self.processes.on_main(self._log)

    def _log(self) -> None:
        if self.folder is not None:
            append_event(self.folder, self.state.done, self.metrics)
        if self.hooks.progress is not None:
            self.hooks.progress(self.state.done, self.config.steps, self.metrics)

    def _join_meters(self) -> None:
        """Bring all processes' metrics to the main one."""
        if self.processes.count > 1:
            found = [m for m in self.processes.gathered(self.state.meter) if isinstance(m, Meter)]
            self.state.meter.join(found if self.processes.is_main else [])

    def _save(self) -> None:
        """Write the checkpoint of this step; the same for any number of processes."""
        if self.folder is None:
            return
        self._join_meters()
        needed = self.processes.is_main or is_sharded(self.objective)  # parts are joined by all
        path, tensors = self.folder / STATE, self.state.tensors() if needed else {}
        self.processes.on_main(lambda: self.state.write(path, self.identity, tensors))

    def _resume(self) -> None:
        """Take up the files of this run, if there are any."""
        if self.folder is not None:
            self.best = read_best(self.folder / BEST, self.objective, self.identity)
            self.state.read(self.folder / STATE, self.identity, self.best)
            if self.processes.is_main:
                forget_events_after(self.folder, self.state.done)
        if not self.processes.is_main:
            self.state.meter = Meter()

    def _batch(self) -> Batch:
        """The batch of the step that comes, for all processes; drawn in the run's precision."""
        with autocast(self.device, self.config.precision):
            if isinstance(self.draw, ByStep):
                return self.draw.make(self.state.done)
            return self.draw(_generator(self.config.seed, self.state.done))

    def _check(self) -> None:
        """Refuse, before the first step, a batch that cannot be split."""
        if not self.hooks.splits and self.config.accumulate > 1 and not self.finished:
            raise ConfigError(
                "The loss of this training compares the samples of a batch with each other, so a "
                "batch cannot be computed in parts: train with accumulate 1."
            )
        if self.work.parts == 1 or self.finished:
            return
        drawn = self.state.drawn()
        split(dict(self._batch()), self.work.parts)
        self.state.draw_again(drawn)


def _generator(seed: int, step: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed * 1_000_003 + step) * 4_099)


def _checkpointing(config: LoopConfig, base: BaseModel | None) -> AbstractContextManager[None]:
    if not config.checkpointing:
        return nullcontext()
    if base is None:
        raise ConfigError(
            "checkpointing is on, but this training runs no base model whose layers could be "
            "computed again: turn it off."
        )
    return gradient_checkpointing(base.unet)
