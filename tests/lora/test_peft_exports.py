"""LoRAs made by stock PEFT and diffusers give the same output through our reader and hooks."""

import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_kohya
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file

from difflora_core.adapters.attach import attach
from difflora_core.adapters.lora import lora_adapter_set
from difflora_core.lora.layout import SDXL_UNET_CONFIG, layout_from_unet_config
from difflora_core.models.layers import DrawnFrom
from difflora_core.storage.lora_file import load_lora, write_lora_file

CONFIG = {
    **SDXL_UNET_CONFIG,
    "sample_size": 8,
    "block_out_channels": [8, 16, 32],
    "norm_num_groups": 4,
    "transformer_layers_per_block": [1, 1, 2],
    "attention_head_dim": [2, 4, 8],
    "cross_attention_dim": 12,
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 32,
}
LAYOUT = layout_from_unet_config("tiny", CONFIG, 3)


@pytest.fixture(scope="module")
def trained():
    """A tiny SDXL UNet, its base output, and a PEFT LoRA after a few real steps."""
    with DrawnFrom(torch.Generator().manual_seed(0)):
        unet = UNet2DConditionModel(**CONFIG).eval().requires_grad_(False)
        batch = {
            "sample": torch.randn(2, 4, 8, 8),
            "timestep": torch.tensor([10, 500]),
            "encoder_hidden_states": torch.randn(2, 5, 12),
            "added_cond_kwargs": {
                "text_embeds": torch.randn(2, 8), "time_ids": torch.ones(2, 6)
            },
        }  # fmt: skip
        base = unet(**batch).sample
        targets = ["to_q", "to_k", "to_v", "to_out.0"]
        unet.add_adapter(LoraConfig(r=3, lora_alpha=5, target_modules=targets))
        parameters = [p for p in unet.parameters() if p.requires_grad]
        optimiser = torch.optim.AdamW(parameters, lr=0.02)
        for _ in range(3):
            unet(**batch).sample.square().mean().backward()
            optimiser.step()
            optimiser.zero_grad()
        with torch.no_grad():
            tuned = unet(**batch).sample
    return unet, batch, base, tuned


def plain_copy(unet):
    """The base model without PEFT."""
    copy = UNet2DConditionModel(**CONFIG).eval().requires_grad_(False)
    state = {k.replace(".base_layer", ""): v for k, v in unet.state_dict().items()}
    copy.load_state_dict({k: v for k, v in state.items() if ".lora_" not in k})
    return copy


def exports(unet, folder):
    """Files as users meet them."""
    state = get_peft_model_state_dict(unet)
    StableDiffusionXLPipeline.save_lora_weights(
        folder / "pipeline",
        unet_lora_layers=state,
        unet_lora_adapter_metadata=unet.peft_config["default"].to_dict(),
    )
    yield folder / "pipeline" / "pytorch_lora_weights.safetensors"
    unet.save_lora_adapter(folder / "module", adapter_name="default")
    yield folder / "module" / "pytorch_lora_weights.safetensors"
    kohya = convert_state_dict_to_kohya({f"unet.{k}": v for k, v in state.items()})
    kohya = {k: v * 5 / 3 if k.endswith("lora_up.weight") else v for k, v in kohya.items()}
    save_file({k: v.contiguous() for k, v in kohya.items()}, folder / "kohya.safetensors")
    yield folder / "kohya.safetensors"


def test_exports_give_the_picture_of_the_trained_model(trained, tmp_path):
    unet, batch, base, tuned = trained
    assert float((tuned - base).abs().max()) > 0.05
    plain = plain_copy(unet)
    assert torch.equal(plain(**batch).sample, base)
    for path in exports(unet, tmp_path):
        result = load_lora(path, LAYOUT)
        assert result.report.layers == len(LAYOUT)
        assert not result.report.unused
        with attach(plain, lora_adapter_set(result.weights), 1.0, LAYOUT.module_names):
            got = plain(**batch).sample
        torch.testing.assert_close(got, tuned, rtol=1e-4, atol=1e-5)
    assert torch.equal(plain(**batch).sample, base)


def test_what_we_write_is_loaded_by_diffusers(trained, tmp_path):
    unet, batch, _, tuned = trained
    source = next(exports(unet, tmp_path))
    weights = load_lora(source, LAYOUT).weights
    for naming in ("diffusers", "kohya_diffusers"):
        path = write_lora_file(
            tmp_path / f"{naming}.safetensors", weights, LAYOUT, None, naming, torch.float32
        )
        state, alphas = StableDiffusionXLPipeline.lora_state_dict(
            str(tmp_path), weight_name=path.name, unet_config=unet.config
        )
        plain = plain_copy(unet)
        StableDiffusionXLPipeline.load_lora_into_unet(state, alphas, plain)
        with torch.no_grad():
            torch.testing.assert_close(plain(**batch).sample, tuned, rtol=1e-4, atol=1e-5)
