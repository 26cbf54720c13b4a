"""FSDP: every process keeps its own part of what is trained, and sees the whole while it computes.

Parts are those of torch's `fully_shard` (FSDP2, arXiv:2304.11277): of weights, gradients, the
optimiser's moments and the average of the weights. The module whose forward is the loss is one
unit: its weights are brought together when its forward begins, and each part of the gradients is
summed for its owner after the backward pass. So a recipe may call whatever methods it has inside
that forward; outside of it (in validations and previews) `gathered` shows it the whole weights.

Unlike the plain way (`processes`), processes wait for each other inside a step. The loop therefore
has them agree before and after the forward pass; one that breaks down between leaves the others to
the group's own time limit.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from .hooks import Hooks
from .loop_config import LoopConfig
from .processes import Processes

LAUNCHED = "ACCELERATE_USE_FSDP"
"""What `accelerate launch --use_fsdp` tells its processes."""
_TABLES = ("_hooks", "_hooks_with_kwargs")
"""Ends of the names under which torch's modules keep their hooks."""


def shard(
    objective: nn.Module, config: LoopConfig, hooks: Hooks, processes: Processes
) -> Callable[[], None]:
    """Leaves each of several processes its part of the weights, if that was asked for.

    Numbers alone, and what is not trained, stay whole.

    Args:
        objective: on its device; changed in place.
        config: of the run.
        hooks: of the recipe.
        processes: who takes part.

    Returns:
        What gives every process the whole weights again, as plain parameters; all call it.

    Raises:
        ConfigError: something else that was asked for does not go with it.
    """
    wanted = config.shard or os.environ.get(LAUNCHED, "") == "true"
    if not wanted or processes.count == 1:
        return lambda: None
    against = {
        "precision fp16 (take bf16)": config.precision == "fp16",
        "compile": config.compile,
        "Muon (matrix_rate)": bool(config.matrix_rate),
        "gradients that are scaled by the recipe": hooks.scale_gradients is not None,
    }
    found = [name for name, there in against.items() if there]
    if found:
        raise ConfigError(f"Weights cannot be shared out by FSDP with {' and '.join(found)}.")
    try:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
    except ImportError as missing:
        raise ConfigError("To share weights out by FSDP, install torch 2.7 or newer.") from missing
    device = next(objective.parameters()).device
    whole = {p for p in objective.parameters() if not p.requires_grad or p.ndim == 0}
    mesh = init_device_mesh(device.type, (processes.count,))
    own_class = type(objective)  # torch puts one of its own in front
    before = {module: _hooks(module) for module in objective.modules()}
    fully_shard(objective, mesh=mesh, ignored_params=whole)
    return lambda: _make_whole(objective, own_class, before)


def is_part(tensor: Tensor) -> bool:
    """Whether this process holds a part of a tensor alone (a DTensor)."""
    return hasattr(tensor, "full_tensor")


def is_sharded(objective: nn.Module) -> bool:
    """Whether this process holds a part of a module alone."""
    return any(map(is_part, objective.parameters()))


@contextmanager
def gathered(objective: nn.Module) -> Iterator[None]:
    """The module with whole weights, which are only to be read; all processes enter together."""
    if not is_sharded(objective):
        yield
        return
    objective.unshard()  # type: ignore[operator]  # torch gives the module this method
    try:
        yield
    finally:
        objective.reshard()  # type: ignore[operator]


@torch.no_grad()
def _make_whole(
    objective: nn.Module, own_class: type, hooks: Mapping[nn.Module, dict[str, Any]]
) -> None:
    """Puts plain parameters in place again, and the class and hooks that modules had before."""
    objective.unshard()  # type: ignore[operator]
    copies: dict[int, nn.Parameter] = {}
    for module in objective.modules():
        for name, p in module.named_parameters(recurse=False):
            if p.requires_grad and p.ndim:
                plain = copies.setdefault(id(p), nn.Parameter(p.detach().clone()))
                setattr(module, name, plain)
    for module, own in hooks.items():
        vars(module).update(own)
    objective.__class__ = own_class


def _hooks(module: nn.Module) -> dict[str, Any]:
    """Copies of the tables of hooks of a module."""
    return {n: copy(table) for n, table in vars(module).items() if n.endswith(_TABLES)}


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, in the same memory."""
    part: Any = tensor.detach() if is_part(tensor) else tensor
    return part.to_local() if is_part(tensor) else tensor


def whole(tensor: Tensor, like: Tensor | None = None) -> Tensor:
    """All parts of a tensor together; every process calls it.

    Args:
        tensor: sharded, or a part of what is.
        like: sharded as the part is.
    """
    there: Any = tensor.detach()
    if like is not None and is_part(like):
        from torch.distributed.tensor import DTensor

        own: Any = like
        there = DTensor.from_local(
            there.to(own.device), own.device_mesh, own.placements, shape=own.shape,
            stride=own.stride(),
        )  # fmt: skip
    return there.full_tensor() if is_part(there) else tensor


def sharded_as(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, which every process has, in the parts of another."""
    if not is_part(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    own: Any = like
    there = tensor.to(own.device)
    return distribute_tensor(there, own.device_mesh, own.placements, src_data_rank=None)
