"""Identities as material in real ComfyUI: latent nodes, Encode LoRA, refusals on the node."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from difflora_core.comfy_client import ComfyPromptError

MODEL, CLIP, VAE, VISION, FACES, DIFFLORA = (["demo", k] for k in range(6))
WEIGHTS = {f"weight_{n}": 1.0 for n in range(1, 5)} | {"method": "slerp"}


def node(class_type, **inputs):
    return {"class_type": class_type, "inputs": inputs}


def invent(seed, count=1, model=DIFFLORA):
    return node("DiffLoRA_InventIdentity", difflora_model=model, seed=seed, count=count, steps=4)


def decode(identity, index=0):
    return node(
        "DiffLoRA_DecodeLoRA", difflora_model=DIFFLORA, lora_latent=[identity, 0], index=index
    )


def save(lora, prefix):
    return node("SaveLoRA", lora=[lora, 0], prefix=f"loras/{prefix}", steps=0)


def people(**nodes):
    """Two invented people, a and b, and what else is given."""
    return {"demo": node("DiffLoRA_LoadDemo"), "a": invent(1), "b": invent(2), **nodes}


@pytest.fixture(scope="module")
def loras(comfy, comfy_server):
    """Runs nodes and reads the LoRA that each of the named identities decodes to."""

    def run(nodes, *names):
        nodes = dict(nodes)
        for name in names:
            nodes |= {f"{name}_lora": decode(name), f"{name}_save": save(f"{name}_lora", name)}
        comfy.run(nodes)
        return [newest(comfy_server, name) for name in names]

    return run


def newest(server, prefix):
    return load_file(max(server.output_directory.glob(f"loras/{prefix}_*")))


def equal(first, second):
    return all(torch.equal(first[key], second[key]) for key in first)


def refused(comfy, nodes, at, pattern):
    with pytest.raises(ComfyPromptError, match=pattern) as caught:
        comfy.run(nodes)
    assert caught.value.node_id == at
    assert "Traceback" not in caught.value.message


def test_blend_follows_its_weights(loras):
    blends = {
        f"w{k}": node(
            "DiffLoRA_BlendIdentities", identity_1=["a", 0], identity_2=["b", 0],
            identity_3=["c", 0], **(WEIGHTS | weights),
        )
        for k, weights in enumerate(
            ({"weight_2": 0.0, "weight_3": 0.0}, {"weight_3": 0.0}, {}, {"weight_1": 2.0})
        )
    }  # fmt: skip
    names = ("a", "w0", "w1", "w2", "w3")
    only_a, *others = loras(people(c=invent(3), **blends), *names)
    assert equal(only_a, others[0])
    for k in range(3):
        assert not equal(others[k], others[k + 1])


def test_vary_keeps_or_replaces_the_person(loras):
    def vary(strength, seed=9):
        return node(
            "DiffLoRA_VaryIdentity", difflora_model=DIFFLORA, identity=["a", 0],
            strength=strength, seed=seed, count=1, steps=4,
        )  # fmt: skip

    nodes = people(none=vary(0.0), some=vary(0.3), other=vary(0.3, 10), new=vary(1.0), n=invent(9))
    a, none, some, other, new, fresh = loras(nodes, "a", "none", "some", "other", "new", "n")
    assert equal(a, none)
    assert equal(new, fresh)  # nothing is left of the person
    assert not equal(a, some)
    assert not equal(some, other)


def test_add_difference_and_the_way_from_a_to_b(loras):
    nodes = people(
        same=node(
            "DiffLoRA_AddDifference", identity=["a", 0], plus=["b", 0], minus=["a", 0], amount=1.0
        ),
        way=node(
            "DiffLoRA_InterpolateIdentities", identity_a=["a", 0], identity_b=["b", 0], steps=3,
            method="slerp",
        ),
        middle=node("DiffLoRA_SelectIdentity", identity=["way", 0], index=1, count=1),
        last=node("DiffLoRA_SelectIdentity", identity=["way", 0], index=2, count=1),
        half=node(
            "DiffLoRA_BlendIdentities", identity_1=["a", 0], identity_2=["b", 0], **WEIGHTS
        ),
    )  # fmt: skip
    b, same, first, middle, last, half = loras(nodes, "b", "same", "way", "middle", "last", "half")
    assert equal(b, last)
    torch.testing.assert_close(same, b, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(middle, half)
    assert not equal(first, middle)


def test_decode_all_runs_the_rest_for_every_identity(comfy):
    nodes = people(
        batch=invent(20, 3),
        all=decode("batch", -1),
        applied=node(
            "LoraModelLoader", model=MODEL, lora=["all", 0], strength_model=1.0, bypass=False
        ),
        words=node("CLIPTextEncode", clip=CLIP, text="photo of a person"),
        empty=node("EmptyLatentImage", width=64, height=64, batch_size=1),
        sampler=node(
            "KSampler", model=["applied", 0], positive=["words", 0], negative=["words", 0],
            latent_image=["empty", 0], seed=3, steps=2, cfg=1.0, sampler_name="euler",
            scheduler="normal", denoise=1.0,
        ),
        pixels=node("VAEDecode", samples=["sampler", 0], vae=VAE),
        show=node("PreviewImage", images=["pixels", 0]),
    )  # fmt: skip
    shown = comfy.run(nodes).pictures["show"]
    assert len(shown) == 3
    assert np.abs(shown[0].astype(int) - shown[1]).max() > 8


def test_encoded_lora_is_the_identity_again(comfy, loras):
    nodes = people(
        a_lora=decode("a"),
        encoded=node(
            "DiffLoRA_EncodeLoRA", difflora_model=DIFFLORA, lora=["a_lora", 0], refine_steps=60
        ),
        kept=node("PreviewAny", source=["encoded", 1]),
        report=node("PreviewAny", source=["encoded", 2]),
        hasty=node(
            "DiffLoRA_EncodeLoRA", difflora_model=DIFFLORA, lora=["a_lora", 0], refine_steps=0
        ),
        hasty_report=node("PreviewAny", source=["hasty", 2]),
    )
    original, again = loras(nodes, "a", "encoded")
    shown = comfy.run(nodes).outputs
    assert float(shown["kept"]["text"][0]) > 0.9
    assert "person may be lost" not in shown["report"]["text"][0]
    assert "person may be lost" in shown["hasty_report"]["text"][0]
    assert "Set refine_steps to 100" in shown["hasty_report"]["text"][0]
    difference = sum((original[k] - again[k]).square().sum() for k in original if "up" in k)
    assert difference < 0.25 * sum(original[k].square().sum() for k in original if "up" in k)


def test_best_of_n_is_one_of_the_samples(comfy, loras, face_picture):
    condition = {
        "photo": node("LoadImage", image=comfy.upload_picture(face_picture)),
        "features": node(
            "DiffLoRA_ExtractFeatures", images=["photo", 0], clip_vision=VISION,
            face_analysis=FACES, on_missing_face="error", face_order="largest", face_index=0,
            image_region="crop", region_factor=2.2,
        ),
        "mixed": node(
            "DiffLoRA_MixFeatures", difflora_model=DIFFLORA, features=["features", 0],
            gate="learned", face_share=0.5, face_weight=-1.0, image_weight=-1.0,
        ),
        "best": node(
            "DiffLoRA_BestOfN", difflora_model=DIFFLORA, condition=["mixed", 0], count=3, seed=40,
            steps=4, guidance=1.0,
        ),
    }  # fmt: skip
    for k in range(3):
        condition[f"s{k}"] = node(
            "DiffLoRA_SampleLatent", difflora_model=DIFFLORA, condition=["mixed", 0],
            mode="sampled", seed=40 + k, steps=4, guidance=1.0,
        )  # fmt: skip
    best, *samples = loras(people(**condition), "best", "s0", "s1", "s2")
    errors = [
        max(float((best[key] - sample[key]).abs().max()) for key in best) for sample in samples
    ]
    assert min(errors) < 1e-4
    assert sorted(errors)[1] > 1e-3


def test_blend_without_weight_is_refused(comfy):
    weightless = WEIGHTS | {f"weight_{n}": 0.0 for n in range(1, 5)}
    nodes = people(
        blend=node(
            "DiffLoRA_BlendIdentities", identity_1=["a", 0], identity_2=["b", 0], **weightless
        ),
        lora=decode("blend"),
        save=save("lora", "refused"),
    )
    refused(comfy, nodes, "blend", "sum to zero")


def test_batches_are_used_as_they_fit(comfy):
    nodes = people(
        few=invent(3, 2),
        many=invent(5, 3),
        pick=node("DiffLoRA_SelectIdentity", identity=["few", 0], index=2, count=1),
        lora=decode("pick"),
        save=save("lora", "refused"),
    )
    refused(comfy, nodes, "pick", "no identity number 2")
    nodes["lora"] = decode("many", 3)
    refused(comfy, nodes, "lora", "no identity number 3")
    nodes["pick"] = node(
        "DiffLoRA_BlendIdentities", identity_1=["few", 0], identity_2=["many", 0], **WEIGHTS
    )
    nodes["lora"] = decode("pick")
    refused(comfy, nodes, "pick", "2, 3 identities")
    nodes["pick"] = node(
        "DiffLoRA_InterpolateIdentities", identity_a=["a", 0], identity_b=["many", 0], steps=3,
        method="slerp",
    )  # fmt: skip
    refused(comfy, nodes, "pick", "one identity.*Select Identity")


def test_latents_of_two_models_do_not_mix(comfy, comfy_server, random_difflora, sizes):
    from difflora_core.demo.networks.base import demo_layout

    models = comfy_server.base_directory / "models"
    folder = models / "difflora"
    folder.mkdir(parents=True, exist_ok=True)
    layout = demo_layout(targets="transformer")  # that of the shipped model
    random_difflora(folder / "stranger.safetensors", layout, sizes, seed=11)
    nodes = people(
        stranger=node("DiffLoRA_LoadModel", model_name="stranger.safetensors"),
        c=invent(3, model=["stranger", 0]),
        blend=node("DiffLoRA_BlendIdentities", identity_1=["a", 0], identity_2=["c", 0], **WEIGHTS),
        lora=decode("blend"),
        save=save("lora", "refused"),
    )
    refused(comfy, nodes, "blend", "different DiffLoRA models")
    nodes["lora"] = decode("c")
    refused(comfy, nodes, "lora", "another identity model")
    nodes["lora"] = decode("blend")
    ends = {"identity_a": ["a", 0], "identity_b": ["c", 0]}
    three = {"identity": ["a", 0], "plus": ["b", 0], "minus": ["c", 0]}
    own = {"difflora_model": DIFFLORA, "identity": ["c", 0]}
    vary = {"strength": 0.3, "seed": 1, "count": 1, "steps": 2}
    users = {
        "DiffLoRA_InterpolateIdentities": (
            {**ends, "steps": 3, "method": "slerp"},
            "different DiffLoRA models",
        ),
        "DiffLoRA_AddDifference": ({**three, "amount": 1.0}, "different DiffLoRA models"),
        "DiffLoRA_VaryIdentity": ({**own, **vary}, "another identity model"),
    }
    for kind, (inputs, complaint) in users.items():
        nodes["blend"] = node(kind, **inputs)
        refused(comfy, nodes, "blend", complaint)
    keep = {"library": "strangers", "name": "Mallory", "same_name": "number"}
    nodes = {key: nodes[key] for key in ("demo", "stranger", "c")}
    nodes["keep"] = node("DiffLoRA_AddToLibrary", **own, **keep)
    refused(comfy, nodes, "keep", "another identity model")
    assert not (models / "difflora_library" / "strangers.safetensors").exists()


@pytest.mark.parametrize(
    ("kind", "pattern"),
    [
        ("another base", "does not fit demo"),
        ("half of another base", "does not fit demo"),
        ("empty", "This LoRA is empty"),
        ("text", "A str is not a LoRA"),
    ],
)
def test_encode_refuses_what_is_no_lora_for_it(comfy, kind, pattern):
    nodes = people(
        a_lora=decode("a"),
        theirs=node("TestHyperLoRA", lora=["a_lora", 0], kind=kind),
        encoded=node(
            "DiffLoRA_EncodeLoRA", difflora_model=DIFFLORA, lora=["theirs", 0], refine_steps=0
        ),
        lora=decode("encoded"),
        save=save("lora", "refused"),
    )
    refused(comfy, nodes, "encoded", pattern)


def test_encode_takes_hyperlora_and_says_what_is_missing(comfy):
    nodes = people(a_lora=decode("a"))
    for kind in ("same", "peft"):
        nodes |= {
            f"theirs {kind}": node("TestHyperLoRA", lora=["a_lora", 0], kind=kind),
            f"encoded {kind}": node(
                "DiffLoRA_EncodeLoRA", difflora_model=DIFFLORA, lora=[f"theirs {kind}", 0],
                refine_steps=0,
            ),
            kind: node("PreviewAny", source=[f"encoded {kind}", 2]),
        }  # fmt: skip
    shown = comfy.run(nodes).outputs
    assert "Agreement of the weights" in shown["same"]["text"][0]
    assert "not in the file" not in shown["same"]["text"][0]
    assert "1 layer read" in shown["peft"]["text"][0]
    assert "not in the file, left at zero" in shown["peft"]["text"][0]
