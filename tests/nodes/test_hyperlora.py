"""A HyperLoRA folder in real ComfyUI, from the loader to everything that takes an identity."""

import importlib.util
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from difflora_core.comfy_client import ComfyPromptError
from difflora_core.demo.networks.base import demo_layout
from difflora_core.lora.formats.state_dict import to_state_dict
from difflora_core.models.latent_math import blend
from difflora_core.storage.hyperlora_folder import load_hyperlora
from difflora_core.storage.library_file import read_library
from difflora_core.storage.lora_file import read_lora_file

VARIANT = "hyper_lora/tiny"
MODEL, CLIP, VISION, HYPER, FACES = (
    ["demo", 0],
    ["demo", 1],
    ["demo", 3],
    ["hyper", 0],
    ["faces", 0],
)
SAMPLING = {"mode": "best_guess", "seed": 0, "steps": 2, "guidance": 1.0}
PARTS = ("input_blocks", "middle_block", "output_blocks", "self_attention", "cross_attention")
FACE = {"on_missing_face": "error", "face_order": "largest", "face_index": 0}
GATE = {"gate": "learned", "face_share": 0.5}
BOTH = {"face_weight": -1.0, "image_weight": -1.0}


def node(class_type, **inputs):
    return {"class_type": class_type, "inputs": inputs}


def demo_modules():
    """The demo base's attention modules as a HyperLoRA table names them."""
    sizes = {layer.name: (layer.in_features, layer.out_features) for layer in demo_layout()}
    modules = {}
    for name, (context, width) in sizes.items():
        if name.endswith(".to_k"):
            kohya = f"lora_unet_{name.removesuffix('.to_k').replace('.', '_')}"
            modules[kohya] = (width, None if context == width else context)
    return modules


@pytest.fixture(scope="module")
def variants(comfy_server, sizes, write_hyperlora):
    """Where users of HyperLoRA keep its variants; one that fits the demo world, and others."""
    place = comfy_server.base_directory / "models" / "hyper_lora" / "hyper_lora"
    encoders = {"face": sizes.face, "image": sizes.token_dim}
    half = torch.float16
    write_hyperlora(place / "tiny", demo_modules(), dtype=half, depth=1, **encoders)
    write_hyperlora(place / "other_base", depth=1, **encoders)
    write_hyperlora(place / "vit_l", demo_modules(), depth=1, face=sizes.face, image=1024)
    write_hyperlora(place / "half", depth=1, **encoders)
    (place / "half" / "resampler.safetensors").unlink()
    (place / "empty").mkdir()
    return place


@pytest.fixture(scope="module")
def packages(comfy_server, demo_world):
    """The demo's face package, plain, and with a model of 106 points beside it."""
    path = Path(__file__).parents[1] / "vision" / "conftest.py"
    spec = importlib.util.spec_from_file_location("faces_with_points", path)
    green = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(green)
    root = comfy_server.base_directory / "models" / "insightface" / "models"
    for name in ("plain", "outline"):
        shutil.copytree(demo_world / "insightface" / "demo_faces", root / name)
    onnx.save(green._landmarks(), root / "outline" / "landmarks.onnx")
    return root


@pytest.fixture(scope="module")
def photos(comfy, face_picture, tmp_path_factory):
    """Two different photos with a face, and one without."""
    first = Image.open(face_picture).convert("RGB")
    folder = tmp_path_factory.mktemp("photos")
    first.save(folder / "first.png")
    first.transpose(Image.Transpose.FLIP_LEFT_RIGHT).point(lambda v: v * 0.9).save(
        folder / "second.png"
    )
    Image.new("RGB", (128, 128), (90, 90, 90)).save(folder / "nobody.png")
    names = ("first", "second", "nobody")
    return {name: comfy.upload_picture(folder / f"{name}.png") for name in names}


