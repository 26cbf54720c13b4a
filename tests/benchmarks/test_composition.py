"""Composition on a tiny random world: pictures to numbers, and the arithmetic by hand."""

import json
import math

import pytest
import torch
from scipy.stats import spearmanr

from benchmarks.command import benchmark_console
from benchmarks.identity import composition
from benchmarks.identity.composition import (
    Cast,
    Size,
    make_cast,
    measure_blend,
    measure_invented,
    placed_right,
    print_results,
)
from benchmarks.identity.likeness import (
    between,
    distribution,
    rank_correlation,
    three_distributions,
    within,
)
from difflora_core.evaluation.report import Report

SMALL = Size(pairs=2, ways=3, prompts=1, invented=2, training=3, training_pictures=2)


@pytest.fixture
def few_pictures(monkeypatch):
    monkeypatch.setattr(composition, "INVENTED_PROMPTS", 2)
    monkeypatch.setattr(composition, "KNOWN_PICTURES", range(40, 42))


def test_everything_is_measured(artefacts, few_pictures, capsys):
    cast = make_cast(artefacts.judges, "validation", SMALL.pairs)
    assert len(cast.seeds) == len(cast.photos) == len(cast.centroids) == 4
    results = {
        "blend": measure_blend(artefacts, cast, SMALL),
        "invented": measure_invented(artefacts, cast, SMALL),
        "two_people": {"pairs": 2}
        | {f"{w}_{n}": 1.0 for w in composition.WAYS for n in ("correct", "regions", "rank1")},
    }
    print_results(results, benchmark_console())
    printed = capsys.readouterr().out
    blended, invented = (
        json.loads(Report({}, results).to_json())[name] for name in ("blend", "invented")
    )
    assert f"Spearman {blended['spearman']:.3f} over 2 pairs" in printed
    assert "nearest_training" in printed
    assert "two people, maskless: 100% of 2 pairs right" in printed
    print_results({"two_people": results["two_people"]}, benchmark_console())
    assert "blend" not in capsys.readouterr().out
    every = blended["spearman_falls"] + blended["spearman_rises"]
    assert len(every) == 2 * SMALL.pairs
    assert blended["spearman"] == pytest.approx(sum(every) / len(every))
    assert len(blended["likeness_to_a"]) == len(blended["likeness_to_b"]) == SMALL.ways
    assert (invented["people"], invented["training_people"]) == (SMALL.invented, SMALL.training)
    for name in ("consistency", "between", "nearest_training", "own"):
        assert invented[name] != invented[f"photo_{name}"]


def test_ends_of_the_blend_are_the_people_themselves(artefacts, few_pictures):
    cast = make_cast(artefacts.judges, "validation", SMALL.pairs)
    model = artefacts.models["functional"]
    draw = composition.person_sampler(artefacts, cast.seeds[:2], composition.PLAIN_PROMPTS[:1])
    ends = Cast(cast.seeds[:2], cast.photos[:2], None)
    pictures = draw(model, composition.photo_latents(artefacts, model, ends))
    faces = artefacts.judges.embed(pictures.flatten(0, 1))
    likeness = float((faces * cast.centroids[:2]).sum(1).mean())
    found = measure_blend(artefacts, cast, SMALL)["likeness_to_a"]
    assert math.isclose(found[0], likeness, abs_tol=2e-3)  # bfloat16


def test_rank_correlation_is_spearmans():
    g = torch.Generator().manual_seed(0)
    values = torch.randn(4, 9, generator=g)
    values[3, 2:5] = 1.0  # ties
    expected = [spearmanr(row, range(9)).statistic for row in values.tolist()]
    assert rank_correlation(values).tolist() == pytest.approx(expected)
    rising = torch.arange(6.0)[None]
    assert rank_correlation(torch.cat([rising, -rising, 0 * rising])).tolist() == pytest.approx(
        [1.0, -1.0, 0.0]
    )


def test_cosines_between_and_within():
    people = torch.eye(3)
    assert between(people).tolist() == [0.0, 0.0, 0.0]
    same = people[:2, None].expand(-1, 4, -1)
    assert within(same).tolist() == [1.0] * 12
    assert distribution(torch.arange(101.0))["p5"] == pytest.approx(5.0)


def test_a_person_is_distinct_who_is_nearer_to_themselves_than_to_the_training():
    faces = torch.eye(4)[[0, 1]][:, None].repeat(1, 4, 1)  # two people, four pictures each
    faces[1, 2:] = torch.tensor([0.0, 0.6, 0.8, 0.0])  # the second one changes
    training = torch.stack([torch.tensor([0.6, 0.0, 0.0, 0.8]), torch.eye(4)[1]])
    found = three_distributions(faces, training, "photo_")
    assert found["photo_own"]["min"] == pytest.approx(0.6)
    assert found["photo_own"]["max"] == pytest.approx(1.0)
    assert found["photo_nearest_training"]["min"] == pytest.approx(0.6)
    assert found["photo_nearest_training"]["max"] > 0.85
    assert found["photo_distinct"] == 0.5


def test_a_pair_is_right_when_both_halves_are():
    cast = Cast((1, 2, 3, 4), torch.zeros(4, 1), torch.eye(4))
    assert cast.pairs == [(0, 2), (1, 3)]
    right, swapped = torch.eye(4)[[0, 2]], torch.eye(4)[[3, 1]]
    found = placed_right(torch.stack([right, swapped]), cast)
    assert found["correct"].tolist() == [True, False]
    blended = torch.stack([torch.eye(4)[[0, 0]], torch.tensor([[0.0, 0.5, 0.8, 0.3]] * 2)])
    found = placed_right(blended, cast)
    assert found["correct"].tolist() == [False, False]
    assert found["regions"].tolist() == [[True, False], [True, False]]
    assert found["rank1"].tolist() == [[True, False], [False, False]]
