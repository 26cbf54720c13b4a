"""Gradient checkpointing on ComfyUI's own UNet, with an adapter that comes off in between."""

import pytest
import torch

from difflora_core.adapters.attach import attach, hold
from difflora_core.adapters.lora import lora_adapter_set
from difflora_core.base_model.checkpointing import gradient_checkpointing
from difflora_core.demo.networks.base import demo_layout
from difflora_core.lora.weights import LoRALayer, LoRAWeights


@pytest.fixture(scope="module")
def unet(comfyui, node_module, demo_world):
    import comfy.model_management

    patcher = node_module("host.demo").load_demo_unet(demo_world / "base.safetensors", None)
    comfy.model_management.load_models_gpu([patcher])
    return patcher.model.diffusion_model.requires_grad_(False)


def test_gradients_stay_and_layers_run_again(unet):
    g = torch.Generator().manual_seed(0)
    layers = {
        s.name: LoRALayer(
            0.1 * torch.randn(4, s.in_features, generator=g),
            0.1 * torch.randn(s.out_features, 4, generator=g),
            4.0,
        )
        for s in demo_layout()
    }
    factors = [p.requires_grad_() for own in layers.values() for p in (own.down, own.up)]
    adapters = lora_adapter_set(LoRAWeights(layers))
    z, y = torch.randn(2, 8, 16, 16, generator=g), torch.randn(2, 1600, generator=g)
    context, runs = torch.randn(2, 77, 128, generator=g), []
    handle = (
        unet.middle_block[1]
        .transformer_blocks[0]
        .register_forward_pre_hook(lambda *_: runs.append(1))
    )

    def gradients():
        with hold() as held:
            with attach(unet, adapters):
                out = unet(z, torch.tensor([100, 800]), context=context, y=y)
            held.resume()
            return torch.autograd.grad(out.square().mean(), factors)

    plain = gradients()
    with gradient_checkpointing(unet):
        again = gradients()
    handle.remove()
    assert len(runs) == 3
    for a, b in zip(plain, again, strict=True):
        assert float(a.abs().max()) > 0
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-8)
