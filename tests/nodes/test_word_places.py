"""A taught word acts where it stands in a prompt, however it is written, and nowhere else."""

import math
from collections.abc import Mapping
from importlib import import_module

import numpy as np
import pytest
import torch

from difflora_core.demo import paths
from difflora_core.demo.networks.concept_judge import load_concept_judge
from difflora_core.demo.world.concept_examples import SHIPPED

MODEL, CLIP, VAE = (["demo", k] for k in range(3))
HAT = "<demo-hat>"
SCENE = "photo of a person, smiling, blue background, white shirt"
PLAIN = (f"{SCENE}, wearing a hat", "a hat", "photo of a person wearing a blue hat, with a cat")


def node(class_type, **inputs):
    return {"class_type": class_type, "inputs": inputs}


def encoded(text, clip=("load", 1)):
    return node("CLIPTextEncode", clip=list(clip), text=text)


def applied(**changes):
    inputs = {
        "model": MODEL, "concept": ["load", 0], "bias": 0.6, "temperature": 0.15, "strength": 1.0,
        "lock": "local", "start_percent": 0.0, "end_percent": 1.0, "combine": "approximate",
        "reach": -1,
    }  # fmt: skip
    return node("DiffLoRA_ApplyConcept", **(inputs | changes))


@pytest.fixture(scope="module")
def draw(comfy, is_shipped):
    """Pictures of conditionings, on the taught model and on the base."""
    if not is_shipped:
        pytest.skip("the demo world is not complete")

    def run(
        prompts: Mapping[str, tuple[str, object]],
        more: Mapping[str, object] | None = None,
        names=("demo_hat",),
        batch=1,
        **settings,
    ):
        """Pictures by name; `prompts` has for each a model (on or base), and a text or link."""
        nodes = {
            "demo": node("DiffLoRA_LoadDemo"),
            "load": node("DiffLoRA_LoadConcept", concept_name=f"{names[0]}.safetensors", clip=CLIP),
            "on": applied(**settings),
            "none": encoded("", CLIP),
            "empty": node("EmptyLatentImage", width=64, height=64, batch_size=batch),
            **(more or {}),
        }
        for name, (model, text) in prompts.items():
            if isinstance(text, str):
                nodes[f"{name}_prompt"], text = encoded(text), [f"{name}_prompt", 0]
            nodes[f"{name}_latent"] = node(
                "KSampler", model=["on", 0] if model == "on" else MODEL, positive=text,
                negative=["none", 0], latent_image=["empty", 0], seed=5, steps=6, cfg=2.0,
                sampler_name="euler", scheduler="normal", denoise=1.0,
            )  # fmt: skip
            nodes[f"{name}_decoded"] = node("VAEDecode", samples=[f"{name}_latent", 0], vae=VAE)
            nodes[name] = node("PreviewImage", images=[f"{name}_decoded", 0])
        said: list[object] = []
        result = comfy.run(nodes, shown=said)
        return {
            name: np.stack([p[..., :3] for p in result.pictures[name]]).astype(int)
            for name in prompts
        }, [text for text in said if isinstance(text, str)]

    return run


@pytest.mark.parametrize("reach", [-1, 0])
@pytest.mark.parametrize("bias", [0.3, 0.6, 0.9])
def test_the_plain_word_stays_the_bases(draw, bias, reach):
    """Read by the CLIP that knows the word, or by the base's."""
    more = {f"own_{k}": encoded(text, CLIP) for k, text in enumerate(PLAIN)}
    prompts = {}
    for k, text in enumerate(PLAIN):
        prompts |= {f"base_{k}": ("base", text), f"taught_{k}": ("on", text)}
        prompts |= {f"other_{k}": ("on", [f"own_{k}", 0])}
    shown, _ = draw(prompts, more, bias=bias, reach=reach)
    for k in range(len(PLAIN)):
        np.testing.assert_array_equal(shown[f"taught_{k}"], shown[f"base_{k}"])
        np.testing.assert_array_equal(shown[f"other_{k}"], shown[f"base_{k}"])


@pytest.mark.parametrize(
    "text",
    [
        "a {}",
        "photo of a person with a {}",
        "portrait of a person wearing a {}",
        "{}",
        "photo of a person, wearing a {}, blue background",
    ],
)
def test_the_wordings_that_people_write(draw, text):
    """At the bias that the node starts with; the base draws no hat at most of them."""
    concept = SHIPPED["demo_hat"]
    judge = load_concept_judge(paths.CONCEPT_JUDGE, list(SHIPPED.values()))
    prompts = {"plain": ("base", text.format("hat")), "hat": ("on", text.format(HAT))}
    shown, _ = draw(prompts, batch=6)
    known = {
        name: int(judge.recognised(torch.from_numpy(p).float() / 255, concept).sum())
        for name, p in shown.items()
    }
    assert known["plain"] == 0
    assert known["hat"] >= 3


