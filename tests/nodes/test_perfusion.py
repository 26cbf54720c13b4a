"""Concepts in real ComfyUI: train, load, apply, chain, stop, export; and what is refused.

# over budget: all tests use the same training run and the same builders of graphs.
"""

import itertools
from importlib import import_module

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from difflora_core.comfy_client import ComfyInterrupted, ComfyPromptError
from difflora_core.methods.base import ConceptMethod
from difflora_core.methods.registry import METHODS
from difflora_core.storage.adapter_file import read_adaptation

MODEL, CLIP, VAE = (["demo", k] for k in range(3))
WORD = "<my-hat>"
KINDS = [name.title() for name, kind in METHODS.items() if issubclass(kind, ConceptMethod)]
"""Of training nodes: one for each method of concepts."""


def node(class_type, **inputs):
    return {"class_type": class_type, "inputs": inputs}


def covariance(**changes):
    inputs = {"clip": CLIP, "captions": "demo", "count": 300, "file_name": "demo"}
    return node(
        "DiffLoRA_BuildCovariance", **(inputs | {"ridge": 0.01, "rebuild": False} | changes)
    )


def example(kind):
    """What the tests of a method know of it."""
    return import_module(f"tests.methods.examples.{kind.lower()}")


def training(pictures, kind="Perfusion", **changes):
    inputs = {
        "model": MODEL, "clip": CLIP, "vae": VAE, "images": ["p0", 0], "covariance": ["c", 0],
        "word": WORD, "superclass": "hat", "prompts": "",
        "steps": 3, "batch_size": 2, "seed": 0, "file_name": "hat", "mirror": False,
        "small_file": False,
    }  # fmt: skip
    inputs |= example(kind).RATES | changes
    inputs["prompts"] = inputs["prompts"] or f"photo of a person, wearing a {inputs['word']}"
    return {
        "demo": node("DiffLoRA_LoadDemo"),
        "p0": node("LoadImage", image=pictures[0]),
        "c": covariance(),
        "train": node(f"DiffLoRA_Train{kind}Concept", **inputs),
    }


def apply(model=MODEL, concept=("train", 0), **changes):
    inputs = {
        "model": model, "concept": list(concept), "bias": 0.3, "temperature": 0.15,
        "strength": 1.0, "lock": "local", "start_percent": 0.0, "end_percent": 1.0,
        "combine": "approximate", "reach": -1,
    }  # fmt: skip
    return node("DiffLoRA_ApplyConcept", **(inputs | changes))


def drawn(name, model, clip, text=f"photo of a person, wearing a {WORD}", cfg=1.5):
    """Nodes that draw one picture; `name` is its node."""
    return {
        f"{name}_words": node("CLIPTextEncode", clip=clip, text=text),
        "none": node("CLIPTextEncode", clip=CLIP, text=""),
        "empty": node("EmptyLatentImage", width=64, height=64, batch_size=1),
        f"{name}_sampler": node(
            "KSampler", model=model, positive=[f"{name}_words", 0], negative=["none", 0],
            latent_image=["empty", 0], seed=3, steps=2, cfg=cfg, sampler_name="euler",
            scheduler="normal", denoise=1.0,
        ),
        f"{name}_decoder": node("VAEDecode", samples=[f"{name}_sampler", 0], vae=VAE),
        name: node("PreviewImage", images=[f"{name}_decoder", 0]),
    }  # fmt: skip


@pytest.fixture(scope="module")
def pictures(comfy, tmp_path_factory):
    """Names of two uploaded pictures of hats, and a mask."""
    from difflora_core.demo.world.scenes import render_portraits

    images = render_portraits([1, 2], [5, 6]).images
    folder = tmp_path_factory.mktemp("hats")
    names = []
    for k, image in enumerate(images):
        path = folder / f"hat{k}.png"
        Image.fromarray((image * 255).round().byte().numpy()).save(path)
        names.append(comfy.upload_picture(path))
    mask = np.zeros((32, 32, 3), np.uint8)
    mask[:12] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    return [*names, comfy.upload_picture(folder / "mask.png")]


@pytest.fixture(scope="module")
def trained(comfy, comfy_server, pictures):
    """A concept file of three steps, by name, and where it lies."""
    comfy.run({**training(pictures), "show": node("PreviewAny", source=["train", 2])})
    folder = comfy_server.base_directory / "models" / "difflora_concepts"
    return folder, folder / "hat.safetensors"


