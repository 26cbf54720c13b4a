"""Spread between seeds: the arithmetic by hand, and rows on a tiny random world."""

import math

import pytest
import torch
from scipy.stats import ttest_1samp

from benchmarks.identity import dreambooth, seeds
from benchmarks.identity.drawing import Plan
from benchmarks.identity.experiment import Experiment, Trial
from benchmarks.identity.rows import HEADLINE
from benchmarks.prompts import QUICK


def trials(values: list[list[float]]) -> list[Trial]:
    return [
        Trial("row", 1.0, {judge: torch.tensor(people) for judge in seeds.JUDGES}, {})
        for people in values
    ]


def test_interval_is_students():
    values = torch.tensor([0.1, 0.25, 0.3, 0.12], dtype=torch.float64)
    expected = ttest_1samp(values.numpy(), 0.0).confidence_interval(0.95)
    assert seeds.interval(values) == pytest.approx((0.1925, expected.low, expected.high))
    assert math.isnan(seeds.interval(values[:1])[1])


def test_table_and_differences_by_hand():
    made = {
        HEADLINE: trials([[0.5, 0.7], [0.7, 0.9]]),
        seeds.DREAMBOOTH: trials([[0.4, 0.4], [0.4, 0.6]]),
    }
    rows = seeds.table(made)
    assert rows[f"{HEADLINE}, seed 1"]["face_similarity"] == pytest.approx(0.8)
    assert rows[f"{HEADLINE}, mean"]["face_similarity"] == pytest.approx(0.7)
    deviation = rows[f"{HEADLINE}, standard deviation"]["face_similarity"]
    assert deviation == pytest.approx(0.02**0.5)
    assert seeds.differences(made)["parameter_error"][0] == pytest.approx(0.25)
    value, low, high = seeds.crossed(made)["face_similarity"]  # of 0.1, 0.3; 0.3, 0.3
    assert value == pytest.approx(0.25)
    assert (low, high) == pytest.approx((0.1, 0.3))


def test_another_seed_trains_another_lora(artefacts, monkeypatch):
    short = dreambooth.replace(dreambooth.SETTINGS, steps=2)
    monkeypatch.setattr(seeds, "SETTINGS", short)
    experiment = Experiment(
        artefacts, Plan(QUICK[:1], repeats=0, steps=1, noises=1), "validation", 1
    )
    first, again, other = (seeds.dreambooth_row(experiment, seed) for seed in (0, 0, 1))
    layer = next(iter(artefacts.layout)).name
    torch.testing.assert_close(first.weights[layer].down, again.weights[layer].down)
    assert not torch.equal(first.weights[layer].down, other.weights[layer].down)
    predicted = seeds.functional_row(experiment, artefacts.models["functional"])
    assert predicted.weights.batch_shape == (1,)
