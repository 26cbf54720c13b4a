"""What the files of the demo's networks must hold: every tensor, no other, each in its shape."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor, nn

from ...errors import CheckpointError, DiffLoRAError

REMEDY = "Make it again, or install the node pack again."


@contextmanager
def building(path: Path) -> Iterator[None]:
    """A block that builds a network from the metadata of a file.

    Raises:
        CheckpointError: the metadata lack something, or describe no network.
    """
    try:
        yield
    except (DiffLoRAError, KeyError, TypeError, ValueError, RuntimeError) as error:
        why = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(
            f"{path}: the description in its metadata is incomplete or damaged ({why}). {REMEDY}"
        ) from error


def load_strictly(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    path: Path,
    names: Mapping[str, str] | None = None,
) -> None:
    """Fill a network whose tensors are exactly those given.

    Args:
        module: the network.
        tensors: state dict, all that the file has for it.
        path: the file, for messages.
        names: name in the file of every tensor of the network, where they differ.

    Raises:
        CheckpointError: a tensor is missing, unknown or of another shape.
    """
    own = module.state_dict()
    names = {key: key for key in own} if names is None else names
    check_tensors({names[key]: tensor for key, tensor in own.items()}, tensors, path)
    there = {key: tensors[name] for key, name in names.items() if name in tensors}
    module.load_state_dict(there, strict=False)  # but for the positions, all are there


def check_tensors(wanted: Mapping[str, Tensor], found: Mapping[str, Tensor], path: Path) -> None:
    """Raises CheckpointError unless a file's state dict has the names and shapes wanted, alone."""
    shared = wanted.keys() & found.keys()
    misshapen = [name for name in shared if wanted[name].shape != found[name].shape]
    check_names(wanted.keys() - shared, found.keys() - shared, path, misshapen)


def check_names(
    missing: Iterable[str], unknown: Iterable[str], path: Path, misshapen: Iterable[str] = ()
) -> None:
    """Raises CheckpointError if there are any, but for CLIP's `position_ids`.

    They are constants, which some versions of transformers and ComfyUI store.
    """
    found = {"missing": missing, "unknown": unknown, "of another shape": misshapen}
    parts = []
    for problem, names in found.items():
        if wrong := sorted(name for name in names if not name.endswith("position_ids")):
            parts.append(f"{problem}: {len(wrong)} (for example {wrong[0]})")
    if parts:
        raise CheckpointError(
            f"{path} does not fit its own configuration; tensors {', '.join(parts)}. {REMEDY}"
        )
