"""Names of layers in LoRA files: every family that ComfyUI knows, and the PEFT/diffusers export."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Literal

from ...errors import LayoutError
from ..layout import LoRALayout

Naming = Literal["kohya_ldm", "kohya_diffusers", "generic", "diffusers"]
Names = LoRALayout | Mapping[str, str]

_TEXT_KOHYA = re.compile(
    r"lora_te(?P<n>[12]?)_text_model_encoder_layers_(?P<layer>\d+)_"
    r"(?P<block>self_attn|mlp)_(?P<part>[qkv]_proj|out_proj|fc[12])$"
)
_TEXT_PROJECTION = re.compile(r"lora_te(?P<n>[12]?)_text_projection$")
_TEXT_DIFFUSERS = re.compile(r"text_encoder(?P<n>_2)?\.(?:base_model\.model\.)?(?P<path>.+)$")

_OTHER_PARTS = (
    (
        re.compile(
            r"lora_te|lora_prior_te|lycoris_te|text_encoder|clip_[lgh]\.|te[123]?[._]|"
            r"(?:base_model\.model\.|transformer\.)?text_(?:model|projection)\b|conditioner\.|"
            r"cond_stage_model\."
        ),
        "text encoders",
    ),
    (re.compile(r"(?:lora_)?vae[._]|first_stage_model\."), "the VAE"),
    (re.compile(r"lora_controlnet|control_model\.|controlnet[._]"), "a ControlNet"),
    (re.compile(r"bundle_emb\.|embeddings?\."), "taught words"),
)


_KINDS = (
    (re.compile(r".*\.(?:on_input|ia3_l)\b"), "an IA3"),
    (re.compile(r".*\.lora_E\b"), "an AdaLoRA"),
    (re.compile(r".*\.vera_lambda_"), "a VeRA"),
    (re.compile(r"oft_unet_|.*\.oft_[rRs]\b"), "an OFT of kohya's scripts or PEFT"),
    (re.compile(r".*\.boft_[Rs]\b"), "a BOFT of PEFT"),
    (
        re.compile(r".*\.(?:fourierft|vblora|randlora|hra|bone|miss|shira|c3a|waveft)_"),
        "a method of PEFT that is no LoRA",
    ),
)
"""Kinds that neither ComfyUI nor this pack reads, by their keys."""
_WRAPPERS = re.compile(
    r"(?:(?:base_model\.model|model|module|_orig_mod|pipe|pipeline|unet|diffusion_model|lora_unet)\.)+"
)
"""What programs put before a layer's name: PEFT, torch.compile, several devices, a pipeline."""


def other_part(key: str) -> str | None:
    """What an entry of a LoRA file belongs to that is no layer of the network that draws."""
    return next((part for pattern, part in _OTHER_PARTS if pattern.match(key)), None)


def why_nothing(keys: Collection[str]) -> str | None:
    """Why no entry of a LoRA acts on the network that draws, if there is a special reason."""
    kind = next((kind for key in keys if (kind := foreign_kind(key))), None)
    if kind:
        return f"This file is {kind}: neither ComfyUI nor this pack reads that kind. Use a LoRA."
    parts = dict.fromkeys(other_part(key) for key in keys)
    if parts and None not in parts:
        edited = " and ".join(str(part) for part in parts)
        return f"This LoRA edits {edited} only; connect one that edits the model."
    return None


def foreign_kind(key: str) -> str | None:
    """The kind of adapter that a key belongs to, where nobody here reads that kind."""
    return next((kind for pattern, kind in _KINDS if pattern.match(key)), None)


def diffusers_pairs(names: Names) -> dict[str, str]:
    """Diffusers name to canonical name."""
    if isinstance(names, LoRALayout):
        return {layer.diffusers_name or layer.name: layer.name for layer in names}
    return dict(names)


def stem_table(names: Names) -> dict[str, str]:
    """Every accepted UNet stem to its canonical layer name.

    Args:
        names: a layout, or a map of diffusers names to canonical names (``unet_name_map``).
    """
    table: dict[str, str] = {}
    for diffusers, ldm in diffusers_pairs(names).items():
        old = diffusers.replace(".to_", ".processor.to_")
        dotted = (diffusers, old, old.removesuffix(".0"), diffusers.replace(".to_out.0", ".to_out"))
        stems = [f"diffusion_model.{ldm}", ldm]
        flat = [name.replace(".", "_") for name in (ldm, diffusers)]
        stems += [before + name for before in ("", "lora_unet_", "lycoris_") for name in flat]
        prefixes = ("", "unet.", "base_model.model.", "unet.base_model.model.")
        stems += [prefix + name for prefix in prefixes for name in (*dotted, ldm)]
        table.update({stem: ldm for stem in stems})
    return table


def layer_name(stem: str, table: Mapping[str, str]) -> str | None:
    """Canonical layer of a UNet stem, whatever programs put before its name, in any case.

    Args:
        stem: the part of a key in front of what says its role.
        table: of `stem_table`.
    """
    small = stem.lower()
    bare = _WRAPPERS.sub("", small, count=1) if _WRAPPERS.match(small) else small
    bare = bare.removesuffix(".base_layer").replace("._orig_mod.", ".")
    return table.get(stem) or table.get(small) or table.get(bare)


def text_encoder_name(stem: str) -> str | None:
    """Canonical name (te1., te2.) of a text encoder stem."""
    match = _TEXT_KOHYA.match(stem)
    if match:
        path = f"text_model.encoder.layers.{match['layer']}.{match['block']}.{match['part']}"
        return f"te{match['n'] or 1}.{path}"
    match = _TEXT_PROJECTION.match(stem)
    if match:
        return f"te{match['n'] or 1}.text_projection"
    match = _TEXT_DIFFUSERS.match(stem)
    return f"te{2 if match['n'] else 1}.{match['path']}" if match else None


def file_stem(name: str, naming: Naming, to_diffusers: Mapping[str, str]) -> str:
    """File stem of a canonical layer.

    Raises:
        LayoutError: its diffusers name is needed and not in `to_diffusers`.
    """
    encoder = re.match(r"te([12])\.(.+)$", name)
    if encoder and naming == "diffusers":
        return f"text_encoder{'_2' if encoder[1] == '2' else ''}.{encoder[2]}"
    if encoder:
        return f"lora_te{encoder[1]}_{encoder[2].replace('.', '_')}"
    if naming == "kohya_ldm":
        return f"lora_unet_{name.replace('.', '_')}"
    if naming == "generic":
        return f"diffusion_model.{name}"
    diffusers = to_diffusers.get(name)
    if diffusers is None:
        raise LayoutError(f"The diffusers name of layer {name} is not known for this base model.")
    return (
        f"unet.{diffusers}" if naming == "diffusers" else f"lora_unet_{diffusers.replace('.', '_')}"
    )
