"""Drawing many people in one batch equals drawing them one at a time."""

from dataclasses import replace

import pytest
import torch

from benchmarks.identity.drawing import PictureSampler, groups, select, unseen_latents
from benchmarks.identity.people import benchmark_people
from benchmarks.prompts import PROMPTS, QUICK, asked
from difflora_core.base_model.precision import imitates_bfloat16
from difflora_core.demo.world.identities import SPLITS
from difflora_core.lora.weights import LoRALayer, LoRAWeights

SEEDS = (100_000, 100_001)


@pytest.fixture(scope="module")
def people():
    return benchmark_people("validation", 2, QUICK[:2])


@pytest.fixture(scope="module")
def loras(artefacts):
    """Two different LoRAs, strong enough to show."""
    generator = torch.Generator().manual_seed(9)

    def layer(shape):
        down = torch.randn(2, 4, shape.in_features, generator=generator) / shape.in_features**0.5
        up = torch.randn(2, shape.out_features, 4, generator=generator) * 0.3
        return LoRALayer(down, up, 4.0)

    return LoRAWeights({shape.name: layer(shape) for shape in artefacts.layout})


def test_grouped_sampling_equals_single_sampling(artefacts, plan, loras):
    together = PictureSampler(artefacts.base, plan, SEEDS).pictures(loras, 1.5)
    assert together.shape == (2, 3, 64, 64, 3)
    for k, seed in enumerate(SEEDS):
        alone = PictureSampler(artefacts.base, replace(plan, batch=1), [seed])
        torch.testing.assert_close(
            alone.pictures(select(loras, [k]), 1.5)[0], together[k], atol=2e-4, rtol=0
        )


def test_every_person_gets_the_own_lora(artefacts, plan, loras):
    sampler = PictureSampler(artefacts.base, plan, SEEDS)
    straight, swapped = sampler.pictures(loras), sampler.pictures(select(loras, [1, 0]))
    base = sampler.pictures()
    assert float((straight - base).abs().max()) > 1e-3
    assert float((straight - swapped).abs().max()) > 1e-3
    torch.testing.assert_close(sampler.pictures(loras, 0.0), base, atol=0, rtol=0)
    torch.testing.assert_close(sampler.pictures(), base, atol=0, rtol=0)  # no hook stayed


def test_guidance_and_half_precision_change_little_but_something(artefacts, plan):
    def drawn(changed):
        return PictureSampler(artefacts.base, changed, SEEDS).pictures()

    base, half = drawn(plan), drawn(replace(plan, half=True))
    guided = drawn(replace(plan, guidance=3.0))
    changed = float((half - base).abs().mean())
    assert changed == 0 if imitates_bfloat16(torch.device("cpu")) else 0 < changed < 0.05
    assert float((guided - base).abs().max()) > 0


def test_grouped_losses_equal_single_losses(artefacts, plan, loras, people):
    sampler = PictureSampler(artefacts.base, plan, SEEDS)
    unseen = unseen_latents(artefacts.base, people.unseen, plan, SEEDS)
    together = sampler.losses(unseen, loras)
    for k, seed in enumerate(SEEDS):
        one = benchmark_people("validation", 1, QUICK[:1], start=k).unseen
        alone = PictureSampler(artefacts.base, plan, [seed])
        single = alone.losses(unseen_latents(artefacts.base, one, plan, [seed]), select(loras, [k]))
        torch.testing.assert_close(single[0], together[k], atol=1e-5, rtol=1e-4)


def test_cells_and_groups(plan):
    assert plan.cells == [(0, 0), (1, 0), (0, 1)]
    assert [len(group) for group in groups(25, 16)] == [13, 12]
    assert [k for group in groups(7, 3) for k in group] == list(range(7))


def test_pictures_of_a_person_are_disjoint_and_the_persons_own(people):
    sets = [people.photos, people.unseen, people.others, people.prompted]
    rows = torch.cat([s.images[0] for s in sets]).flatten(1)
    distance = torch.cdist(rows, rows) + 1e9 * torch.eye(len(rows))
    assert float(distance.min()) > 1.0
    assert set(people.seeds) <= set(SPLITS["validation"])
    assert [row[:5] for row in people.photos.captions[0][:4]] == ["photo"] * 4


def test_prompts_are_as_promised():
    assert len(set(PROMPTS)) == len(PROMPTS) == 30
    assert set(QUICK) <= set(PROMPTS)
    assert len(set(QUICK)) == 6
    assert sum(scene.item != "none" for scene in PROMPTS) == 10
    assert {scene.look for scene in PROMPTS} == {"photo", "cartoon", "painting"}
    assert "item" not in asked(PROMPTS[0])
    assert asked(PROMPTS[10])["item"] == "hat"
