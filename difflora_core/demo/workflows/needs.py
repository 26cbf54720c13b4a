"""What an artist must bring for a full-size workflow: folder, file and where it comes from.

Read from the graph itself, so that a note names what its graph loads and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

_HUB = "https://huggingface.co"
SDXL_FILES = {
    "checkpoints": (
        "sd_xl_base_1.0.safetensors",
        f"{_HUB}/stabilityai/stable-diffusion-xl-base-1.0/resolve/main/sd_xl_base_1.0.safetensors",
    ),
    "clip_vision": (
        "clip-vit-large-patch14.safetensors",
        f"{_HUB}/openai/clip-vit-large-patch14/resolve/main/model.safetensors",
    ),
    "controlnet": (
        "instantid_controlnet.safetensors",
        f"{_HUB}/InstantX/InstantID/resolve/main/ControlNetModel/"
        "diffusion_pytorch_model.safetensors",
    ),
}
"""Folder to file name and address of what others publish."""
_FACES = "https://github.com/deepinsight/insightface/tree/master/model_zoo"
_OWN_PICTURES = (
    "Put your own picture into every **Load Image**; the drawn ones only hold the place."
)


def files_to_bring(nodes: Sequence[Mapping[str, Any]]) -> str:
    """The part of a note (Markdown) that names the files of a graph's loaders.

    Args:
        nodes: of a workflow file.
    """
    lines = ["**Bring these files first**"]
    for node in nodes:
        says = _LOADERS.get(node["type"])
        line = f"- {says(str(node['widgets_values'][0]))}" if says else ""
        if line and line not in lines:
            lines.append(line)
    if any(node["type"] == "LoadImage" for node in nodes):
        lines += ["", _OWN_PICTURES]
    return "\n".join(lines)


def _published(folder: str, remark: str) -> Callable[[str], str]:
    """A file that somebody publishes, saved under the name of the loader."""
    page, _, file = SDXL_FILES[folder][1].partition("/resolve/main/")

    def say(name: str) -> str:
        renamed = "" if file == name else f" (there: `{file}`)"
        return f"`models/{folder}/{name}`{remark}: from {page}{renamed}"

    return say


def _identity_model(name: str) -> str:
    folder, _, variant = name.partition("/")
    if folder == "hyper_lora":
        return (
            f"`models/hyper_lora/hyper_lora/{variant}/`: the four files as they are published "
            f"(3 GB), from {_HUB}/bytedance-research/HyperLoRA"
        )
    return (
        f"`models/difflora/{name}`: a DiffLoRA model for SDXL. None is published with this pack "
        "yet; it has to be trained (README, For trainers)"
    )


_LOADERS: dict[str, Callable[[str], str]] = {
    "CheckpointLoaderSimple": _published("checkpoints", ", or any SDXL checkpoint"),
    "CLIPVisionLoader": _published("clip_vision", " (CLIP ViT-L/14)"),
    "ControlNetLoader": _published("controlnet", ""),
    "DiffLoRA_LoadFaceAnalysis": lambda name: (
        f"`models/insightface/models/{name}/`: its .onnx files, `2d106det.onnx` too (weights for "
        f"non-commercial research), from {_FACES}"
    ),
    "DiffLoRA_LoadModel": _identity_model,
    "DiffLoRA_LoadConcept": lambda name: (
        f"`models/difflora_concepts/{name}`: a word of yours, taught with the workflow "
        "*sdxl_teach_concept*"
    ),
    "DiffLoRA_LoadStyle": lambda name: (
        f"`models/difflora_styles/{name}`: a style of yours, trained with the workflow "
        "*sdxl_few_shot_style* or *sdxl_para_style*"
    ),
    "DiffLoRA_LoadLoRAFile": lambda name: (
        f"`models/loras/{name}`: a LoRA of a person that you have, for SDXL"
    ),
}
"""Loader to what it needs, by the name in its first widget."""
