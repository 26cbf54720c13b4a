"""Adapters under every guider of core, its guidances, HyperTile and torch.compile.

A prompt is known by what it is. The reference is core's own hook on a conditioning, which acts on
that prompt alone by patching weights.
"""

from importlib import import_module

import numpy as np
import pytest
import torch

from difflora_core.demo.comfyui.client import ComfyPromptError

MODEL, CLIP, VAE = (["demo", k] for k in range(3))
ROUNDING = 2  # grey levels between the same arithmetic in another order
WHOLE = {
    "strength": 1.0, "start_percent": 0.0, "end_percent": 1.0, "positive_only": False,
    "input_blocks": 1.0, "middle_block": 1.0, "output_blocks": 1.0, "self_attention": 1.0,
    "cross_attention": 1.0,
}  # fmt: skip


def node(class_type, **inputs):
    return {"class_type": class_type, "inputs": inputs}


def apply(model=MODEL, **changes):
    return node("DiffLoRA_ApplyLoRA", model=model, lora=["lora", 0], **(WHOLE | changes))


@pytest.fixture(scope="module")
def parts():
    """A person's LoRA, prompts with and without a hook on them, and what every sampler needs."""
    return {
        "demo": node("DiffLoRA_LoadDemo"),
        "latent": node(
            "DiffLoRA_InventIdentity", difflora_model=["demo", 5], seed=3, count=1, steps=4,
            guidance=1.0,
        ),
        "lora": node("DiffLoRA_DecodeLoRA", difflora_model=["demo", 5], lora_latent=["latent", 0]),
        "words": node("CLIPTextEncode", clip=CLIP, text="photo of a person, smiling"),
        "none": node("CLIPTextEncode", clip=CLIP, text="cartoon"),
        "hook": node("DiffLoRA_LoRAToHook", lora=["lora", 0], strength_model=1.0),
        "hooked": node(
            "ConditioningSetProperties", cond_NEW=["words", 0], strength=1.0,
            set_cond_area="default", hooks=["hook", 0],
        ),
        "ours": apply(positive_only=True),
        "noise": node("RandomNoise", noise_seed=3),
        "sampler": node("KSamplerSelect", sampler_name="euler"),
        "steps": node("BasicScheduler", model=MODEL, scheduler="normal", steps=3, denoise=1.0),
        "empty": node("EmptyLatentImage", width=64, height=64, batch_size=2),
    }  # fmt: skip


def cfg(model, positive):
    return node("CFGGuider", model=model, positive=positive, negative=["none", 0], cfg=2.0)


def dual(model, positive, middle=None):
    return node(
        "DualCFGGuider", model=model, cond1=positive, cond2=middle or positive,
        negative=["none", 0], cfg_conds=3.0, cfg_cond2_negative=2.0, style="regular",
    )  # fmt: skip


def perp_neg(model, positive):
    return node(
        "PerpNegGuider", model=model, positive=positive, negative=["none", 0],
        empty_conditioning=["none", 0], cfg=2.0, neg_scale=0.7,
    )  # fmt: skip


def dual_model(model, positive):
    return node(
        "DualModelGuider", model=model, model_negative=MODEL, positive=positive,
        negative=["none", 0], cfg=2.0,
    )  # fmt: skip


def basic(model, positive):
    return node("BasicGuider", model=model, conditioning=positive)


def guided(name, guider):
    """Nodes that draw with a guider."""
    return {
        f"{name}_guider": guider,
        f"{name}_latent": node(
            "SamplerCustomAdvanced", noise=["noise", 0], guider=[f"{name}_guider", 0],
            sampler=["sampler", 0], sigmas=["steps", 0], latent_image=["empty", 0],
        ),
        f"{name}_decoded": node("VAEDecode", samples=[f"{name}_latent", 0], vae=VAE),
        name: node("PreviewImage", images=[f"{name}_decoded", 0]),
    }  # fmt: skip


def difference(a, b):
    """Largest difference in grey levels over all pictures."""
    return max(int(np.abs(x.astype(int) - y.astype(int)).max()) for x, y in zip(a, b, strict=True))


GUIDERS = {
    "CFG": cfg,
    "Dual CFG": dual,
    "PerpNeg": perp_neg,
    "Dual Model": dual_model,
    "Basic": basic,
}


@pytest.mark.parametrize("name", GUIDERS)
def test_positive_only_is_a_hook_on_the_positive_prompts(comfy, parts, name):
    make = GUIDERS[name]
    nodes = {**parts, **guided("base", make(MODEL, ["words", 0]))}
    nodes |= guided("ours_p", make(["ours", 0], ["words", 0]))
    nodes |= guided("cores", make(MODEL, ["hooked", 0]))
    shown = comfy.run(nodes).pictures
    assert difference(shown["ours_p"], shown["base"]) > 8
    assert difference(shown["ours_p"], shown["cores"]) <= ROUNDING


def test_dual_cfg_with_equal_prompts_is_cfg(comfy, parts):
    nodes = {**parts, **guided("one", cfg(["ours", 0], ["words", 0]))}
    nodes |= guided("two", dual(["ours", 0], ["words", 0]))
    shown = comfy.run(nodes).pictures
    assert difference(shown["one"], shown["two"]) <= ROUNDING


