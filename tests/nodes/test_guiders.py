"""Adapters on one of two models, beside other LoRAs, in areas, and under torch.compile.

A prompt is known by what it is. The reference is core's own hook on a conditioning, which acts on
that prompt alone by patching weights.
"""

import shutil
from importlib import import_module

import pytest
import torch

from difflora_core.comfy_client import ComfyPromptError
from tests.nodes.sampler_graphs import (
    CLIP,
    MODEL,
    ROUNDING,
    apply_lora,
    cfg,
    difference,
    dual_model,
    guided,
    hooked,
    invented_lora,
    node,
    sampling_nodes,
)


@pytest.fixture(scope="module")
def parts():
    """A person's LoRA, prompts with and without a hook on them, and what every sampler needs."""
    return {
        "demo": node("DiffLoRA_LoadDemo"),
        **invented_lora(),
        **sampling_nodes(),
        "words": node("CLIPTextEncode", clip=CLIP, text="photo of a person, smiling"),
        "none": node("CLIPTextEncode", clip=CLIP, text="cartoon"),
        "hook": node("DiffLoRA_LoRAToHook", lora=["lora", 0], strength_model=1.0),
        "hooked": hooked(["words", 0], ["hook", 0]),
        "ours": apply_lora(positive_only=True),
    }


def test_a_lora_on_one_model_of_two_leaves_the_other_alone(comfy, parts):
    """Dual Model Guider asks the second model for the negative prompt: nothing is on it."""
    timed = apply_lora(end_percent=0.999)
    nodes = {**parts, "timed": timed, **guided("both", dual_model(["timed", 0], ["words", 0]))}
    nodes["half"] = apply_lora(end_percent=0.999, positive_only=True)
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
    other = apply_lora(positive_only=True, strength=0.5)
    with pytest.raises(ComfyPromptError, match="would have no effect on this model"):
        comfy.run({**parts, "other": other, **guided("out", both)})


def test_stacked_on_a_loaded_lora_and_before_one(comfy, parts):
    """As with few-step LoRAs: one in the weights, before or after ours, and neither is lost."""

    def loaded(model):
        return node(
            "LoraModelLoader", model=model, lora=["lora", 0], strength_model=-0.6, bypass=False
        )

    nodes = {
        **parts,
        "below": loaded(MODEL),
        "on_top": apply_lora(["below", 0], positive_only=True),
    }
    nodes |= {"above": loaded(["ours", 0])}
    nodes |= guided("base", cfg(["below", 0], ["words", 0]))
    nodes |= guided("after", cfg(["on_top", 0], ["words", 0]))
    nodes |= guided("before", cfg(["above", 0], ["words", 0]))
    nodes |= guided("cores", cfg(["below", 0], ["hooked", 0]))
    shown = comfy.run(nodes).pictures
    assert difference(shown["after"], shown["base"]) > 8
    assert difference(shown["after"], shown["cores"]) <= ROUNDING
    assert difference(shown["before"], shown["after"]) <= ROUNDING


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


COMPILER = pytest.mark.skipif(
    not shutil.which("g++") and not shutil.which("cl"), reason="no C++ compiler"
)


@pytest.mark.parametrize(
    "backend", ["eager", pytest.param("inductor", marks=[pytest.mark.slow, COMPILER])]
)
@pytest.mark.parametrize("order", ["adapter first", "compiled first"])
@pytest.mark.parametrize("link", [{"end": 0.6}, {"positive_only": True}])
def test_a_compiled_model_has_its_adapters(comfyui, pack, unet, backend, order, link):
    """Also where it was compiled and called without them before: another branch, a late start."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    def compiled(model):
        clone = model.clone()
        set_torch_compile_wrapper(clone, backend=backend)
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
