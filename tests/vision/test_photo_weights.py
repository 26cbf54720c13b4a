"""How much each photo counts: read from a text, and exact in a model's mean."""

import pytest
import torch

from difflora_core.errors import ConfigError
from difflora_core.vision.features import ImageFeatures
from difflora_core.vision.photo_weights import read_weights, weighted


def photos(count):
    generator = torch.Generator().manual_seed(count)
    face, image = (torch.randn(count, 4, generator=generator) for _ in range(2))
    tokens = torch.randn(count, 2, 3, generator=generator)
    return ImageFeatures(face, torch.ones(count, dtype=torch.bool), image, tokens, "crop", "r.onnx")


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("", ()), ("  \n", ()), ("1, 0.5,2", (1, 0.5, 2)), ("1 0\n3", (1, 0, 3)), ("1;2", (1, 2)),
        ("1,5; 2", (1.5, 2)), ("0,5;1,25 ;", (0.5, 1.25)), ("1, 0.5; 2", (1, 0.5, 2)),
        ("1,5", (1, 5)),
    ],
)  # fmt: skip
def test_texts(text, numbers):
    assert read_weights(text) == numbers


@pytest.mark.parametrize("text", ["a", "1, -1", "nan", "inf", "1e9", "1,5x"])
def test_texts_that_are_no_weights(text):
    with pytest.raises(ConfigError, match="no number from 0 to 1000"):
        read_weights(text)


@pytest.mark.parametrize(
    "weights", [(1, 1, 1), (1, 0.5, 0.25), (4, 0, 1), (1, 0.05, 0), (7, 3.5, 1.75)]
)
def test_means_are_weighted(weights):
    features = photos(3)
    got = weighted(features, weights)
    shares = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    for name in ("face", "image", "image_tokens"):
        values = getattr(features, name).double()
        wanted = (values.movedim(0, -1) * shares).sum(-1)
        torch.testing.assert_close(getattr(got, name).double().mean(0), wanted)
    assert got.recogniser == "r.onnx"


def test_equal_weights_are_the_photos_themselves():
    features = photos(3)
    for weights in ((), (2, 2, 2)):
        assert torch.equal(weighted(features, weights).face, features.face)


def test_a_weight_above_nothing_counts_a_little():
    assert len(weighted(photos(2), (1000, 0.001))) == 21


@pytest.mark.parametrize(
    ("weights", "message"),
    [((1, 2), "2 photo weights for 3 photos"), ((0, 0, 0), "nobody is left")],
)
def test_weights_that_do_not_fit(weights, message):
    with pytest.raises(ConfigError, match=message):
        weighted(photos(3), weights)
