"""Perceptrons of people and their LoRAs: against torch's own layers, and shares by hand."""

import pytest
import torch
from torch import nn

from benchmarks.identity import toy


def faces(count=40):
    """People whose colours are one random direction each, and features that say which."""
    generator = torch.Generator().manual_seed(1)
    places, features = toy.waves(8), torch.randn(count, 3, generator=generator)
    colours = 0.5 + 0.05 * features @ torch.randn(3, 3, generator=generator)
    return toy.Faces(colours[:, None].expand(-1, 64, -1), places, features)


def test_a_perceptron_is_linear_layers_and_relu():
    weights = toy.network(3, 5, alike=False)
    places = toy.waves(8)
    for bias in weights[1::2]:
        bias.normal_(generator=torch.Generator().manual_seed(2))
    made = toy.perceptron(weights, places)
    for person in range(3):
        h = places
        for k in range(0, len(weights), 2):
            layer = nn.Linear(*weights[k].shape[:0:-1])
            layer.weight.data, layer.bias.data = weights[k][person], weights[k + 1][person]
            h = layer(h if k == 0 else h.relu())
        torch.testing.assert_close(made[person], h)
    assert not torch.equal(weights[0][0], weights[0][1])


def test_a_lora_starts_at_the_mean_and_adds_its_product():
    mean = toy.network(1, 3, alike=True)
    _, _, _, lora, shared = toy.kinds(mean, 4, 0)
    places = toy.waves(8)
    torch.testing.assert_close(
        lora.draw(lora.start, places), toy.perceptron(mean, places).expand(4, -1, -1)
    )
    factors = [part + 0.1 for part in lora.start]
    whole = [part.expand(4, *part.shape[1:]).clone() for part in mean]
    for k in range(0, len(mean), 2):
        whole[k] += torch.einsum("nor,nri->noi", factors[k + 1], factors[k])
    torch.testing.assert_close(lora.draw(factors, places), toy.perceptron(whole, places))
    assert lora.numbers() == sum(toy.RANK * sum(part.shape[1:]) for part in mean[::2])
    assert shared.numbers() == sum(toy.RANK * part.shape[1] for part in mean[::2])


def test_what_is_linear_in_the_features_is_predicted_and_what_is_random_is_not():
    """People differ in three numbers: shared weights carry them, starts of their own bury them."""
    known = faces()
    mean = toy.mean_network(known, 150, 0)
    before = toy.errors(toy.perceptron, mean, known)
    rows = {}
    for kind in toy.kinds(mean, 40, 0):
        made = toy.judge(kind, toy.learn(kind, known, 150, 0), known, 3)
        assert made["error"].mean() < before.mean() / 5
        rows[kind.name] = toy.columns([made | {"before": before, "numbers": torch.tensor(1.0)}])
    assert rows["LoRA, one down for all"]["predicted"] > 0.7
    assert rows["LoRA, one down for all"]["compressed"] > 0.7
    assert rows["perceptron, a start for each"]["compressed"] < 0
    assert rows["perceptron, a start for each"]["variation"] < 0.1


def test_shares_by_hand():
    seed = {
        "before": torch.tensor([1.0, 3.0]),
        "error": torch.tensor([0.5, 1.5]),
        "compressed": torch.tensor([0.6, 2.0]),
        "predicted": torch.tensor([1.0, 3.0]),
        "variation": torch.tensor(0.25),
        "numbers": torch.tensor(7.0),
    }
    row = toy.columns([seed, seed])
    assert row["compressed"] == pytest.approx((0.4 + 1.0) / 2 / 1.0)
    assert row["predicted"] == 0
    assert (row["error"], row["numbers"]) == (1.0, 7.0)
    assert row["compressed_low"] == pytest.approx(0.4)
    assert row["compressed_high"] == pytest.approx(1.0)
