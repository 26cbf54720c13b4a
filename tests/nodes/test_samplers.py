"""Everything that we put on a model under the samplers, schedulers and patches of core.

What core can do in another way, by hooks that patch weights, has to give the same picture; a
concept has no such way, and has to show.
"""

from functools import partial

import pytest

from tests.nodes.placed import OURS, Placed, common_nodes, ksampler
from tests.nodes.sampler_graphs import ROUNDING, VAE, VISIBLE, difference, node, shown

KINDS = ("LoRA, timed", "LoRA to Hook", "concept", "style of PaRa")


def by_sampler(sampler, scheduler, name, placed):
    return ksampler(name, placed, sampler_name=sampler, scheduler=scheduler)


def in_two_halves(name, placed):
    """The same steps by two samplers, the second without noise of its own."""
    own = {
        "model": list(placed.model), "positive": list(placed.positive),
        "negative": list(placed.negative), "noise_seed": 3, "steps": 4, "cfg": 2.0,
        "sampler_name": "euler", "scheduler": "karras",
    }  # fmt: skip
    nodes, latent = shown(name, [f"{name}_2", 0]), ["empty", 0]
    halves = (("enable", 0, 2, "enable"), ("disable", 2, 10_000, "disable"))
    for number, (noise, start, end, rest) in enumerate(halves, 1):
        nodes[f"{name}_{number}"] = node(
            "KSamplerAdvanced", **own, latent_image=latent, add_noise=noise, start_at_step=start,
            end_at_step=end, return_with_leftover_noise=rest,
        )  # fmt: skip
        latent = [f"{name}_1", 0]
    return nodes


def patched(class_type, settings, name, placed):
    nodes = {f"{name}_m": node(class_type, model=list(placed.model), **settings)}
    return nodes | ksampler(name, Placed((f"{name}_m", 0), placed.positive, placed.negative))


def inpainted(name, placed):
    """The middle of a picture, in a mask, by Differential Diffusion."""
    conds = f"{name}_conds"
    nodes = {
        "old": node("EmptyImage", width=64, height=64, batch_size=1, color=0x808040),
        "black": node("SolidMask", value=0.0, width=64, height=64),
        "white": node("SolidMask", value=1.0, width=32, height=64),
        "stripe": node(
            "MaskComposite", destination=["black", 0], source=["white", 0], x=16, y=0,
            operation="add",
        ),
        conds: node(
            "InpaintModelConditioning", positive=list(placed.positive),
            negative=list(placed.negative), vae=VAE, pixels=["old", 0], mask=["stripe", 0],
            noise_mask=True,
        ),
    }  # fmt: skip
    soft = patched("DifferentialDiffusion", {}, name, Placed(placed.model, (conds, 0), (conds, 1)))
    soft[f"{name}_latent"]["inputs"] |= {"latent_image": [conds, 2]}
    return nodes | soft


SAMPLERS = {
    "dpmpp_2m_sde": "beta", "euler_ancestral": "karras", "uni_pc": "sgm_uniform", "lcm": "simple",
    "ddim": "ddim_uniform", "heunpp2": "exponential", "res_multistep": "kl_optimal",
    "sa_solver": "normal", "dpm_adaptive": "karras",
}  # fmt: skip
SHRUNK = {
    "block_number": 3, "downscale_factor": 2.0, "start_percent": 0.0, "end_percent": 0.35,
    "downscale_after_skip": True, "downscale_method": "bicubic", "upscale_method": "bicubic",
}  # fmt: skip
GRAPHS = {
    **{sampler: partial(by_sampler, sampler, scheduler) for sampler, scheduler in SAMPLERS.items()},
    "two halves": in_two_halves,
    "inpainted": inpainted,
    "RescaleCFG": partial(patched, "RescaleCFG", {"multiplier": 0.7}),
    "Mahiro": partial(patched, "Mahiro", {}),
    "CFGZeroStar": partial(patched, "CFGZeroStar", {}),
    "zero SNR": partial(
        patched, "ModelSamplingDiscrete", {"sampling": "v_prediction", "zsnr": True}
    ),
    "deep shrink": partial(patched, "PatchModelAddDownscale", SHRUNK),
}
QUICK = {("dpmpp_2m_sde", "LoRA, timed"), ("two halves", "LoRA, timed"), ("inpainted", "concept")}
CASES = [
    pytest.param(graph, kind, marks=[] if (graph, kind) in QUICK else pytest.mark.slow)
    for graph in GRAPHS
    for kind in KINDS
]


@pytest.fixture(scope="module")
def common(comfy, comfy_server, is_shipped):
    """What every graph needs."""
    if not is_shipped:
        pytest.skip("the demo world is not complete")
    return common_nodes(comfy, comfy_server)


@pytest.mark.parametrize(("graph", "kind"), CASES)
def test_each_under_every_sampler(comfy, common, graph, kind):
    made = OURS[kind]()
    nodes = common | made.nodes
    ways = {"ours": made.ours, "base": made.base, "cores": made.cores}
    for way, placed in ways.items():
        if placed is not None:
            nodes |= GRAPHS[graph](way, placed)
    pictures = comfy.run(nodes).pictures
    assert difference(pictures["ours"], pictures["base"]) > VISIBLE
    if made.cores is not None:
        assert difference(pictures["ours"], pictures["cores"]) <= ROUNDING
