"""The ControlNet recipe: a picture of key points steers a frozen base model.

ControlNet (arXiv:2302.05543) copies the UNet's encoder and feeds its features back through
convolutions that start at zero. As in a Control-LoRA the copy keeps the base's weights and learns
a low-rank change of them, so the file is small and ComfyUI's own loader builds the rest from the
base model at hand.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..base_model.diffusers_base import DiffusersBase, time_ids
from ..base_model.protocol import TextCondition
from ..config import Config
from ..diffusion.objective import stratified_timesteps
from ..errors import CheckpointError, ConfigError
from ..lora.layout import unet_name_map
from ..models.layers import DrawnFrom
from ..vision.keypoint_picture import keypoint_picture
from .fingerprint import fingerprint
from .loop import Hooks, LoopConfig, Progress, train
from .losses import NoisedBatch, denoising_error

HINT_SCALE = 8
"""Pixels of the control picture per latent; ComfyUI resizes it to that, by nearest pixel."""

MARKER = "lora_controlnet"
"""The key by which ComfyUI knows what the file is."""

_WHOLE = ("controlnet_cond_embedding.", "controlnet_down_blocks.", "controlnet_mid_block.")
_LOW_RANK = ("conv_in.", "down_blocks.", "mid_block.")


class LowRank(nn.Module):
    """A learned change up @ down of a weight; nothing at first.

    Args:
        weight: linear (out, in) or convolution (out, in, h, w). rank: of the change.
        generator: of the first `down`.
    """

    def __init__(self, weight: Tensor, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        out, inner = weight.flatten(1).shape
        rank = min(rank, out, inner)
        self.up = nn.Parameter(torch.zeros(out, rank))
        self.down = nn.Parameter(torch.randn(rank, inner, generator=generator) / inner**0.5)

    def forward(self, weight: Tensor) -> Tensor:
        """The changed weight; the shape is that of `weight`, (out, in) or (out, in, h, w)."""
        return weight + (self.up @ self.down).reshape(weight.shape)


class ControlLoRA(nn.Module):
    """A ControlNet on a base's own encoder; before training it changes nothing.

    Args:
        base: the frozen base. rank: of the change of every layer of the copied encoder.
        generator: of the new weights.
    """

    def __init__(self, base: DiffusersBase, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        self.rank = rank
        with DrawnFrom(torch.Generator().manual_seed(generator.initial_seed())):
            self.net = ControlNetModel.from_unet(base.unet)
            # The zero convolutions alone keep the start silent; a zero here too would stall it.
            self.net.controlnet_cond_embedding.conv_out.reset_parameters()
        self.net.set_attn_processor(next(iter(base.unet.attn_processors.values())))
        self.net.requires_grad_(False)
        for path, module in list(self.net.named_modules()):
            if f"{path}.".startswith(_WHOLE):
                module.requires_grad_(True)
            elif path.startswith(_LOW_RANK) and isinstance(module, nn.Linear | nn.Conv2d):
                change = LowRank(module.weight, rank, generator)
                parametrize.register_parametrization(module, "weight", change)
        self.names = _names(dict(base.unet.config), self.net)

    def forward(
        self, noisy: Tensor, timesteps: Tensor, text: TextCondition, hints: Tensor
    ) -> tuple[list[Tensor], Tensor]:
        """What to add to the UNet's skip connections and to its middle.

        Args:
            noisy: (B, C, h, w) latents.
            timesteps: (B,) their noise levels.
            text: B encoded prompts.
            hints: (B, 3, 8 h, 8 w) control pictures in [0, 1].

        Returns:
            One tensor (B, c, h', w') for each skip connection, and one for the middle.
        """
        added = {"text_embeds": text.pooled, "time_ids": time_ids(noisy)}
        skips, middle = self.net(
            noisy, timesteps, text.context, hints, added_cond_kwargs=added, return_dict=False
        )
        return skips, middle

    def state(self) -> dict[str, Tensor]:
        """State dict of what was learned, under the names that ComfyUI's ControlNet loader reads.

        A low-rank change is up (out, r) and down (r, in); the new layers are there as they are.
        """
        tensors = {MARKER: torch.zeros(0)}
        for name, parameter in self.net.named_parameters():
            if parameter.requires_grad:
                module, leaf = name.replace(".parametrizations.weight.0.", ".").rsplit(".", 1)
                tensors[f"{self.names[module]}.{leaf}"] = parameter.detach().cpu().contiguous()
        return tensors

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over the state dict that `state` returned.

        Raises:
            CheckpointError: it belongs to a ControlNet of another base or rank.
        """
        own = self.state()
        if {k: t.shape for k, t in own.items()} != {k: t.shape for k, t in tensors.items()}:
            raise CheckpointError("The ControlNet was trained for another base model or rank.")
        parameters = dict(self.net.named_parameters())
        with torch.no_grad():
            for name in [n for n, p in parameters.items() if p.requires_grad]:
                module, leaf = name.replace(".parametrizations.weight.0.", ".").rsplit(".", 1)
                parameters[name].copy_(tensors[f"{self.names[module]}.{leaf}"])


class ControlledBase(DiffusersBase):
    """A base model under a ControlNet.

    Args:
        base: the base. control: its ControlNet. hints: (B, 3, 8 h, 8 w), one per sample.
    """

    def __init__(self, base: DiffusersBase, control: ControlLoRA, hints: Tensor) -> None:
        super().__init__(base.unet, base.vae, base.encode_prompts, base.scheduler)
        self.control, self.hints = control, hints

    def predict(self, noisy: Tensor, timesteps: Tensor, text: TextCondition) -> Tensor:
        """The steered UNet's output for noisy latents (B, C, h, w) at timesteps (B,)."""
        skips, middle = self.control(noisy, timesteps, text, self.hints)  # B c h' w' each
        added = {"text_embeds": text.pooled, "time_ids": time_ids(noisy)}
        output: Tensor = self.unet(
            noisy,
            timesteps,
            text.context,
            added_cond_kwargs=added,
            down_block_additional_residuals=skips,
            mid_block_additional_residual=middle,
        ).sample
        return output