def test_a_lora_on_one_model_of_two_leaves_the_other_alone(comfy, parts):
    """Dual Model Guider asks the second model for the negative prompt: nothing is on it."""
    timed = apply(end_percent=0.999)
    nodes = {**parts, "timed": timed, **guided("both", dual_model(["timed", 0], ["words", 0]))}
    nodes["half"] = apply(end_percent=0.999, positive_only=True)
    nodes |= guided("positive", cfg(["half", 0], ["words", 0]))
    nodes |= guided("everywhere", cfg(["timed", 0], ["words", 0]))
    shown = comfy.run(nodes).pictures
    assert difference(shown["both"], shown["positive"]) <= ROUNDING
    assert difference(shown["both"], shown["everywhere"]) > 8


def test_on_the_second_model_it_is_refused_before_sampling(comfy, parts):
    """Core runs nothing of what wraps that model, so it would have no effect."""
    guider = dual_model(MODEL, ["words", 0])
    guider["inputs"]["model_negative"] = ["ours", 0]
    with pytest.raises(ComfyPromptError, match="would have no effect on this model"):
        comfy.run({**parts, **guided("out", guider)})
    both = dual_model(["ours", 0], ["words", 0])
    both["inputs"]["model_negative"] = ["other", 0]
    other = apply(positive_only=True, strength=0.5)
    with pytest.raises(ComfyPromptError, match="would have no effect on this model"):
        comfy.run({**parts, "other": other, **guided("out", both)})


PATCHES = {
    "SAG": {"class_type": "SelfAttentionGuidance", "scale": 0.7, "blur_sigma": 2.0},
    "PAG": {"class_type": "PerturbedAttentionGuidance", "scale": 2.0},
    "FreeU": {"class_type": "FreeU_V2", "b1": 1.1, "b2": 1.2, "s1": 0.9, "s2": 0.6},
}


@pytest.mark.parametrize("name", PATCHES)
def test_under_other_guidances_too(comfy, parts, name):
    def patched(model):
        settings = dict(PATCHES[name])
        return node(settings.pop("class_type"), model=model, **settings)

    nodes = {**parts, "plain_m": patched(MODEL), "ours_m": patched(["ours", 0])}
    nodes |= guided("base", cfg(["plain_m", 0], ["words", 0]))
    nodes |= guided("ours_p", cfg(["ours_m", 0], ["words", 0]))
    nodes |= guided("cores", cfg(["plain_m", 0], ["hooked", 0]))
    shown = comfy.run(nodes).pictures
    assert difference(shown["ours_p"], shown["base"]) > 8
    assert difference(shown["ours_p"], shown["cores"]) <= ROUNDING


def test_at_cfg_1(comfy, parts):
    """The negative prompt is never asked for: positive only is the whole LoRA."""
    nodes = {**parts, "whole": apply()}
    for name, model, words in (
        ("base", MODEL, "words"), ("ours_p", ["ours", 0], "words"), ("cores", MODEL, "hooked"),
        ("patched", ["whole", 0], "words"),
    ):  # fmt: skip
        guider = cfg(model, [words, 0])
        guider["inputs"]["cfg"] = 1.0
        nodes |= guided(name, guider)
    shown = comfy.run(nodes).pictures
    assert difference(shown["ours_p"], shown["base"]) > 8
    assert difference(shown["ours_p"], shown["cores"]) <= ROUNDING
    assert difference(shown["ours_p"], shown["patched"]) <= ROUNDING


def test_stacked_on_a_loaded_lora_and_before_one(comfy, parts):
    """As with few-step LoRAs: one in the weights, before or after ours, and neither is lost."""

    def loaded(model):
        return node(
            "LoraModelLoader", model=model, lora=["lora", 0], strength_model=-0.6, bypass=False
        )

    nodes = {**parts, "below": loaded(MODEL), "on_top": apply(["below", 0], positive_only=True)}
    nodes |= {"above": loaded(["ours", 0])}
    nodes |= guided("base", cfg(["below", 0], ["words", 0]))
    nodes |= guided("after", cfg(["on_top", 0], ["words", 0]))
    nodes |= guided("before", cfg(["above", 0], ["words", 0]))
    nodes |= guided("cores", cfg(["below", 0], ["hooked", 0]))
    shown = comfy.run(nodes).pictures
    assert difference(shown["after"], shown["base"]) > 8
    assert difference(shown["after"], shown["cores"]) <= ROUNDING
    assert difference(shown["before"], shown["after"]) <= ROUNDING


def test_under_hypertile(comfy, parts):
    """It cuts the samples of self-attention into tiles: the batch of those layers grows."""
    tile = {"tile_size": 32, "swap_size": 1, "max_depth": 2, "scale_depth": False}
    nodes = {**parts, "plain_m": node("HyperTile", model=MODEL, **tile)}
    nodes["ours_m"] = node("HyperTile", model=["ours", 0], **tile)
    nodes |= guided("base", cfg(["plain_m", 0], ["words", 0]))
    nodes |= guided("ours_p", cfg(["ours_m", 0], ["words", 0]))
    nodes |= guided("cores", cfg(["plain_m", 0], ["hooked", 0]))
    shown = comfy.run(nodes).pictures
    assert difference(shown["ours_p"], shown["base"]) > 8
    assert difference(shown["ours_p"], shown["cores"]) <= ROUNDING


