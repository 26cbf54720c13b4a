"""One step of the training loop: gradients of a batch, part by part, and the update."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.attach import hold
from ..base_model.precision import autocast
from ..errors import ConfigError, DivergedError, InterruptedTraining
from .hooks import Batch, Hooks
from .loop_config import LoopConfig
from .loop_state import RunState, buffers_of, put
from .processes import Processes, split
from .sharding import is_part, is_sharded

_SMALLEST_SCALE = 2.0**-14
"""Of a float16 loss; gradients that overflow at it will never do anything else."""


class Step:
    """How every step of a run is computed.

    `metrics`: those of this process's parts in the last step; `parts`: of a batch, over all
    processes.

    Args:
        state: the module and its optimisers.
        config: the run.
        hooks: of the recipe.
        processes: who takes part.

    Raises:
        ConfigError: weights to train are in half precision.
    """

    def __init__(
        self, state: RunState, config: LoopConfig, hooks: Hooks, processes: Processes
    ) -> None:
        self.state, self.config, self.hooks, self.processes = state, config, hooks, processes
        objective = state.objective
        self.call = torch.compile(objective, dynamic=False) if config.compile else objective
        self.buffers = buffers_of(objective)
        last = {id(p) for p in hooks.matrices or ()}  # the order in which norms are summed
        trained = (p for p in objective.parameters() if p.requires_grad)
        self.trained = sorted(trained, key=lambda p: id(p) in last)
        if any(p.dtype in (torch.float16, torch.bfloat16) for p in self.trained):
            raise ConfigError("Weights are trained in float32; these are in half precision.")
        for parameter in self.trained:
            parameter.grad = None  # a stopped run may have left some
        self.device = next(objective.parameters()).device
        self.sharded = is_sharded(objective)
        self.parts = processes.count * config.accumulate if hooks.splits else 1
        self.metrics: list[Mapping[str, Any]] = []

    def gradients(self, batch: Callable[[], Batch]) -> None:
        """Gradients of a batch, the same on every process.

        Args:
            batch: draws it for all processes; it may raise InterruptedTraining.

        Raises:
            InterruptedTraining: a process was stopped; the state is that before the step.
            DivergedError: the loss of a process is not a finite number.
        """
        before, drawn = {n: b.clone() for n, b in self.buffers.items()}, self.state.drawn()
        error = None
        if self.sharded:  # whoever stops does so before the others wait for it
            batch = self._agreed(batch)
        try:
            self._own_gradients(batch(), before)
        except (Exception, KeyboardInterrupt) as raised:
            error = raised
        try:
            self._average(before, error)
        except (InterruptedTraining, torch.cuda.OutOfMemoryError):
            put(self.state.objective, before)  # what an unfinished step changed
            self.state.draw_again(drawn)
            raise

    def update(self) -> None:
        """Take the step that the gradients ask for.

        Raises:
            ConfigError: gradients overflow float16 however the loss is scaled.
        """
        state = self.state
        for group in (g for optimizer in state.optimizers for g in optimizer.param_groups):
            group["lr"] = self.config.rate(group["peak"], state.done)
        for optimizer in state.optimizers:
            state.scaler.unscale_(optimizer)
        finite = not state.scaler.is_enabled() or all(
            bool(torch.isfinite(p.grad).all()) for p in self.trained if p.grad is not None
        )  # one that overflowed stops all: halves of a step are no step
        if self.hooks.scale_gradients is not None:
            self.hooks.scale_gradients()
        elif self.config.clip:
            nn.utils.clip_grad_norm_(self.trained, self.config.clip)
        for optimizer in state.optimizers if finite else ():
            state.scaler.step(optimizer)
        state.scaler.update()
        for optimizer in state.optimizers:
            optimizer.zero_grad()
        scale = state.scaler.get_scale()
        if scale < _SMALLEST_SCALE:
            raise ConfigError(
                f"The gradients are too large for float16 at step {state.done + 1}, however the "
                "loss is scaled: lower learning_rate, or take precision bf16."
            )
        if finite:
            state.average.update(state.objective)

    def _own_gradients(self, batch: Batch, before: Mapping[str, Tensor]) -> None:
        """Gradients of this process's parts, each from the buffers that there were before."""
        accumulate, scaler = self.config.accumulate, self.state.scaler
        first = self.processes.rank * accumulate if self.hooks.splits else 0  # or all of it
        made: list[dict[str, Tensor]] = []
        self.metrics = []
        for part in split(dict(batch), self.parts)[first : first + accumulate]:
            if made:
                put(self.state.objective, before)
            with hold() as held:  # checkpointed layers are computed again with their adapters
                with autocast(self.device, self.config.precision):
                    loss, metrics = self.call(_to(part, self.device))
                self._judge_loss(float(loss.detach()), part)
                held.resume()
                scaler.scale(loss / accumulate if accumulate > 1 else loss).backward()
            self.metrics.append({"loss": loss.detach(), **metrics})
            if accumulate > 1:
                made.append({name: buffer.clone() for name, buffer in self.buffers.items()})
        for name in self._changed(before) if made else ():
            self.buffers[name].copy_(torch.stack([one[name] for one in made]).mean(0))

    def _average(self, before: Mapping[str, Tensor], error: BaseException | None) -> None:
        """Bring the parts of all processes together, unless one of them has an error."""
        if self.processes.count == 1:
            self.processes.agree(error)
            return
        changed = set(self._changed(before))
        flags = [float(p.grad is not None) for p in self.trained]
        flags += [float(name in changed) for name in self.buffers]
        counts = self.processes.agree_on(error, flags)
        shared: list[Tensor] = []
        for parameter, count in zip(self.trained, counts, strict=False):
            if count and not is_part(parameter):  # those are averages already
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                shared.append(parameter.grad)
        for buffer, count in zip(self.buffers.values(), counts[len(self.trained) :], strict=True):
            shared += [buffer] if count else []
        self.processes.average(shared)

    def _changed(self, before: Mapping[str, Tensor]) -> list[str]:
        """Names of the buffers of numbers that the forward pass changed."""
        numbers = {name: b for name, b in self.buffers.items() if b.is_floating_point()}
        return [name for name, b in numbers.items() if not torch.equal(b, before[name])]

    def _agreed(self, batch: Callable[[], Batch]) -> Callable[[], Batch]:
        """The same; it raises on every process what it would raise on one."""
        error, drawn = None, None
        try:
            drawn = batch()
        except (Exception, KeyboardInterrupt) as raised:
            error = raised
        self.processes.agree(error)
        return lambda: drawn or {}

    def _judge_loss(self, loss: float, part: Batch) -> None:
        """Refuses a loss that is no number; of a sharded run, on every process."""
        if self.sharded:
            self.processes.together(lambda: self._check_loss(loss, part))
        else:
            self._check_loss(loss, part)

    def _check_loss(self, loss: float, part: Batch) -> None:
        if math.isfinite(loss):
            return
        who = f", {self.processes}" if self.processes.count > 1 else ""
        names = "".join(f", {n} {list(part[n])}" for n in ("names", "prompts") if n in part)
        raise DivergedError(
            f"The loss is no longer a number ({loss}) at step {self.state.done + 1}{who} (batch of "
            f"seed {self.config.seed}{names}): lower learning_rate, or look for damaged training "
            "pictures."
        )


def _to(batch: Batch, device: torch.device) -> dict[str, Any]:
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