@dataclass(frozen=True)
class KeypointPictures:
    """Pictures of one size with the face points that are on them.

    `latents`: (M, C, h, w) scaled; `keypoints`: (M, F, 5, 2) in pixels; `captions`: M;
    `ratio`: pixels per latent.
    """

    latents: Tensor
    keypoints: Tensor
    captions: Sequence[str]
    ratio: int


@dataclass(frozen=True)
class ControlNetConfig(Config):
    """Settings of the recipe: `batch` pictures per step, `rank` of the change of every layer."""

    batch: int = 16
    rank: int = 16

    def __post_init__(self) -> None:
        if self.batch < 1 or self.rank < 1:
            raise ConfigError("batch and rank must be at least 1")


class ControlObjective(nn.Module):
    """Denoising loss of the frozen base under the ControlNet; maps a batch to (loss, metrics)."""

    def __init__(self, control: ControlLoRA, base: DiffusersBase) -> None:
        super().__init__()
        self.control, self.base = control, base
        base.unet.requires_grad_(False)

    def forward(self, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss () of a batch of `control_batches`."""
        text = TextCondition(batch["context"], batch["pooled"])
        pictures = NoisedBatch(batch["latents"], batch["noise"], batch["timesteps"], text)
        steered = ControlledBase(self.base, self.control, batch["hints"])
        return denoising_error(steered, pictures, "uniform").mean(), {}


def control_batches(
    base: DiffusersBase, sets: Sequence[tuple[float, KeypointPictures]], batch: int
) -> Callable[[torch.Generator], dict[str, Tensor]]:
    """Batches of pictures, captions and control pictures.

    Args:
        base: encodes the captions; its schedule bounds the noise levels.
        sets: pictures of one size each, with the share of steps they get.
        batch: pictures per step; larger pictures come in smaller batches.

    Returns:
        From a generator to a batch: scaled `latents` and `noise` (B, C, h, w), `timesteps` (B,),
        `context` (B, L, C) and `pooled` (B, P) of the captions, `hints` (B, 3, 8 h, 8 w) in [0, 1].
    """
    shares = torch.tensor([share for share, _ in sets])
    smallest = min(data.latents[0].numel() for _, data in sets)
    steps = len(base.alphas_cumprod)

    def draw(generator: torch.Generator) -> dict[str, Tensor]:
        data = sets[int(torch.multinomial(shares, 1, generator=generator))][1]
        count = max(1, batch * smallest // data.latents[0].numel())
        index = torch.randint(len(data.latents), (count,), generator=generator)
        latents = data.latents[index].float()
        # Places are settled early, so high noise comes more often (Eq. 4 of arXiv:2302.08453).
        late = stratified_timesteps(count, generator, steps).double() / steps
        captioned = torch.rand(count, generator=generator) >= 0.1
        known = zip(index.tolist(), captioned.tolist(), strict=True)
        text = base.encode_prompts([data.captions[k] if t else "" for k, t in known])
        coarse = bool(torch.rand((), generator=generator) < 0.5)
        return {
            "latents": latents,
            "noise": torch.randn(latents.shape, generator=generator),
            "timesteps": ((1 - late**3) * steps).long().clamp(0, steps - 1),
            "context": text.context,
            "pooled": text.pooled,
            "hints": control_pictures(data, index, coarse),
        }

    return draw


def control_pictures(data: KeypointPictures, index: Tensor, coarse: bool = True) -> Tensor:
    """Control pictures (B, 3, 8 h, 8 w) of some pictures.

    Args:
        data: the pictures.
        index: (B,) which of them.
        coarse: drawn at the picture's own size and enlarged by nearest pixel, as ComfyUI does
            with a key-point picture of a photo; else drawn at the size it is needed in.
    """
    height, width = (side * HINT_SCALE for side in data.latents.shape[-2:])
    grow = HINT_SCALE // data.ratio
    drawn = [
        keypoint_picture(points, height // grow, width // grow)
        if coarse
        else keypoint_picture(points * grow, height, width)
        for points in data.keypoints[index]
    ]
    pictures = torch.stack(drawn).permute(0, 3, 1, 2)
    return nn.functional.interpolate(pictures, (height, width), mode="nearest")


def fit(
    control: ControlLoRA,
    base: DiffusersBase,
    sets: Sequence[tuple[float, KeypointPictures]],
    loop: LoopConfig,
    folder: Path,
    config: ControlNetConfig | None = None,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Train `control` in place; see `loop.train` for the rest."""
    config = config or ControlNetConfig()
    objective = ControlObjective(control, base)
    draw = control_batches(base, sets, config.batch)
    hooks = Hooks(progress, base=base, fingerprint=fingerprint(config, sets))
    return train(objective, draw, loop, folder, hooks)


def _names(config: Mapping[str, Any], net: ControlNetModel) -> dict[str, str]:
    """Diffusers module path to the name in the file."""
    names = dict(unet_name_map(config))
    names["controlnet_mid_block"] = "middle_block_out.0"
    for number in range(len(net.controlnet_down_blocks)):
        names[f"controlnet_down_blocks.{number}"] = f"zero_convs.{number}.0"
    embedding = net.controlnet_cond_embedding
    steps = ["conv_in", *(f"blocks.{k}" for k in range(len(embedding.blocks))), "conv_out"]
    for number, step in enumerate(steps):
        names[f"controlnet_cond_embedding.{step}"] = f"input_hint_block.{2 * number}"
    return names
