"""The road of a method: one that lives in the tests is registered, trained, kept and applied.

Nothing of it stands in the pack. It multiplies the outputs of attention projections by learned
gains; the reference is the same change as a patch of the weights, by core's own loader and hooks.
"""

import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from difflora_core.comfy_client import ComfyPromptError
from difflora_core.demo import paths
from difflora_core.demo.networks.base import load_base
from difflora_core.demo.networks.concept_text import demo_concept_text
from difflora_core.errors import CheckpointError, LayoutError
from difflora_core.methods.base import AppliedAdaptation, PreparedAdaptation
from difflora_core.methods.registry import METHODS
from difflora_core.storage.adapter_file import read_adaptation, write_adaptation
from difflora_core.text.covariance import Covariance
from difflora_core.training.adaptation_run import run_adaptation
from difflora_core.training.concept_task import NewWord, prepare_task
from difflora_core.training.picture_examples import PictureExamples

MODEL, CLIP, VAE = (["demo", k] for k in range(3))
ROUNDING = 2  # grey levels between the same arithmetic in another order


@pytest.fixture(scope="module")
def toy():
    """The method, its settings and its recipe, on the library of this process."""
    sys.path.insert(0, str(Path(__file__).parent))
    try:
        made = import_module("toy_pack.method")
    finally:
        sys.path.pop(0)
    return made.make(lambda name: import_module(f"difflora_core.{name}"))


@pytest.fixture
def registered(toy, monkeypatch):
    """The line in the registry."""
    monkeypatch.setitem(METHODS, toy.method.name, toy.method)
    return toy


@pytest.fixture(scope="module")
def base(is_shipped):
    if not is_shipped:
        pytest.skip("the demo world is not complete")
    return load_base(paths.BASE)


@pytest.fixture(scope="module")
def trained(toy, base, tmp_path_factory):
    """Three steps on three noisy pictures, through the one runner and loop."""
    text = demo_concept_text(paths.BASE)
    width = text.encode(["a"], {}).context.shape[-1]
    task = prepare_task(base, text, Covariance(torch.eye(width), 1), [NewWord("<w>", "hat")])
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(3, 8, 16, 16, generator=generator)
    examples = PictureExamples(latents, [["photo of a person"]] * 3)
    config, losses = toy.training(), []
    result = run_adaptation(
        toy.objective(task, config),
        examples,
        tmp_path_factory.mktemp("toy"),
        lambda step, steps, metrics, preview: losses.append(metrics["evaluation"]),
    )
    (adaptation,) = result.adaptations
    assert result.finished
    assert len(losses) == 3
    assert result.loss == pytest.approx(min(losses), rel=1e-6)
    assert any(bool(t["gain"].any()) for t in adaptation.layers.values())
    return adaptation


def stronger(adaptation):
    """The same directions, large enough to be seen in a picture."""
    generator = torch.Generator().manual_seed(2)
    for tensors in adaptation.layers.values():
        noise = torch.randn(tensors["gain"].shape, generator=generator)
        tensors["gain"] = (tensors["gain"] + 0.3 * noise).half().float()  # exact in the file
    return adaptation


@pytest.fixture(scope="module")
def stored(comfy_server, toy, base, trained):
    """Its file among the concepts of ComfyUI, and the same change as a LoRA of weights."""
    METHODS[toy.method.name] = toy.method
    try:
        folder = comfy_server.base_directory / "models"
        adaptation = stronger(trained)
        written = write_adaptation(folder / "difflora_concepts" / "gain.safetensors", adaptation)
        assert written.error == 0
        again = read_adaptation(written.path)
        assert (again.method, again.word, again.facts["pictures"]) == ("gain", None, 3)
        assert again.settings == toy.settings()
    finally:
        del METHODS[toy.method.name]
    names, changes = base.layout("demo", 1).module_names, {}
    for layer, tensors in adaptation.layers.items():
        part, gain = base.unet.get_submodule(names[layer]), tensors["gain"]
        changes[f"diffusion_model.{layer}.diff"] = gain[:, None] * part.weight.detach()
        if part.bias is not None:
            changes[f"diffusion_model.{layer}.diff_b"] = gain * part.bias.detach()
    (folder / "loras").mkdir(parents=True, exist_ok=True)
    save_file(changes, folder / "loras" / "gain_as_weights.safetensors")
    return written.path


def node(class_type, **inputs):
    return {"class_type": class_type, "inputs": inputs}


def apply(**changes):
    settings = {
        "bias": 0.6, "temperature": 0.15, "strength": 1.0, "lock": "local", "start_percent": 0.0,
        "end_percent": 1.0, "combine": "approximate", "reach": -1,
    }  # fmt: skip
    return node("DiffLoRA_ApplyConcept", model=MODEL, concept=["load", 0], **(settings | changes))


