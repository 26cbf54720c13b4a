"""What a run of the training loop holds from step to step, and its file."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from ..errors import CheckpointError
from ..storage import safetensors_io
from .loop_config import LoopConfig

logger = logging.getLogger(__name__)

STATE = "state.safetensors"
BEST = "best.safetensors"
MOMENTS = {"AdamW": ("step", "exp_avg", "exp_avg_sq"), "Muon": ("momentum_buffer",)}
"""What an optimiser keeps of each parameter; by name, because older versions of torch lack Muon."""


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
        found.append(torch.optim.AdamW(rest, rate, config.betas, weight_decay=decay))
    if large:
        found.append(torch.optim.Muon(large, config.matrix_rate, weight_decay=decay))
    for group in (g for optimizer in found for g in optimizer.param_groups):
        group["peak"] = group["lr"]
    return found


class Average:
    """Exponential moving average of the trained weights, with the usual warm-up."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay, self.updates = decay, 0
        named = ((n, p) for n, p in module.named_parameters() if p.requires_grad and decay > 0)
        self.weights = {n: p.detach().clone().float() for n, p in named}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Take in the weights of a step."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for name, p in module.named_parameters():
            if name in self.weights:
                self.weights[name].lerp_(p.detach().float(), 1 - decay)

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Put the average in place of the weights."""
        for name, p in module.named_parameters():
            if name in self.weights:
                p.copy_(self.weights[name])

    @contextmanager
    def in_place(self, module: nn.Module) -> Iterator[None]:
        """The module at the average while the block runs."""
        own = {n: p.detach().clone() for n, p in module.named_parameters() if n in self.weights}
        self.copy_to(module)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, p in module.named_parameters():
                    if name in own:
                        p.copy_(own[name])


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
    """Write tensors of the same shapes over those of `state_of`, by name."""
    own = state_of(module)
    for name, tensor in tensors.items():
        own[name].copy_(tensor)


def on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same state dict in copies that later steps do not change."""
    return {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}


