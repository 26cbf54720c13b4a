"""A base model of SDXL's classes, small enough to train against in a test."""

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel

from difflora_core.base_model.diffusers_base import DiffusersBase
from difflora_core.base_model.protocol import TextCondition
from difflora_core.lora.weights import LoRALayer, LoRAWeights
from difflora_core.models.layers import DrawnFrom
from difflora_core.training.dreambooth import DreamBoothExamples

UNET = {
    "sample_size": 4,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ["CrossAttnDownBlock2D"],
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "up_block_types": ["CrossAttnUpBlock2D"],
    "block_out_channels": [8],
    "norm_num_groups": 4,
    "layers_per_block": 1,
    "cross_attention_dim": 8,
    "attention_head_dim": 1,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 28,
}
WORDS = ("a", "b", "c", "d")


def text_of(prompts):
    """Fixed random vectors per prompt: context (B, 3, 8), pooled (B, 4)."""
    rows = [torch.Generator().manual_seed(sum(map(ord, prompt))) for prompt in prompts]
    context = torch.stack([torch.randn(3, 8, generator=g) for g in rows])
    return TextCondition(context, context[:, 0, :4])


@pytest.fixture
def base():
    """A v-predicting base with random weights; float32, frozen."""
    with DrawnFrom(torch.Generator().manual_seed(0)):
        unet = UNet2DConditionModel(**UNET)
    unet.requires_grad_(False).eval()
    scheduler = DDIMScheduler(prediction_type="v_prediction", beta_schedule="scaled_linear")
    return DiffusersBase(unet, None, text_of, scheduler)


@pytest.fixture
def people():
    """A function that makes DreamBoothExamples of given people, in a dtype."""

    def make(seeds=(11, 7, 2), pictures=5, dtype=torch.float32):
        latents, prompts = [], []
        for seed in seeds:
            g = torch.Generator().manual_seed(seed)
            own = torch.randn(1, 4, 4, 4, generator=g, dtype=torch.float64)
            noise = torch.randn(pictures, 4, 4, 4, generator=g, dtype=torch.float64)
            latents.append((own + 0.1 * noise).to(dtype))
            prompts.append([WORDS[(seed + k) % 4] for k in range(pictures)])
        return DreamBoothExamples(torch.stack(latents), prompts, tuple(seeds))

    return make


@pytest.fixture
def weights_of():
    """A function that makes a batch of random LoRAs of a layout, small differences about a mean."""

    def make(layout, count, seed=0, shared_down=False, directions=3):
        g = torch.Generator().manual_seed(seed)
        world = torch.Generator().manual_seed(99)  # what all corpora have in common
        r, layers = layout.rank, {}
        who = torch.randn(count, directions, generator=g)
        for s in layout:
            down = torch.randn(1, r, s.in_features, generator=world).expand(count, -1, -1)
            ups = torch.randn(directions, s.out_features, r, generator=world)
            if not shared_down:
                turn = torch.linalg.qr(torch.randn(count, r, r, generator=g))[0]
                down = turn.mT @ down
            up = 0.1 * torch.einsum("md,dor->mor", who, ups)
            up = up if shared_down else up @ turn
            layers[s.name] = LoRALayer(down, up, float(r))
        return LoRAWeights(layers)

    return make
