"""What a run of the training loop holds from step to step, and its file."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from ..config import Config
from ..errors import CheckpointError, ConfigError
from .average import Average
from .loop_config import LoopConfig
from .muon import Muon
from .sharding import local, sharded_as, whole
from .state_file import RunIdentity, check_tensors, damaged, read_state, write_state

logger = logging.getLogger(__name__)

BEST = "best.safetensors"
MOMENTS = {torch.optim.AdamW: ("step", "exp_avg", "exp_avg_sq"), Muon: ("momentum_buffer",)}
"""What an optimiser keeps of each parameter."""


def optimizers(
    objective: nn.Module, config: LoopConfig, matrices: Sequence[nn.Parameter] | None
) -> list[torch.optim.Optimizer]:
    """AdamW, and Muon for matrices when it is asked for.

    Args:
        objective: whose parameters that require a gradient are trained.
        config: learning rates and weight decay.
        matrices: what Muon trains; all weights of linear layers unless given.
    """
    linear = (m.weight for m in objective.modules() if isinstance(m, nn.Linear))
    wanted = linear if matrices is None else matrices
    chosen = {id(p) for p in wanted if config.matrix_rate}
    trained = [p for p in objective.parameters() if p.requires_grad]
    rest = [p for p in trained if id(p) not in chosen]
    large = [p for p in trained if id(p) in chosen]
    rate, decay = config.learning_rate, config.weight_decay
    found: list[torch.optim.Optimizer] = []
    if rest:
        found.append(torch.optim.AdamW(rest, rate, config.betas, config.eps, decay))
    if large:
        found.append(Muon(large, config.matrix_rate, weight_decay=decay))
    for group in (g for optimizer in found for g in optimizer.param_groups):
        group["peak"] = group["lr"]
    return found


@dataclass
class Meter:
    """Means of the metrics between two logs."""

    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, values: Mapping[str, Tensor | float]) -> None:
        """Take in the metrics () of one part of a step, by name."""
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(value)
            self.counts[name] = self.counts.get(name, 0) + 1

    def join(self, others: Sequence[Meter]) -> None:
        """Become the sum of several meters."""
        self.sums, self.counts = {}, {}
        for other in others:
            for name, value in other.sums.items():
                self.sums[name] = self.sums.get(name, 0.0) + value
                self.counts[name] = self.counts.get(name, 0) + other.counts[name]

    def pop(self) -> dict[str, float]:
        """The means; it starts anew."""
        means = {name: value / self.counts[name] for name, value in self.sums.items()}
        self.sums, self.counts = {}, {}
        return means


@dataclass
class Best:
    """The weights of the lowest validation loss so far."""

    value: float = float("inf")
    step: int = 0
    tensors: dict[str, Tensor] = field(default_factory=dict)


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """State dict of what training changes: parameters that require a gradient, and buffers."""
    named = {n: p.detach() for n, p in module.named_parameters() if p.requires_grad}
    return named | buffers_of(module)


def buffers_of(module: nn.Module) -> dict[str, Tensor]:
    """Those buffers, by name, that belong to a module's state dict."""
    kept = module.state_dict(keep_vars=True)
    return {name: b for name, b in module.named_buffers() if name in kept}


