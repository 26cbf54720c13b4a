"""Everything that we put on a model, in every kind of graph that artists put it into.

What core can do in another way, by hooks that patch weights, has to give the same picture. A
concept or a style has no such way: where a graph is mathematically the plain one, or one of two
models, the picture has to be that of the other; elsewhere the effect has to lead the same way.
"""

from functools import partial

import numpy as np
import pytest

from difflora_core.comfy_client import ComfyPromptError
from tests.nodes.placed import OURS, Placed, common_nodes, ksampler
from tests.nodes.sampler_graphs import (
    MODEL,
    ROUNDING,
    VAE,
    VISIBLE,
    basic,
    cfg,
    difference,
    dual_cfg,
    dual_model,
    guided,
    node,
    perp_neg,
)

ALIKE = 0.2  # least cosine of an effect with that in the plain graph; the opposite one's is below 0


def draw(make, name, placed):
    """Nodes that draw with a guider."""
    return guided(name, make(list(placed.model), list(placed.positive), list(placed.negative)))


PATCHES = {
    "SAG": ("SelfAttentionGuidance", {"scale": 0.7, "blur_sigma": 2.0}),
    "PAG": ("PerturbedAttentionGuidance", {"scale": 2.0}),
    "FreeU": ("FreeU_V2", {"b1": 1.1, "b2": 1.2, "s1": 0.9, "s2": 0.6}),
    "HyperTile": (
        "HyperTile", {"tile_size": 32, "swap_size": 1, "max_depth": 2, "scale_depth": False}
    ),
    "one prompt at a time": ("TestOneByOne", {}),
    "seamless": ("TestSeamless", {}),
    "tiled diffusion": ("TestTwoTiles", {}),
    "compiled": ("TestCompiled", {}),
}  # fmt: skip
"""What is put on a model after ours."""
EVEN = ("FreeU", "HyperTile", "seamless", "tiled diffusion")
"""Those that do the same to every prompt."""


def patched(patch, make, name, placed):
    """A guider's picture with a patch of the model."""
    class_type, settings = PATCHES[patch]
    own = Placed((f"{name}_m", 0), placed.positive, placed.negative)
    nodes = {f"{name}_m": node(class_type, model=list(placed.model), **settings)}
    return nodes | draw(make, name, own)


def by_two_models(patch, name, placed):
    """The same of two models: one with ours for the positive prompt, one without for the other."""
    class_type, settings = PATCHES[patch]
    other = {"bare": node(class_type, model=MODEL, **settings)}
    return other | patched(patch, partial(dual_model, other=["bare", 0]), name, placed)


def few_steps(name, placed):
    """As with a LoRA of few steps: its weights below, its sampling above, its sampler."""
    own = Placed((f"{name}_m", 0), placed.positive, placed.negative)
    nodes = {
        f"{name}_lcm": node(
            "LoraModelLoader", model=list(placed.model), lora=["lora4", 0], strength_model=0.3,
            bypass=False,
        ),
        f"{name}_m": node(
            "ModelSamplingDiscrete", model=[f"{name}_lcm", 0], sampling="lcm", zsnr=False
        ),
        **draw(partial(cfg, scale=1.5), name, own),
    }  # fmt: skip
    lcm = {"lcm sampler": node("KSamplerSelect", sampler_name="lcm")}
    lcm["lcm steps"] = node(
        "BasicScheduler", model=[f"{name}_m", 0], scheduler="sgm_uniform", steps=4, denoise=1.0
    )
    nodes[f"{name}_latent"]["inputs"] |= {
        "sampler": ["lcm sampler", 0], "sigmas": ["lcm steps", 0],
    }  # fmt: skip
    return nodes | lcm


PLAIN = "KSampler"
GRAPHS = {
    PLAIN: ksampler,
    "CFG Guider": partial(draw, cfg),
    "Dual CFG": partial(draw, dual_cfg),
    "Dual Model": partial(draw, dual_model),
    "PerpNeg": partial(draw, perp_neg),
    "Basic": partial(draw, basic),
    "cfg 1": partial(draw, partial(cfg, scale=1.0)),
    **{patch: partial(patched, patch, cfg) for patch in PATCHES},
    "few steps": few_steps,
}
OURS_ALONE = {
    ("Dual Model", "LoRA, timed"),  # its other model has nothing of ours, but core's hook
    ("few steps", "style of PaRa"),  # takes its directions out of that LoRA, too, as is told
    ("Dual Model", "two people by words"),  # its other model has nothing of ours
    ("FreeU", "two people by words"),  # acts on both prompts, which a model for each would not show
    ("seamless", "two people by words"),  # the same
}
"""Where core's way does something else."""
REFUSED = {
    ("HyperTile", "two people by words"): "HyperTile",
    ("tiled diffusion", "two people by words"): "drawn by itself",
}
"""Graphs that cut the picture, where nobody can say what part of it a layer sees."""
ELSEWHERE = {(graph, "two people by words") for graph in ("few steps", "seamless")}
"""Graphs that begin with another picture, where people may be found at other places."""
AS_PLAIN = {"CFG Guider", "Dual CFG", "Dual Model", "one prompt at a time", "compiled"}
"""Graphs that compute the same as the plain one in another way."""


@pytest.fixture(scope="module")
def common(comfy, comfy_server, is_shipped):
    """What every graph needs."""
    if not is_shipped:
        pytest.skip("the demo world is not complete")
    return common_nodes(comfy, comfy_server)


