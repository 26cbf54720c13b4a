"""The running average of the weights of a run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from .sharding import local


class Average:
    """Exponential moving average of the trained weights, with the usual warm-up.

    Of weights that are shared out it is this process's part.

    Args:
        module: whose parameters that require a gradient are averaged.
        decay: 0 averages nothing.
        device: where the average is kept; by default where each parameter is.
    """

    def __init__(self, module: nn.Module, decay: float, device: torch.device | None = None) -> None:
        self.decay, self.updates = decay, 0
        named = ((n, p) for n, p in module.named_parameters() if p.requires_grad and decay > 0)
        self.weights = {n: local(p.detach()).to(device, torch.float32, copy=True) for n, p in named}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Take in the weights of a step."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for name, p in module.named_parameters():
            if name in self.weights:
                own = self.weights[name]
                own.lerp_(local(p.detach()).to(own), 1 - decay)

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Put the average in place of the weights."""
        for name, p in module.named_parameters():
            if name in self.weights:
                local(p).copy_(self.weights[name])

    @contextmanager
    def in_place(self, module: nn.Module) -> Iterator[None]:
        """The module at the average while the block runs."""
        own = {
            n: local(p.detach()).clone() for n, p in module.named_parameters() if n in self.weights
        }
        self.copy_to(module)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, p in module.named_parameters():
                    if name in own:
                        local(p).copy_(own[name])
