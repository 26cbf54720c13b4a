"""The base model that is trained on: the demo's, or SDXL from files on this machine."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..base_model.diffusers_base import DiffusersBase
from ..base_model.protocol import TextCondition
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
    """

    model: DiffusersBase
    family: str
    full_size: bool

    def without_encoders(self) -> LocalBase:
        """The same without text encoders, whose memory is free once nobody holds this one.

        What they made is kept in files. The VAE, which has pictures to decode, waits on the CPU.
        """
        own = self.model
        own.vae.to("cpu")
        return replace(self, model=DiffusersBase(own.unet, own.vae, _no_prompts, own.scheduler))


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
    model = load_sdxl(path, None if path.is_dir() and not tokenizer else words, device)
    return LocalBase(model, SDXL, True)


def _no_prompts(prompts: Sequence[str]) -> TextCondition:
    raise RuntimeError("This base has given its text encoders away.")