def drawn(name, model=MODEL, positive=("words", 0)):
    sampler = node(
        "KSampler", model=model, positive=list(positive), negative=["none", 0],
        latent_image=["empty", 0], seed=3, steps=4, cfg=2.0, sampler_name="euler",
        scheduler="normal", denoise=1.0,
    )  # fmt: skip
    return {
        f"{name}_latent": sampler,
        f"{name}_decoded": node("VAEDecode", samples=[f"{name}_latent", 0], vae=VAE),
        name: node("PreviewImage", images=[f"{name}_decoded", 0]),
    }


def hooked(name, strength, frames=()):
    """Core's way: a hook on the positive prompt, with keyframes."""
    nodes = {
        f"{name}_hook": node(
            "CreateHookLoraModelOnly",
            lora_name="gain_as_weights.safetensors",
            strength_model=strength,
        )
    }
    last, source = None, [f"{name}_hook", 0]
    for k, (start, factor) in enumerate(frames):
        before = {} if last is None else {"prev_hook_kf": [last, 0]}
        last = f"{name}_{k}"
        nodes[last] = node(
            "CreateHookKeyframe", strength_mult=factor, start_percent=start, **before
        )
    if last is not None:
        nodes[f"{name}_timed"] = node("SetHookKeyframes", hooks=source, hook_kf=[last, 0])
        source = [f"{name}_timed", 0]
    nodes[f"{name}_words"] = node(
        "ConditioningSetProperties", cond_NEW=["words", 0], strength=1.0,
        set_cond_area="default", hooks=source,
    )  # fmt: skip
    return nodes | drawn(name, positive=(f"{name}_words", 0))


def difference(a, b):
    return int(np.abs(a[0].astype(int) - b[0].astype(int)).max())


def test_it_acts_in_comfyui_with_strength_start_and_end(comfy, stored):
    nodes = {
        "demo": node("DiffLoRA_LoadDemo"),
        "load": node("DiffLoRA_LoadConcept", concept_name="gain.safetensors", clip=CLIP),
        "words": node("CLIPTextEncode", clip=["load", 1], text="photo of a person, smiling"),
        "none": node("CLIPTextEncode", clip=CLIP, text=""),
        "empty": node("EmptyLatentImage", width=64, height=64, batch_size=1),
        "whole": apply(), "half": apply(strength=0.5), "off": apply(strength=0.0),
        "late": apply(start_percent=0.5), "early": apply(end_percent=0.5),
    }  # fmt: skip
    nodes |= drawn("base")
    for name in ("whole", "half", "off", "late", "early"):
        nodes |= drawn(f"ours_{name}", [name, 0])
    nodes |= hooked("cores_whole", 1.0) | hooked("cores_half", 0.5)
    nodes |= hooked("cores_late", 1.0, [(0.0, 0.0), (0.5, 1.0)])
    nodes |= hooked("cores_early", 1.0, [(0.0, 1.0), (0.5, 0.0)])
    shown = comfy.run(nodes).pictures
    np.testing.assert_array_equal(shown["ours_off"], shown["base"])
    for name in ("whole", "half", "late", "early"):
        assert difference(shown[f"ours_{name}"], shown["base"]) > 8, name
        assert difference(shown[f"ours_{name}"], shown[f"cores_{name}"]) <= ROUNDING, name
    np.testing.assert_array_equal(
        comfy.run_fresh(nodes).pictures["ours_whole"], shown["ours_whole"]
    )


def test_without_its_line_the_file_says_what_is_missing(stored, toy):
    assert toy.method.name not in METHODS
    with pytest.raises(CheckpointError, match=r"'gain' is not known here; known are lora, .*inst"):
        read_adaptation(stored)


def test_another_base_is_refused_by_name(comfy, registered, trained, comfy_server):
    layers = {f"input_blocks.99.{name}": tensors for name, tensors in trained.layers.items()}
    path = comfy_server.base_directory / "models" / "difflora_concepts" / "stranger.safetensors"
    write_adaptation(path, replace(trained, base="sd9", layers=layers))
    nodes = {
        "demo": node("DiffLoRA_LoadDemo"),
        "load": node("DiffLoRA_LoadConcept", concept_name="stranger.safetensors", clip=CLIP),
        "words": node("CLIPTextEncode", clip=CLIP, text="photo"),
        "none": node("CLIPTextEncode", clip=CLIP, text=""),
        "empty": node("EmptyLatentImage", width=64, height=64, batch_size=1),
        "on": apply(),
    }
    with pytest.raises(ComfyPromptError, match=r"gain adaptation was made for sd9.*do not fit"):
        comfy.run(nodes | drawn("out", ["on", 0]))


def test_it_keeps_the_contract_of_methods(registered, trained):
    kind = registered.method
    kind.check(trained)
    assert set(kind.layer_sizes(trained)) == set(trained.layers)
    part = AppliedAdaptation(PreparedAdaptation(trained), registered.settings(limit=0.0))
    for entry in kind.adapters([part]):
        y = torch.ones(1, len(trained.layers[entry.layer]["gain"]))
        assert torch.equal(entry.adapter.edit(y, y), y)  # a limit of zero is no gain
    with pytest.raises(LayoutError, match="does not hold a gain"):
        kind.check(replace(trained, shared={"more": torch.ones(1)}))
