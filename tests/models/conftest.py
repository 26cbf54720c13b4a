"""A tiny DiffLoRA model and features that fit it."""

import pytest
import torch

from difflora_core.lora.layout import LayerShape, LoRALayout
from difflora_core.models.difflora import DiffLoRAConfig, DiffLoRAModel
from difflora_core.models.dit import DiTConfig
from difflora_core.models.lae.config import LAEConfig
from difflora_core.models.mif import MIFConfig
from difflora_core.models.predictor import PredictorConfig
from difflora_core.vision.features import ImageFeatures


@pytest.fixture
def layout() -> LoRALayout:
    names = [f"input_blocks.{b}.1.attn1.to_{p}" for b in (1, 2) for p in "qkv"]
    return LoRALayout(
        "tiny", 2, tuple(LayerShape(n, 8, 6 + 2 * (i % 2)) for i, n in enumerate(names))
    )


@pytest.fixture
def config() -> DiffLoRAConfig:
    return DiffLoRAConfig.build(
        MIFConfig(
            face_dim=12, image_dim=10, token_dim=8, image_token_count=5, width=16, tokens=2, heads=2
        ),
        PredictorConfig(width=32, depth=1),
        DiTConfig(width=32, depth=2, heads=2),
        LAEConfig(
            latent_tokens=3, latent_dim=4, width=16, heads=2, depth=1, basis_size=8,
            decoder_width=16,
        ),
    )  # fmt: skip


@pytest.fixture
def model(config: DiffLoRAConfig, layout: LoRALayout) -> DiffLoRAModel:
    """As after training: no zeros anywhere."""
    g = torch.Generator().manual_seed(0)
    built = DiffLoRAModel(config, layout, generator=g)
    with torch.no_grad():
        for p in built.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=g))
    built.fit_latent_statistics(torch.randn(20, 3, 4, generator=g) * 3 + 1)
    return built.eval()


@pytest.fixture
def person():
    """Features of one person's photos, by seed and count."""

    def make(seed: int, photos: int = 1) -> ImageFeatures:
        g = torch.Generator().manual_seed(seed)
        return ImageFeatures(
            torch.nn.functional.normalize(torch.randn(photos, 12, generator=g), dim=-1),
            torch.ones(photos, dtype=torch.bool),
            torch.randn(photos, 10, generator=g),
            torch.randn(photos, 5, 8, generator=g),
        )

    return make
