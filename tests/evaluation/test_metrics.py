"""Metrics on cases with known answers."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from difflora_core.errors import ConfigError
from difflora_core.evaluation import (
    distribution,
    identity,
    image_alignment,
    text_alignment,
    weight_space,
)
from difflora_core.lora.weights import LoRALayer, LoRAWeights


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    """Float64 normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def lora(count: int, seed: int) -> LoRAWeights:
    """A batch of float64 LoRAs with two layers of different shapes."""
    shapes = {"a": (5, 7), "b": (6, 4)}
    return LoRAWeights(
        {
            name: LoRALayer(
                draw(count, 2, width, seed=seed + k), draw(count, height, 2, seed=seed + k + 9), 3.0
            )
            for k, (name, (width, height)) in enumerate(shapes.items())
        }
    )


def test_frechet_distance_of_equal_sets_is_zero():
    features = draw(400, 8)
    assert distribution.frechet_distance(features, features) == pytest.approx(0, abs=1e-6)


def test_frechet_distance_of_shifted_and_scaled_gaussians():
    """Closed form |m|^2 + tr(A + B - 2 sqrt(AB)), exact because the second set is computed."""
    features = draw(500, 6)
    shift = torch.arange(6, dtype=torch.float64) / 3
    assert distribution.frechet_distance(features, features + shift) == pytest.approx(
        float(shift.square().sum()), rel=1e-6
    )
    spread = float(features.var(0).sum())  # tr(C + 4 C - 2 * 2 C) = tr C
    mean = float(features.mean(0).square().sum())
    assert distribution.frechet_distance(features, 2 * features) == pytest.approx(
        spread + mean, rel=1e-6
    )


def test_kernel_distance_is_unbiased_and_sees_a_shift():
    first, second = draw(300, 6, seed=1), draw(300, 6, seed=2)
    mean, deviation = distribution.kernel_distance(first, second, subset_size=100, subsets=30)
    assert abs(mean) < 3 * deviation
    shifted, _ = distribution.kernel_distance(first, second + 0.5, subset_size=100, subsets=30)
    assert shifted > mean + 3 * deviation
    assert distribution.kernel_distance(first, second)[0] == pytest.approx(
        distribution.kernel_distance(first, second)[0]
    )


def test_kernel_distance_equals_the_written_out_formula():
    x, y = draw(5, 3, seed=3), draw(5, 3, seed=4)
    kernel = lambda a, b: (a @ b.T / 3 + 1) ** 3  # noqa: E731
    off = 1 - torch.eye(5, dtype=torch.float64)
    wanted = (kernel(x, x) * off).sum() / 20 + (kernel(y, y) * off).sum() / 20
    wanted = wanted - 2 * kernel(x, y).mean()
    got, deviation = distribution.kernel_distance(x, y, subsets=3)
    assert got == pytest.approx(float(wanted))
    assert deviation == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("shapes", [((1, 3), (9, 3)), ((9, 3), (9, 4)), ((9,), (9,))])
def test_sets_that_cannot_be_compared(shapes):
    with pytest.raises(ConfigError, match="two pictures"):
        distribution.frechet_distance(draw(*shapes[0]), draw(*shapes[1]))


@given(st.integers(0, 1000))
def test_face_similarity_ignores_lengths(seed):
    pictures, people = draw(6, 5, seed=seed), draw(6, 5, seed=seed + 1)
    plain = identity.face_similarity(pictures, people)
    scaled = identity.face_similarity(pictures * 3.5, people * 0.2)
    torch.testing.assert_close(plain, scaled)
    assert float(plain.abs().max()) <= 1 + 1e-12


def test_a_missing_face_counts_as_zero():
    faces = draw(2, 4)
    found = torch.tensor([True, False])
    assert identity.face_similarity(faces, faces, found).tolist() == pytest.approx([1.0, 0.0])


