"""The demo base model: SDXL's classes at tiny size, trained on the rendered pictures.

Two text encoders, text-time embedding, an AutoencoderKL and a two-level UNet with attention at
both levels, v-prediction on SDXL's noise schedule. One file holds it all under ComfyUI's names.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from ...base_model.diffusers_base import DiffusersBase, time_ids
from ...base_model.protocol import TextCondition
from ...config import parse_json
from ...diffusion.objective import abar_at, add_noise, training_target
from ...lora.layout import TARGETS, LoRALayout, layout_from_unet_config, unet_name_map
from ...models.layers import DrawnFrom
from ...storage.safetensors_io import read_file, write_atomic
from ..world.pool import PicturePool
from .changes import with_changes
from .stored import building, check_tensors, load_strictly
from .text import clip_numbers, encode, new_text_encoders, tokenize
from .vae import VAE_CONFIG

UNET_CONFIG: dict[str, Any] = {
    "sample_size": 16,
    "in_channels": 8,
    "out_channels": 8,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    "block_out_channels": [64, 128],
    "layers_per_block": 1,
    "transformer_layers_per_block": 1,
    "cross_attention_dim": 128,
    "attention_head_dim": [2, 4],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 1600,
}
STEPS = 1000
"""Length of the noise schedule."""
SCHEDULER_CONFIG: dict[str, Any] = {
    "num_train_timesteps": STEPS,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "timestep_spacing": "leading",
}
LORA_RANK = 4

_PREFIXES = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_l": "conditioner.embedders.0.transformer.",
    "text_g": "conditioner.embedders.1.transformer.",
}


class DemoText(nn.Module):
    """Both text encoders as one module that knows our vocabulary."""

    def __init__(self) -> None:
        super().__init__()
        first, second = new_text_encoders()
        self.text_l: CLIPTextModel = first
        self.text_g: CLIPTextModelWithProjection = second

    def forward(self, tokens: tuple[Tensor, Tensor]) -> TextCondition:
        """Encode token numbers of both encoders, each (B, 77)."""
        return TextCondition(*encode((self.text_l, self.text_g), tokens))

    def encode_prompts(self, prompts: Sequence[str]) -> TextCondition:
        """Encode captions: context (B, 77, C), pooled (B, P)."""
        device = next(self.parameters()).device
        first, second = tokenize(prompts)
        return self((first.to(device), second.to(device)))


class BaseObjective(nn.Module):
    """v-prediction loss of UNet and text encoders; forward maps a batch to (loss, metrics)."""

    def __init__(self, unet: UNet2DConditionModel, text: DemoText) -> None:
        super().__init__()
        self.unet, self.text = unet, text
        self.register_buffer("alphas_cumprod", DDIMScheduler(**SCHEDULER_CONFIG).alphas_cumprod)

    def condition(self, batch: dict[str, Tensor]) -> TextCondition:
        """The encoded captions of a batch's `tokens_l` and `tokens_g`, each (B, 77)."""
        encoded: TextCondition = self.text((batch["tokens_l"], batch["tokens_g"]))
        return encoded

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss (), and metrics, of a batch of `base_batches`.

        Scaled `latents` and `noise` (B, 8, h, w); `timesteps` (B,), below STEPS; `tokens_l` and
        `tokens_g` (B, 77). `weights` (B, 1, h, w), if there are any, say how much each place
        counts.
        """
        text = self.condition(batch)
        abar = abar_at(self.get_buffer("alphas_cumprod"), batch["timesteps"], batch["latents"])
        noisy = add_noise(batch["latents"], batch["noise"], abar)
        target = training_target(batch["latents"], batch["noise"], abar, "v_prediction")
        added = {"text_embeds": text.pooled, "time_ids": time_ids(batch["latents"])}
        prediction = self.unet(
            noisy, batch["timesteps"], text.context, added_cond_kwargs=added
        ).sample
        error = (batch.get("weights", 1.0) * (prediction.float() - target) ** 2).mean((1, 2, 3))
        early = batch["timesteps"] >= STEPS // 2
        return error.mean(), {"noisy_half": error[early].mean().detach().nan_to_num()}


def base_batches(
    portraits: tuple[Tensor, PicturePool], pairs: tuple[Tensor, PicturePool], batch: int
) -> Callable[[torch.Generator], dict[str, Tensor]]:
    """Batches of scaled latents with captions; every tenth has wide pictures, at half the count.

    Args:
        portraits: scaled latents (M, 8, h, w) and their pool.
        pairs: the same of wide pictures.
        batch: B, portraits per batch.

    Returns:
        From a generator to a batch: `latents` and `noise` (B, 8, h, w), `timesteps` (B,),
        `tokens_l` and `tokens_g` (B, 77).
    """
    sets = [(latents, *tokenize(pool.captions)) for latents, pool in (portraits, pairs)]
    empty_l, empty_g = tokenize([""])

    def draw(generator: torch.Generator) -> dict[str, Tensor]:
        wide = bool(torch.rand((), generator=generator) < 0.1)
        latents, tokens_l, tokens_g = sets[wide]
        count = batch // 2 if wide else batch
        index = torch.randint(len(latents), (count,), generator=generator)
        captioned = torch.rand(count, 1, generator=generator) >= 0.1
        z = latents[index].float()
        # Stratified timesteps, as `stratified_timesteps` makes them; the order that it draws too
        # would move the noise drawn after it, and with it the base that is shipped.
        strata = (torch.arange(count) + torch.rand(count, generator=generator)) / count
        return {
            "latents": z,
            "noise": torch.randn(z.shape, generator=generator),
            "timesteps": (strata * STEPS).long().clamp(max=STEPS - 1),
            "tokens_l": torch.where(captioned, tokens_l[index], empty_l),
            "tokens_g": torch.where(captioned, tokens_g[index], empty_g),
        }

    return draw


def new_base(seed: int) -> tuple[UNet2DConditionModel, DemoText]:
    """Untrained UNet and text encoders with weights from `seed`."""
    with DrawnFrom(torch.Generator().manual_seed(seed)):
        unet, text = UNet2DConditionModel(**UNET_CONFIG), DemoText()
    # On a CPU plain attention trains faster than the fused kernel, whose backward is slow.
    unet.set_attn_processor(AttnProcessor())
    return unet, text


def demo_layout(rank: int = LORA_RANK, targets: str = "attention") -> LoRALayout:
    """The LoRA layout of the demo base, of the layers that `targets` (key of TARGETS) names."""
    return layout_from_unet_config("demo", UNET_CONFIG, rank, TARGETS[targets])


def save_base(path: Path, unet: UNet2DConditionModel, text: DemoText, vae: AutoencoderKL) -> None:
    """Write one float16 file: LDM names for the UNet, CLIP numbers of the vocabulary rows."""
    tensors = stored_tensors(unet, text)
    tensors |= {_stored_name("vae", k): t for k, t in vae.state_dict().items()}
    tensors |= {"vocabulary": clip_numbers(), "v_pred": torch.ones(1)}
    facts = {"unet": UNET_CONFIG, "vae": {**VAE_CONFIG, "scaling_factor": 1.0}}
    write_half(path, tensors, {"config": json.dumps(facts), "format": "difflora-demo-base-1"})


def stored_tensors(unet: UNet2DConditionModel, text: DemoText) -> dict[str, Tensor]:
    """State dict of the UNet and the text encoders under their names in the file."""
    names, tensors = _unet_names(unet), {}
    for key, tensor in unet.state_dict().items():
        tensors[names[key]] = tensor
    return tensors | text_tensors(text.text_l, text.text_g)


def text_tensors(first: nn.Module, second: nn.Module) -> dict[str, Tensor]:
    """State dict of both text encoders under their names in the file, in their own order."""
    parts = (("text_l", first), ("text_g", second))
    return {_stored_name(p, k): t for p, module in parts for k, t in module.state_dict().items()}


def write_half(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> None:
    """Write a state dict, its float numbers in float16, with `facts` as the metadata.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    stored = {
        k: t.detach().cpu().half().contiguous() if t.is_floating_point() else t.detach().cpu()
        for k, t in tensors.items()
    }
    write_atomic(stored, dict(facts), path)