def difference(shown, first, second):
    """The largest difference of two pictures, in levels of 255."""
    return int(np.abs(np.subtract(shown[first], shown[second], dtype=int)).max())


def values(path):
    """What a concept file holds for all layers."""
    layers = read_adaptation(path).layers.values()
    return np.concatenate([tensors["values"].numpy() for tensors in layers])


def loaded(name="hat.safetensors", clip=CLIP):
    return node("DiffLoRA_LoadConcept", concept_name=name, clip=clip)


def test_a_trained_file_is_what_the_artist_expects(trained, comfy_server):
    folder, path = trained
    concept = read_adaptation(path)
    word = concept.word
    assert (word.word, word.superclass, concept.method) == (WORD, "hat", "perfusion")
    assert word.contexts == ("photo of a person, wearing a {}",)
    assert path.stat().st_size < 20_000
    assert (folder.parent / "difflora_covariance" / "demo.safetensors").exists()


def test_the_word_changes_the_picture_and_only_with_the_concept(comfy, trained):
    nodes = {"demo": node("DiffLoRA_LoadDemo"), "load": loaded()}
    nodes["on"] = apply(concept=("load", 0))
    nodes["off"] = apply(concept=("load", 0), strength=0.0)
    nodes["late"] = apply(concept=("load", 0), start_percent=1.0)
    nodes |= drawn("base", MODEL, ["load", 1]) | drawn("with", ["on", 0], ["load", 1])
    nodes |= drawn("without", ["off", 0], ["load", 1]) | drawn("never", ["late", 0], ["load", 1])
    nodes |= drawn("again", MODEL, ["load", 1])
    shown = comfy.run(nodes).pictures
    assert difference(shown, "with", "base") > 4
    for name in ("without", "never", "again"):
        np.testing.assert_array_equal(shown[name], shown["base"])
    np.testing.assert_array_equal(comfy.run_fresh(nodes).pictures["with"], shown["with"])


def test_word_in_prompts_of_every_kind(comfy, trained):
    """Weights, repeats and punctuation; a plain prompt is what it was before."""
    plain = "photo of a person, smiling"
    nodes = {"demo": node("DiffLoRA_LoadDemo"), "load": loaded()}
    nodes["on"] = apply(concept=("load", 0))
    nodes |= drawn("plain", MODEL, CLIP, plain) | drawn("taught", MODEL, ["load", 1], plain)
    prompts = {
        "once": f"a {WORD}, smiling",
        "neutral": f"a ({WORD}:1.0), smiling",
        "stressed": f"a ({WORD}:3.0), smiling",
        "twice": f"a {WORD}, a {WORD}, smiling",
        "punctuated": f"a {WORD}; smiling!",
    }
    for name, text in prompts.items():
        nodes |= drawn(name, ["on", 0], ["load", 1], text)
        nodes |= drawn(f"{name}_base", MODEL, ["load", 1], text)
    shown = comfy.run(nodes).pictures
    np.testing.assert_array_equal(shown["taught"], shown["plain"])
    np.testing.assert_array_equal(shown["neutral"], shown["once"])
    for name in prompts:  # wherever the word stands, its concept is found
        assert difference(shown, name, f"{name}_base") > 4
    assert difference(shown, "stressed", "once") > 0
    for name in ("twice", "punctuated"):
        assert difference(shown, name, "once") > 4


LOCKS = ("none", "local", "global")


def locked(strength):
    """Nodes that draw with every lock at a strength (`lock_none`, ...), and without (`base`)."""
    nodes = {"demo": node("DiffLoRA_LoadDemo"), "load": loaded()}
    prompt = node("CLIPTextEncode", clip=CLIP, text="photo of a person, wearing a hat")
    nodes |= {"super": prompt, **drawn("base", MODEL, ["load", 1])}
    for lock in LOCKS:
        more = {"superclass_prompt": ["super", 0]} if lock == "global" else {}
        on = apply(concept=("load", 0), lock=lock, strength=strength, **more)
        nodes |= {f"{lock}_on": on, **drawn(f"lock_{lock}", [f"{lock}_on", 0], ["load", 1])}
    return nodes


def test_locks_give_three_pictures(comfy, trained):
    shown = comfy.run(locked(1.0)).pictures
    for first, second in itertools.combinations(("base", *(f"lock_{k}" for k in LOCKS)), 2):
        assert difference(shown, first, second) > 4, (first, second)


