"""LoRA files that ComfyUI's reader drops, or applies as nothing or as NaN: acted on, or refused."""

import pytest
import torch

from benchmarks.files.lora_files import WHOLE, Host

LAYER = "input_blocks.1.1.transformer_blocks.0.attn2.to_k"
CONVOLUTION = "input_blocks.1.0.in_layers.2"
STEM = f"lora_unet_{LAYER.replace('.', '_')}"
KERNEL = f"lora_unet_{CONVOLUTION.replace('.', '_')}"


@pytest.fixture(scope="module")
def host(pack):
    return Host()


def random(*size):
    return 0.3 * torch.randn(size, generator=torch.Generator().manual_seed(sum(size)))


def factors(host, stem=STEM, rank=4, up="lora_up.weight", down="lora_down.weight"):
    out, width = host.state[f"diffusion_model.{LAYER}.weight"].shape
    return {f"{stem}.{up}": random(out, rank), f"{stem}.{down}": random(rank, width)}


def changed(host, state, layer=LAYER, settings=WHOLE):
    """What Apply LoRA by Part and Time makes of a weight, less the weight."""
    patched, _ = host.apply.execute(host.model, state, *settings).args
    key = f"diffusion_model.{layer}.weight"
    weight = host.state[key].float()
    made = host.lora.calculate_weight(patched.patches.get(key, []), weight.clone(), key)
    return made.double() - weight.double()


def hooked(host, state):
    """The hook of a LoRA, registered as sampling does."""
    hooks = __import__("comfy.hooks").hooks
    (group,) = host.to_hook.execute(state, 1.0).args
    target = hooks.create_target_dict(hooks.EnumWeightTarget.Model)
    for hook in group.hooks:
        hook.add_hook_patches(host.model.clone(), {}, target, hooks.HookGroup())


def product(state):
    up, down = (tensor.double() for tensor in state.values())
    return up @ down


@pytest.mark.parametrize(
    "before", ["base_model.model.unet.", "model.diffusion_model.", "pipe.unet.", "_orig_mod."]
)
def test_wrapped_names_act(host, before):
    name = LAYER if "diffusion" in before else host.diffusers[LAYER]
    state = factors(host, before + name, up="lora_B.weight", down="lora_A.weight")
    torch.testing.assert_close(changed(host, state), product(state), rtol=1e-5, atol=1e-5)
    hooked(host, state)


@pytest.mark.parametrize("before", ["", "LORA_UNET_", "Lora_Unet_"])
def test_flat_names_act_without_a_prefix_and_in_capitals(host, before):
    """No other layer is called so, and ComfyUI itself would apply nothing, in silence."""
    default = {"up": "lora_up.default.weight", "down": "lora_down.default.weight"}
    state = factors(host, before + LAYER.replace(".", "_"), **default)
    torch.testing.assert_close(changed(host, state), product(state), rtol=1e-5, atol=1e-5)
    hooked(host, state)


@pytest.mark.parametrize("form", ["PEFT", "PEFT, in a wrapper", "one-dimensional", "column"])
def test_every_form_of_a_dora_scale(host, form):
    """ComfyUI's DoRA, (W + dW) m / |W| by rows; programs write m with a second axis or without."""
    wrapped = form.startswith("PEFT")
    before = "base_model.model.unet." if "wrapper" in form else "base_model.model."
    stem = before + host.diffusers[LAYER] if wrapped else STEM
    state = factors(host, stem)
    if wrapped:
        state = factors(host, stem, up="lora_B.weight", down="lora_A.weight")
    weight = host.state[f"diffusion_model.{LAYER}.weight"].double()
    new = weight + product(state)
    lengths = random(len(weight)).abs() + 1
    wanted = lengths.double()[:, None] * new / weight.norm(dim=1, keepdim=True)
    scale = lengths[:, None] if form == "column" else lengths
    state[f"{stem}.{'lora_magnitude_vector' if wrapped else 'dora_scale'}"] = scale
    torch.testing.assert_close(changed(host, state) + weight, wanted, rtol=1e-5, atol=1e-5)


def test_a_flattened_difference_acts(host):
    """Some programs store a kernel as a matrix; ComfyUI leaves that out with a line in the log."""
    shape = host.state[f"diffusion_model.{CONVOLUTION}.weight"].shape
    state = {f"{KERNEL}.diff": random(shape[0], shape[1:].numel())}
    wanted = state[f"{KERNEL}.diff"].reshape(shape).double()
    torch.testing.assert_close(changed(host, state, CONVOLUTION), wanted, rtol=1e-5, atol=1e-5)


def test_flattened_factors_of_a_convolution_act_for_a_part_of_the_steps(host):
    out, *rest = host.state[f"diffusion_model.{CONVOLUTION}.weight"].shape
    numbers = rest[0] * rest[1] * rest[2]
    state = {
        f"{KERNEL}.lora_up.weight": random(out, 4),
        f"{KERNEL}.lora_down.weight": random(4, numbers),
    }
    patched, _ = host.apply.execute(host.model, state, 1.0, 0.0, 0.5, *WHOLE[3:]).args
    (chain,) = patched.get_wrappers("apply_model", "difflora")
    (layer,) = chain.links[0].applied.adaptation.layers.values()
    assert tuple(layer["down"].shape) == (4, *rest)
    assert tuple(layer["up"].shape) == (out, 4, 1, 1)


REFUSED = {
    "nan": ({"lora_up.weight": torch.full((64, 4), torch.nan)}, "NaN or infinite"),
    "alpha": ({"alpha": torch.tensor(torch.inf)}, "NaN or infinite"),
    "two alphas": ({"alpha": torch.ones(2)}, "alpha should be one number"),
    "ranks": ({"lora_down.weight": torch.ones(5, 128)}, "do not fit together"),
    "AdaLoRA": ({"lora_E": torch.ones(4, 1)}, "is an AdaLoRA"),
    "DoRA of another size": ({"dora_scale": torch.ones(3, 1)}, "not fit the base model"),
    "PEFT beside": ({"lora_A.weight": torch.ones(4, 128)}, "described twice"),
    "short DoRA": ({"dora_scale": torch.tensor(1.0)}, "not fit the base model"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_would_do_nothing_or_harm_is_refused(host, kind):
    """In Apply, for a part of the steps, and in a hook when sampling starts."""
    change, said = REFUSED[kind]
    state = factors(host) | {f"{STEM}.{name}": tensor for name, tensor in change.items()}
    timed = (1.0, 0.0, 0.5, *WHOLE[3:])
    for act in (changed, lambda *a: changed(*a, settings=timed), hooked):
        with pytest.raises(Exception, match=said) as caught:
            act(host, state)
        assert type(caught.value).__name__ in ("LoRAFileError", "LayoutError")


def test_one_layer_under_two_names_is_refused_in_a_hook_too(host):
    other = f"lora_unet_{host.diffusers[LAYER].replace('.', '_')}"
    state = factors(host) | factors(host, other)
    for act in (changed, hooked):
        with pytest.raises(Exception, match="under two names"):
            act(host, state)


@pytest.mark.parametrize("stem", ["vae.decoder.conv_in", "te1_text_model_encoder_layers_0_mlp_fc1"])
def test_parts_of_other_models_do_not_stop_the_rest(host, stem):
    state = factors(host)
    beside = {f"{stem}.{name}": torch.ones(4, 4) for name in ("lora_up.weight", "lora_down.weight")}
    torch.testing.assert_close(changed(host, state | beside), product(state), rtol=1e-5, atol=1e-5)
