"""Tensors that no LoRA can hold, names behind wrappers of programs, and what else is in files."""

import pytest
import torch

from difflora_core.errors import LayoutError, LoRAFileError
from difflora_core.lora.formats.known_names import with_known_names
from difflora_core.lora.formats.sound import check_sound
from difflora_core.lora.formats.state_dict import from_state_dict
from difflora_core.lora.formats.stems import layer_name, other_part, stem_table, why_nothing

LDM = "input_blocks.1.1.transformer_blocks.0.attn2.to_k"
OURS = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
TABLE = stem_table({OURS: LDM})
STEM = "lora_unet_input_blocks_1_1_transformer_blocks_0_attn2_to_k"
UP, DOWN = torch.ones(6, 2), torch.ones(2, 4)
GOOD = {f"{STEM}.lora_up.weight": UP, f"{STEM}.lora_down.weight": DOWN}


@pytest.mark.parametrize("name", [LDM, OURS])
@pytest.mark.parametrize(
    "before",
    [
        *("model.diffusion_model.", "base_model.model.diffusion_model.", "base_model.model.unet."),
        *("base_model.model.model.diffusion_model.", "pipe.unet.", "model.unet.", "module."),
        *("_orig_mod.", "module._orig_mod.unet.", "diffusion_model.", "lora_unet.", "unet.", ""),
    ],
)
def test_a_layer_is_found_behind_every_wrapper(before, name):
    assert layer_name(before + name, TABLE) == LDM
    assert layer_name(f"{before}{name}.base_layer", TABLE) == LDM


def test_compiled_parts_and_other_layers():
    assert layer_name(OURS.replace(".attn2", "._orig_mod.attn2"), TABLE) == LDM
    for stem in (f"text_encoder.{OURS}", f"unet2.{OURS}", f"{OURS}.more", "unet.", "model.model."):
        assert layer_name(stem, TABLE) is None
    assert layer_name("model." * 50_000, TABLE) is None  # and at once


def test_wrapped_names_become_the_hosts():
    state = {
        f"base_model.model.unet.{OURS}.lora_A.weight": DOWN,
        f"base_model.model.unet.{OURS}.lora_B.weight": UP,
    }
    known = with_known_names(state, TABLE, ())
    assert set(known) == {f"{STEM}.lora_A.weight", f"{STEM}.lora_B.weight"}
    read = from_state_dict(state, {OURS: LDM})
    torch.testing.assert_close(read.weights[LDM].delta(), UP @ DOWN)


def test_one_layer_under_a_known_and_a_foreign_name():
    other = {f"unet.{OURS}.lora_A.weight": DOWN, f"unet.{OURS}.lora_B.weight": UP}
    with pytest.raises(LoRAFileError, match="under two names"):
        with_known_names(GOOD | other, TABLE, {STEM})


