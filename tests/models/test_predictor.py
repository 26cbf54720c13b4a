"""LatentPredictor, and the full-size model as a whole."""

import pytest
import torch

from difflora_core.errors import ConfigError
from difflora_core.lora.layout import sdxl_layout
from difflora_core.models.difflora import DiffLoRAConfig, DiffLoRAModel
from difflora_core.models.mif import IdentityCondition
from difflora_core.models.predictor import LatentPredictor, PredictorConfig


@pytest.mark.parametrize("tokens", [0, 3])
def test_before_training_it_is_two_linear_layers(tokens: int) -> None:
    config = PredictorConfig(
        condition_dim=6, condition_tokens=tokens, latent_tokens=2, latent_dim=5, width=8
    )
    net = LatentPredictor(config, generator=torch.Generator().manual_seed(0))
    pooled, extra = torch.randn(4, 6), torch.randn(4, tokens, 6)
    z = net(IdentityCondition(pooled, extra, torch.ones(4, 2)))
    assert z.shape == (4, 2, 5)
    flat = torch.cat([pooled, extra.flatten(1)], dim=1)
    torch.testing.assert_close(z.flatten(1), net.latent_out(net.condition_in(flat)))


def test_bad_config() -> None:
    with pytest.raises(ConfigError, match="width"):
        PredictorConfig(width=0)


def test_full_size_model_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = DiffLoRAModel(DiffLoRAConfig.sdxl(), sdxl_layout(8))
    numbers = sum(p.numel() for p in model.parameters())
    assert 800e6 < numbers < 850e6, "the preset's docstring gives this count"
    assert len(model.dit.blocks) == 16
    assert model.config.feature_sizes.tokens == 257
