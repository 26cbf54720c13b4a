"""LoRA .safetensors files: the only reader and writer. Nothing in a file is trusted.

Files never hold face embeddings or the names of reference pictures: the
metadata record has no place for them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch
from torch import Tensor

from .. import __version__
from ..errors import LoRAFileError, shown
from ..lora.formats.change import change_width, keys_by_role
from ..lora.formats.report import ReadResult
from ..lora.formats.state_dict import from_state_dict, to_state_dict
from ..lora.formats.stems import Names, Naming
from ..lora.layout import LoRALayout
from ..lora.weights import LoRAWeights
from .safetensors_io import read_file, write_atomic

# base family of a layout: (modelspec.architecture, ss_base_model_version)
_FAMILIES = {
    "sdxl": ("stable-diffusion-xl-v1-base/lora", "sdxl_base_v1-0"),
    "sd15": ("stable-diffusion-v1/lora", "sd_v1"),
    "sd21": ("stable-diffusion-v2-512/lora", "sd_v2"),
}
_CONTEXT_WIDTHS = {2048: "sdxl", 768: "sd15", 1024: "sd21", 128: "demo"}
"""Width of the text that cross-attention reads, by base family."""
PRECISIONS = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class LoRAInfo:
    """What a written LoRA says about itself; every field is optional.

    Args:
        title: shown by model browsers.
        description: one or two sentences.
        license: licence of the result.
        model_hash: digest of the DiffLoRA model that made it.
        seed: seed of the sampled latent.
        steps: sampling steps, 0 for the mean latent.
        guidance_scale: guidance of the sampling.
        gate: face and image weight of the MIF gate, each 0 to 1.
        trigger_words: words that a prompt needs for it.
        tags: what model browsers file it under.
        method: how it was made.
        strength: the strength that its maker advises.
        train_steps, train_pictures, learning_rate: of a LoRA that was trained.
    """

    title: str = "DiffLoRA"
    description: str = "LoRA predicted from reference photos by DiffLoRA."
    license: str = ""
    model_hash: str = ""
    seed: int | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    gate: tuple[float, float] | None = None
    trigger_words: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    method: str = ""
    strength: float | None = None
    train_steps: int | None = None
    train_pictures: int | None = None
    learning_rate: float | None = None


@dataclass(frozen=True, eq=False)
class LoRAFile:
    """Raw content of a LoRA file."""

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]


def lora_metadata(weights: LoRAWeights, base: str, info: LoRAInfo | None = None) -> dict[str, str]:
    """Metadata of a LoRA file: modelspec.*, ss_* (kohya) and difflora.* strings.

    Args:
        weights: for rank and alpha; differing values are written as ``Dynamic`` (kohya's word).
        base: base family name of the layout.
        info: what else to say.
    """
    layers = weights.layers.values()
    ranks, alphas = ({getattr(layer, name) for layer in layers} for name in ("rank", "alpha"))
    return _metadata(ranks, alphas, base, info or LoRAInfo())


def _metadata(
    ranks: Collection[int], alphas: Collection[float], base: str, info: LoRAInfo
) -> dict[str, str]:
    """The texts of a LoRA whose layers have these ranks and alphas."""
    architecture, version = _FAMILIES.get(base, (f"{base}/lora", base))
    counts = {word: 1 for word in (*info.trigger_words, *info.tags)}  # kohya's: word to pictures
    stated = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": architecture,
        "modelspec.implementation": "https://github.com/kohya-ss/sd-scripts",
        "modelspec.title": info.title,
        "modelspec.description": info.description,
        "modelspec.date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "modelspec.license": info.license,
        "modelspec.trigger_phrase": ", ".join(info.trigger_words),
        "modelspec.tags": ", ".join(info.tags),
        "modelspec.usage_hint": None if info.strength is None else f"strength {info.strength:g}",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(next(iter(ranks))) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": f"{next(iter(alphas)):g}" if len(alphas) == 1 else "Dynamic",
        "ss_base_model_version": version,
        "ss_tag_frequency": json.dumps({info.title or "LoRA": counts}) if counts else None,
        "ss_training_comment": info.method,
        "ss_steps": info.train_steps,
        "ss_num_train_images": info.train_pictures,
        "ss_learning_rate": info.learning_rate,
        "difflora.version": __version__,
        "difflora.base": base,
        "difflora.model_hash": info.model_hash,
        "difflora.seed": info.seed,
        "difflora.steps": info.steps,
        "difflora.guidance_scale": info.guidance_scale,
        "difflora.gate": None if info.gate is None else ",".join(f"{g:.4g}" for g in info.gate),
        "difflora.strength": None if info.strength is None else f"{info.strength:g}",
    }
    return {key: str(value) for key, value in stated.items() if value not in (None, "")}


def base_of(state: Mapping[str, Tensor]) -> str | None:
    """Base family of a LoRA of any family, by the width of the text that it reads; else None."""
    for stem, keys in keys_by_role(state).items():
        if re.search(r"attn2[._](?:processor[._])?to_[kv]$", stem):
            width = change_width({role: state[key] for role, key in _plain_roles(keys).items()})
            if width in _CONTEXT_WIDTHS:
                return _CONTEXT_WIDTHS[width]
    return None


def _plain_roles(keys: Mapping[str, str]) -> dict[str, str]:
    """Role to key, PEFT's factors as the others."""
    return {role.removesuffix("_peft"): key for role, key in keys.items()}


def write_lora_state(
    path: str | Path,
    state: Mapping[str, Tensor],
    base: str,
    info: LoRAInfo,
    dtype: torch.dtype = torch.float16,
) -> Path:
    """Write a LoRA of any family as it is, atomically, with metadata that other programs read.

    Args:
        path: file to write, ending in ``.safetensors``.
        state: key to tensor.
        base: base family, see `base_of`.
        info: what the metadata says.
        dtype: of all real numbers but alphas.

    Raises:
        LoRAFileError: a value does not fit the dtype, or the disk is full or read-only.
    """
    stored = {}
    for key, tensor in state.items():
        real = tensor.is_floating_point() and not key.endswith(".alpha")
        value = tensor.detach().to("cpu", dtype if real else None).contiguous().clone()
        if key.endswith(".alpha"):
            value = value.float()
        if not torch.isfinite(value.float()).all():
            raise LoRAFileError(
                f"{shown(key)} has values that are not finite in {value.dtype}; nothing was "
                "written. Choose bfloat16 or float32."
            )
        stored[key] = value
    groups = [_plain_roles(keys) for keys in keys_by_role(state).values()]
    ranks = {len(state[keys["down"]]) for keys in groups if "down" in keys}
    alphas = {float(state[keys["alpha"]]) for keys in groups if "alpha" in keys}
    return write_atomic(stored, _metadata(ranks, alphas, base, info), path, LoRAFileError)


def write_lora_file(
    path: str | Path,
    weights: LoRAWeights,
    layout: LoRALayout,
    info: LoRAInfo | None = None,
    naming: Naming = "kohya_ldm",
    dtype: torch.dtype = torch.float16,
) -> Path:
    """Write one LoRA, atomically: the file is complete or not there.

    Args:
        path: file to write, ending in ``.safetensors``; its folder is made when missing.
        weights: one LoRA that fits the layout.
        layout: names the base model and its layers.
        info: what the metadata says.
        naming: key names, see ``lora.formats.state_dict.to_state_dict``.
        dtype: of the factors; float16 is what LoRA files usually hold.

    Returns:
        The path.

    Raises:
        LayoutError: when the weights do not fit the layout.
        LoRAFileError: when the ending is wrong, a value does not fit the dtype, or the disk is
            full or read-only.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise LoRAFileError(f"A LoRA file must end in .safetensors, got {path.name}.")
    layout.check(weights)
    state = to_state_dict(weights, naming, layout, dtype)
    metadata = lora_metadata(weights, layout.base, info)
    return write_atomic(state, metadata, path, LoRAFileError)


def read_lora_file(path: str | Path) -> LoRAFile:
    """Tensors and metadata of a LoRA file after a full check of its header.

    Raises:
        LoRAFileError: when the file is missing, truncated, not safetensors, or inconsistent.
    """
    # Not finite numbers are left to the reader of the layers, which knows what to say of them.
    return LoRAFile(*read_file(Path(path), "LoRA file", LoRAFileError, finite=False))


def load_lora(path: str | Path, names: Names, rank: int | None = None) -> ReadResult:
    """Weights of a LoRA file in canonical names, with a report.

    Args:
        path: a .safetensors file of any known key family.
        names: layout or name map, see ``lora.formats.state_dict.from_state_dict``.
        rank: rank for LoKr, LoHa and whole weight changes.

    Raises:
        LoRAFileError: when the file is damaged or not a readable LoRA; the message names it.
        LayoutError: when the LoRA is for another base model.
    """
    file = read_lora_file(path)
    try:
        return from_state_dict(file.tensors, names, rank, file.metadata)
    except LoRAFileError as error:
        raise LoRAFileError(f"{shown(Path(path).name)}: {error}") from error