def load_base(path: Path, changes: Path | None = None) -> DiffusersBase:
    """The demo base as a frozen float32 model for training and evaluation.

    Args:
        path: the base's file.
        changes: weights that replace some of its own, as a teacher of a style holds them.

    Raises:
        CheckpointError: a file cannot be read, they do not fit each other, or the base lacks
            something or holds something else.
    """
    tensors, metadata = read_file(path, "demo base")
    if changes is not None:
        changed, _ = read_file(changes, "file of changes to the demo base")
        tensors = with_changes(tensors, changed, changes)
    with building(path):
        facts = parse_json(metadata["config"], "the configuration")
        unet, vae = UNet2DConditionModel(**facts["unet"]), AutoencoderKL(**facts["vae"])
        unet_names = _unet_names(unet)
    text = _text(tensors, path)
    load_strictly(unet, _under("unet", tensors), path, unet_names)
    _load_part("vae", vae, tensors, path)
    prefixes = tuple(_PREFIXES.values())
    rest = {name: t for name, t in tensors.items() if not name.startswith(prefixes)}
    check_tensors({"vocabulary": clip_numbers(), "v_pred": torch.ones(1)}, rest, path)
    for frozen in (unet, vae):
        frozen.requires_grad_(False).eval()
    return DiffusersBase(unet, vae, text.encode_prompts, DDIMScheduler(**SCHEDULER_CONFIG))


def load_text(path: Path) -> DemoText:
    """The demo base's text encoders alone, frozen, float32.

    Raises:
        CheckpointError: as for `load_base`, of the text encoders.
    """
    return _text(read_file(path, "demo base")[0], path)


def _text(tensors: Mapping[str, Tensor], path: Path) -> DemoText:
    """The text encoders among a base's tensors."""
    text = DemoText()
    _load_part("text_l", text.text_l, tensors, path)
    _load_part("text_g", text.text_g, tensors, path)
    return text.requires_grad_(False).eval()


def _unet_names(unet: UNet2DConditionModel) -> dict[str, str]:
    """Name in the file of every weight of the UNet."""
    modules = unet_name_map(dict(unet.config))
    parts = {key: key.rsplit(".", 1) for key in unet.state_dict()}
    return {
        key: f"{_PREFIXES['unet']}{modules[module]}.{leaf}" for key, (module, leaf) in parts.items()
    }


def _load_part(part: str, module: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Fill the VAE or a text encoder."""
    names = {key: _stored_name(part, key) for key in module.state_dict()}
    load_strictly(module, _under(part, tensors), path, names)


def _under(part: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of one part of the base."""
    return {name: t for name, t in tensors.items() if name.startswith(_PREFIXES[part])}


def _stored_name(part: str, key: str) -> str:
    """Name in the file of a weight of the VAE or a text encoder.

    Some versions of transformers leave out `text_model.`; the file always has it.
    """
    if part != "vae" and not key.startswith(("text_model.", "text_projection.")):
        key = f"text_model.{key}"
    return _PREFIXES[part] + key
