"""CLIP vision models from local files: a folder as transformers keeps it, or one file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import parse_json
from ..errors import EncoderError, shown
from ..vision.image_encoder import ClipImageEncoder
from .safetensors_io import read_file

_KNOWN = {
    768: (12, "quick_gelu"),  # ViT-B and
    1024: (16, "quick_gelu"),  # ViT-L of OpenAI
    1280: (16, "gelu"),  # ViT-H and
    1664: (16, "gelu"),  # ViT-bigG of OpenCLIP
}
"""Width of a vision tower to heads and activation, which its tensors do not tell."""


def load_clip_vision(path: str | Path, device: str | torch.device = "cpu") -> ClipImageEncoder:
    """A CLIP vision model, as ComfyUI's Load CLIP Vision and transformers have it.

    Args:
        path: a folder with config.json and safetensors, or a .safetensors file under the names of
            transformers, as ComfyUI's users keep them in models/clip_vision.
        device: where it computes.

    Raises:
        EncoderError: it is not there, damaged, or no CLIP vision with projection.
    """
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    path = Path(path)
    try:
        if path.is_dir():
            load: Any = CLIPVisionModelWithProjection.from_pretrained
            model = load(path, local_files_only=True, use_safetensors=True)
            return ClipImageEncoder(model.float(), device)
        tensors, facts = read_file(path, "CLIP vision", EncoderError)
        config = facts.get("config")
        sizes = parse_json(config, path.name, EncoderError) if config else _sizes(tensors)
        model = CLIPVisionModelWithProjection(CLIPVisionConfig(**sizes))
        wanted = {name for name in model.state_dict() if not name.endswith("position_ids")}
        found = {name: tensors[name].float() for name in wanted if name in tensors}
        if wanted != found.keys():
            raise EncoderError(_unfit(path, f"{sorted(wanted - found.keys())[0]} is missing"))
        model.load_state_dict(found, strict=False)  # but for the positions, all are there
    except EncoderError:
        raise
    except Exception as error:  # transformers says in many ways that a folder is no such model
        raise EncoderError(_unfit(path, str(error))) from error
    return ClipImageEncoder(model, device)


def _sizes(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """A vision tower's configuration off its tensors.

    Raises:
        KeyError: a tensor is not there, or the width is of no known tower.
    """
    place = "vision_model.embeddings."
    width, _, _, patch = tensors[f"{place}patch_embedding.weight"].shape
    heads, activation = _KNOWN[width]
    layers = {name.split(".")[3] for name in tensors if name.startswith("vision_model.encoder.")}
    positions = len(tensors[f"{place}position_embedding.weight"])
    return {
        "hidden_size": width,
        "intermediate_size": len(tensors["vision_model.encoder.layers.0.mlp.fc1.weight"]),
        "num_hidden_layers": len(layers),
        "num_attention_heads": heads,
        "image_size": math.isqrt(positions - 1) * patch,
        "patch_size": patch,
        "projection_dim": len(tensors["visual_projection.weight"]),
        "hidden_act": activation,
    }


def _unfit(path: Path, why: str) -> str:
    """What to say of something that is no CLIP vision."""
    return (
        f"{shown(str(path), 300)} is no CLIP vision with projection that can be read here "
        f"({shown(why, 200)}). Name the folder of one with config.json, or a file as ComfyUI keeps "
        "them in models/clip_vision."
    )
