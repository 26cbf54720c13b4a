"""LoRAs of people trained one after another by stock peft, as its documentation has it."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from torch import Tensor, nn

from difflora_core.base_model.diffusers_base import DiffusersBase
from difflora_core.base_model.precision import autocast
from difflora_core.diffusion.objective import abar_at, add_noise, training_target
from difflora_core.lora.flat import flatten
from difflora_core.lora.layout import LoRALayout
from difflora_core.lora.weights import LoRALayer, LoRAWeights
from difflora_core.training.lora.dreambooth_config import DreamBoothConfig

ADAPTER = "person"


@dataclass(frozen=True)
class Trained:
    """LoRAs (P, numel) of P people, see `lora.flat`, and the seconds by the clock and of the
    processor that they took."""

    loras: Tensor
    seconds: float
    cpu_seconds: float


def train_one(
    base: DiffusersBase,
    layout: LoRALayout,
    latents: Tensor,
    captions: list[str],
    config: DreamBoothConfig,
    seed: int,
) -> Trained:
    """One person: peft's adapter on diffusers' UNet, AdamW, clipped gradients, linear decay.

    Args:
        base: stays as it is.
        layout: which layers, and the rank.
        latents: (M, C, h, w) of the person's pictures.
        captions: M.
        config: steps, batch, rate, precision.
        seed: of the draws.
    """
    unet = _with_adapter(base, layout)
    own = DiffusersBase(unet, base.vae, base.encode_prompts, base.scheduler)
    trained = [p for p in unet.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(
        trained, config.learning_rate, config.betas, weight_decay=config.weight_decay
    )
    course = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 1e-3, config.steps)
    text, draw = base.encode_prompts(captions), torch.Generator().manual_seed(seed)
    latents = latents.to(unet.device)
    begun, begun_cpu = time.perf_counter(), time.process_time()
    for _ in range(config.steps):
        rows = torch.randint(len(latents), (config.samples_per_step,), generator=draw)
        times = torch.randint(len(base.alphas_cumprod), rows.shape, generator=draw)
        clean = latents[rows]
        noise = torch.randn(clean.shape, generator=draw).to(clean)
        abar = abar_at(base.alphas_cumprod, times, clean)
        with autocast(clean.device, config.precision):
            made = own.predict(
                add_noise(clean, noise, abar), times.to(clean.device), text.select(rows)
            )
        wanted = training_target(clean, noise, abar, base.prediction_type)
        (made.float() - wanted).square().mean().backward()
        nn.utils.clip_grad_norm_(trained, config.clip)
        optimiser.step()
        course.step()
        optimiser.zero_grad()
    if latents.is_cuda:
        torch.cuda.synchronize()
    seconds, cpu = time.perf_counter() - begun, time.process_time() - begun_cpu
    return Trained(flatten(layout, _weights(unet, layout)), seconds, cpu)


def _with_adapter(base: DiffusersBase, layout: LoRALayout) -> UNet2DConditionModel:
    """A copy of the UNet with peft's adapter on the layers of a layout."""
    unet = copy.deepcopy(base.unet).requires_grad_(False)
    targets = sorted(layout.module_names.values())
    settings = LoraConfig(r=layout.rank, lora_alpha=layout.rank, target_modules=targets)
    unet.add_adapter(settings, adapter_name=ADAPTER)
    return unet


def _weights(unet: nn.Module, layout: LoRALayout) -> LoRAWeights:
    """What peft trained, as a batch of one."""
    layers = {}
    for name, path in layout.module_names.items():
        module = unet.get_submodule(path)
        down, up = (getattr(module, part)[ADAPTER].weight for part in ("lora_A", "lora_B"))
        factors = (factor.detach().cpu()[None] for factor in (down, up))
        layers[name] = LoRALayer(*factors, float(layout.rank))
    return LoRAWeights(layers)
