"""The demo ControlNet in ComfyUI: core's own loader reads it, and it computes what was trained."""

import shutil

import numpy as np
import pytest
import torch

from difflora_core.base_model.protocol import TextCondition
from difflora_core.demo.build.controlnet import load_controlnet
from difflora_core.demo.networks.base import load_base
from difflora_core.vision.keypoint_picture import keypoint_picture

PROMPT = "photo of a person, smiling, blue background, red shirt"
FACE = torch.tensor([[28.0, 26.0], [42.0, 22.0], [37.0, 34.0], [33.0, 42.0], [44.0, 39.0]])


def test_comfyui_computes_what_was_trained(demo_world, node_module):
    import comfy.controlnet
    import comfy.model_management

    demo = node_module("host.demo")
    patcher = demo.load_demo_unet(demo_world / "base.safetensors")
    comfy.model_management.load_models_gpu([patcher])
    model, base = patcher.model, load_base(demo_world / "base.safetensors")
    generator = torch.Generator().manual_seed(1)
    noisy = torch.randn(2, 8, 16, 16, generator=generator)
    text = TextCondition(
        torch.randn(2, 77, 128, generator=generator), torch.randn(2, 64, generator=generator)
    )
    step = torch.tensor([600, 600])
    hint = keypoint_picture(FACE[None], 64, 64).permute(2, 0, 1)[None]
    control = demo.load_demo_controlnet(demo_world / "controlnet.safetensors")
    assert isinstance(control, comfy.controlnet.ControlLora)
    control.set_cond_hint(hint, 1.0, (0.0, 1.0))
    sampling = model.model_sampling
    sigma = sampling.sigma(step.float())
    with torch.no_grad():
        reference = load_controlnet(demo_world / "controlnet.safetensors", base)
        big = torch.nn.functional.interpolate(hint, scale_factor=2, mode="nearest")
        skips, middle = reference(noisy, step, text, big.expand(2, -1, -1, -1))
        label = model.encode_adm(
            device=noisy.device, pooled_output=text.pooled, width=128, height=128
        )
        control.pre_run(model, sampling.percent_to_sigma)
        scaled = noisy * (sigma[:, None, None, None] ** 2 + 1).sqrt()
        found = control.get_control(scaled, sigma, {"c_crossattn": text.context, "y": label}, 1, {})
    for mine, theirs in zip([*skips, middle], [*found["output"], *found["middle"]], strict=True):
        torch.testing.assert_close(theirs.float(), mine, atol=2e-3, rtol=2e-3)
        assert mine.abs().max() > 0


def node(class_type, **inputs):
    return {"class_type": class_type, "inputs": inputs}


def drawing(points, source, strength):
    """Draws one seed: steered by the demo's ControlNet or a file of it; not at all at None."""
    wanted = ["text", "empty"] if strength is None else ["steer", "steer"]
    nodes = {
        "demo": node("DiffLoRA_LoadDemo"),
        "points": node("LoadImage", image=points),
        "text": node("CLIPTextEncode", clip=["demo", 1], text=PROMPT),
        "empty": node("CLIPTextEncode", clip=["demo", 1], text=""),
        "canvas": node("EmptyLatentImage", width=64, height=64, batch_size=1),
        "draw": node(
            "KSampler", model=["demo", 0], positive=[wanted[0], 0],
            negative=[wanted[1], 0 if strength is None else 1], latent_image=["canvas", 0],
            seed=3, steps=8, cfg=2.0, sampler_name="euler", scheduler="normal", denoise=1.0,
        ),
        "decode": node("VAEDecode", samples=["draw", 0], vae=["demo", 2]),
        "show": node("PreviewImage", images=["decode", 0]),
    }  # fmt: skip
    if source:
        nodes["loader"] = node("ControlNetLoader", control_net_name=source)
    if strength is not None:
        nodes["steer"] = node(
            "ControlNetApplyAdvanced", positive=["text", 0], negative=["empty", 0],
            control_net=["loader", 0] if source else ["demo", 6], image=["points", 0],
            strength=strength, start_percent=0.0, end_percent=1.0,
        )  # fmt: skip
    return nodes


@pytest.fixture(scope="module")
def pictures(comfy, comfy_server, demo_world, tmp_path_factory):
    """The same seed: without, at strength 0, with the demo's output and with core's loader."""
    from PIL import Image

    folder = comfy_server.base_directory / "models" / "controlnet"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(demo_world / "controlnet.safetensors", folder / "demo_points.safetensors")
    path = tmp_path_factory.mktemp("points") / "points.png"
    drawn = (keypoint_picture(FACE[None], 64, 64) * 255).round().byte().numpy()
    Image.fromarray(drawn).save(path)
    points = comfy.upload_picture(path)

    def run(source, strength):
        return comfy.run(drawing(points, source, strength)).picture("show").astype(int)

    return {
        "without": run("", None),
        "off": run("", 0.0),
        "demo": run("", 1.0),
        "core": run("demo_points.safetensors", 1.0),
    }


def test_core_loader_reads_the_same_controlnet(pictures):
    np.testing.assert_array_equal(pictures["core"], pictures["demo"])
    assert np.abs(pictures["demo"] - pictures["without"]).mean() > 2


def test_strength_zero_is_no_controlnet(pictures):
    np.testing.assert_array_equal(pictures["off"], pictures["without"])


def test_face_is_where_it_was_asked_for(pictures, is_shipped):
    if not is_shipped:
        pytest.skip("the shipped demo world is not trained yet (make demo-world)")
    from difflora_core.demo import paths
    from difflora_core.vision.face_encoder import InsightFaceEncoder

    faces = InsightFaceEncoder(paths.FACES)

    def error(picture):
        found = faces.detect(torch.from_numpy(picture).float() / 255)
        return float((found[0].keypoints - FACE).norm(dim=1).mean())

    assert error(pictures["demo"]) < 0.6 * error(pictures["without"])