@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_without_strength_leaves_the_base(comfy, trained, lock):
    shown = comfy.run(locked(0.0)).pictures
    np.testing.assert_array_equal(shown[f"lock_{lock}"], shown["base"])


def test_two_concepts_chain_with_a_person(comfy, comfy_server, trained, pictures):
    """Two words, a DiffLoRA person, another node's attention patch: all act together."""
    nodes = training(
        pictures,
        KINDS[-1],
        word="<my-cup>",
        superclass="cup",
        file_name="cup",
        steps=3,
        **dict.fromkeys(example(KINDS[-1]).RATES, 1.0),
    )
    nodes |= {
        "load": loaded(),
        "second": loaded("cup.safetensors", ["load", 1]),
        "first": apply(concept=("load", 0)),
        "both": apply(model=["first", 0], concept=("second", 0), combine="exact"),
        "person": node(
            "DiffLoRA_SampleLatent",
            difflora_model=["demo", 5],
            mode="sampled",
            seed=3,
            steps=4,
            guidance=1.0,
        ),
        "lora": node("DiffLoRA_DecodeLoRA", difflora_model=["demo", 5], lora_latent=["person", 0]),
        "tuned": node(
            "LoraModelLoader", model=["both", 0], lora=["lora", 0], strength_model=1.0, bypass=False
        ),
        "patched": node("PerturbedAttentionGuidance", model=["tuned", 0], scale=2.0),
    }
    train_only = {k: nodes.pop(k) for k in ("p0", "c", "train")}
    comfy.run({"demo": nodes["demo"], **train_only, "s": node("PreviewAny", source=["train", 2])})
    text = f"photo of a person, holding a <my-cup>, wearing a {WORD}"
    for name in ("first", "both", "tuned", "patched"):
        nodes |= drawn(f"p_{name}", [name, 0], ["second", 1], text)
    shown = comfy.run(nodes).pictures
    order = ["p_first", "p_both", "p_tuned", "p_patched"]
    for before, after in itertools.pairwise(order):
        assert difference(shown, before, after) > 2, (before, after)


def test_export_is_an_ordinary_lora(comfy, comfy_server, trained):
    nodes = {"demo": node("DiffLoRA_LoadDemo"), "load": loaded()}
    nodes["lora"] = node(
        "DiffLoRA_ExportConceptLoRA", model=MODEL, concept=["load", 0], lock_keys=True
    )
    nodes["save"] = node("SaveLoRA", lora=["lora", 0], prefix="loras/concept", steps=0)
    comfy.run(nodes)
    state = load_file(max(comfy_server.output_directory.glob("loras/concept*")))
    concept = read_adaptation(trained[1])
    assert len(state) == 6 * len(concept.layers)
    downs = [v for k, v in state.items() if k.endswith("lora_down.weight")]
    width = len(concept.shared["direction"])
    assert [tuple(d.shape) for d in downs] == 2 * len(concept.layers) * [(1, width)]


def test_training_stops_and_keeps_the_best(comfy, comfy_server, interrupt, pictures):
    folder = comfy_server.base_directory / "models" / "difflora_concepts"

    def stop(step):
        if step.node_type == "DiffLoRA_TrainPerfusionConcept" and step.value >= 25:
            interrupt()

    nodes = training(pictures, steps=5000, file_name="stopped", batch_size=1)
    nodes["show"] = node("PreviewAny", source=["train", 2])
    with pytest.raises(ComfyInterrupted):
        comfy.run(nodes, on_progress=stop)
    stopped = read_adaptation(folder / "stopped.safetensors")
    assert stopped.word.word == WORD
    assert 0 < stopped.facts["steps"] < 1000
    with pytest.raises(ComfyInterrupted):  # it goes on, and its file is the same one
        comfy.run(nodes, on_progress=lambda s: s.value >= 75 and stop(s))
    assert read_adaptation(folder / "stopped.safetensors").word.word == WORD
    assert not (folder / "stopped_002.safetensors").exists()


def test_training_that_only_gets_worse_says_so(comfy, trained, pictures):
    nodes = training(pictures, file_name="worse", value_rate=10.0, word_rate=1.0)
    shown = comfy.run({**nodes, "show": node("PreviewAny", source=["train", 2])})
    (report,) = shown.outputs["show"]["text"]
    assert "best at step 0 of 3" in report
    assert "nothing was learned" in report