def loaded(photos, name=VARIANT, package="outline"):
    return {
        "demo": node("DiffLoRA_LoadDemo"),
        "hyper": node("DiffLoRA_LoadModel", model_name=name),
        "faces": node("DiffLoRA_LoadFaceAnalysis", package=package, provider="cpu"),
        **{name: node("LoadImage", image=file) for name, file in photos.items()},
    }


def personalize(photo="first", **changes):
    inputs = {"images": [photo, 0], "difflora_model": HYPER, "clip_vision": VISION}
    inputs |= {"face_analysis": FACES, "base_model": MODEL, "image_region": "crop"}
    inputs |= SAMPLING | FACE | GATE | changes
    return node("DiffLoRA_Personalize", **{k: v for k, v in inputs.items() if v is not None})


def person(photo, prefix, weights=BOTH, **changes):
    """The long path up to an identity."""
    extract = {"images": [photo, 0], "clip_vision": VISION, "face_analysis": FACES}
    extract |= FACE | {"image_region": "face_on_grey", "region_factor": 2.2} | changes
    mix = {"difflora_model": HYPER, "features": [f"{prefix}_features", 0]}
    return {
        f"{prefix}_features": node("DiffLoRA_ExtractFeatures", **extract),
        f"{prefix}_mixed": node("DiffLoRA_MixFeatures", **mix, **GATE, **weights),
        prefix: node(
            "DiffLoRA_SampleLatent", difflora_model=HYPER, condition=[f"{prefix}_mixed", 0],
            **SAMPLING,
        ),
    }  # fmt: skip


def decode(identity, **changes):
    inputs = {"difflora_model": HYPER, "lora_latent": [identity, 0], "base_model": MODEL}
    return node("DiffLoRA_DecodeLoRA", **inputs, **changes)


@pytest.fixture
def files(comfy, comfy_server, variants, packages):
    """Runs nodes and reads the LoRAs that core's SaveLoRA wrote, by the name of their node."""

    def run(nodes, *names):
        keep = {
            f"save_{name}": node("SaveLoRA", lora=[name, 0], prefix=f"loras/hyper_{name}", steps=0)
            for name in names
        }
        comfy.run({**nodes, **keep})
        folder = comfy_server.output_directory / "loras"
        return [load_file(max(folder.glob(f"hyper_{name}_0*"))) for name in names]

    return run


def refused(comfy, nodes, at, pattern):
    with pytest.raises(ComfyPromptError, match=pattern) as caught:
        comfy.run(nodes)
    assert caught.value.node_id == at
    assert "Traceback" not in caught.value.message


def same(a, b, tolerance=0.0):
    return set(a) == set(b) and all(torch.allclose(a[k], b[k], rtol=0, atol=tolerance) for k in a)


def test_variants_are_listed_beside_our_models(comfy, variants):
    options = comfy.object_info()["DiffLoRA_LoadModel"]["input"]["required"]["model_name"]
    listed = str(options)
    for name in ("tiny", "other_base", "half"):
        assert f"hyper_lora/{name}" in listed
    assert "hyper_lora/empty" not in listed


def test_personalize_is_the_long_path(files, photos):
    nodes = loaded(photos) | {"lora": personalize()} | person("first", "who")
    nodes["decoded"] = decode("who")
    short, long = files(nodes, "lora", "decoded")
    assert same(short, long)
    assert len(short) == 3 * len(demo_layout())
    assert short["lora_unet_middle_block_1_transformer_blocks_0_attn2_to_out_0.alpha"] == 1
    assert max(v.abs().max() for k, v in short.items() if "alpha" not in k) > 1e-2