@pytest.fixture(scope="module")
def drawn(comfy, common):
    """Draws in a graph: pictures of a kind (ours, base, cores), each drawn once."""
    kept = {}

    def pictures(graph, kind):
        made, run = OURS[kind](), {}
        ways = {"ours": made.ours, "base": made.base}
        if made.cores is not None:
            ways["cores"] = made.cores
        makers = dict.fromkeys(ways, GRAPHS[graph])
        if made.cores is None and graph in EVEN:
            ways["cores"], makers["cores"] = made.ours, partial(by_two_models, graph)
        keys = {
            way: (graph, placed if way == "base" else (kind, way)) for way, placed in ways.items()
        }
        for way, placed in ways.items():
            if keys[way] not in kept:
                run |= makers[way](way, placed)
        if run:
            shown = comfy.run(common | made.nodes | run).pictures
            kept.update({keys[way]: shown[way] for way in shown if way in keys})
        return {way: kept[key] for way, key in keys.items()}

    return pictures


def cosine(effect, other):
    """Of two differences of pictures."""
    a, b = (np.concatenate([p.ravel() for p in e]).astype(float) for e in (effect, other))
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def effect(pictures):
    """What ours does to the base, in grey levels."""
    pairs = zip(pictures["ours"], pictures["base"], strict=True)
    return [np.subtract(ours, base, dtype=int) for ours, base in pairs]


@pytest.mark.parametrize("kind", OURS)
@pytest.mark.parametrize("graph", GRAPHS)
def test_each_in_every_graph(drawn, graph, kind):
    if (graph, kind) in REFUSED:
        with pytest.raises(ComfyPromptError, match=REFUSED[graph, kind]):
            drawn(graph, kind)
        return
    pictures, plain = drawn(graph, kind), drawn(PLAIN, kind)
    wanted = []
    if (graph, kind) not in OURS_ALONE:
        wanted += [pictures["cores"]] if "cores" in pictures else []
        wanted += [plain["ours"]] if graph in AS_PLAIN else []
    assert difference(pictures["ours"], pictures["base"]) > VISIBLE
    for other in wanted:
        assert difference(pictures["ours"], other) <= ROUNDING
    if not wanted and graph != PLAIN and (graph, kind) not in ELSEWHERE:
        assert cosine(effect(pictures), effect(plain)) > ALIKE


def on_base(nodes, name, output):
    """The same nodes with another base model."""
    return {
        key: {
            **entry,
            "inputs": {
                k: [name, output] if value == MODEL else value
                for k, value in entry["inputs"].items()
            },
        }
        for key, entry in nodes.items()
    }


BY_WEIGHTS = ("LoRA to Hook", "two people by mask")
"""Kinds that core patches into weights, where they are rounded as those are."""


@pytest.mark.parametrize("kind", OURS)
@pytest.mark.parametrize("stored", ["fp8 e4m3", "fp16"])
def test_on_weights_of_another_type(comfy, common, stored, kind):
    """As on a model that holds the rounded numbers; a hook as core's, which rounds its sum."""
    made = OURS[kind]()
    other = {"stored": node("TestStored", model=MODEL, kind=stored)}
    both = {}
    for output, name in enumerate(("stored", "rounded")):
        nodes = {**made.nodes, **ksampler("base", made.base), **ksampler("ours", made.ours)}
        if made.cores is not None:
            nodes |= ksampler("cores", made.cores)
        both[name] = comfy.run(common | on_base(nodes, "stored", output) | other).pictures
    assert difference(both["stored"]["ours"], both["stored"]["base"]) > VISIBLE
    if kind in BY_WEIGHTS:
        assert difference(both["stored"]["ours"], both["stored"]["cores"]) <= ROUNDING
        assert cosine(effect(both["stored"]), effect(both["rounded"])) > 0.9
    else:
        assert difference(both["stored"]["ours"], both["rounded"]["ours"]) <= ROUNDING


@pytest.mark.parametrize("kind", OURS)
def test_an_encoded_photo_in_tiles(comfy, common, face_picture, kind):
    """The VAE reads and writes by tiles: what ours does shows as through the whole picture."""
    made = OURS[kind]()
    nodes = common | made.nodes
    nodes["photo"] = node("LoadImage", image=comfy.upload_picture(face_picture))
    tiles = {"tile_size": 64, "overlap": 16, "temporal_size": 64, "temporal_overlap": 8}
    nodes["whole"] = node("VAEEncode", pixels=["photo", 0], vae=VAE)
    nodes["tiled"] = node("VAEEncodeTiled", pixels=["photo", 0], vae=VAE, **tiles)
    for way, placed in (("ours", made.ours), ("base", made.base)):
        for latent in ("whole", "tiled"):
            name = f"{way} {latent}"
            drawing = ksampler(name, placed)
            drawing[f"{name}_latent"]["inputs"] |= {"latent_image": [latent, 0], "denoise": 0.7}
            nodes |= drawing
        for name, side in (("one tile", 512), ("tiles", 64)):
            samples = [f"{way} tiled_latent", 0]
            own = {**tiles, "samples": samples, "vae": VAE, "tile_size": side}
            nodes[f"{way} {name}_decoded"] = node("VAEDecodeTiled", **own)
            nodes[f"{way} {name}"] = node("PreviewImage", images=[f"{way} {name}_decoded", 0])
    pictures = comfy.run(nodes).pictures
    assert difference(pictures["ours one tile"], pictures["ours tiled"]) <= ROUNDING
    effects = {
        name: effect({way: pictures[f"{way} {name}"] for way in ("ours", "base")})
        for name in ("whole", "tiled", "tiles")
    }
    assert max(np.abs(e).max() for e in effects["tiles"]) > VISIBLE
    assert cosine(effects["tiles"], effects["tiled"]) > 0.9
    assert cosine(effects["tiled"], effects["whole"]) > 0.9
