"""What makes full-size training possible: checkpointing, parts of a batch, half precision."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from torch import nn

from difflora_core.adapters.attach import attach
from difflora_core.adapters.lora import lora_adapter_set
from difflora_core.base_model.checkpointing import (
    checkpointed_blocks,
    gradient_checkpointing,
    ldm_blocks,
)
from difflora_core.base_model.diffusers_base import DiffusersBase
from difflora_core.base_model.precision import autocast, imitates_bfloat16
from difflora_core.base_model.protocol import TextCondition
from difflora_core.errors import ConfigError
from difflora_core.lora.weights import LoRALayer, LoRAWeights
from difflora_core.training.loop import Hooks, LoopConfig, train
from difflora_core.training.lora.dreambooth import DreamBoothConfig, train_dreambooth
from difflora_core.training.losses import NoisedBatch, denoise, denoising_error, under_guidance


class LoRAObjective(nn.Module):
    """A LoRA that is attached inside the forward pass and off again when it ends."""

    def __init__(self, base):
        super().__init__()
        self.base, self.layout = base, base.layout("tiny", 2)
        g = torch.Generator().manual_seed(0)
        self.down = nn.ParameterList(
            torch.randn(2, s.in_features, generator=g) for s in self.layout
        )
        self.up = nn.ParameterList(
            0.1 * torch.randn(s.out_features, 2, generator=g) for s in self.layout
        )

    def forward(self, batch):
        rows = zip(self.layout, self.down, self.up, strict=True)
        weights = LoRAWeights({s.name: LoRALayer(d, u, 2.0) for s, d, u in rows})
        text = TextCondition(batch["context"], batch["pooled"])
        noised = NoisedBatch(batch["latents"], batch["noise"], batch["timesteps"], text)
        names = self.layout.module_names
        with attach(self.base.unet, lora_adapter_set(weights), names=names):
            return denoising_error(self.base, noised, "uniform").mean(), {}


def draw(base):
    def batch(generator):
        text = base.encode_prompts(["a", "b", "c", "d"])
        return {
            "latents": torch.randn(4, 4, 4, 4, generator=generator),
            "noise": torch.randn(4, 4, 4, 4, generator=generator),
            "timesteps": torch.tensor([10, 300, 600, 900]),
            "context": text.context,
            "pooled": text.pooled,
        }

    return batch


def gradients(base, **settings):
    """Gradients of the first step, and how often the middle block of the UNet ran."""
    objective, runs = LoRAObjective(base), []
    found = []
    hooks = Hooks(
        scale_gradients=lambda: found.extend(p.grad.clone() for p in objective.parameters()),
        base=base,
    )
    block = base.unet.mid_block.attentions[0].transformer_blocks[0]
    handle = block.register_forward_pre_hook(lambda *_: runs.append(1))
    train(objective, draw(base), LoopConfig(steps=1, **settings), None, hooks)
    handle.remove()
    assert not any(m._forward_hooks for m in base.unet.modules())
    return found, len(runs)


def test_checkpointing_leaves_the_gradients_of_an_attached_lora_as_they_are(base):
    plain, once = gradients(base)
    again, twice = gradients(base, checkpointing=True)
    assert (once, twice) == (1, 2)
    assert all(float(g.abs().max()) > 0 for g in plain)
    for a, b in zip(plain, again, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-8)
    assert not base.unet.is_gradient_checkpointing
    parts, runs = gradients(base, checkpointing=True, accumulate=2)
    assert runs == 4
    for a, b in zip(plain, parts, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-7)


def test_checkpointing_without_a_base_model_is_refused():
    line = nn.Linear(2, 1)
    with pytest.raises(ConfigError, match="turn it off"):
        train(line, lambda g: {}, LoopConfig(steps=1, checkpointing=True), None)
    with pytest.raises(ConfigError, match="Linear"), gradient_checkpointing(line):
        pass


class ResBlock(nn.Module):
    """Named as LDM names it; its layers are called one by one."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x, scale=1.0):
        return x + torch.tanh(self.layer(x)) * scale


class LDM(nn.Module):
    """A UNet that walks through its groups itself, as ComfyUI's does."""

    def __init__(self):
        super().__init__()
        self.input_blocks = nn.ModuleList(nn.Sequential(ResBlock(), nn.Tanh()) for _ in range(2))
        self.middle_block = nn.Sequential(ResBlock())
        self.output_blocks = nn.ModuleList(nn.Sequential(ResBlock()) for _ in range(2))

    def forward(self, x):
        for group in (*self.input_blocks, self.middle_block, *self.output_blocks):
            for layer in group:
                x = layer(x, scale=0.5) if isinstance(layer, ResBlock) else layer(x)
        return x


