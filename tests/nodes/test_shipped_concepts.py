"""The concepts that ship, in real ComfyUI: their word draws their look, alone and together."""

import numpy as np
import pytest
import torch

from difflora_core.demo import paths
from difflora_core.demo.networks.concept_judge import load_concept_judge
from difflora_core.demo.world.concept_examples import SHIPPED

CLIP = ["demo", 1]
SCENE = "photo of a person, smiling, blue background, white shirt"
PHRASES = {"demo_hat": "wearing a {}", "demo_cat": "with a {}"}


def node(class_type, **inputs):
    return {"class_type": class_type, "inputs": inputs}


@pytest.fixture(scope="module")
def judge():
    return load_concept_judge(paths.CONCEPT_JUDGE, list(SHIPPED.values()))


@pytest.fixture(scope="module")
def draw(comfy, is_shipped):
    """Pictures of a prompt with some of the shipped concepts on the model."""
    if not is_shipped:
        pytest.skip("the demo world is not complete")

    def run(text, names=()):
        nodes = {"demo": node("DiffLoRA_LoadDemo")}
        model, clip = ["demo", 0], CLIP
        for name in names:
            load, worn = f"load_{name}", f"worn_{name}"
            nodes[load] = node(
                "DiffLoRA_LoadConcept", concept_name=f"{name}.safetensors", clip=clip
            )
            nodes[worn] = node(
                "DiffLoRA_ApplyConcept", model=model, concept=[load, 0], bias=0.6,
                temperature=0.1, strength=1.0, lock="local", start_percent=0.0, end_percent=1.0,
                combine="exact", reach=0,
            )  # fmt: skip
            model, clip = [worn, 0], [load, 1]
        nodes |= {
            "prompt": node("CLIPTextEncode", clip=clip, text=text),
            "none": node("CLIPTextEncode", clip=CLIP, text=""),
            "empty": node("EmptyLatentImage", width=64, height=64, batch_size=8),
            "sampler": node(
                "KSampler", model=model, positive=["prompt", 0], negative=["none", 0],
                latent_image=["empty", 0], seed=5, steps=10, cfg=2.0, sampler_name="euler",
                scheduler="normal", denoise=1.0,
            ),
            "decoder": node("VAEDecode", samples=["sampler", 0], vae=["demo", 2]),
            "show": node("PreviewImage", images=["decoder", 0]),
        }  # fmt: skip
        pictures = np.stack([p[..., :3] for p in comfy.run(nodes).pictures["show"]])
        return torch.from_numpy(pictures).float() / 255

    return run


@pytest.mark.parametrize("name", list(SHIPPED))
def test_a_shipped_word_draws_its_look(draw, judge, name):
    concept, phrase = SHIPPED[name], f"{SCENE}, {PHRASES[name]}"
    plain = draw(phrase.format(concept.kind))
    taught = draw(phrase.format(concept.word), [name])
    before, after = (judge.likeness(p, concept).mean() for p in (plain, taught))
    assert after > before + 0.3
    assert judge.recognised(taught, concept).float().mean() >= 0.8
    place = (slice(None), slice(4, 20), slice(0, 4))  # background, far from hat and cat
    assert (plain[place] - taught[place]).abs().mean() < 0.05


def test_two_shipped_words_share_a_picture(draw, judge):
    hat, cat = SHIPPED.values()
    both = draw(f"{SCENE}, wearing a {hat.word}, with a {cat.word}", list(SHIPPED))
    for concept in (hat, cat):
        assert judge.likeness(both, concept).mean() > 0.3
        assert judge.recognised(both, concept).float().mean() >= 0.8
