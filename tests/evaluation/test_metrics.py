"""Metrics on cases with known answers."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from difflora_core.errors import ConfigError
from difflora_core.evaluation import metrics
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


@given(st.integers(0, 1000))
def test_face_similarity_ignores_lengths(seed):
    pictures, people = draw(6, 5, seed=seed), draw(6, 5, seed=seed + 1)
    plain = metrics.face_similarity(pictures, people)
    scaled = metrics.face_similarity(pictures * 3.5, people * 0.2)
    torch.testing.assert_close(plain, scaled)
    assert float(plain.abs().max()) <= 1 + 1e-12


def test_copy_paste_is_a_share_of_the_angle_between_photos():
    """Against float64 numbers by numpy's arctan2, over several references and other photos."""
    generator = torch.Generator().manual_seed(0)
    pictures, references, others = (
        torch.randn(n, 8, generator=generator, dtype=torch.float64) for n in (5, 2, 3)
    )

    def angle(a, b):
        a, b = a / np.linalg.norm(a), b / np.linalg.norm(b)
        return 2 * np.arctan2(np.linalg.norm(a - b), np.linalg.norm(a + b))

    def mean(one, other):
        return np.mean([angle(a, b) for a in one.numpy() for b in other.numpy()])

    wanted = [
        (mean(p[None], others) - mean(p[None], references)) / mean(references, others)
        for p in pictures
    ]
    found = metrics.copy_paste(pictures, references[None], others[None])
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-9)
    people = metrics.copy_paste(
        pictures[None] * 3, references[None, None], others[None, None] * 0.1
    )
    torch.testing.assert_close(people, found[None])


def test_a_missing_face_counts_as_zero():
    faces = draw(2, 4)
    found = torch.tensor([True, False])
    assert metrics.face_similarity(faces, faces, found).tolist() == pytest.approx([1.0, 0.0])


def test_centroid_gives_every_picture_the_same_say():
    embeddings = torch.tensor([[10.0, 0.0], [0.0, 0.1]])
    torch.testing.assert_close(metrics.centroid(embeddings), torch.full((2,), math.sqrt(0.5)))


def test_recognition_and_parameters():
    centroids = torch.eye(3)
    pictures = torch.tensor([[1.0, 0.2, 0.0], [0.9, 0.1, 0.3]])
    assert metrics.recognition_rate(pictures, centroids, torch.tensor([0, 2])).tolist() == [1, 0]
    error = metrics.parameter_error(torch.tensor([[0.0, 1.0]]), torch.tensor([0.5, -1.0]))
    assert error.tolist() == [1.25]
    with pytest.raises(ConfigError, match="one recogniser"):
        metrics.face_similarity(torch.ones(2, 3), torch.ones(2, 4))


def test_agreement_counts_only_what_is_named():
    read = {"look": ["photo", "cartoon"], "item": ["hat", "cup"]}
    asked = [{"look": "photo", "item": "cup"}, {"look": "cartoon"}]
    assert metrics.attribute_agreement(read, asked).tolist() == [0.5, 1.0]
    with pytest.raises(ConfigError, match="shirt"):
        metrics.attribute_agreement(read, [{"shirt": "red"}, {}])


def test_seed_diversity():
    black, white = torch.zeros(1, 2, 2, 3), torch.ones(1, 2, 2, 3)
    assert float(metrics.seed_diversity(torch.cat([black, white]))) == 1.0
    assert float(metrics.seed_diversity(torch.cat([black, white, black]))) == (pytest.approx(2 / 3))
    assert float(metrics.seed_diversity(torch.cat([white, white]))) == 0.0
    with pytest.raises(ConfigError, match="two seeds"):
        metrics.seed_diversity(white)


def test_reconstruction_by_known_changes():
    """Half of a LoRA misses half of it, points the same way, and misses a quarter squared."""
    whole = lora(3, 1)
    exact = metrics.reconstruction(whole, whole)
    assert float(exact["relative_error"].max()) < 1e-7
    half = metrics.reconstruction(whole.scaled(0.5), whole)
    assert half["relative_error"].tolist() == pytest.approx([0.5] * 3)
    assert half["cosine"].tolist() == pytest.approx([1.0] * 3)
    assert half["spectral_error"].tolist() == pytest.approx([0.25] * 3)
