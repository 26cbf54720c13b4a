"""States of training runs: the loop's, its best weights, DreamBooth's snapshots.

A state holds a digest of itself, which refuses nearly everything. So each is read twice: as it was
edited, and with a digest that fits, as somebody would write who knows the format.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler

from difflora_core.errors import CheckpointError
from difflora_core.lora.weights import LoRAWeights
from difflora_core.storage.safetensors_io import read_file
from difflora_core.training.average import Average
from difflora_core.training.loop_config import LoopConfig
from difflora_core.training.loop_state import (
    Best,
    Meter,
    RunState,
    optimizers,
    read_best,
    state_of,
    write_best,
)
from difflora_core.training.lora.dreambooth import DreamBoothConfig, _factors, _Snapshots
from difflora_core.training.state_file import RunIdentity, _digest
from tests.contracts import contract_files

from .reader import Reader, same, sound, written
from .safetensors_edits import SafeFile

RUN = RunIdentity("fingerprint", {"steps": 10})
CONFIGS = {
    "AdamW": LoopConfig(steps=10),
    "average": LoopConfig(steps=10, ema=0.9),
    "Muon": LoopConfig(steps=10, matrix_rate=0.01),
    "drawn": LoopConfig(steps=10, ema=0.5, seed=1),
}
SNAPSHOT_STEP = 3


def _module() -> nn.Module:
    """A small network with buffers and a frozen part."""
    made = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    made[0].bias.requires_grad_(False)
    return made


def _state(family: str) -> RunState:
    """A run before its first step."""
    config, module = CONFIGS[family], _module()
    generator = torch.Generator().manual_seed(2) if family == "drawn" else None
    return RunState(
        module,
        optimizers(module, config, None),
        Average(module, config.ema),
        GradScaler("cpu", enabled=family == "drawn"),
        generator,
        config.steps,
    )


def _valid_state(family: str) -> bytes:
    """A run after a step."""
    state = _state(family)
    state.objective(torch.ones(2, 3)).sum().backward()
    for optimizer in state.optimizers:
        optimizer.step()
    state.average.update(state.objective)
    state.meter, state.done, state.judged = Meter({"loss": 0.5}, {"loss": 2}), 1, 0
    return written(lambda path: state.write(path, RUN))


def _read_state(path: Path, family: str) -> tuple[str, RunState]:
    state = _state(family)
    state.read(path, RUN, Best())
    return family, state


def _check_state(read: tuple[str, RunState], path: Path) -> None:
    family, state = read
    moments = [optimizer.state_dict()["state"] for optimizer in state.optimizers]
    sound([state_of(state.objective), state.average.weights, moments, state.meter])
    assert 0 <= state.done <= state.steps, "step"
    assert -1 <= state.judged <= state.done, "judged"
    assert 0 <= state.average.updates <= state.done, "updates"
    state.meter.pop()
    for optimizer in state.optimizers:  # it can go on
        optimizer.step()
    sound(state_of(state.objective))
    copy = path.with_name("copy.safetensors")
    state.write(copy, RUN)
    again = _read_state(copy, family)[1]
    assert same(state_of(again.objective), state_of(state.objective)), "comes back changed"


def _read_best(path: Path, family: str) -> Best:
    return read_best(path, _module(), RUN)


def _check_best(best: Best, path: Path) -> None:
    sound([best.value, best.tensors])
    assert best.step >= 0, "step below 0"
    copy = path.with_name("copy.safetensors")
    write_best(copy, best, RUN)
    assert same(read_best(copy, _module(), RUN), best), "comes back changed"


def _snapshots(folder: Path) -> _Snapshots:
    config = DreamBoothConfig(steps=SNAPSHOT_STEP)
    weights = contract_files.tiny_lora()
    objective = SimpleNamespace(weights=weights, config=config, copy=lambda: weights)
    return _Snapshots(objective, folder, RUN)


def _write_snapshot(path: Path) -> None:
    _snapshots(path.parent).after_step(SNAPSHOT_STEP)


def _read_snapshot(path: Path, family: str) -> LoRAWeights:
    return _snapshots(path.parent)._read(path, SNAPSHOT_STEP)


def _check_snapshot(weights: LoRAWeights, path: Path) -> None:
    like = _factors(contract_files.tiny_lora())
    found = _factors(weights)
    sound(found)
    assert {n: t.shape for n, t in found.items()} == {n: t.shape for n, t in like.items()}, "shapes"


def _sealed(read: Callable[[Path, str], object]) -> Callable[[Path, str], object]:
    """Reads a file whose digest was made to fit, where it can be read at all."""

    def seal_and_read(path: Path, family: str) -> object:
        file = SafeFile.parse(path.read_bytes())
        try:
            tensors, texts = read_file(path, "state file", finite=False)
        except CheckpointError:
            file = None
        if file is not None:
            file.metadata["digest"] = _digest(tensors, texts)
            path.write_bytes(file.pack())
        return read(path, family)

    return seal_and_read


STATES = {family: (lambda f=family: _valid_state(f)) for family in CONFIGS}
BEST_SO_FAR = Best(0.25, 3, state_of(_module()))
BEST = {"best": lambda: written(lambda path: write_best(path, BEST_SO_FAR, RUN))}
SNAPSHOT = {"snapshot": lambda: written(_write_snapshot, f"snapshot-{SNAPSHOT_STEP}.safetensors")}
READERS = tuple(
    Reader(name + ending, families, seal(read), check, share=share)
    for ending, seal in (("", lambda read: read), (", digest made", _sealed))
    for name, families, read, check, share in (
        ("loop state", STATES, _read_state, _check_state, 2),
        ("best of a run", BEST, _read_best, _check_best, 1),
        ("snapshot", SNAPSHOT, _read_snapshot, _check_snapshot, 1),
    )
)
