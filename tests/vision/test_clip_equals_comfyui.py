"""Our CLIP vision path against the real ComfyUI: same pixels, same numbers."""

import pytest
import torch

from difflora_core.vision.preprocess import clip_pixels

SIZES = [(224, 224), (100, 37), (31, 64), (300, 451), (32, 32), (1, 1)]


@pytest.mark.comfy
def test_pixels_embeddings_and_tokens_equal_comfyui(comfyui, image_encoder):
    from comfy.clip_vision import ClipVisionModel, clip_preprocess

    vision = ClipVisionModel(image_encoder.model.config.to_dict())
    weights = image_encoder.model.state_dict()
    missing, _ = vision.load_sd({name: value.clone() for name, value in weights.items()})
    assert not missing
    generator = torch.Generator().manual_seed(5)
    for size in SIZES:
        picture = torch.rand(1, *size, 3, generator=generator)
        assert torch.equal(clip_pixels(picture, 32), clip_preprocess(picture, size=32))
        theirs = vision.encode_image(picture)
        image, tokens = image_encoder.encode(picture)
        torch.testing.assert_close(image, theirs["image_embeds"], atol=2e-5, rtol=1e-4)
        states = theirs["penultimate_hidden_states"]
        torch.testing.assert_close(tokens, states, atol=2e-5, rtol=1e-4)
