"""Every kind of identity model that can be loaded: our files, and folders that others publish."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import CheckpointError, shown
from ..models.identity_model import IdentityModel
from .checkpoint import load_model
from .hyperlora_folder import is_hyperlora_folder, load_hyperlora


@dataclass(frozen=True)
class ModelFolder:
    """A model that another project publishes as a folder of files.

    Attributes:
        title: its name.
        place: where its users keep such folders, below ComfyUI's models: its own name for the
            kind, then the rest of the way.
        holds: whether a folder is one, complete or not.
        load: reads it; takes the folder and a namespace of layer classes.
        trigger: words that its LoRAs need at the beginning of a prompt.
    """

    title: str
    place: tuple[str, ...]
    holds: Callable[[Path], bool]
    load: Callable[[str | Path, Any], IdentityModel]
    trigger: str = ""


MODEL_FOLDERS = (
    ModelFolder(
        title="HyperLoRA",
        place=("hyper_lora", "hyper_lora"),
        holds=is_hyperlora_folder,
        load=load_hyperlora,
        trigger="fcsks fxhks fhyks",
    ),
)
"""A kind of folder is known by its line here."""


def model_folder(path: Path) -> ModelFolder | None:
    """The kind of model that a folder holds; None for another folder, or a file."""
    return next((kind for kind in MODEL_FOLDERS if path.is_dir() and kind.holds(path)), None)


def load_identity_model(
    path: str | Path, operations: Any = nn, as_stored: bool = False
) -> IdentityModel:
    """Rebuilds a model on the CPU, in evaluation mode.

    Args:
        path: a file that `save_model` wrote, or a folder of one of MODEL_FOLDERS.
        operations: namespace of layer classes for the networks.
        as_stored: see `checkpoint.load_model`; folders of others do as they always do.

    Raises:
        CheckpointError: it is missing, incomplete, damaged, or none of these.
    """
    path = Path(path)
    if not path.is_dir():
        return load_model(path, operations, as_stored=as_stored)
    if (kind := model_folder(path)) is not None:
        return kind.load(path, operations)
    raise CheckpointError(f"The folder {shown(str(path), 300)} holds no model that is known here.")
