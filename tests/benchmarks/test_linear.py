"""The linear baselines and the arithmetic of whole LoRAs against closed forms."""

import pytest
import torch

from benchmarks.identity.linear import fit_linear, load_linear, save_linear
from benchmarks.identity.rows import mean_of_others, rolled
from difflora_core.lora.layout import LayerShape, LoRALayout
from difflora_core.lora.tokens import TokenGrid
from difflora_core.lora.weights import LoRALayer, LoRAWeights
from difflora_core.vision.features import ImageFeatures

LAYOUT = LoRALayout("toy", 2, (LayerShape("a", 5, 7), LayerShape("b", 6, 4)))


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def loras(count: int, shared: bool) -> LoRAWeights:
    """LoRAs with one `down` for all or one each."""
    layers = {}
    for k, shape in enumerate(LAYOUT):
        down = draw(1 if shared else count, 2, shape.in_features, seed=k).expand(count, -1, -1)
        layers[shape.name] = LoRALayer(down, draw(count, shape.out_features, 2, seed=k + 5), 2.0)
    return LoRAWeights(layers)


def photo(face: torch.Tensor) -> ImageFeatures:
    """Features of one photo whose face tells everything."""
    return ImageFeatures(face[None], torch.tensor([True]), torch.ones(1, 2), torch.zeros(1, 1, 1))


@pytest.fixture(scope="module")
def linear_world():
    """LoRAs of 60 people that are a linear function of their (unit) faces."""
    faces = torch.nn.functional.normalize(draw(70, 3), dim=1)
    grid = TokenGrid(LAYOUT, ("up",))
    tokens = torch.where(
        grid.mask(),
        1
        + (faces @ draw(3, grid.tokens * grid.length, seed=1)).unflatten(
            1, (grid.tokens, grid.length)
        ),
        0.0,
    )
    down = {name: layer.down[0] for name, layer in loras(1, True).layers.items()}
    parts = [grid.decode(tokens[rows], down) for rows in (slice(40), slice(40, 60))]
    photos = [[photo(face), photo(face)] for face in faces]
    linear = fit_linear(tuple(parts), (photos[:40], photos[40:60]), LAYOUT, 5)
    return linear, faces, grid.decode(tokens, down)


def test_a_linear_world_is_learned(linear_world):
    linear, faces, weights = linear_world
    people = [photo(face) for face in faces[60:]]
    predicted = linear.predict(people, LAYOUT)
    for name in weights:
        torch.testing.assert_close(
            predicted[name].delta(), weights[name].delta()[60:], atol=0.1, rtol=0.05
        )


def test_reconstruction_is_exact_inside_the_span(linear_world):
    linear, _, weights = linear_world
    again = linear.reconstruct(weights, LAYOUT)
    for name in weights:
        torch.testing.assert_close(again[name].delta(), weights[name].delta(), atol=1e-4, rtol=1e-4)


def test_file_round_trip(linear_world, tmp_path):
    linear, faces, _ = linear_world
    path = tmp_path / "linear.safetensors"
    save_linear(linear, path, {"people": 40})
    again, facts = load_linear(path)
    assert facts == {"people": 40}
    assert again.size == linear.size
    people = [photo(faces[0])]
    torch.testing.assert_close(
        again.predict(people, LAYOUT)["a"].up,
        linear.predict(people, LAYOUT)["a"].up,
        atol=1e-2,
        rtol=1e-2,
    )


def test_mean_of_others_is_exact_with_and_without_shared_factors():
    for shared in (True, False):
        weights = loras(4, shared)
        mean = mean_of_others(weights)
        for name in weights:
            delta = weights[name].delta()
            wanted = torch.stack([delta[[k for k in range(4) if k != i]].mean(0) for i in range(4)])
            torch.testing.assert_close(mean[name].delta(), wanted)


def test_rolled_gives_everybody_somebody_elses():
    weights = loras(3, shared=False)
    torch.testing.assert_close(rolled(weights)["a"].up, weights["a"].up[[1, 2, 0]])
