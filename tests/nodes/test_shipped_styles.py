"""The styles that ship, in real ComfyUI: every prompt gets their look, and the picture stays."""

import numpy as np
import pytest
import torch

from difflora_core.demo.world.art_styles import LUMA
from difflora_core.demo.world.shipped_styles import SHIPPED

SCENES = (
    "photo of a person, smiling, green background, red shirt",
    "photo of a person, surprised, yellow background, purple shirt",
)


def node(class_type, **inputs):
    return {"class_type": class_type, "inputs": inputs}


@pytest.fixture(scope="module")
def draw(comfy, is_shipped):
    """Pictures of both scenes, with a shipped style at a strength."""
    if not is_shipped:
        pytest.skip("the demo world is not complete")

    def run(name="", strength=0.0):
        nodes = {"demo": node("DiffLoRA_LoadDemo")}
        model = ["demo", 0]
        if name:
            nodes["style"] = node("DiffLoRA_LoadStyle", style_name=f"{name}.safetensors")
            nodes["on"] = node(
                "DiffLoRA_ApplyStyle", model=model, style=["style", 0], strength=strength,
                start_percent=0.0, end_percent=1.0, positive_only=False, input_blocks=1.0,
                middle_block=1.0, output_blocks=1.0, self_attention=1.0, cross_attention=1.0,
            )  # fmt: skip
            model = ["on", 0]
        nodes |= {
            "none": node("CLIPTextEncode", clip=["demo", 1], text=""),
            "empty": node("EmptyLatentImage", width=64, height=64, batch_size=4),
        }
        for k, scene in enumerate(SCENES):
            nodes |= {
                f"prompt {k}": node("CLIPTextEncode", clip=["demo", 1], text=scene),
                f"sampler {k}": node(
                    "KSampler", model=model, positive=[f"prompt {k}", 0], negative=["none", 0],
                    latent_image=["empty", 0], seed=5, steps=10, cfg=2.0, sampler_name="euler",
                    scheduler="normal", denoise=1.0,
                ),
                f"decoder {k}": node("VAEDecode", samples=[f"sampler {k}", 0], vae=["demo", 2]),
                f"show {k}": node("PreviewImage", images=[f"decoder {k}", 0]),
            }  # fmt: skip
        shown = comfy.run(nodes).pictures
        pictures = [p[..., :3] for k in range(len(SCENES)) for p in shown[f"show {k}"]]
        return torch.from_numpy(np.stack(pictures)).float() / 255

    return run


def off_hue(pictures, look):
    """Mean distance of colours (B, H, W, 3) from the line of a look's hue."""
    dark, light = look(torch.zeros(1, 8, 8, 3))[0, 4, 4], look(torch.ones(1, 8, 8, 3))[0, 4, 4]
    along = torch.nn.functional.normalize(light - dark, dim=0)
    rest = pictures - dark
    return float((rest - (rest @ along)[..., None] * along).norm(dim=-1).mean())


@pytest.mark.parametrize("name", list(SHIPPED))
def test_a_shipped_style_gives_its_look_to_every_prompt(draw, name):
    plain, off, on = draw(), draw(name, 0.0), draw(name, 1.0)
    assert torch.equal(off, plain)
    assert off_hue(on, SHIPPED[name]) < 0.5 * off_hue(plain, SHIPPED[name])
    half = draw(name, 0.5)
    assert off_hue(on, SHIPPED[name]) < off_hue(half, SHIPPED[name]) < off_hue(plain, SHIPPED[name])
    tones = [p @ torch.tensor(LUMA) for p in (plain, on)]
    for before, after in zip(*tones, strict=True):  # who is on it and how stays
        assert float(torch.corrcoef(torch.stack([before.flatten(), after.flatten()]))[0, 1]) > 0.4
