"""The one training loop: every recipe hands it a module whose forward is the loss.

The batch of a step depends only on the seed, the step and the process rank, so a run that was
stopped and resumed repeats exactly what the uninterrupted run would have done.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import CheckpointError, ConfigError, InterruptedTraining

logger = logging.getLogger(__name__)

Batch = Mapping[str, Any]
Progress = Callable[[int, int, dict[str, float]], None]


@dataclass(frozen=True)
class LoopConfig:
    """How to run a recipe.

    `steps`: optimiser steps in total. `learning_rate`: peak, after `warmup` steps; it falls
    linearly to zero over the last `decay` share of the steps. `matrix_rate`: when not 0, the
    weights of linear layers are trained by Muon at this rate (orthogonalised momentum; far fewer
    steps than AdamW for transformers) and the rest by AdamW. `clip`: largest gradient norm.
    `ema`: decay of the running average of the weights, 0 = off. `checkpoint_every`: steps.
    `precision`: "no" or "bf16". `seed`: of batches and noise. `compile`: use torch.compile.
    """

    steps: int
    learning_rate: float = 1e-3
    matrix_rate: float = 0.0
    warmup: int = 50
    decay: float = 0.3
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.99)
    clip: float = 1.0
    ema: float = 0.0
    checkpoint_every: int = 500
    log_every: int = 50
    precision: str = "no"
    seed: int = 0
    compile: bool = False

    def __post_init__(self) -> None:
        if self.steps < 1 or self.checkpoint_every < 1 or self.log_every < 1:
            raise ConfigError("steps, checkpoint_every and log_every must be at least 1")
        if not 0 <= self.decay <= 1 or not 0 <= self.ema < 1:
            raise ConfigError("decay must lie in [0, 1] and ema in [0, 1)")

    def rate(self, step: int) -> float:
        """Factor on the learning rates at a step: warm-up, plateau, linear fall."""
        start = self.steps * (1 - self.decay)
        fall = (self.steps - step) / max(self.steps - start, 1) if step > start else 1.0
        return min(1.0, (step + 1) / max(self.warmup, 1)) * max(fall, 0.0)


def train(
    objective: nn.Module,
    draw: Callable[[torch.Generator], Batch],
    config: LoopConfig,
    folder: Path,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Train until `config.steps`, from the last checkpoint in `folder` if there is one.

    Args:
        objective: module whose forward maps a batch to (loss, metrics); its parameters that
            require a gradient are trained. It holds the averaged weights afterwards when
            `config.ema` is set.
        draw: makes a batch from a generator; called once per step and process.
        config: the run.
        folder: of the checkpoint (state.safetensors) and the event log (events.jsonl).
        progress: called as (step, steps, metrics) at every log; it may raise
            InterruptedTraining, which saves first.

    Returns:
        The metrics of the last log.

    Raises:
        InterruptedTraining: the run was stopped; call again to go on.
        CheckpointError: the checkpoint in `folder` belongs to another model.
    """
    run = _Run(objective, config, folder)
    metrics: dict[str, float] = {}
    done = run.start
    try:
        while done < config.steps:
            run.advance(done, draw)
            done += 1
            last = done == config.steps
            if done % config.log_every == 0 or last:
                metrics = run.meter.pop()
                run.report(done, metrics, progress)
            if done % config.checkpoint_every == 0 or last:
                run.save(done)
    except (InterruptedTraining, KeyboardInterrupt) as stop:
        run.save(done)
        raise InterruptedTraining(f"stopped after step {done}; run it again to go on") from stop
    run.average.copy_to(objective)
    return metrics


class _Run:
    """What a run holds: the module on its device, the optimisers, the average and the meter."""

    def __init__(self, objective: nn.Module, config: LoopConfig, folder: Path) -> None:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
        from accelerate.utils import DistributedDataParallelKwargs

        self.objective, self.config, self.folder = objective, config, folder
        # Text encoders end before their last layer, whose weights get no gradient.
        unused = DistributedDataParallelKwargs(find_unused_parameters=True)
        AcceleratorState._reset_state()  # recipes of one process may differ in precision
        self.accelerator = Accelerator(
            mixed_precision=config.precision,
            cpu=not torch.cuda.is_available(),
            kwargs_handlers=[unused],
        )
        self.optimizers = _optimizers(objective, config)
        self.average = _Average(objective, config.ema)
        self.meter = _Meter()
        folder.mkdir(parents=True, exist_ok=True)
        state = folder / "state.safetensors"
        self.start = _resume(state, objective, self.optimizers, self.average)
        runner, *self.prepared = self.accelerator.prepare(objective, *self.optimizers)
        self.call = torch.compile(runner, dynamic=False) if config.compile else runner
        self.trained = [p for p in objective.parameters() if p.requires_grad]

    def advance(self, step: int, draw: Callable[[torch.Generator], Batch]) -> None:
        """One step: draw, loss, gradient, update, average."""
        config, device = self.config, self.accelerator.device
        generator = _generator(config.seed, step, self.accelerator.process_index)
        for group in (g for optimizer in self.optimizers for g in optimizer.param_groups):
            group["lr"] = config.rate(step) * group["peak"]
        with self.accelerator.autocast():
            loss, parts = self.call(_to(draw(generator), device))
        if not math.isfinite(loss.item()):
            raise ConfigError(f"the loss is {loss.item()} at step {step}: lower learning_rate")
        self.accelerator.backward(loss)
        if config.clip:
            self.accelerator.clip_grad_norm_(self.trained, config.clip)
        for optimizer in self.prepared:
            optimizer.step()
            optimizer.zero_grad()
        self.average.update(self.objective)
        self.meter.add({"loss": loss.detach(), **parts})

    def report(self, step: int, metrics: dict[str, float], progress: Progress | None) -> None:
        """Write the event log and tell the caller, once per machine group."""
        if self.accelerator.is_main_process:
            with (self.folder / "events.jsonl").open("a") as file:
                file.write(json.dumps({"step": step, **metrics}) + "\n")
            if progress is not None:
                progress(step, self.config.steps, metrics)

    def save(self, step: int) -> None:
        """Write the checkpoint of a step."""
        if self.accelerator.is_main_process:
            path = self.folder / "state.safetensors"
            _save(path, self.objective, self.optimizers, self.average, step)