def _optimizer_tensors(found: Sequence[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """State of the optimisers under `optimizer.NUMBER.INDEX.NAME`."""
    return {
        f"optimizer.{number}.{index}.{name}": torch.as_tensor(value)
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
                    tensor = torch.empty_like(like, dtype=tensor.dtype).copy_(tensor).detach()
                state["state"].setdefault(int(index), {})[name] = tensor
        optimizer.load_state_dict(state)


def read_file(path: Path) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    """State dict and metadata of a state file.

    Raises:
        CheckpointError: it is damaged.
    """
    try:
        return safetensors_io.read_file(path, "state file")
    except CheckpointError as error:
        raise damaged(path) from error


def damaged(path: Path) -> CheckpointError:
    """What to say of a file that cannot be taken up."""
    return CheckpointError(f"{path} is damaged; delete it to start anew.")


def check_parts(path: Path, state: RunState, tensors: Mapping[str, Tensor]) -> None:
    """Raises CheckpointError unless a state dict has the names and shapes of `RunState.write`.

    An optimiser has nothing of a parameter that never had a gradient, and all of any other.
    """
    named = state.objective.named_parameters()
    wanted: dict[str, Tensor] = {f"model.{n}": p for n, p in named if p.requires_grad}
    wanted |= {f"buffer.{name}": b for name, b in buffers_of(state.objective).items()}
    wanted |= {f"ema.{name}": p for name, p in state.average.weights.items()}
    if (drawn := state.drawn()) is not None:
        wanted["generator"] = drawn
    shapes = {name: tensor.shape for name, tensor in wanted.items()}
    for number, optimizer in enumerate(state.optimizers):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for index, parameter in enumerate(parameters):
            whole = {
                f"optimizer.{number}.{index}.{name}": torch.Size() if name == "step" else shape
                for name, shape in dict.fromkeys(
                    MOMENTS[type(optimizer).__name__], parameter.shape
                ).items()
            }
            shapes |= whole if whole.keys() & tensors.keys() else {}
    if shapes != {name: tensor.shape for name, tensor in tensors.items()}:
        raise damaged(path)


def check_run(path: Path, facts: Mapping[str, str], fingerprint: str) -> None:
    """Raises CheckpointError unless a file belongs to the run with this fingerprint."""
    if facts.get("fingerprint") != fingerprint:
        raise CheckpointError(
            f"{path.parent} holds the state of another training (other settings, words or "
            "pictures); delete it or take another folder."
        )


def check_model(path: Path, module: nn.Module, tensors: Mapping[str, Tensor], prefix: str) -> None:
    """Raises CheckpointError unless a state dict has a module's parameters under a prefix."""
    wanted = {n: p.shape for n, p in module.named_parameters() if p.requires_grad}
    found = {k.removeprefix(prefix): t.shape for k, t in tensors.items() if k.startswith(prefix)}
    buffers = buffers_of(module).keys()
    if wanted != {name: shape for name, shape in found.items() if name not in buffers}:
        raise CheckpointError(f"{path} belongs to another model; move it away to start anew.")


def write_best(path: Path, best: Best, fingerprint: str) -> None:
    """Write the best weights so far."""
    facts = {"value": best.value.hex(), "best_step": str(best.step), "fingerprint": fingerprint}
    safetensors_io.write_atomic(best.tensors, facts, path)


def read_best(path: Path, module: nn.Module, fingerprint: str) -> Best:
    """What `write_best` wrote, or none so far.

    Raises:
        CheckpointError: the file is damaged, or belongs to another model or run.
    """
    if not path.exists():
        return Best()
    tensors, facts = read_file(path)
    check_model(path, module, tensors, "")
    check_run(path, facts, fingerprint)
    try:
        return Best(float.fromhex(facts["value"]), int(facts["best_step"]), tensors)
    except (KeyError, ValueError) as error:
        raise damaged(path) from error


def _meter_text(meter: Meter) -> str:
    """A meter as text, exactly."""
    return json.dumps(
        {name: [value.hex(), meter.counts[name]] for name, value in meter.sums.items()}
    )


def _meter_from(text: str) -> Meter:
    """What `_meter_text` wrote."""
    rows = json.loads(text)
    sums = {name: float.fromhex(value) for name, (value, _) in rows.items()}
    return Meter(sums, {name: int(count) for name, (_, count) in rows.items()})


@dataclass
class RunState:
    """All that a checkpoint keeps; the same for any number of processes.

    `generator`: of a recipe that draws from one generator in every step; `meter`: of all processes
    on the main one; `done`: steps; `judged`: steps at the last validation, -1 before any.
    """

    objective: nn.Module
    optimizers: list[torch.optim.Optimizer]
    average: Average
    scaler: GradScaler
    generator: torch.Generator | None
    meter: Meter = field(default_factory=Meter)
    done: int = 0
    judged: int = -1

    def drawn(self) -> Tensor | None:
        """State (n,) uint8 of the recipe's generator, if it has one."""
        return None if self.generator is None else self.generator.get_state()

    def draw_again(self, drawn: Tensor | None) -> None:
        """Go back to the state (n,) that `drawn` returned."""
        if self.generator is not None and drawn is not None:
            self.generator.set_state(drawn)

    def write(self, path: Path, fingerprint: str) -> None:
        """Write the file of the run with this fingerprint."""
        named = self.objective.named_parameters()
        tensors = {f"model.{name}": p.detach() for name, p in named if p.requires_grad}
        tensors |= {f"buffer.{name}": b for name, b in buffers_of(self.objective).items()}
        tensors |= {f"ema.{name}": p for name, p in self.average.weights.items()}
        tensors |= _optimizer_tensors(self.optimizers)
        if (drawn := self.drawn()) is not None:
            tensors["generator"] = drawn
        facts = {
            "step": str(self.done),
            "judged": str(self.judged),
            "updates": str(self.average.updates),
            "meter": _meter_text(self.meter),
            "scaler": json.dumps(self.scaler.state_dict()),
            "fingerprint": fingerprint,
        }
        stored = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
        safetensors_io.write_atomic(stored, facts, path)

    def read(self, path: Path, fingerprint: str) -> None:
        """Take up what `write` wrote, if there is a file.

        Raises:
            CheckpointError: it is damaged, or belongs to another model or run.
        """
        if not path.exists():
            return
        tensors, facts = read_file(path)
        check_model(path, self.objective, tensors, "model.")
        check_run(path, facts, fingerprint)
        check_parts(path, self, tensors)
        try:
            put(self.objective, _under("model.", tensors) | _under("buffer.", tensors))
            for name, weight in self.average.weights.items():
                weight.copy_(tensors[f"ema.{name}"])
            _put_optimizers(self.optimizers, tensors)
            if self.generator is not None:
                self.generator.set_state(tensors["generator"])
            if self.scaler.is_enabled():
                self.scaler.load_state_dict(json.loads(facts["scaler"]))
            self.average.updates, self.meter = int(facts["updates"]), _meter_from(facts["meter"])
            self.done, self.judged = int(facts["step"]), int(facts["judged"])
        except (KeyError, ValueError, RuntimeError) as error:
            raise damaged(path) from error
        logger.info("going on from step %d of %s", self.done, path)


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