def test_prompts_in_areas(comfy, parts):
    """Core gives the negative prompt the positive one's area, in a copy that is still negative.

    The reference has that area on both sides; core's copy would take the hook along.
    """
    nodes = {**parts}
    for name in ("words", "hooked", "none"):
        nodes[f"{name}_top"] = node(
            "ConditioningSetAreaPercentage", conditioning=[name, 0], width=1.0, height=0.5, x=0.0,
            y=0.0, strength=1.0,
        )  # fmt: skip
        nodes[f"{name}_all"] = node(
            "ConditioningCombine", conditioning_1=[f"{name}_top", 0], conditioning_2=[name, 0]
        )
    nodes |= guided("base", cfg(MODEL, ["words_all", 0]))
    nodes |= guided("ours_p", cfg(["ours", 0], ["words_all", 0]))
    reference = cfg(MODEL, ["hooked_all", 0])
    reference["inputs"]["negative"] = ["none_all", 0]
    nodes |= guided("cores", reference)
    shown = comfy.run(nodes).pictures
    assert difference(shown["ours_p"], shown["base"]) > 8
    assert difference(shown["ours_p"], shown["cores"]) <= ROUNDING


@pytest.fixture
def unet(pack):
    """A fresh demo UNet in a ModelPatcher."""
    part = lambda name: import_module(f".{name}", pack.__name__)  # noqa: E731
    (base, *_), _ = part("nodes.model_paths").demo_paths()
    return part("nodes.host.demo").load_demo_unet(base, disable_dynamic=True)


def with_lora(pack, model, **link):
    """A clone of a model with a random LoRA on it."""
    part = lambda name: import_module(f".{name}", pack.__name__)  # noqa: E731
    host, methods = part("nodes.host.adapters"), part("difflora_core.methods.base")
    lora, weights = part("difflora_core.methods.lora"), part("difflora_core.lora.weights")
    generator = torch.Generator().manual_seed(1)
    layers = {
        shape.name: weights.LoRALayer(
            torch.randn(2, shape.in_features, generator=generator),
            torch.randn(shape.out_features, 2, generator=generator),
            0.2,
        )
        for shape in part("nodes.host.base").unet_layout(model, "demo", 2)
    }
    made = lora.lora_adaptation(weights.LoRAWeights(layers))
    applied = methods.AppliedAdaptation(methods.PreparedAdaptation(made), made.settings)
    return host.with_link(model, host.Link(applied, **link))


@torch.no_grad()
def call(model, sigma=5.0):
    """One call of a loaded model as ComfyUI's sampler makes it, of two prompts."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, 8, 16, 16, generator=generator)
    width = model.model.model_config.unet_config["context_dim"]
    context = torch.randn(2, 7, width, generator=generator)
    marks = (
        {"difflora_negative": torch.tensor([1.0, 0.0])} if "difflora" in str(model.wrappers) else {}
    )
    return model.model.apply_model(
        x, torch.full((2,), sigma), c_crossattn=context, y=torch.zeros(2, 1600),
        transformer_options={"wrappers": model.wrappers}, **marks,
    )  # fmt: skip


@pytest.mark.parametrize("order", ["adapter first", "compiled first"])
@pytest.mark.parametrize("link", [{"end": 0.6}, {"positive_only": True}])
def test_a_compiled_model_has_its_adapters(comfyui, pack, unet, order, link):
    """Also where it was compiled and called without them before: another branch, a late start."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    def compiled(model):
        clone = model.clone()
        set_torch_compile_wrapper(clone, backend="eager")
        return clone

    wanted, bare = call(with_lora(pack, unet, **link)), call(unet)
    if order == "compiled first":
        branch = compiled(unet)
        call(branch)
        model = with_lora(pack, branch, **link)
    else:
        model = compiled(with_lora(pack, unet, **link))
        call(model, sigma=0.05)  # after the end
    got = call(model)
    assert float((wanted - bare).abs().max()) > 0.05
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(call(unet), bare)


def test_a_sampler_that_prepares_nothing_is_refused(comfyui, pack, unet):
    """Nobody could say which prompts are negative; also after a run that was prepared."""
    model = with_lora(pack, unet, positive_only=True)
    (chain,) = model.get_wrappers("apply_model", "difflora")
    chain.prepare(lambda *_: None, model, (1, 8, 16, 16), {"positive": [], "negative": None})
    chain.begin(model)
    call(model)
    chain.end(model)
    assert not chain._built
    with pytest.raises(Exception, match="does not prepare its prompts") as caught:
        model.model.apply_model(
            torch.zeros(1, 8, 16, 16), torch.ones(1), c_crossattn=torch.zeros(1, 7, 8),
            y=torch.zeros(1, 1600), transformer_options={"wrappers": model.wrappers},
        )  # fmt: skip
    assert type(caught.value).__name__ == "ConfigError"
