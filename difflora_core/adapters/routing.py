"""Shows which of its parts an adapter takes, for adapters that choose between several. Ours.

An adapter that routes calls `show_routing` whenever a layer runs; who wants to know watches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

Watcher = Callable[[str, Tensor], None]
"""Gets a layer's name and its weights (B, n), which sum to 1, at every call of the layer."""

_WATCHER: ContextVar[Watcher | None] = ContextVar("who watches the routing", default=None)


def show_routing(layer: str, weights: Tensor) -> None:
    """Tell who watches what a layer takes of each of its n parts: weights (B, n)."""
    watcher = _WATCHER.get()
    if watcher is not None:
        watcher(layer, weights.detach())


@contextmanager
def watched_routing(watcher: Watcher) -> Iterator[None]:
    """Shows a function which part acts where while the block runs."""
    token = _WATCHER.set(watcher)
    try:
        yield
    finally:
        _WATCHER.reset(token)
