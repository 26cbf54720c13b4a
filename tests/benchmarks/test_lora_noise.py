"""What LoRAs of a person have in common is told from what chance made of them."""

from dataclasses import replace

import pytest
import torch

from benchmarks.identity import dreambooth, lora_noise
from benchmarks.identity.experiment import Experiment
from benchmarks.identity.people import render_people
from difflora_core.demo.world.renderer import LOOKS


def test_parts_of_the_variation_are_those_that_were_put_in():
    generator = torch.Generator().manual_seed(5)

    def draw(size):
        return size * torch.randn(400, 300, generator=generator, dtype=torch.float64)

    person, same, other = draw(1.0), draw(2.0), draw(2.0)
    common = draw(1.0)[:1] * 50  # what all LoRAs have, which tells nobody from anybody
    first, again = (common + person + same + draw(1.5) for _ in range(2))
    parts = lora_noise.variation(first, again, common + person + other + draw(1.5))
    whole = 1.0 + 4.0 + 2.25
    assert parts["person"] == pytest.approx(1 / whole, abs=0.02)
    assert parts["pictures"] == pytest.approx(4 / whole, abs=0.02)
    assert parts["chance"] == pytest.approx(2.25 / whole, abs=0.02)
    assert parts["norm"] == pytest.approx(float(first.norm(dim=1).mean()))


def test_one_training_is_on_other_pictures_and_one_on_other_draws(artefacts, plan, monkeypatch):
    seen = []

    def train(_, pictures, seeds, course):
        seen.append((pictures.images, tuple(seeds)))
        return None

    monkeypatch.setattr(dreambooth.DreamBoothTrainer, "train", train)
    experiment = Experiment(artefacts, replace(plan, repeats=0), "validation", 2)
    lora_noise.trainings(experiment, lora_noise.PAPER_COURSE)
    (first, seeds), (again, others), (fresh, last) = seen
    assert torch.equal(first, again)
    assert not torch.equal(first, fresh)
    assert set(seeds).isdisjoint(others)
    assert others == last
    assert first.shape == (2, lora_noise.PICTURES, 64, 64, 3)
    shown = experiment.people
    for known in (shown.photos, shown.unseen, shown.others, shown.prompted):
        pairs = (first[:, :, None] - known.images[:, None]).abs().amax((3, 4, 5))
        assert float(pairs.min()) > 0  # nothing that anything is judged by
    again = render_people(shown.seeds, range(400, 410), LOOKS)
    assert torch.equal(again.images, first)
