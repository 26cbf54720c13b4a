import pytest
import torch

from difflora_core.errors import EncoderError
from difflora_core.vision.image_encoder import ClipImageEncoder, describe_encoder


def test_shapes_follow_the_config(image_encoder):
    image, tokens = image_encoder.encode(torch.rand(3, 50, 40, 3))
    assert image_encoder.image_size == 32
    assert image.shape == (3, 24)
    assert tokens.shape == (3, 17, 32)
    assert image.dtype == tokens.dtype == torch.float32
    assert not image.requires_grad


def test_batch_equals_one_by_one(image_encoder):
    pictures = torch.rand(3, 32, 32, 3)
    image, tokens = image_encoder.encode(pictures)
    for i, picture in enumerate(pictures):
        one, one_tokens = image_encoder.encode(picture[None])
        torch.testing.assert_close(one[0], image[i], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(one_tokens[0], tokens[i], atol=1e-5, rtol=1e-4)


def test_other_models_are_refused():
    with pytest.raises(EncoderError, match="Linear is not a CLIP vision"):
        ClipImageEncoder(torch.nn.Linear(2, 2))


def test_encoders_are_named():
    assert describe_encoder(1024, 257, 1280) == "CLIP ViT-H/14 (1024; 257 x 1280)"
    assert describe_encoder(24, 17, 32) == "a CLIP vision (24; 17 x 32)"
