"""The linear baselines against closed forms, and their file."""

import torch

from benchmarks.linear import (
    fit_linear,
    load_linear,
    save_linear,
    up_vectors,
    with_up_vectors,
)
from benchmarks.rows import mean_of_others, rolled
from difflora_core.lora.weights import LoRALayer, LoRAWeights


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def loras(count: int, shared: bool) -> LoRAWeights:
    """LoRAs of two layers, with one `down` for all or one each."""
    layers = {}
    for k, (name, width, height) in enumerate((("a", 5, 7), ("b", 6, 4))):
        down = draw(1 if shared else count, 2, width, seed=k).expand(count, -1, -1)
        layers[name] = LoRALayer(down, draw(count, height, 2, seed=k + 5), 3.0)
    return LoRAWeights(layers)


def test_a_linear_world_is_learned_exactly():
    """LoRAs that are a linear function of the features are predicted, also of new people."""
    features, mixing = draw(60, 2, 4), draw(4, 30, seed=1)
    features[:, 1] = features[:, 0]
    vectors = 2 + features[:, 0] @ mixing
    linear = fit_linear(vectors, features, 8)
    new = draw(5, 4, seed=2)
    torch.testing.assert_close(linear.predict(new), 2 + new @ mixing, atol=2e-2, rtol=1e-2)
    torch.testing.assert_close(linear.project(vectors), vectors, atol=1e-3, rtol=1e-3)


def test_useless_features_give_about_the_mean():
    vectors = draw(80, 20)
    linear = fit_linear(vectors, draw(80, 1, 50, seed=3), 10)
    predicted = linear.predict(draw(9, 50, seed=4))
    assert float((predicted - linear.mean).square().mean()) < 0.1


def test_file_round_trip(tmp_path):
    linear = fit_linear(draw(12, 20), draw(12, 2, 6, seed=1), 5)
    path = tmp_path / "linear.safetensors"
    save_linear(linear, path, {"people": 12})
    again, facts = load_linear(path)
    assert facts == {"people": 12}
    torch.testing.assert_close(
        again.predict(draw(2, 6)), linear.predict(draw(2, 6)), atol=1e-2, rtol=1e-2
    )


def test_up_vectors_are_inverse():
    weights = loras(3, shared=True)
    again = with_up_vectors(up_vectors(weights), weights)
    for name in weights:
        torch.testing.assert_close(again[name].delta(), weights[name].delta())


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