def test_what_is_seen_matters_and_so_does_each_source(files, photos):
    nodes = loaded(photos) | person("first", "grey")
    nodes |= person("first", "whole", image_region="picture")
    nodes |= person("first", "face_only", {"face_weight": 1.0, "image_weight": 0.0})
    nodes |= person("first", "image_only", {"face_weight": 0.0, "image_weight": 1.0})
    nodes |= person("second", "both")
    nodes["both_features"]["inputs"]["features"] = ["grey_features", 0]  # two photos, one person
    names = ("grey", "whole", "face_only", "image_only", "both")
    nodes |= {f"{name}_lora": decode(name) for name in names}
    found = files(nodes, *(f"{name}_lora" for name in names))
    for k, one in enumerate(found):
        assert not any(same(one, other, 1e-4) for other in found[:k])


def test_identities_blend_and_are_kept(files, photos, comfy_server, variants):
    library = {"difflora_model": HYPER, "library": "hyper", "same_name": "replace"}
    nodes = loaded(photos) | person("first", "a") | person("second", "b")
    nodes |= {
        "blend": node(
            "DiffLoRA_BlendIdentities", identity_1=["a", 0], identity_2=["b", 0],
            method="slerp", weight_1=3.0, weight_2=1.0, weight_3=0.0, weight_4=0.0,
        ),
        "way": node(
            "DiffLoRA_InterpolateIdentities", identity_a=["a", 0], identity_b=["b", 0], steps=5,
            method="slerp",
        ),
        "quarter": node("DiffLoRA_SelectIdentity", identity=["way", 0], index=1, count=1),
        "more": node(
            "DiffLoRA_AddDifference", identity=["a", 0], plus=["b", 0], minus=["a", 0], amount=1.0
        ),
        "keep_a": node("DiffLoRA_AddToLibrary", identity=["a", 0], name="Ada", **library),
        "keep_b": node("DiffLoRA_AddToLibrary", identity=["b", 0], name="Ben", **library),
    }  # fmt: skip
    nodes |= {f"{name}_lora": decode(name) for name in ("blend", "quarter", "more", "b")}
    blended, quarter, more, second = files(
        nodes, "blend_lora", "quarter_lora", "more_lora", "b_lora"
    )
    assert same(blended, quarter, 1e-5)
    assert same(more, second, 1e-5)
    assert not same(blended, second, 1e-3)
    path = comfy_server.base_directory / "models" / "difflora_library" / "hyper.safetensors"
    kept = read_library(path)
    assert kept.model_name == VARIANT
    assert "CC-BY-NC" in kept.latents.license
    ours = load_hyperlora(variants / "tiny")
    people = [kept.latent(kept.find(name)) for name in ("Ada", "Ben")]
    expected = to_state_dict(ours.decode(blend(people, [3, 1])).batch_item(0))
    assert same(blended, expected, 1e-4)
    picked = loaded(photos) | {
        "picked": node("DiffLoRA_PickFromLibrary", library="hyper", name="Ben", number=1),
        "picked_lora": decode("picked"),
    }
    assert same(files(picked, "picked_lora")[0], second, 1e-5)


def drawn(name, model, positive="words"):
    sampler = node(
        "KSampler", model=model, positive=[positive, 0], negative=["none", 0],
        latent_image=["empty", 0], seed=3, steps=2, cfg=1.5, sampler_name="euler",
        scheduler="normal", denoise=1.0,
    )  # fmt: skip
    return {
        "words": node("CLIPTextEncode", clip=CLIP, text="photo of a person, smiling"),
        "none": node("CLIPTextEncode", clip=CLIP, text=""),
        "empty": node("EmptyLatentImage", width=64, height=64, batch_size=1),
        f"{name}_sampler": sampler,
        f"{name}_decoder": node("VAEDecode", samples=[f"{name}_sampler", 0], vae=["demo", 2]),
        name: node("SaveImage", images=[f"{name}_decoder", 0], filename_prefix=name),
    }