def test_centroid_gives_every_picture_the_same_say():
    embeddings = torch.tensor([[10.0, 0.0], [0.0, 0.1]])
    torch.testing.assert_close(identity.centroid(embeddings), torch.full((2,), math.sqrt(0.5)))


def test_recognition_and_parameters():
    centroids = torch.eye(3)
    pictures = torch.tensor([[1.0, 0.2, 0.0], [0.9, 0.1, 0.3]])
    assert identity.recognition_rate(pictures, centroids, torch.tensor([0, 2])).tolist() == [1, 0]
    error = identity.parameter_error(torch.tensor([[0.0, 1.0]]), torch.tensor([0.5, -1.0]))
    assert error.tolist() == [1.25]
    with pytest.raises(ConfigError, match="one recogniser"):
        identity.face_similarity(torch.ones(2, 3), torch.ones(2, 4))


def test_agreement_counts_only_what_is_named():
    read = {"look": ["photo", "cartoon"], "item": ["hat", "cup"]}
    asked = [{"look": "photo", "item": "cup"}, {"look": "cartoon"}]
    assert text_alignment.attribute_agreement(read, asked).tolist() == [0.5, 1.0]
    with pytest.raises(ConfigError, match="shirt"):
        text_alignment.attribute_agreement(read, [{"shirt": "red"}, {}])


def test_clip_scores():
    image, text = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[3.0, 4.0], [-1.0, 0.0]])
    assert text_alignment.clip_text_similarity(image, text).tolist() == pytest.approx([0.6, -1.0])
    assert text_alignment.clip_score(image, text).tolist() == pytest.approx([1.5, 0.0])


def test_image_similarity_against_loops():
    generated, real = draw(4, 6, seed=5), draw(3, 6, seed=6)
    wanted = [sum(float(torch.cosine_similarity(g, r, dim=0)) for r in real) / 3 for g in generated]
    assert image_alignment.image_similarity(generated, real).tolist() == pytest.approx(wanted)
    assert image_alignment.mapped_to_unit(torch.tensor(0.25)).item() == 0.625
    with pytest.raises(ConfigError, match="one network"):
        image_alignment.image_similarity(generated, draw(3, 5))


def test_seed_diversity():
    black, white = torch.zeros(1, 2, 2, 3), torch.ones(1, 2, 2, 3)
    assert float(image_alignment.seed_diversity(torch.cat([black, white]))) == 1.0
    assert float(image_alignment.seed_diversity(torch.cat([black, white, black]))) == (
        pytest.approx(2 / 3)
    )
    assert float(image_alignment.seed_diversity(torch.cat([white, white]))) == 0.0
    with pytest.raises(ConfigError, match="two seeds"):
        image_alignment.seed_diversity(white)


def test_weight_space_against_full_deltas():
    first, second = lora(3, 1), lora(4, 50)

    def flat(weights: LoRAWeights) -> torch.Tensor:
        return torch.cat([layer.delta().flatten(1) for layer in weights.layers.values()], 1)

    wanted = torch.nn.functional.normalize(flat(first), dim=1)
    wanted = wanted @ torch.nn.functional.normalize(flat(second), dim=1).T
    torch.testing.assert_close(weight_space.pairwise_cosines(first, second), wanted)
    assert weight_space.retrieval_rate(first, first) == 1.0
    same = LoRAWeights.stack([first.batch_item(0)] * 3)
    assert float(weight_space.diversity(same)) == pytest.approx(0, abs=1e-12)
    assert float(weight_space.diversity(first)) > 0.3
    exact = weight_space.reconstruction(first, first)
    assert float(exact["relative_error"].max()) < 1e-7
    half = weight_space.reconstruction(first.scaled(0.5), first)
    assert half["relative_error"].tolist() == pytest.approx([0.5] * 3)
    assert half["cosine"].tolist() == pytest.approx([1.0] * 3)
    assert half["spectral_error"].tolist() == pytest.approx([0.25] * 3)
    with pytest.raises(ConfigError, match="two of them"):
        weight_space.diversity(LoRAWeights.stack([first.batch_item(0)]))
