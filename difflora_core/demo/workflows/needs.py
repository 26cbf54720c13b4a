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
OWN_CHECKPOINT = "my_checkpoint.safetensors"
"""Of the artist: a teacher to learn a look from."""
_FACES = "https://github.com/deepinsight/insightface/releases/download/v0.7"
HYPER = "hyper_lora/"
"""The names of HyperLoRA's variants begin so."""
_OWN_FILES = {
    "DiffLoRA_LoadModel": "train",
    "DiffLoRA_LoadConcept": "teach",
    "DiffLoRA_LoadStyle": "train",
    "DiffLoRA_LoadLoRAFile": "bring",
    "CheckpointLoaderSimple": "bring",
}
"""Loaders of what is the artist's own, and how one comes by it."""
_OWN_PICTURES = (
    "Put your own picture into every **Load Image**; the drawn ones only hold the place."
)


def files_to_bring(nodes: Sequence[Mapping[str, Any]]) -> str:
    """The part of a note (Markdown) that names the files of a graph's loaders.

    What nobody publishes comes first: without it the other files are of no use.

    Args:
        nodes: of a workflow file.
    """
    ordered = sorted(nodes, key=lambda node: not _is_own(node))
    says = [_LOADERS[n["type"]](_file(n)) for n in ordered if n["type"] in _LOADERS]
    first, *others = dict.fromkeys(says)
    lines = [f"**Bring first** {first}", *(f"- {line}" for line in others)]
    if any(node["type"] == "LoadImage" for node in nodes):
        lines += ["", _OWN_PICTURES]
    return "\n".join(lines)


def what_is_missing(nodes: Sequence[Mapping[str, Any]]) -> str:
    """A few words for a group's title: what its nodes load and nobody publishes; or nothing."""
    for kind, verb in _OWN_FILES.items():
        names = [_file(node) for node in nodes if node["type"] == kind and _is_own(node)]
        if any(name.startswith(HYPER) for name in names):
            return "download HyperLoRA first"
        if names:
            names = [name.removesuffix(".safetensors") for name in names]
            return f"{verb} {' and '.join(names)} first"
    return ""


def _is_own(node: Mapping[str, Any]) -> bool:
    """True for a loader of what nobody publishes."""
    if node["type"] == "CheckpointLoaderSimple":
        return _file(node) == OWN_CHECKPOINT
    return node["type"] in _OWN_FILES


def _file(node: Mapping[str, Any]) -> str:
    """What a loader loads."""
    return str(node["widgets_values"][0])


def _published(folder: str, remark: str) -> Callable[[str], str]:
    """A file that somebody publishes, saved under the name of the loader."""
    page, _, file = SDXL_FILES[folder][1].partition("/resolve/main/")

    def say(name: str) -> str:
        renamed = "" if file == name else f" (there: `{file}`)"
        return f"`models/{folder}/{name}`{remark}: from {page}{renamed}"

    return say


def _identity_model(name: str) -> str:
    if name.startswith(HYPER):
        return (
            f"`models/hyper_lora/{name}/`: the four files as they are published "
            f"(3 GB), from {_HUB}/bytedance-research/HyperLoRA"
        )
    return (
        f"`models/difflora/{name}`: a DiffLoRA model for SDXL. None is published yet; it has to be "
        "trained (README, For trainers). Public weights are in *sdxl_hyperlora_portrait*"
    )


def _checkpoint(name: str) -> str:
    if name == OWN_CHECKPOINT:
        return f"`models/checkpoints/{name}`: an SDXL checkpoint that you have, with a look"
    return _published("checkpoints", ", or any SDXL checkpoint")(name)


_LOADERS: dict[str, Callable[[str], str]] = {
    "CheckpointLoaderSimple": _checkpoint,
    "CLIPVisionLoader": _published("clip_vision", " (CLIP ViT-L/14)"),
    "ControlNetLoader": _published("controlnet", ""),
    "DiffLoRA_LoadFaceAnalysis": lambda name: (
        f"`models/insightface/models/{name}/`: its .onnx files, `2d106det.onnx` too (weights for "
        f"non-commercial research), unpacked from {_FACES}/{name}.zip"
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