def test_blocks_of_an_ldm_unet_run_again_and_are_left_as_they_were():
    torch_state = torch.Generator().manual_seed(0)
    unet, runs = LDM(), []
    for p in unet.parameters():
        p.data = torch.randn(p.shape, generator=torch_state)
    x = torch.randn(3, 4, generator=torch_state)
    blocks = ldm_blocks(unet)
    assert len(blocks) == 5
    blocks[2].layer.register_forward_hook(lambda *_: runs.append(1))

    def found():
        unet.zero_grad()
        unet(x).square().sum().backward()
        return [p.grad.clone() for p in unet.parameters()]

    plain = found()
    with gradient_checkpointing(unet):
        again = found()
    after = found()
    assert len(runs) == 4  # 1, 2 and 1
    for a, b, c in zip(plain, again, after, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
    with pytest.raises(ValueError, match="own"), checkpointed_blocks(blocks):
        raise ValueError("own")
    assert all("forward" not in vars(block) for block in blocks)


SIGMAS = {0: 0.02915, 1: 0.04126}  # SDXL's schedule; full bfloat16 arithmetic gives 0 for both


def sdxl_schedule():
    """Its betas, written out in float64."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return (1 - betas).cumprod(0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_noise_levels_of_a_half_precision_base_are_right(base, monkeypatch, dtype):
    """Clean zeros and noise ones: what the UNet sees is sigma, what it should say is alpha."""
    base.unet.to(dtype)
    base.alphas_cumprod = sdxl_schedule().float()
    steps = torch.tensor([0, 1, 5, 10, 200, 999])
    seen = []

    def silent(noisy, timesteps, text):
        seen.append(noisy)
        return torch.zeros_like(noisy)

    monkeypatch.setattr(base, "predict", silent)
    shape = (6, 4, 4, 4)
    text = base.encode_prompts(["a"] * 6)
    batch = NoisedBatch(torch.zeros(shape), torch.ones(shape), steps, text)
    made = denoise(base, batch)
    abar = sdxl_schedule()[steps]
    unit = torch.finfo(dtype).eps / 2
    torch.testing.assert_close(
        seen[0][:, 0, 0, 0].double(), (1 - abar).sqrt(), rtol=2 * unit, atol=0
    )
    for row, (step, sigma) in enumerate(SIGMAS.items()):
        assert step == steps[row]
        assert float(seen[0][row, 0, 0, 0]) == pytest.approx(sigma, rel=2 * unit)
    # v = alpha noise - sigma clean, so an answer of zero is wrong by alpha
    torch.testing.assert_close(made.error.double(), abar, rtol=1e-6, atol=0)
    guided = under_guidance(base, batch, 2.0, base.encode_prompts([""]))
    assert torch.equal(seen[1], seen[0])
    assert guided.null.dtype == torch.float32


def vae(dtype):
    """A tiny VAE with fixed weights."""
    made = AutoencoderKL(
        block_out_channels=[8], norm_num_groups=4, latent_channels=4, sample_size=8
    )
    g = torch.Generator().manual_seed(1)
    for p in made.parameters():
        p.data = 0.3 * torch.randn(p.shape, generator=g)
    return made.to(dtype).requires_grad_(False)


def test_a_half_precision_vae_takes_and_gives_float32(base):
    fine = DiffusersBase(base.unet, vae(torch.float32), base.encode_prompts, base.scheduler)
    coarse = DiffusersBase(base.unet, vae(torch.bfloat16), base.encode_prompts, base.scheduler)
    images = torch.rand(3, 8, 8, 3, generator=torch.Generator().manual_seed(2))
    latents, half = fine.encode_images(images), coarse.encode_images(images)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, latents, rtol=0.1, atol=0.02 * float(latents.abs().max()))
    again, half = fine.decode_latents(latents), coarse.decode_latents(latents)
    assert half.dtype == torch.float32
    assert half.shape == images.shape
    assert float((half - again).abs().mean()) < 0.02


def test_large_pictures_go_through_the_vae_one_by_one(base, monkeypatch):
    own, sizes = vae(torch.float32), []
    encode = own.encode
    monkeypatch.setattr(own, "encode", lambda x: sizes.append(len(x)) or encode(x[:, :, :8, :8]))
    model = DiffusersBase(base.unet, own, base.encode_prompts, base.scheduler)
    model.encode_images(torch.zeros(20, 64, 64, 3))
    model.encode_images(torch.zeros(2, 1024, 1024, 3))
    assert sizes == [16, 4, 1, 1]


def test_dreambooth_in_parts_and_with_checkpoints_is_the_same_to_rounding(base, people):
    base.unet.double()
    config = DreamBoothConfig(rank=2, steps=4)
    examples = people(dtype=torch.float64)
    whole = train_dreambooth(base, examples, config)[4]
    saving = replace(config, accumulate=2, checkpointing=True)
    parts = train_dreambooth(base, examples, saving)[4]
    for name in whole:
        torch.testing.assert_close(parts[name].up, whole[name].up, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(parts[name].down, whole[name].down, rtol=1e-6, atol=1e-9)
    with pytest.raises(ConfigError, match="4 samples"):
        train_dreambooth(base, examples, replace(config, accumulate=3))


def test_a_processor_that_would_imitate_bfloat16_computes_in_float32():
    here = torch.device("cpu")
    x = torch.ones(2, 2)
    with autocast(here, "bf16"):
        half = (x @ x).dtype == torch.bfloat16
    with autocast(here, "no"):
        assert (x @ x).dtype == torch.float32
    with autocast(here, "fp16"):
        assert (x @ x).dtype == torch.float16
    assert half is not imitates_bfloat16(here)
    assert not imitates_bfloat16(torch.device("cuda"))
    facts = Path("/proc/cpuinfo")
    features = set(facts.read_text().split()) if facts.exists() else set()
    if "sse2" in features:  # a PC's processor, as Linux tells of it
        assert half is ({"avx512bw", "avx512vl", "avx512dq"} <= features)