def test_masks_of_another_size_and_files_that_are_there(comfy, comfy_server, trained, pictures):
    folder, path = trained
    before = path.read_bytes()
    nodes = training(pictures, masks=["m", 0], seed=5, small_file=True)
    nodes["m"] = node("LoadImageMask", image=pictures[2], channel="red")
    nodes["show"] = node("PreviewAny", source=["train", 2])
    comfy.run(nodes)
    assert path.read_bytes() == before  # nothing is replaced
    assert (folder / "hat_002.safetensors").stat().st_size < path.stat().st_size


def test_two_words_from_one_picture(comfy, comfy_server, pictures):
    """Two files, one CLIP that knows both, and the attention losses take part."""
    folder = comfy_server.base_directory / "models" / "difflora_concepts"
    text = "photo of a person, wearing a <p-hat> hat, holding a <p-cup> cup"
    nodes = training(
        pictures, word="<p-hat>", second_word="<p-cup>", second_superclass="cup", prompts=text,
        file_name="pair", separation=0.02, binding=0.02,
    )  # fmt: skip
    nodes["show"] = node("PreviewAny", source=["train", 2])
    nodes["one"] = apply(concept=("train", 0))
    nodes["both"] = apply(["one", 0], concept=("train", 3))
    nodes |= drawn("base", MODEL, ["train", 1], text) | drawn(
        "with", ["both", 0], ["train", 1], text
    )
    shown = comfy.run(nodes)
    assert difference(shown.pictures, "with", "base") > 4
    words = [read_adaptation(folder / f"pair{k}.safetensors").word for k in ("", "_002")]
    assert [w.word for w in words] == ["<p-hat>", "<p-cup>"]
    assert words[0].contexts == ("photo of a person, wearing a {} hat, holding a cup cup",)
    assert words[1].contexts == ("photo of a person, wearing a hat hat, holding a {} cup",)


def test_reach_decides_through_which_tokens_a_word_learns(comfy, trained, pictures):
    """-1 is the recipe as it was; 0 gives other values from the same pictures and noise."""
    folder, path = trained
    learned = {}
    for reach, name in ((-1, "far"), (0, "near")):
        nodes = training(pictures, file_name=name, reach=reach)
        comfy.run({**nodes, "show": node("PreviewAny", source=["train", 2])})
        learned[reach] = values(folder / f"{name}.safetensors")
    before = values(path)
    np.testing.assert_allclose(learned[-1], before, atol=1e-3)
    assert np.abs(learned[0] - before).max() > 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_guidance_changes_what_is_learned(comfy, trained, pictures, kind):
    """1 is the recipe as it was, as a workflow without the input runs it."""
    folder, learned = trained[0], {}
    settings = {"plain": {}, "unguided": {"guidance": 1.0}, "guided": {"guidance": 1.5}}
    for name, changes in settings.items():
        nodes = training(pictures, kind=kind, file_name=f"{kind}_{name}", **changes)
        comfy.run({**nodes, "show": node("PreviewAny", source=["train", 2])})
        learned[name] = values(folder / f"{kind}_{name}.safetensors")
    np.testing.assert_allclose(learned["unguided"], learned["plain"], atol=1e-3)
    assert np.abs(learned["guided"] - learned["plain"]).max() > example(kind).LEAST_CHANGE


def test_masks_as_segmentation_nodes_give_them(comfy, comfy_server, pictures):
    """One mask for each picture of a batch, as SAM3 Detect or Batch Masks make them."""
    nodes = training(pictures, masks=["masks", 0], file_name="segmented", images=["photos", 0])
    nodes["p1"] = node("LoadImage", image=pictures[1])
    nodes["photos"] = node(
        "BatchImagesNode", **{"images.image0": ["p0", 0], "images.image1": ["p1", 0]}
    )
    nodes["m"] = node("LoadImageMask", image=pictures[2], channel="red")
    nodes["masks"] = node("BatchMasksNode", **{"masks.mask0": ["m", 0], "masks.mask1": ["m", 0]})
    nodes["show"] = node("PreviewAny", source=["train", 2])
    assert "segmented.safetensors" in str(comfy.run(nodes).outputs["show"])
    three = {
        **nodes,
        "masks": node("BatchMasksNode", **{f"masks.mask{k}": ["m", 0] for k in range(3)}),
    }
    with pytest.raises(ComfyPromptError, match="one mask for all"):
        comfy.run(three)


