"""Some LoRAs of a store, read when they are asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

from ..lora.weights import LoRAWeights
from .lora_store import LoRAStore


class LoRARows:
    """LoRAs of a store by place, some at a time; in memory there is what was asked for last.

    Args:
        store: indexed.
        rows: numbers of its rows; all of them unless given.
    """

    def __init__(self, store: LoRAStore, rows: Sequence[int] | None = None) -> None:
        self.store = store
        self.rows = tuple(range(len(store)) if rows is None else rows)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def digest(self) -> str:
        """Of the LoRAs and their order."""
        return hashlib.sha256(
            "".join(self.store.rows[row].digest for row in self.rows).encode()
        ).hexdigest()

    def batch(self, places: Sequence[int]) -> LoRAWeights:
        """LoRAs at places (B,), which may repeat: (B, ...) float32 on the CPU."""
        return self.store.batch([self.rows[place] for place in places])

    def parts(self, size: int) -> Iterator[LoRAWeights]:
        """All of them in order, at most `size` at once."""
        for start in range(0, len(self), size):
            yield self.batch(range(start, min(start + size, len(self))))
