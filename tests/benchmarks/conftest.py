"""A tiny demo world with random weights: every real part, none of it trained."""

from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel

from benchmarks.identity.artefacts import Artefacts
from benchmarks.identity.drawing import Plan
from benchmarks.prompts import QUICK
from difflora_core.base_model.diffusers_base import DiffusersBase
from difflora_core.demo.networks.base import SCHEDULER_CONFIG, UNET_CONFIG, new_base
from difflora_core.demo.networks.judges import RECIPES, JudgeNetwork, Judges
from difflora_core.demo.networks.text import (
    END,
    LENGTH,
    PAD,
    START,
    UNKNOWN,
    new_text_encoders,
    word_numbers,
)
from difflora_core.demo.networks.vae import new_vae
from difflora_core.demo.networks.views import initialise
from difflora_core.lora.layout import layout_from_unet_config
from difflora_core.models.difflora import DiffLoRAConfig, DiffLoRAModel
from difflora_core.text.clip_pair import ClipPairText, SpecialTokens
from difflora_core.vision.face_encoder import DetectedFace
from difflora_core.vision.features import FeatureSizes

SIZES = FeatureSizes(face=6, image=8, tokens=5, token_dim=4)


class PixelFaces:
    """A face encoder of fixed arithmetic: one face in the middle, described by its colours."""

    embedding_dim = SIZES.face

    def detect(self, image: torch.Tensor) -> list[DetectedFace]:
        height, width = image.shape[:2]
        box = torch.tensor([0.2 * width, 0.1 * height, 0.8 * width, 0.9 * height])
        points = torch.tensor([[0.35, 0.4], [0.65, 0.4], [0.5, 0.55], [0.4, 0.7], [0.6, 0.7]])
        middle = image[height // 4 : 3 * height // 4, width // 4 : 3 * width // 4]
        embedding = torch.cat([middle.mean((0, 1)), middle.std((0, 1))])
        return [DetectedFace(box, 0.9, points * torch.tensor([width, height]), embedding)]


class PixelVision:
    """An image encoder of fixed arithmetic."""

    image_size = 16

    def encode(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows = images.mean((1, 2))
        flat = images.flatten(1)[:, : SIZES.tokens * SIZES.token_dim]
        pooled = torch.cat([rows, rows.square(), rows[:, :2]], 1)
        return pooled, flat.unflatten(1, (SIZES.tokens, SIZES.token_dim))


def tiny_base() -> DiffusersBase:
    """The demo base with a narrower UNet and random weights."""
    _, text = new_base(0)
    unet = UNet2DConditionModel(**{**UNET_CONFIG, "block_out_channels": [32, 32]})
    initialise(unet, 1)
    vae = new_vae(2)
    for part in (unet, text, vae):
        part.requires_grad_(False).eval()
    return DiffusersBase(unet, vae, text.encode_prompts, DDIMScheduler(**SCHEDULER_CONFIG))


def random_model(layout, preset: str, seed: int) -> DiffLoRAModel:
    """A DiffLoRA model whose decoder draws something, with its corpus statistics set."""
    generator = torch.Generator().manual_seed(seed)
    config = DiffLoRAConfig.demo(SIZES, preset=preset)
    model = DiffLoRAModel(config, layout, generator=generator).eval().requires_grad_(False)
    for parameter in model.lae.decoder.parameters():
        parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    for name, buffer in model.lae.named_buffers():
        if name.startswith("scale_"):
            buffer.fill_(0.1)
    return model


def judge(name: str) -> JudgeNetwork:
    """One untrained judge."""
    network = JudgeNetwork(RECIPES[name].widths, RECIPES[name].outputs)
    initialise(network, 5)
    return network.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def artefacts(tmp_path_factory: pytest.TempPathFactory) -> Artefacts:
    base = tiny_base()
    layout = layout_from_unet_config("demo", dict(base.unet.config), 4)
    functional = random_model(layout, "functional", 3)
    paper = random_model(layout, "paper", 4)
    paper.lae.set_shared_down(functional.lae.down_factors())
    return Artefacts(
        base=base,
        base_hash="tiny",
        layout=layout,
        judges=Judges({name: judge(name) for name in RECIPES}),
        encoders=(PixelFaces(), PixelVision()),
        models={"functional": functional, "paper": paper},
        linear=None,
        cache=Path(tmp_path_factory.mktemp("cache")),
    )


@pytest.fixture
def plan() -> Plan:
    """Two prompts, one of them with two seeds, two steps."""
    return Plan((QUICK[0], QUICK[5]), repeats=1, steps=2, batch=4, noises=1, half=False)


@pytest.fixture(scope="session")
def text():
    """Random text encoders that can learn words."""
    encoders = new_text_encoders()
    for number, encoder in enumerate(encoders):
        initialise(encoder, 3 + number)
        encoder.get_input_embeddings().weight.data.mul_(20)
        encoder.requires_grad_(False).eval()
    return ClipPairText(
        encoders, word_numbers, SpecialTokens(START, END, (END, PAD), UNKNOWN, LENGTH)
    )
