"""A base model of SDXL's classes, small enough to train against in a test."""

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from difflora_core.base_model.diffusers_base import DiffusersBase
from difflora_core.base_model.protocol import TextCondition
from difflora_core.demo.networks.text import (
    END,
    LENGTH,
    PAD,
    START,
    UNKNOWN,
    text_config,
    word_numbers,
)
from difflora_core.lora.weights import LoRALayer, LoRAWeights
from difflora_core.models.layers import DrawnFrom
from difflora_core.text.captions import captions
from difflora_core.text.clip_pair import ClipPairText, SpecialTokens
from difflora_core.text.covariance import build_covariance
from difflora_core.training.concept_task import NewWord, prepare_task
from difflora_core.training.lora.dreambooth import DreamBoothExamples
from difflora_core.training.picture_examples import PictureExamples

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


def tiny_base():
    """A v-predicting base with random weights; float32, frozen."""
    with DrawnFrom(torch.Generator().manual_seed(0)):
        unet = UNet2DConditionModel(**UNET)
    unet.requires_grad_(False).eval()
    scheduler = DDIMScheduler(prediction_type="v_prediction", beta_schedule="scaled_linear")
    return DiffusersBase(unet, None, text_of, scheduler)


@pytest.fixture
def base():
    """The tiny base, anew for each test."""
    return tiny_base()


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


WORD = NewWord("<h1>", "hat")
PROMPTS = ["photo of a <h1>", "a person wearing a <h1>, blue background", "the red <h1>"]


def text_encoders(seed):
    """Two tiny text encoders that can learn words."""
    config = {**text_config(4), "num_attention_heads": 1, "projection_dim": 4}
    with DrawnFrom(torch.Generator().manual_seed(seed)):
        first = CLIPTextModel(CLIPTextConfig(**config, attn_implementation="eager"))
        second = CLIPTextModelWithProjection(CLIPTextConfig(**config, attn_implementation="eager"))
    for module in (first, second):
        module.get_input_embeddings().weight.data.mul_(20)
        module.requires_grad_(False).eval()
    return ClipPairText(
        (first, second), word_numbers, SpecialTokens(START, END, (END, PAD), UNKNOWN, LENGTH)
    )


@pytest.fixture(scope="session")
def make_text():
    """Makes a pair of tiny text encoders from a seed."""
    return text_encoders


@pytest.fixture(scope="module")
def text():
    """A pair of tiny text encoders that can learn words."""
    return text_encoders(1)


@pytest.fixture(scope="module")
def covariance(text):
    """C of these encoders."""
    return build_covariance(text, captions(300, "demo"), ridge=1e-2)


@pytest.fixture
def task(base, text, covariance):
    """The setting in which one word is learned."""
    contexts = [p.replace("<h1>", "{}") for p in PROMPTS]
    return prepare_task(base, text, covariance, [WORD], contexts, "tiny")


@pytest.fixture
def pictures():
    """Makes a few pictures of one thing, masked or not."""

    def make(count=3, masked=True):
        g = torch.Generator().manual_seed(4)
        noise = [torch.randn(n, 4, 4, 4, generator=g) for n in (1, count)]
        masks = torch.ones(count, 4, 4)
        masks[:, :, 2:] = 0
        return PictureExamples(
            noise[0] + 0.1 * noise[1], [PROMPTS] * count, masks if masked else None
        )

    return make


@pytest.fixture
def evaluation_loss(pictures):
    """Mean loss over the batches and noise by which a run measures itself."""

    def measure(objective, batch):
        generator, draw = torch.Generator().manual_seed(71), pictures().draw(batch, 1000)
        with torch.no_grad():
            return sum(float(objective.eval()(draw(generator))[0]) for _ in range(6)) / 6

    return measure


@pytest.fixture
def numbers():
    """All numbers that a run has trained, as one vector."""

    def collect(result):
        parts = []
        for c in result.adaptations:
            values = [tensors["values"] for tensors in c.layers.values()]
            parts += [*c.shared.values(), *c.word.embeddings, *values]
        return torch.cat(parts)

    return collect
