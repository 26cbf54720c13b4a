"""Changes to the demo base: a file of tensors that take the place of the base's own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ...errors import CheckpointError


def with_changes(
    base: Mapping[str, Tensor], changes: Mapping[str, Tensor], path: Path
) -> dict[str, Tensor]:
    """State dict of a base with tensors of `changes` in place of its own.

    Args:
        base: all tensors of the base.
        changes: some of them, in the same shapes.
        path: the file of the changes, for messages.

    Raises:
        CheckpointError: a change has a name or a shape that the base lacks.
    """
    foreign = [k for k, t in changes.items() if k not in base or base[k].shape != t.shape]
    if foreign:
        raise CheckpointError(
            f"{path} does not fit the demo base: {len(foreign)} of its {len(changes)} tensors have "
            f"a name or a shape that the base lacks (for example {foreign[0]}). Take the file that "
            "was made for this base, or make it again."
        )
    return {**base, **changes}