def test_its_lora_is_applied_in_every_way(comfy, variants, packages, photos):
    blocks = dict.fromkeys(PARTS, 1.0)
    late = {"strength": 5.0, "start_percent": 0.5, "end_percent": 1.0, "positive_only": False}
    late |= blocks
    whole = late | {"start_percent": 0.0}
    lora = {"lora": ["lora", 0]}
    nodes = loaded(photos) | {
        "lora": personalize(),
        "core": node("LoraModelLoader", model=MODEL, **lora, strength_model=5.0, bypass=False),
        "whole": node("DiffLoRA_ApplyLoRA", model=MODEL, **lora, **whole),
        "late": node("DiffLoRA_ApplyLoRA", model=MODEL, **lora, **late),
        "hook": node("DiffLoRA_LoRAToHook", **lora, strength_model=5.0),
        "half": node("SolidMask", value=1.0, width=64, height=64),
        "hooked": node(
            "ConditioningSetProperties", cond_NEW=["words", 0], hooks=["hook", 0],
            mask=["half", 0], strength=1.0, set_cond_area="default",
        ),
    }  # fmt: skip
    nodes |= drawn("base", MODEL)
    for name in ("core", "whole", "late"):
        nodes |= drawn(f"p_{name}", [name, 0])
    nodes |= drawn("p_hook", MODEL, "hooked")
    shown = {name: p[0].astype(int) for name, p in comfy.run(nodes).pictures.items()}
    assert np.abs(shown["p_core"] - shown["p_whole"]).max() <= 2
    changes = {name: int(np.abs(shown[name] - shown["base"]).max()) for name in shown}
    assert min(changes["p_core"], changes["p_hook"]) > 8, changes
    assert 2 < changes["p_late"] < changes["p_core"], changes  # the last step alone
    assert np.abs(shown["p_late"] - shown["p_whole"]).max() > 2


def test_what_it_cannot_do_is_said_on_the_node(comfy, variants, packages, photos):
    words = "cannot draw variants or invent people"
    nodes = loaded(photos)
    save = {"save": node("SaveLoRA", lora=["lora", 0], prefix="loras/no", steps=0)}
    refused(comfy, nodes | {"lora": personalize(mode="sampled")} | save, "lora", words)
    invent = node("DiffLoRA_InventIdentity", difflora_model=HYPER, seed=1, count=1, steps=2)
    refused(comfy, nodes | {"who": invent, "lora": decode("who")} | save, "who", words)
    who = person("first", "a")
    vary = {"identity": ["a", 0], "strength": 0.3, "seed": 1, "count": 1, "steps": 2}
    vary = node("DiffLoRA_VaryIdentity", difflora_model=HYPER, **vary)
    refused(comfy, nodes | who | {"who": vary, "lora": decode("who")} | save, "who", words)
    best = {"condition": ["a_mixed", 0], "count": 2, "seed": 1, "steps": 2, "guidance": 1.0}
    best = node("DiffLoRA_BestOfN", difflora_model=HYPER, **best)
    refused(comfy, nodes | who | {"who": best, "lora": decode("who")} | save, "who", words)
    encode = node("DiffLoRA_EncodeLoRA", difflora_model=HYPER, lora=["made", 0], refine_steps=0)
    nodes |= {"made": personalize(), "who": encode, "lora": decode("who")}
    refused(comfy, nodes | save, "who", "has no encoder")