AS_READ = ("<Demo-Hat>", "<DEMO-HAT>", "< demo-hat >", "<demo - hat>")
NEAR = ("demo-hat", "<demo_hat>", "<demo–hat>", "‹demo-hat›", "<demo-hta>")


def test_found_wherever_clip_reads_the_same_and_else_told(draw):
    prompts = {"as_taught": ("on", f"{SCENE}, wearing a {HAT}")}
    prompts |= {f"read_{k}": ("on", f"{SCENE}, wearing a {w}") for k, w in enumerate(AS_READ)}
    shown, texts = draw(prompts)
    for k in range(len(AS_READ)):
        np.testing.assert_array_equal(shown[f"read_{k}"], shown["as_taught"])
    assert texts == []
    _, texts = draw({f"near_{k}": ("on", f"{SCENE}, wearing a {w}") for k, w in enumerate(NEAR)})
    for k, written in enumerate(NEAR):
        told = (
            f"near_{k}_prompt: {written} is no word that this CLIP was taught. Did you mean {HAT}?"
        )
        assert told in texts
    assert any(text.startswith(f"on: The word {HAT} stands in no prompt") for text in texts)


def test_joined_weighted_and_long_prompts(draw):
    """The word is found in the second of two joined prompts, and beyond the 77th token."""
    filler = ", ".join(["smiling"] * 45)
    word, kind = f"wearing a {HAT}", "wearing a hat"
    more = {"scene": encoded(SCENE, CLIP), "scene_taught": encoded(SCENE)}
    for name, text in (("word", word), ("kind", kind)):
        more[name] = encoded(text)
        for scene in ("scene", "scene_taught"):
            more[f"{scene}_{name}"] = node(
                "ConditioningConcat", conditioning_to=[scene, 0], conditioning_from=[name, 0]
            )
        more[f"mean_{name}"] = node(
            "ConditioningAverage", conditioning_to=[name, 0], conditioning_from=["scene", 0],
            conditioning_to_strength=0.8,
        )  # fmt: skip
    links = {name: [name, 0] for name in more if name.endswith(("_word", "_kind"))}
    links |= {"long_word": f"{SCENE}, {filler}, {word}", "long_kind": f"{SCENE}, {filler}, {kind}"}
    links |= {"weighted_word": f"{SCENE}, ({word}:1.3)", "weighted_kind": f"{SCENE}, ({kind}:1.3)"}
    prompts = {f"{name}_on": ("on", link) for name, link in links.items()}
    prompts |= {f"{name}_off": ("base", link) for name, link in links.items()}
    shown, _ = draw(prompts, more)
    for name in links:
        changed = int(np.abs(shown[f"{name}_on"] - shown[f"{name}_off"]).max())
        assert changed > 8 if name.endswith("_word") else changed == 0, name


def test_a_prompt_set_to_zero_says_nothing(draw):
    """Its options go on saying where the word stood."""
    more = {"taught": encoded(f"{SCENE}, wearing a {HAT}")}
    more["zero"] = node("ConditioningZeroOut", conditioning=["taught", 0])
    shown, texts = draw({"ours": ("on", ["zero", 0]), "base": ("base", ["zero", 0])}, more)
    np.testing.assert_array_equal(shown["ours"], shown["base"])
    assert any(text.startswith(f"on: The word {HAT} stands in no prompt") for text in texts)


def test_an_encoding_whose_options_were_dropped(comfyui, pack):
    """As ComfyUI drops them where hooks encode a prompt for every time, and other packs do."""
    words = import_module(".nodes.host.words", pack.__name__)
    context = torch.ones(1, 77, 8)
    setattr(context, words.MARK, {HAT: [math.inf, 0.0, *range(1, 76)]})
    where = words.heard({"cross_attn": context}, ["<other>", HAT])
    assert where.shape == (1, 77, 2)
    assert where[0, :3, 1].tolist() == [math.inf, 0, 1]
    assert where[..., 0].isinf().all()
    assert words.heard({"cross_attn": context.clone()}, [HAT]).isinf().all()
    assert words.heard({}, [HAT]).isinf().all()


def test_where_a_word_is_heard():
    from difflora_core.text.new_words import since_word

    inf = math.inf
    assert since_word([False, True, False, False], [False, False, False, True]) == [inf, 0, 1, inf]
    assert since_word([False] * 3, [True, False, False]) == [inf] * 3
    assert since_word([True, False, True, False], [False] * 4) == [0, 1, 0, 1]