@pytest.mark.parametrize("kind", KINDS)
def test_the_mask_of_a_picture_nobody_painted_on_is_no_mask(comfy, pictures, kind):
    """Load Image gives an empty mask then; the report says that whole pictures counted."""
    nodes = training(pictures, kind=kind, masks=["p0", 1])
    nodes["show"] = node("PreviewAny", source=["train", 2])
    assert "the whole pictures counted" in str(comfy.run(nodes).outputs["show"])


REFUSED = {
    "several tokens": ({"superclass": "red hat"}, "must be one word"),
    "a word that exists": ({"word": "cat"}, "already means something"),
    "a word with a space": ({"word": "my hat"}, "cannot be taught"),
    "a prompt without the word": ({"prompts": "a hat"}, "must hold the new word"),
    "one word twice": (
        {"second_word": "<my-hat>", "second_superclass": "cup"},
        "choose different ones",
    ),
    "a second word of several tokens": (
        {"second_word": "<c>", "second_superclass": "red cup", "prompts": "a <my-hat>, a <c>"},
        "must be one word",
    ),
    "a second word in no prompt": (
        {"second_word": "<c>", "second_superclass": "cup", "prompts": "a <my-hat>"},
        "No training prompt holds the new word <c>",
    ),
    "a path for a name": ({"file_name": "../../hat"}, "cannot be a file name"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_training_refuses(comfy, comfy_server, pictures, name):
    changes, message = REFUSED[name]
    nodes = {**training(pictures, **changes), "show": node("PreviewAny", source=["train", 2])}
    with pytest.raises(ComfyPromptError, match=message):
        comfy.run(nodes)


def test_applying_refuses(comfy, comfy_server, trained):
    base = {"demo": node("DiffLoRA_LoadDemo"), "load": loaded()}
    cases = [
        ({"on": apply(concept=("load", 0), lock="global")}, "superclass_prompt"),
        (
            {"one": apply(concept=("load", 0)), "on": apply(["one", 0], concept=("load", 0))},
            "on this model already",
        ),
        ({"twice": loaded(clip=["load", 1]), "on": apply(concept=("twice", 0))}, "already means"),
        ({"on": apply(concept=("load", 0), start_percent=0.9, end_percent=0.1)}, "would never act"),
        ({"on": apply(concept=("load", 0), bias=17.0)}, "bias"),
        ({"on": apply(concept=("load", 0), temperature=0.0)}, "temperature"),
        ({"load": loaded("nothing.safetensors"), "on": apply(concept=("load", 0))}, "nothing"),
    ]
    for nodes, message in cases:
        with pytest.raises(ComfyPromptError, match=message):
            comfy.run({**base, **nodes, **drawn("p", ["on", 0], ["load", 1])})


def test_a_concept_of_other_text_encoders_is_refused(comfy, trained):
    from dataclasses import replace

    from difflora_core.storage.adapter_file import write_adaptation

    folder, path = trained
    concept = read_adaptation(path)
    probe = torch.randn(64, generator=torch.Generator().manual_seed(0))
    word = replace(concept.word, probe=probe, word="<strange>")
    write_adaptation(folder / "strange.safetensors", replace(concept, word=word))
    layers = {f"input_blocks.9.{k}.attn2.to_v": v for k, v in enumerate(concept.layers.values())}
    word = replace(concept.word, word="<other>")
    other = replace(concept, layers=layers, word=word, base="sdxl")
    write_adaptation(folder / "other.safetensors", other)
    base = {"demo": node("DiffLoRA_LoadDemo")}
    for name, message in (("strange", "other text encoders"), ("other", "made for sdxl")):
        nodes = {**base, "load": loaded(f"{name}.safetensors"), "on": apply(concept=("load", 0))}
        with pytest.raises(ComfyPromptError, match=message):
            comfy.run({**nodes, **drawn("p", ["on", 0], CLIP)})


def test_covariance_is_read_again_and_guarded(comfy, comfy_server, trained):
    folder = comfy_server.base_directory / "models" / "difflora_covariance"
    before = (folder / "demo.safetensors").stat().st_mtime_ns
    show = {"show": node("PreviewAny", source=["c", 1])}
    comfy.run({"demo": node("DiffLoRA_LoadDemo"), "c": covariance(count=500), **show})
    assert (folder / "demo.safetensors").stat().st_mtime_ns == before
    (folder / "broken.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ComfyPromptError, match="not a safetensors"):
        comfy.run({"demo": node("DiffLoRA_LoadDemo"), "c": covariance(file_name="broken"), **show})