@torch.no_grad()
def put(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Write whole tensors of the same shapes over those of `state_of`, by name."""
    own = state_of(module)
    for name, tensor in tensors.items():
        local(own[name]).copy_(local(sharded_as(tensor, own[name])))


def on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same state dict in copies that later steps do not change."""
    return {n: whole(t).detach().to("cpu", copy=True).contiguous() for n, t in tensors.items()}


def _optimizer_tensors(found: Sequence[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """State of the optimisers under `optimizer.NUMBER.INDEX.NAME`."""
    return {
        f"optimizer.{number}.{index}.{name}": whole(torch.as_tensor(value))
        for number, optimizer in enumerate(found)
        for index, state in optimizer.state_dict()["state"].items()
        for name, value in state.items()
    }


def _put_optimizers(found: Sequence[torch.optim.Optimizer], tensors: Mapping[str, Tensor]) -> None:
    """Take up what `_optimizer_tensors` returned, in the memory layout of the parameters."""
    for number, optimizer in enumerate(found):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        state = optimizer.state_dict()
        for key, tensor in tensors.items():
            if key.startswith(f"optimizer.{number}."):
                index, name = key.split(".", 3)[2:]
                like = parameters[int(index)]
                if name != "step" and tensor.shape == like.shape:
                    tensor = sharded_as(tensor, like)
                    tensor = torch.empty_like(like, dtype=tensor.dtype).copy_(tensor).detach()
                state["state"].setdefault(int(index), {})[name] = tensor
        optimizer.load_state_dict(state)


@dataclass(frozen=True)
class BestFacts(Config):
    """What a file of best weights says: their validation loss, and after how many steps.

    Raises:
        ConfigError: a value that no run has.
    """

    value: float
    step: int

    def __post_init__(self) -> None:
        if not math.isfinite(self.value) or self.step < 0:
            raise ConfigError(f"The best of a run cannot be {self.value} at step {self.step}.")


@dataclass(frozen=True)
class RunFacts(Config):
    """The numbers of a state file.

    `meter`: names, sums as hexadecimal digits, and counts, in order; `best`: lowest validation
    loss so far; `scale`: that of a float16 loss, and steps since it grew. See `RunState` for the
    others.

    Raises:
        ConfigError: a value that no run has.
    """

    step: int
    judged: int = -1
    updates: int = 0
    meter: tuple[tuple[str, str, int], ...] = ()
    best: float | None = None
    scale: tuple[float, int] | None = None

    def __post_init__(self) -> None:
        sound = -1 <= self.judged <= self.step and 0 <= self.updates <= self.step
        sound = sound and (self.best is None or math.isfinite(self.best))
        if self.scale is not None:
            scale, growth = self.scale
            sound = sound and 0 < scale < math.inf and 0 <= growth < 2**31
        if not sound or not all(count > 0 for _, _, count in self.meter):
            raise ConfigError("A run cannot have these numbers.")
        self.to_meter()

    def to_meter(self) -> Meter:
        """The meter.

        Raises:
            ConfigError: a sum is no number.
        """
        try:
            sums = {name: float.fromhex(digits) for name, digits, _ in self.meter}
        except (ValueError, OverflowError) as error:
            raise ConfigError("A sum is no number.") from error
        return Meter(sums, {name: count for name, _, count in self.meter})


def check_model(path: Path, module: nn.Module, tensors: Mapping[str, Tensor], prefix: str) -> None:
    """Raises CheckpointError unless a state dict has a module's parameters under a prefix."""
    wanted = {n: p.shape for n, p in module.named_parameters() if p.requires_grad}
    found = {k.removeprefix(prefix): t.shape for k, t in tensors.items() if k.startswith(prefix)}
    buffers = buffers_of(module).keys()
    if wanted != {name: shape for name, shape in found.items() if name not in buffers}:
        raise CheckpointError(f"{path} belongs to another model; move it away to start anew.")


def write_best(path: Path, best: Best, run: RunIdentity) -> None:
    """Write the best weights so far."""
    write_state(path, best.tensors, BestFacts(best.value, best.step), run)


def read_best(path: Path, module: nn.Module, run: RunIdentity) -> Best:
    """What `write_best` wrote, or none so far.

    Raises:
        CheckpointError: the file is damaged, or belongs to another model or run.
    """
    if not path.exists():
        return Best()
    tensors, facts = read_state(path, run, BestFacts)
    check_model(path, module, tensors, "")
    check_tensors(path, tensors, state_of(module))
    return Best(facts.value, facts.step, tensors)


@dataclass
class RunState:
    """All that a checkpoint keeps; the same for any number of processes.

    `generator`: of a recipe that draws from one generator in every step; `meter`: of all processes
    on the main one; `done`: steps, of `steps`; `judged`: steps at the last validation, -1 before
    any; `lowest`: validation loss of the best weights on disk.
    """

    objective: nn.Module
    optimizers: list[torch.optim.Optimizer]
    average: Average
    scaler: GradScaler
    generator: torch.Generator | None
    steps: int
    meter: Meter = field(default_factory=Meter)
    done: int = 0
    judged: int = -1
    lowest: float = math.inf

    def drawn(self) -> Tensor | None:
        """State (n,) uint8 of the recipe's generator, if it has one."""
        return None if self.generator is None else self.generator.get_state()

    def draw_again(self, drawn: Tensor | None) -> None:
        """Go back to the state (n,) that `drawn` returned."""
        if self.generator is not None and drawn is not None:
            self.generator.set_state(drawn)

    def tensors(self) -> dict[str, Tensor]:
        """What `write` writes; every process of a sharded run calls it."""
        return self._own_tensors() | _optimizer_tensors(self.optimizers)

    def write(
        self, path: Path, run: RunIdentity, tensors: Mapping[str, Tensor] | None = None
    ) -> None:
        """Write the file of a run.

        Args:
            path: of the file.
            run: this one.
            tensors: what `tensors` returned, if it did.

        Raises:
            CheckpointError: it cannot be written; a file that was there is as it was.
        """
        state = self.scaler.state_dict()
        facts = RunFacts(
            step=self.done,
            judged=self.judged,
            updates=self.average.updates,
            meter=tuple((n, v.hex(), self.meter.counts[n]) for n, v in self.meter.sums.items()),
            best=self.lowest if math.isfinite(self.lowest) else None,
            scale=(state["scale"], state["_growth_tracker"]) if state else None,
        )
        write_state(path, self.tensors() if tensors is None else tensors, facts, run)

    def read(self, path: Path, run: RunIdentity, best: Best) -> None:
        """Take up what `write` wrote, if there is a file; nothing changes unless all of it fits.

        Args:
            path: of the file.
            run: this one.
            best: the weights that `read_best` found beside it.

        Raises:
            CheckpointError: it is damaged, belongs to another model or run, or knew better weights.
        """
        if not path.exists():
            return
        tensors, facts = read_state(path, run, RunFacts)
        check_model(path, self.objective, tensors, "model.")
        self._check(path, tensors, facts)
        if facts.best is not None and best.value > facts.best:
            raise CheckpointError(
                f"{path.with_name(BEST)} is missing or older than {path.name} beside it; delete "
                f"{path.parent} to start anew."
            )
        put(self.objective, _under("model.", tensors) | _under("buffer.", tensors))
        own = dict(self.objective.named_parameters())
        for name, weight in self.average.weights.items():
            weight.copy_(local(sharded_as(tensors[f"ema.{name}"], own[name])))
        _put_optimizers(self.optimizers, tensors)
        self.draw_again(tensors.get("generator"))
        if facts.scale is not None:
            state = {**self.scaler.state_dict(), "scale": facts.scale[0]}
            self.scaler.load_state_dict({**state, "_growth_tracker": facts.scale[1]})
        self.average.updates, self.meter = facts.updates, facts.to_meter()
        self.done, self.judged = facts.step, facts.judged
        self.lowest = math.inf if facts.best is None else facts.best
        logger.info("going on from step %d of %s", self.done, path)

    def _own_tensors(self) -> dict[str, Tensor]:
        """Everything of a state but the optimisers'."""
        named = dict(self.objective.named_parameters())
        tensors = {f"model.{n}": whole(p.detach()) for n, p in named.items() if p.requires_grad}
        tensors |= {f"buffer.{name}": b for name, b in buffers_of(self.objective).items()}
        tensors |= {f"ema.{n}": whole(p, named[n]) for n, p in self.average.weights.items()}
        drawn = self.drawn()
        return tensors if drawn is None else {**tensors, "generator": drawn}

    def _check(self, path: Path, tensors: Mapping[str, Tensor], facts: RunFacts) -> None:
        """Raises CheckpointError unless a file holds what `write` writes.

        An optimiser has nothing of a parameter that never had a gradient, and all of any other.
        """
        like = self._own_tensors()
        for number, optimizer in enumerate(self.optimizers):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            for index, parameter in enumerate(parameters):
                moments = {
                    f"optimizer.{number}.{index}.{name}": _COUNT if name == "step" else parameter
                    for name in MOMENTS[type(optimizer)]
                }
                like |= moments if moments.keys() & tensors.keys() else {}
        check_tensors(path, tensors, like)
        sound = facts.step <= self.steps and self.scaler.is_enabled() == (facts.scale is not None)
        for name, tensor in tensors.items():
            if name.endswith(".exp_avg_sq") and name.startswith("optimizer."):
                sound = sound and bool((tensor >= 0).all())
            elif name.endswith(".step") and name.startswith("optimizer."):
                count = float(tensor)
                sound = sound and count.is_integer() and 1 <= count <= facts.step
        try:
            if self.generator is not None:
                torch.Generator().set_state(tensors["generator"])
        except RuntimeError as error:
            raise damaged(path) from error
        if not sound:
            raise damaged(path)


_COUNT = torch.zeros(())
"""How an optimiser counts the steps of a parameter."""


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