@pytest.mark.parametrize(
    ("changes", "at", "words"),
    [
        ({"name": "hyper_lora/half"}, "hyper", "lacks resampler.safetensors.*press R"),
        ({"name": "hyper_lora/empty"}, "hyper", "was not found"),
        ({"name": "hyper_lora/../../checkpoints"}, "hyper", "was not found"),
        ({"name": "hyper_lora/other_base"}, "lora", "made for sdxl.*do not fit the base model"),
        ({"name": "hyper_lora/vit_l"}, "lora", "Wrong CLIP vision.*ViT-L/14"),
        ({"package": "plain"}, "lora", "put 2d106det.onnx"),
    ],
)
def test_bad_input_is_one_sentence(comfy, variants, packages, photos, changes, at, words):
    nodes = loaded(photos, **changes) | {"lora": personalize()}
    nodes["save"] = node("SaveLoRA", lora=["lora", 0], prefix="loras/no", steps=0)
    refused(comfy, nodes, at, words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"photo": "nobody"}, "shows no face"),
        ({"clip_vision": None}, "connect a CLIP vision"),
        ({"face_analysis": None}, "connect a face analysis too"),
        ({"difflora_model": ["demo", 5], "image_region": "face_on_grey", "clip_vision": None},
         "connect its CLIP vision"),
    ],
)  # fmt: skip
def test_what_is_missing_is_named(comfy, variants, packages, photos, changes, words):
    nodes = loaded(photos) | {"lora": personalize(**changes)}
    nodes["save"] = node("SaveLoRA", lora=["lora", 0], prefix="loras/no", steps=0)
    refused(comfy, nodes, "lora", words)


def test_the_usual_crop_is_refused_where_the_model_was_trained_on_grey(
    comfy, variants, packages, photos
):
    nodes = loaded(photos) | person("first", "who", image_region="crop") | {"lora": decode("who")}
    nodes["save"] = node("SaveLoRA", lora=["lora", 0], prefix="loras/no", steps=0)
    refused(comfy, nodes, "who_mixed", "set image_region to face_on_grey")


def test_the_licence_is_shown(comfy, variants, photos):
    shown = []
    nodes = loaded(photos) | {"shown": node("PreviewAny", source=["hyper", 0])}
    comfy.run_fresh(nodes, shown=shown)
    assert any(str(line).startswith("hyper: ") and "CC-BY-NC" in str(line) for line in shown)


def kept(lora, file_name):
    texts = dict.fromkeys(("title", "trigger_words", "tags", "description"), "")
    given = {"advised_strength": 1.0, "method": "", "base_model": "demo", "precision": "float32"}
    return node("DiffLoRA_SaveLoRA", lora=lora, file_name=file_name, **texts, **given)


def test_the_licence_is_in_the_file(comfy, comfy_server, variants, packages, photos):
    """Of a LoRA that was scaled, and of one that was loaded again, too."""
    shown, folder = [], comfy_server.base_directory / "models" / "loras"
    whole = {"strength": 0.5, "start_percent": 0.0, "end_percent": 1.0, "positive_only": False}
    whole |= dict.fromkeys(PARTS, 1.0)
    nodes = loaded(photos) | {
        "lora": personalize(),
        "ours": personalize(difflora_model=["demo", 5]),
        "scaled": node("DiffLoRA_ApplyLoRA", model=MODEL, lora=["lora", 0], **whole),
        "keep": kept(["lora", 0], "hyper_licensed"),
        "keep_scaled": kept(["scaled", 1], "hyper_scaled"),
        "keep_ours": kept(["ours", 0], "hyper_ours"),
        "core": node("SaveLoRA", lora=["lora", 0], prefix="loras/by_core", steps=0),
    }
    comfy.run(nodes, shown=shown)
    again = {"again": node("DiffLoRA_LoadLoRAFile", lora_name="hyper_licensed.safetensors")}
    comfy.run(again | {"keep": kept(["again", 0], "hyper_again")})
    names = ("hyper_licensed", "hyper_scaled", "hyper_again", "hyper_ours")
    files = {name: read_lora_file(folder / f"{name}.safetensors") for name in names}
    for name in names[:3]:
        assert "CC-BY-NC 4.0" in files[name].metadata["modelspec.license"]
    assert files["hyper_ours"].metadata["modelspec.license"] == "Apache-2.0"
    by_core = load_file(max((comfy_server.output_directory / "loras").glob("by_core*")))
    assert same(dict(files["hyper_licensed"].tensors), by_core)
    assert any(str(line).startswith("keep: ") and "CC-BY-NC" in str(line) for line in shown)
