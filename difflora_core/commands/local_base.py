"""The base model that is trained on: the demo's, or files on this machine."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..base_model.diffusers_base import DiffusersBase
from ..demo import paths
from ..demo.networks.base import load_base

DEMO = "demo"


@dataclass(frozen=True, eq=False)
class LocalBase:
    """A base model and its family.

    Attributes:
        model: frozen.
        family: name of the base in layouts.
        full_size: whether the full-size network goes with it.
    """

    model: DiffusersBase
    family: str
    full_size: bool

    def without_encoders(self) -> None:
        """Takes the VAE off the device: what it and the text encoders make is kept in files."""
        self.model.vae.to("cpu")


def open_base(name: str, device: torch.device) -> LocalBase:
    """Loads a base model.

    Args:
        name: "demo".
        device: where it computes.

    Raises:
        DiffLoRAError: it cannot be read.
    """
    model = load_base(paths.BASE)
    model.unet.to(device)
    model.vae.to(device)
    return LocalBase(model, DEMO, False)
