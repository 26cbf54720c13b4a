"""Names and shapes of what SDXL's files hold, as ComfyUI's own classes have them, in JSON.

`python shapes.py COMFYUI_FOLDER`: a process of its own, since a module of ComfyUI is named `nodes`.
Everything is built on the meta device: no memory, a few seconds.
"""

from __future__ import annotations

import importlib
import json
import sys
from typing import Any

UNET = {
    "image_size": 32,
    "in_channels": 4,
    "num_res_blocks": [2, 2, 2],
    "channel_mult": [1, 2, 4],
    "num_classes": "sequential",
    "transformer_depth_middle": 10,
    "num_heads": -1,
    "num_head_channels": 64,
    "use_spatial_transformer": True,
    "legacy": False,
}
"""What ComfyUI reads from a checkpoint's names beside `comfy.supported_models.SDXL.unet_config`."""
OUTPUT_DEPTHS = [0, 0, 0, 2, 2, 2, 10, 10, 10]
VAE = {
    "double_z": True,
    "z_channels": 4,
    "resolution": 256,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 128,
    "ch_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "attn_resolutions": [],
    "dropout": 0.0,
}

Shapes = dict[str, list[int]]


def main(comfyui: str) -> None:
    """Print the shapes of every file by its folder in ComfyUI's models."""
    sys.path.insert(0, comfyui)
    sys.argv = [sys.argv[0], "--cpu"]  # ComfyUI reads it when it is imported
    importlib.import_module("comfy.options").enable_args_parsing()
    found = {
        "checkpoints": checkpoint_shapes(),
        "controlnet": controlnet_shapes(),
        "clip_vision": vision_shapes(),
        "photomaker": photomaker_shapes(),
    }
    sys.stdout.write(json.dumps(found))


def checkpoint_shapes() -> Shapes:
    """UNet, both text encoders and the VAE in one file, as SDXL is published."""
    family = importlib.import_module("comfy.supported_models").SDXL
    config = {**UNET, **family.unet_config}
    unet = _on_meta(
        "comfy.ldm.modules.diffusionmodules.openaimodel",
        "UNetModel",
        out_channels=4,
        transformer_depth_output=OUTPUT_DEPTHS,
        operations=importlib.import_module("comfy.ops").disable_weight_init,
        **config,
    )
    vae = _on_meta("comfy.ldm.models.autoencoder", "AutoencoderKL", ddconfig=VAE, embed_dim=4)
    text = _on_meta("comfy.sdxl_clip", "SDXLClipModel", device="meta")
    stored = family(config).process_clip_state_dict_for_saving(text.state_dict())
    return {
        **_shapes(unet.state_dict(), "model.diffusion_model."),
        **_shapes(vae.state_dict(), "first_stage_model."),
        **{name: shape for name, shape in _shapes(stored).items() if "position_ids" not in name},
    }


def controlnet_shapes() -> Shapes:
    """A ControlNet for SDXL that takes a picture, with the bare names of the original code."""
    family = importlib.import_module("comfy.supported_models").SDXL
    config = {**UNET, **family.unet_config}
    operations = importlib.import_module("comfy.ops").disable_weight_init
    network = _on_meta(
        "comfy.cldm.cldm", "ControlNet", hint_channels=3, operations=operations, **config
    )
    return _shapes(network.state_dict())


def vision_shapes() -> Shapes:
    """CLIP ViT-L/14 with its projection: what ComfyUI names models with by its configuration."""
    transformers = importlib.import_module("transformers")
    config = transformers.CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=224,
        patch_size=14,
        projection_dim=768,
    )
    network = _on_meta("transformers", "CLIPVisionModelWithProjection", config)
    shapes = _shapes(network.state_dict())
    return {name: shape for name, shape in shapes.items() if "position_ids" not in name}


def photomaker_shapes() -> Shapes:
    """PhotoMaker's encoder of a person: CLIP ViT-L/14, a projection more, and the fusion."""
    encoder = _on_meta("comfy_extras.nodes_photomaker", "PhotoMakerIDEncoder")
    return _shapes(encoder.state_dict())


def _on_meta(module: str, name: str, /, *arguments: Any, **settings: Any) -> Any:
    """A network without its numbers."""
    torch = importlib.import_module("torch")
    with torch.device("meta"):
        return getattr(importlib.import_module(module), name)(*arguments, **settings)


def _shapes(state: Any, prefix: str = "") -> Shapes:
    return {prefix + name: list(value.shape) for name, value in state.items()}


if __name__ == "__main__":
    main(sys.argv[1])
