"""The base model that is trained on: the demo's, or SDXL from files on this machine."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ..base_model.diffusers_base import DiffusersBase
from ..demo import paths
from ..demo.networks.base import load_base
from ..storage.sdxl_checkpoint import load_sdxl

DEMO, SDXL = "demo", "sdxl"
TOKENIZER = Path("comfy", "sd1_tokenizer")
"""Where ComfyUI keeps CLIP's tokenizer."""


@dataclass(frozen=True, eq=False)
class LocalBase:
    """A base model and its family.

    Attributes:
        model: frozen.
        family: name of the base in layouts.
        full_size: whether the full-size network goes with it.
        text_encoders: that encode its prompts.
    """

    model: DiffusersBase
    family: str
    full_size: bool
    text_encoders: tuple[nn.Module, ...] = ()

    def without_encoders(self) -> None:
        """Takes VAE and text encoders off the device: what they make is kept in files."""
        for part in (self.model.vae, *self.text_encoders):
            nn.Module.to(part, "cpu")


def open_base(name: str, device: torch.device, tokenizer: str = "") -> LocalBase:
    """Loads a base model.

    Args:
        name: "demo", or a checkpoint file or a diffusers folder of SDXL.
        device: where it computes.
        tokenizer: folder of CLIP's tokenizer; empty takes that of the pipeline, or of the ComfyUI
            that COMFYUI_PATH names.

    Raises:
        DiffLoRAError: it cannot be read.
    """
    if name == DEMO:
        model = load_base(paths.BASE)
        model.unet.to(device)
        model.vae.to(device)
        return LocalBase(model, DEMO, False)
    comfyui = Path(os.environ.get("COMFYUI_PATH", paths.ROOT / ".comfyui")) / TOKENIZER
    words = Path(tokenizer) if tokenizer else comfyui if comfyui.is_dir() else None
    path = Path(name)
    loaded = load_sdxl(path, None if path.is_dir() and not tokenizer else words, device)
    return LocalBase(loaded.base, SDXL, True, loaded.text_encoders)
