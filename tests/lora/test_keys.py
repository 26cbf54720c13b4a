"""Every key family reads back to the same weights; everything else is reported or refused."""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from difflora_core.errors import LayoutError, LoRAFileError
from difflora_core.lora.distance import relative_error
from difflora_core.lora.formats.state_dict import (
    from_state_dict,
    to_state_dict,
    with_peft_alphas,
)
from difflora_core.lora.layout import (
    SDXL_UNET_CONFIG,
    LoRALayout,
    layout_from_unet_config,
    sdxl_layout,
    unet_name_map,
)
from difflora_core.lora.weights import LoRALayer, LoRAWeights

# SDXL's structure and names at a hundredth of its size
TINY_CONFIG = {
    **SDXL_UNET_CONFIG,
    "block_out_channels": [8, 16, 32],
    "norm_num_groups": 4,
    "transformer_layers_per_block": [1, 1, 2],
    "attention_head_dim": 2,
    "cross_attention_dim": 12,
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 32,
}
SDXL = sdxl_layout(1)
TINY = layout_from_unet_config("tiny", TINY_CONFIG, 2)
LAYOUT = LoRALayout("tiny", 2, TINY.layers[5:9] + TINY.layers[-2:])
NAMES = unet_name_map(TINY_CONFIG)
NAMINGS = ("kohya_ldm", "kohya_diffusers", "generic", "diffusers")
PAIRS = (
    (".lora_down.weight", ".lora_up.weight"),
    (".lora_A.weight", ".lora_B.weight"),
    ("_lora.down.weight", "_lora.up.weight"),
    (".lora.down.weight", ".lora.up.weight"),
    (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    (".lora_A.default.weight", ".lora_B.default.weight"),
    (".lora_A.my-face_1.weight", ".lora_B.my-face_1.weight"),
    (".lora_A", ".lora_B"),
    (".lora_down.default.weight", ".lora_up.default.weight"),
)
STEMS = {
    "kohya, LDM names": lambda s: f"lora_unet_{s.name.replace('.', '_')}",
    "kohya, diffusers names": lambda s: f"lora_unet_{s.diffusers_name.replace('.', '_')}",
    "generic": lambda s: f"diffusion_model.{s.name}",
    "LyCORIS": lambda s: f"lycoris_{s.diffusers_name.replace('.', '_')}",
    "old processors": lambda s: (
        "unet." + s.diffusers_name.replace(".to_", ".processor.to_").removesuffix(".0")
    ),
    "old processors, no prefix": lambda s: s.diffusers_name.replace(
        ".to_", ".processor.to_"
    ).removesuffix(".0"),
    "diffusers": lambda s: f"unet.{s.diffusers_name}",
    "PEFT": lambda s: f"base_model.model.{s.diffusers_name}",
    "bare": lambda s: s.diffusers_name,
    "bare, flat": lambda s: s.diffusers_name.replace(".", "_"),
    "bare, flat LDM names": lambda s: s.name.replace(".", "_"),
    "capitals": lambda s: f"LORA_UNET_{s.name.replace('.', '_')}",
    "capitals, diffusers": lambda s: f"UNet.{s.diffusers_name}",
}


def random_weights(layout, seed=0, alpha=None, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for s in layout:
        down = torch.randn(layout.rank, s.in_features, generator=generator, dtype=dtype)
        up = torch.randn(s.out_features, layout.rank, generator=generator, dtype=dtype)
        layers[s.name] = LoRALayer(down, up, float(layout.rank) if alpha is None else alpha)
    return LoRAWeights(layers)


def assert_same(found, wanted):
    assert list(found) == list(wanted)
    for name in wanted:
        torch.testing.assert_close(found[name].delta(), wanted[name].delta(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("stem", STEMS.values(), ids=STEMS)
@pytest.mark.parametrize("pair", PAIRS, ids=lambda p: p[0])
def test_every_stem_and_suffix(stem, pair):
    weights = random_weights(LAYOUT, alpha=1.0)
    state = {}
    for shape in LAYOUT:
        layer = weights[shape.name]
        state[stem(shape) + pair[0]] = layer.down
        state[stem(shape) + pair[1]] = layer.up
        state[stem(shape) + ".alpha"] = torch.tensor(layer.alpha)
    for names in (LAYOUT, NAMES):
        result = from_state_dict(state, names)
        assert_same(result.weights, weights)
        assert result.report.layers == len(LAYOUT)
        assert not result.report.unused
        assert not result.report.skipped
        assert result.report.total_error == 0


@pytest.mark.parametrize("naming", NAMINGS)
@given(alpha=st.floats(0.125, 64, width=32), seed=st.integers(0, 99))
def test_writing_and_reading_are_inverse(naming, alpha, seed):
    weights = random_weights(LAYOUT, seed, alpha)
    state = to_state_dict(weights, naming, LAYOUT)
    found = from_state_dict(state, LAYOUT).weights
    if naming == "diffusers":  # alpha is folded into lora_B there
        assert not any(key.endswith(".alpha") for key in state)
        assert_same(found, weights)
        return
    for name in weights:
        assert torch.equal(found[name].down, weights[name].down)
        assert torch.equal(found[name].up, weights[name].up)
        assert found[name].alpha == pytest.approx(alpha, rel=1e-7)


def test_default_names_are_what_kohya_writes():
    state = to_state_dict(random_weights(SDXL))
    assert len(state) == 3 * 560
    stem = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
    assert {f"{stem}.{end}" for end in ("lora_down.weight", "lora_up.weight", "alpha")} <= set(
        state
    )
    assert "lora_unet_middle_block_1_transformer_blocks_9_attn2_to_out_0.lora_up.weight" in state
    assert "lora_unet_output_blocks_5_1_transformer_blocks_1_attn2_to_v.alpha" in state


def test_text_encoders_round_trip():
    generator = torch.Generator().manual_seed(0)
    names = [
        "te1.text_model.encoder.layers.3.self_attn.q_proj",
        "te2.text_model.encoder.layers.31.mlp.fc1",
        "te2.text_model.encoder.layers.0.self_attn.out_proj",
    ]
    weights = LoRAWeights(
        {
            name: LoRALayer(
                torch.randn(2, 8, generator=generator), torch.randn(6, 2, generator=generator), 1.0
            )
            for name in names
        }
    )
    state = to_state_dict(weights)
    assert "lora_te2_text_model_encoder_layers_31_mlp_fc1.lora_up.weight" in state
    for naming in NAMINGS:
        found = from_state_dict(to_state_dict(weights, naming), NAMES)
        assert_same(found.weights, weights)


def test_rank_is_brought_to_the_layout():
    weights = random_weights(LAYOUT, alpha=3.0)
    wide = from_state_dict(to_state_dict(weights), replace(LAYOUT, rank=5))
    replace(LAYOUT, rank=5).check(wide.weights)
    assert_same(wide.weights, weights)
    assert wide.report.total_error == 0
    small = from_state_dict(to_state_dict(weights), replace(LAYOUT, rank=1))
    replace(LAYOUT, rank=1).check(small.weights)
    assert small.report.total_error == pytest.approx(
        float(relative_error(small.weights, weights)), rel=1e-4
    )
    assert "approximated" in small.report.summary()


def test_partial_and_foreign_layers_are_reported():
    state = to_state_dict(random_weights(LAYOUT))
    gone = LAYOUT.layers[1].name
    state = {k: v for k, v in state.items() if gone.replace(".", "_") not in k}
    state["lora_unet_nowhere.alpha"] = torch.tensor(1.0)
    state["something.else"] = torch.zeros(1)
    stem = "lora_unet_" + LAYOUT.layers[0].name.replace(".", "_")
    state[f"{stem}.diff_b"] = torch.zeros(4)
    report = from_state_dict(state, LAYOUT).report
    assert report.missing == (gone,)
    assert set(report.unused) == {"lora_unet_nowhere", "something.else"}
    assert f"{stem} (bias)" in report.skipped
    assert "left out" in report.summary()
    assert "1 layer not in the file, left at zero" in report.summary()


def test_lora_for_another_base_is_refused(sd15_config):
    sd15 = layout_from_unet_config("sd15", sd15_config, 1)
    for naming in ("kohya_diffusers", "kohya_ldm"):
        state = to_state_dict(random_weights(sd15), naming, sd15)
        with pytest.raises(LayoutError, match="does not fit sdxl"):
            from_state_dict(state, SDXL)
    only_cross = {k: v for k, v in state.items() if "attn2_to_k" in k}
    with pytest.raises(LayoutError, match=r"looks like a LoRA for Stable Diffusion 1\.x"):
        from_state_dict(only_cross, SDXL)
    with pytest.raises(LayoutError, match="No layer of this LoRA belongs to the base model sdxl"):
        from_state_dict({"transformer.blocks.0.lora_A.weight": torch.zeros(1, 2)}, SDXL)
    with pytest.raises(LayoutError, match="No layer"):
        from_state_dict({}, SDXL)


STEM = "lora_unet_" + LAYOUT.layers[0].name.replace(".", "_")
WIDTH, OUT = LAYOUT.layers[0].in_features, LAYOUT.layers[0].out_features


DOWN, UP = torch.ones(2, WIDTH), torch.ones(OUT, 2)
GOOD = {".lora_down.weight": DOWN, ".lora_up.weight": UP}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({".lora_up.weight": UP}, "down factor is missing"),
        ({".lora_down.weight": DOWN}, "up factor is missing"),
        (GOOD | {".lora_up.weight": torch.ones(OUT, 3)}, "different ranks"),
        (GOOD | {".lora_down.weight": DOWN * torch.nan}, "NaN or infinite"),
        (GOOD | {".lora_up.weight": UP * torch.inf}, "NaN or infinite"),
        (GOOD | {".lora_down.weight": DOWN[0]}, "shape"),
        ({".lora_down.weight": DOWN[:0], ".lora_up.weight": UP[:, :0]}, "shape"),
        (GOOD | {".lora_down.weight": DOWN.int()}, "not real numbers"),
        (GOOD | {".lora_up.weight": UP[1:]}, "does not fit tiny"),
        (GOOD | {".alpha": torch.ones(3)}, "alpha should be one number"),
        (GOOD | {".alpha": torch.tensor(torch.nan)}, "NaN or infinite"),
        (GOOD | {".dora_scale": torch.ones(OUT, 1)}, "this is a DoRA"),
        ({".lora_A.a.weight": DOWN, ".lora_A.b.weight": DOWN}, "several adapters"),
        ({".lokr_w1": torch.ones(2, 2)}, "lacks its matrix lokr_w2"),
        ({".hada_w1_a": UP}, "LoHa layer lacks"),
        ({".hada_w1_a": UP, ".hada_w1_b": DOWN, ".hada_w2_a": UP, ".hada_w2_b": DOWN[:, 1:]},
         "do not fit together"),
        ({".lokr_w1_a": torch.ones(4, 2), ".lokr_w1_b": torch.ones(3, 4), ".lokr_w2": UP},
         "do not fit together"),
    ],
)  # fmt: skip
def test_damaged_layers_are_named(state, message):
    with pytest.raises((LoRAFileError, LayoutError), match=message) as caught:
        from_state_dict({STEM + k: v for k, v in state.items()}, LAYOUT)
    assert len(str(caught.value)) < 400


def test_hostile_keys_cost_no_time():
    state = to_state_dict(random_weights(LAYOUT))
    long = "a.lora_magnitude_vector" * 50_000 + "!"
    report = from_state_dict({long: torch.zeros(1), **state}, LAYOUT).report
    assert set(report.unused) == {long}
    assert len(report.summary()) < 300


def test_two_names_for_one_layer():
    state = to_state_dict(random_weights(LAYOUT))
    state |= to_state_dict(random_weights(LAYOUT), "diffusers", LAYOUT)
    with pytest.raises(LoRAFileError, match="under two names"):
        from_state_dict(state, LAYOUT)


def test_other_methods_are_skipped_with_reasons():
    state = to_state_dict(random_weights(LAYOUT))
    state |= {
        "lora_unet_input_blocks_1_0_in_layers_2.lora_down.weight": torch.ones(2, 8, 1, 1),
        "lora_unet_input_blocks_1_0_in_layers_2.lora_up.weight": torch.ones(8, 2, 3, 3),
        "lora_unet_input_blocks_2_0_in_layers_2.oft_blocks": torch.ones(2, 2, 2),
        "lora_unet_input_blocks_4_1_norm.set_weight": torch.ones(16),
        "lora_unet_input_blocks_4_0_skip_connection.lora_down.weight": torch.ones(1, 8, 1, 1),
        "lora_unet_input_blocks_4_0_skip_connection.lora_up.weight": torch.ones(16, 1, 1, 1),
    }
    result = from_state_dict(state, NAMES)
    assert set(result.report.skipped.values()) == {
        "convolution of an unknown form",
        "OFT, BOFT or GLoRA, not a low-rank sum",
        "replaces a whole weight",
    }
    assert result.weights["input_blocks.4.0.skip_connection"].delta().shape == (16, 8)


def test_peft_alpha_comes_from_the_metadata():
    weights = random_weights(LAYOUT, alpha=4.0)
    state = {}
    for shape in LAYOUT:
        state[f"unet.{shape.diffusers_name}.lora_A.weight"] = weights[shape.name].down
        state[f"unet.{shape.diffusers_name}.lora_B.weight"] = weights[shape.name].up
    special = LAYOUT.layers[2]
    config = {"unet.lora_alpha": 4, "unet.r": 2}
    config["unet.alpha_pattern"] = {special.diffusers_name: 1}
    metadata = {"lora_adapter_metadata": json.dumps(config)}
    found = from_state_dict(state, LAYOUT, metadata=metadata).weights
    assert {name: layer.alpha for name, layer in found.layers.items()} == {
        s.name: 1.0 if s is special else 4.0 for s in LAYOUT
    }
    config = {"unet.lora_alpha": 4, "unet.use_rslora": True}
    stabilised = from_state_dict(
        state, LAYOUT, metadata={"lora_adapter_metadata": json.dumps(config)}
    )
    assert stabilised.weights[special.name].scaling == pytest.approx(4 / 2**0.5)
    assert from_state_dict(state, LAYOUT).weights[special.name].scaling == 1.0
    again = from_state_dict(with_peft_alphas(state, metadata), LAYOUT).weights
    assert {name: layer.alpha for name, layer in again.layers.items()} == {
        name: layer.alpha for name, layer in found.layers.items()
    }


@pytest.mark.parametrize(
    "config",
    ["{", "[]", '{"unet.lora_alpha": "four"}', '{"unet.lora_alpha": Infinity}', "[" * 100000],
    ids=["cut", "list", "word", "infinite", "deep"],
)
def test_damaged_peft_settings_are_refused(config):
    shape = LAYOUT.layers[0]
    stem = f"unet.{shape.diffusers_name}"
    state = {
        f"{stem}.lora_A.weight": torch.ones(2, shape.in_features),
        f"{stem}.lora_B.weight": torch.ones(shape.out_features, 2),
    }
    for read in (with_peft_alphas, lambda s, m: from_state_dict(s, LAYOUT, metadata=m)):
        with pytest.raises(LoRAFileError, match="file's metadata"):
            read(state, {"lora_adapter_metadata": config})


def test_writing_refuses_what_would_be_wrong():
    weights = random_weights(LAYOUT)
    with pytest.raises(LayoutError, match="one LoRA"):
        to_state_dict(LoRAWeights.stack([weights, weights]))
    with pytest.raises(LayoutError, match="diffusers name"):
        to_state_dict(weights, "diffusers")
    with pytest.raises(LoRAFileError, match="naming"):
        to_state_dict(weights, "civitai")
    big = LoRAWeights({n: LoRALayer(v.down * 1e6, v.up, 2.0) for n, v in weights.layers.items()})
    with pytest.raises(LoRAFileError, match=r"not finite in torch\.float16"):
        to_state_dict(big, dtype=torch.float16)
