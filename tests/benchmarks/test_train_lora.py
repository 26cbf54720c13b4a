"""Train Identity LoRA against DreamBooth and core's node: equal settings, and the arithmetic."""

from dataclasses import replace

import pytest
import torch

from benchmarks.command import benchmark_console
from benchmarks.identity.dreambooth import SETTINGS
from benchmarks.identity.experiment import Trial
from benchmarks.identity.people import benchmark_people
from benchmarks.identity.train_lora import JUDGES, NodeTrainer, differences, node_settings
from benchmarks.identity.trainers import BATCH, CORE, OURS, RANK, RATE, TRAINERS, prompt, slope
from difflora_core.training.difflora.refine import refinement_config


@pytest.mark.parametrize("config", [SETTINGS, refinement_config(4)])
def test_both_trainers_have_the_same_settings(config):
    made = node_settings(config)
    pairs = {
        "steps": "steps",
        "batch": "samples_per_step",
        "weighting": "loss_weighting",
        "learning_rate": "learning_rate",
        "schedule": "decay",
        "warmup": "warmup",
        "rank": "rank",
        "targets": "targets",
        "train_down": "train_down",
        "normalise_gradient": "normalise_gradient",
    }
    for ours, theirs in pairs.items():
        assert getattr(made, ours) == getattr(config, theirs), ours
    theirs, ours = config.loop, made.loop
    for step in (0, 1, config.steps // 2, config.steps - 1):
        assert ours.rate(1.0, step) == pytest.approx(theirs.rate(1.0, step))
    assert ours.betas == theirs.betas


def test_what_is_done_once_is_no_part_of_a_step():
    assert slope((10, 30, 60), [7 + 0.5 * n for n in (10, 30, 60)]) == pytest.approx(0.5)


@pytest.mark.parametrize(("kind", "own"), TRAINERS.values())
def test_each_trainer_gets_the_same_photos_and_settings(kind, own):
    nodes = prompt([f"{k}.png" for k in range(3)], kind, own, 20)
    given = nodes["train"]["inputs"]
    assert nodes["train"]["class_type"] == kind
    assert (given["steps"], given["rank"], given["batch_size"]) == (20, RANK, BATCH)
    assert given["learning_rate"] == RATE
    assert own.items() <= given.items()
    source = nodes["latents"]["inputs"]["pixels"] if kind == CORE else given["images"]
    photos = []
    while source[0].startswith("batch"):
        source, photo = (nodes[source[0]]["inputs"][name] for name in ("image1", "image2"))
        photos.append(photo[0])
    assert [source[0], *reversed(photos)] == ["photo0", "photo1", "photo2"]
    assert kind in (OURS, CORE)


def test_differences_are_means_over_people_with_their_interval():
    g = torch.Generator().manual_seed(1)
    base = {column: torch.randn(40, generator=g) for column in JUDGES}
    shift = {column: 0.3 + 0.05 * torch.randn(40, generator=g) for column in JUDGES}
    first = Trial("a", 1.0, {column: base[column] + shift[column] for column in JUDGES}, {})
    found = differences(first, Trial("b", 1.0, base, {}))
    for column, (value, low, high) in found.items():
        assert value == pytest.approx(float(shift[column].mean()), abs=1e-6)
        assert low < value < high < value + 0.05


def test_a_lora_for_each_person_and_one_that_is_trained_on(artefacts, monkeypatch, text):
    monkeypatch.setattr("benchmarks.identity.train_lora.demo_concept_text", lambda _: text)
    people = benchmark_people("validation", 2, ())
    trainer = NodeTrainer(artefacts, benchmark_console())
    config = replace(node_settings(SETTINGS), steps=2, evaluate_every=2, precision="no")
    made, seconds = trainer.train(people, 2, config)
    assert made.batch_shape == (2,)
    assert seconds > 0
    again, _ = trainer.train(people, 2, replace(config, train_down=False), made)
    for name, layer in made.layers.items():
        assert torch.equal(again[name].down, layer.down)
    assert any(not torch.equal(again[name].up, made[name].up) for name in made)
    assert any(not torch.equal(layer.up[0], layer.up[1]) for layer in made.layers.values())