def write_config(folder: Path, config: Any) -> None:
    """Write the resolved configuration of a run beside its checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / "config.part"
    temporary.write_text(json.dumps(asdict(config), indent=2, default=str))
    temporary.replace(folder / "config.json")


def _optimizers(objective: nn.Module, config: LoopConfig) -> list[torch.optim.Optimizer]:
    """AdamW, and Muon for the weights of linear layers when it is asked for."""
    linear = {
        id(m.weight) for m in objective.modules() if isinstance(m, nn.Linear) and config.matrix_rate
    }
    trained = [p for p in objective.parameters() if p.requires_grad]
    rest = [p for p in trained if id(p) not in linear]
    matrices = [p for p in trained if id(p) in linear]
    decay = config.weight_decay
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(rest, config.learning_rate, config.betas, weight_decay=decay)
    ]
    if matrices:
        optimizers.append(torch.optim.Muon(matrices, config.matrix_rate, weight_decay=decay))
    for group in (g for optimizer in optimizers for g in optimizer.param_groups):
        group["peak"] = group["lr"]
    return optimizers


class _Average:
    """Exponential moving average of the trained weights, with the usual warm-up."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay, self.updates = decay, 0
        named = ((n, p) for n, p in module.named_parameters() if p.requires_grad and decay > 0)
        self.weights = {n: p.detach().clone().float() for n, p in named}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for name, p in module.named_parameters():
            if name in self.weights:
                average = self.weights[name].to(p.device)  # moves once, with the module
                self.weights[name] = average.lerp_(p.detach().float(), 1 - decay)

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        for name, p in module.named_parameters():
            if name in self.weights:
                p.copy_(self.weights[name])


class _Meter:
    """Means of the metrics between two logs."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.count = 0

    def add(self, values: Mapping[str, Tensor]) -> None:
        self.count += 1
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(value)

    def pop(self) -> dict[str, float]:
        means = {name: value / max(self.count, 1) for name, value in self.sums.items()}
        self.sums, self.count = {}, 0
        return means


def _generator(seed: int, step: int, rank: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed * 1_000_003 + step) * 4_099 + rank)


def _to(batch: Batch, device: torch.device) -> dict[str, Any]:
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}


def _save(
    path: Path,
    module: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    average: _Average,
    step: int,
) -> None:
    trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
    tensors = {f"model.{n}": p.detach().cpu().contiguous() for n, p in trained.items()}
    tensors |= {f"ema.{n}": p.cpu().contiguous() for n, p in average.weights.items()}
    for number, optimizer in enumerate(optimizers):
        for index, state in optimizer.state_dict()["state"].items():
            named = {f"optimizer.{number}.{index}.{k}": v for k, v in state.items()}
            tensors |= {k: torch.as_tensor(v).cpu() for k, v in named.items()}
    temporary = path.with_suffix(".part")
    facts = {"step": str(step), "updates": str(average.updates)}
    save_file({k: t.clone() for k, t in tensors.items()}, temporary, metadata=facts)
    temporary.replace(path)


def _resume(
    path: Path, module: nn.Module, optimizers: list[torch.optim.Optimizer], average: _Average
) -> int:
    if not path.exists():
        return 0
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
        facts = file.metadata()
    trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
    saved = {k[6:]: t for k, t in tensors.items() if k.startswith("model.")}
    if {n: p.shape for n, p in trained.items()} != {n: t.shape for n, t in saved.items()}:
        raise CheckpointError(f"{path} belongs to another model; move it away to start anew")
    with torch.no_grad():
        for name, p in trained.items():
            p.copy_(saved[name])
    for name in average.weights:
        average.weights[name] = tensors[f"ema.{name}"]
    average.updates = int(facts["updates"])
    for number, optimizer in enumerate(optimizers):
        state = optimizer.state_dict()
        for key, tensor in tensors.items():
            if key.startswith(f"optimizer.{number}."):
                index, name = key.split(".", 3)[2:]
                state["state"].setdefault(int(index), {})[name] = tensor
        optimizer.load_state_dict(state)
    logger.info("going on from step %s of %s", facts["step"], path)
    return int(facts["step"])
