"""What we write is what the real ComfyUI takes, for full-size SDXL on the meta device."""

from types import SimpleNamespace

import pytest
import torch

from difflora_core.lora.formats.lycoris import loha_layer, lokr_layer
from difflora_core.lora.formats.state_dict import to_state_dict
from difflora_core.lora.formats.stems import stem_table
from difflora_core.lora.layout import SDXL_UNET_CONFIG, sdxl_layout, unet_name_map
from difflora_core.lora.weights import LoRALayer, LoRAWeights

pytestmark = pytest.mark.comfy

COMFY_SDXL = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "num_res_blocks": [2, 2, 2],
    "channel_mult": [1, 2, 4],
    "num_head_channels": 64,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": True,
    "transformer_depth": [0, 0, 2, 2, 10, 10],
    "transformer_depth_middle": 10,
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
    "context_dim": 2048,
    "num_classes": "sequential",
    "adm_in_channels": 2816,
}
COMFY_SD15 = {
    "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": [1, 2, 4, 4],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_middle": 1,
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
}


@pytest.fixture(scope="module")
def sdxl(comfyui):
    """ComfyUI's own SDXL UNet, shapes only, in the shell that its LoRA code looks at."""
    import comfy.ops
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    unet = UNetModel(**COMFY_SDXL, device="meta", operations=comfy.ops.disable_weight_init)
    state = {f"diffusion_model.{key}": value for key, value in unet.state_dict().items()}
    return SimpleNamespace(
        state_dict=lambda: state, model_config=SimpleNamespace(unet_config=COMFY_SDXL)
    )


@pytest.fixture(scope="module")
def key_map(sdxl):
    import comfy.lora

    return comfy.lora.model_lora_keys_unet(sdxl, {})


def small_weights(layout):
    """Cheap distinct factors of the right shapes."""
    return LoRAWeights(
        {
            s.name: LoRALayer(
                torch.full((layout.rank, s.in_features), 0.5 + number),
                torch.full((s.out_features, layout.rank), 2.0),
                0.5 * layout.rank,
            )
            for number, s in enumerate(layout)
        }
    )


@pytest.mark.parametrize("naming", ["kohya_ldm", "kohya_diffusers", "generic"])
def test_all_560_layers_are_taken(sdxl, key_map, naming):
    import comfy.lora

    layout = sdxl_layout(1)
    weights = small_weights(layout)
    state = to_state_dict(weights, naming, layout)
    patches = comfy.lora.load_lora(state, key_map)
    assert set(patches) == {f"diffusion_model.{name}.weight" for name in weights}
    assert len(patches) == 560
    taken = set().union(*(adapter.loaded_keys for adapter in patches.values()))
    assert {key for key in state if not key.endswith(".alpha")} <= taken
    shapes = sdxl.state_dict()
    for key, adapter in patches.items():
        up, down, alpha = adapter.weights[:3]
        layer = weights[key.removeprefix("diffusion_model.").removesuffix(".weight")]
        assert shapes[key].shape == (up.shape[0], down.shape[1])
        assert torch.equal(up, layer.up)
        assert torch.equal(down, layer.down)
        assert alpha == layer.alpha


def test_layout_shapes_are_those_of_the_live_model(sdxl):
    shapes = sdxl.state_dict()
    for shape in sdxl_layout(1):
        weight = shapes[f"diffusion_model.{shape.name}.weight"]
        assert tuple(weight.shape) == (shape.out_features, shape.in_features)


@pytest.mark.parametrize("base", ["sdxl", "sd15"])
def test_every_name_agrees_with_comfyui(comfyui, base, sd15_config):
    import comfy.utils

    ours = {"sdxl": SDXL_UNET_CONFIG, "sd15": sd15_config}[base]
    table = comfy.utils.unet_to_diffusers({"sdxl": COMFY_SDXL, "sd15": COMFY_SD15}[base])
    names = unet_name_map(ours)
    assert len(names) > 380
    for diffusers, ldm in names.items():
        assert table[f"{diffusers}.weight"] == f"{ldm}.weight"


def test_every_stem_that_comfyui_takes_for_a_layer_is_read(key_map):
    table = stem_table(sdxl_layout(1))
    layers = set(table.values())
    stems = 0
    for stem, key in key_map.items():
        name = key.removeprefix("diffusion_model.").removesuffix(".weight")
        if name in layers:
            assert table[stem] == name
            stems += 1
    assert stems >= 6 * 560


def test_applied_weight_is_our_delta(comfyui, key_map):
    import comfy.lora

    generator = torch.Generator().manual_seed(0)
    name = "middle_block.1.transformer_blocks.3.attn2.to_k"
    layer = LoRALayer(
        torch.randn(4, 2048, generator=generator), torch.randn(1280, 4, generator=generator), 3.0
    )
    patches = comfy.lora.load_lora(to_state_dict(LoRAWeights({name: layer})), key_map)
    key = f"diffusion_model.{name}.weight"
    got = patches[key].calculate_weight(
        torch.zeros(1280, 2048), key, 0.7, 1.0, None, lambda change: change
    )
    torch.testing.assert_close(got, 0.7 * layer.delta(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("alpha", [None, 3.0])
@pytest.mark.parametrize("kind", ["lokr", "lokr_factored", "loha"])
def test_lycoris_is_read_as_comfyui_applies_it(comfyui, kind, alpha):
    from comfy.weight_adapter.loha import LoHaAdapter
    from comfy.weight_adapter.lokr import LoKrAdapter

    generator = torch.Generator().manual_seed(1)
    shapes = {
        "lokr": {"lokr_w1": (3, 2), "lokr_w2": (4, 5)},
        "lokr_factored": {"lokr_w1": (3, 2), "lokr_w2_a": (4, 2), "lokr_w2_b": (2, 5)},
        "loha": {
            "hada_w1_a": (12, 2), "hada_w1_b": (2, 10), "hada_w2_a": (12, 2), "hada_w2_b": (2, 10),
        },
    }[kind]  # fmt: skip
    parts = {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}
    adapter_class, read = (LoHaAdapter, loha_layer) if kind == "loha" else (LoKrAdapter, lokr_layer)
    state = {f"x.{name}": value for name, value in parts.items()}
    adapter = adapter_class.load("x", state, alpha, None, set())
    wanted = adapter.calculate_weight(
        torch.zeros(12, 10), "x", 1.0, 1.0, None, lambda change: change
    )
    layer, error = read(parts, alpha, 10)
    assert float(error) < 1e-6
    torch.testing.assert_close(layer.delta(), wanted, rtol=1e-4, atol=1e-4)