NAN = torch.full((6, 2), torch.nan)
WRONG = {
    "nan": ({f"{STEM}.lora_up.weight": NAN}, "NaN or infinite"),
    "infinite alpha": ({f"{STEM}.alpha": torch.tensor(torch.inf)}, "NaN or infinite"),
    "two alphas": ({f"{STEM}.alpha": torch.ones(2)}, "alpha should be one number"),
    "no alpha": ({f"{STEM}.alpha": torch.ones(0)}, "alpha should be one number"),
    "rank 0": (
        {f"{STEM}.lora_up.weight": UP[:, :0], f"{STEM}.lora_down.weight": DOWN[:0]},
        "empty or damaged",
    ),
    "ranks": ({f"{STEM}.lora_down.weight": torch.ones(3, 4)}, "do not fit together"),
    "core": ({f"{STEM}.lora_mid.weight": torch.ones(3, 3, 1, 1)}, "do not fit together"),
    "complex": ({f"{STEM}.lora_up.weight": UP.to(torch.complex64)}, "is complex"),
    "sparse": ({f"{STEM}.lora_up.weight": UP.to_sparse()}, "plain real numbers"),
    "meta": ({f"{STEM}.lora_up.weight": UP.to("meta")}, "plain real numbers"),
    "quantised": (
        {f"{STEM}.lora_up.weight": torch.quantize_per_tensor(UP, 0.1, 0, torch.qint8)},
        "plain real numbers",
    ),
    "PEFT beside": ({f"{STEM}.lora_A.weight": DOWN}, "described twice"),
    "AdaLoRA": ({f"{STEM}.lora_E": torch.ones(2, 1)}, "is an AdaLoRA"),
    "AdaLoRA, named": ({f"{STEM}.lora_E.default": torch.ones(2, 1)}, "is an AdaLoRA"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_cannot_be_is_one_sentence(kind):
    check_sound(GOOD)
    change, said = WRONG[kind]
    with pytest.raises(LoRAFileError, match=said) as caught:
        check_sound(GOOD | change)
    assert "\n" not in str(caught.value)


def test_forms_that_are_sound():
    """Kernels, Tucker, LoHa, LoKr, DoRA, fp8, whole weights, integers and words beside them."""
    stem = f"{STEM}."
    forms = (
        {"lora_up.weight": UP[..., None, None], "lora_down.weight": torch.ones(2, 4, 3, 3)},
        {
            "lora_up.weight": UP[..., None, None], "lora_mid.weight": torch.ones(2, 2, 3, 3),
            "lora_down.weight": DOWN[..., None, None],
        },
        {"hada_w1_a": UP, "hada_w1_b": DOWN, "hada_w2_a": UP, "hada_w2_b": DOWN},
        {"lokr_w1": torch.ones(2, 2), "lokr_w2_a": torch.ones(3, 1), "lokr_w2_b": torch.ones(1, 2)},
        {"lora_up.weight": UP, "lora_down.weight": DOWN, "dora_scale": torch.ones(6, 1)},
        {
            name: tensor.to(torch.float8_e4m3fn)
            for name, tensor in {"lora_up.weight": UP, "lora_down.weight": DOWN}.items()
        },
        {"set_weight": torch.ones(6, 4)}, {"diff_b": torch.ones(6)}, {"diff": torch.ones(6)},
        {"lora_A.weight": DOWN, "lora_B.weight": UP, "lora_B.bias": torch.ones(6)},
    )  # fmt: skip
    for form in forms:
        state = {stem + name: tensor for name, tensor in form.items()}
        check_sound(state | {f"{STEM}.alpha": torch.tensor(2), "bundle_emb.a.x": torch.ones(2, 3)})


@pytest.mark.parametrize(
    ("key", "part"),
    [
        ("te1_text_model_encoder_layers_0_self_attn_q_proj.lora_up.weight", "text encoders"),
        ("te.text_model.encoder.layers.0.mlp.fc1.alpha", "text encoders"),
        ("text_model.encoder.layers.0.mlp.fc1.lora_A.weight", "text encoders"),
        ("base_model.model.text_model.encoder.layers.0.mlp.fc1.lora_A.weight", "text encoders"),
        ("text_projection.lora_A.weight", "text encoders"),
        ("conditioner.embedders.0.transformer.text_model.x.lora_up.weight", "text encoders"),
        ("cond_stage_model.transformer.text_model.x.lora_up.weight", "text encoders"),
        ("lora_prior_te_text_model_encoder_layers_0_mlp_fc1.alpha", "text encoders"),
        ("vae.decoder.conv_in.lora_up.weight", "the VAE"),
        ("lora_vae_decoder_conv_in.lora_up.weight", "the VAE"),
        ("first_stage_model.decoder.conv_in.diff", "the VAE"),
        ("lora_controlnet_input_hint_block_0.lora_up.weight", "a ControlNet"),
        (f"{STEM}.lora_up.weight", None),
        ("temporal.lora_up.weight", None),
        ("textures.lora_up.weight", None),
    ],
)
def test_what_belongs_to_another_model(key, part):
    assert other_part(key) == part


@pytest.mark.parametrize(
    ("key", "said"),
    [
        (f"{OURS}.on_input", "is an IA3"),
        (f"base_model.model.{OURS}.ia3_l", "is an IA3"),
        (f"base_model.model.{OURS}.vera_lambda_b", "is a VeRA"),
        (f"base_model.model.{OURS}.oft_R.weight", "is an OFT of kohya's scripts or PEFT"),
        ("oft_unet_down_blocks_0_attentions_0.oft_blocks", "is an OFT of kohya's"),
        (f"base_model.model.{OURS}.boft_R", "is a BOFT of PEFT"),
        (f"base_model.model.{OURS}.hra_u", "method of PEFT that is no LoRA"),
        ("vae.decoder.conv_in.lora_up.weight", "edits the VAE only"),
        ("lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha", "edits text encoders only"),
    ],
)
def test_why_a_file_does_nothing(key, said):
    assert said in str(why_nothing([key]))
    assert why_nothing([f"{STEM}.alpha"]) is None
    with pytest.raises(LayoutError, match=said):
        from_state_dict({key: torch.ones(4, 2)}, {OURS: LDM})
