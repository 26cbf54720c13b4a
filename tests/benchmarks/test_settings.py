"""Settings of the benchmarks are strict records: JSON both ways, unknown fields refused."""

import json
from dataclasses import replace

import pytest

from benchmarks.concepts import perfusion
from benchmarks.concepts.methods import METHODS
from benchmarks.concepts.methods.base import TrainingSettings
from benchmarks.concepts.word_objectives import YardstickConfig
from benchmarks.identity import composition
from benchmarks.identity.compression import ABLATIONS, Recipe
from benchmarks.identity.drawing import Plan
from benchmarks.identity.identity import FULL_PLAN, QUICK_PLAN
from benchmarks.identity.rows import DreamBoothRuns
from benchmarks.prompts import QUICK
from benchmarks.styles import styles
from difflora_core.errors import ConfigError

SETTINGS = [
    composition.QUICK,
    perfusion.Size(),
    perfusion.QUICK,
    QUICK_PLAN,
    FULL_PLAN,
    *ABLATIONS.values(),
    DreamBoothRuns((), (300,)),
    TrainingSettings(steps=7),
    styles.Size(),
    styles.QUICK,
    YardstickConfig(steps=3, rate=0.01),
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: type(s).__name__)
def test_json_both_ways(settings):
    again = type(settings).from_json(settings.to_json())
    assert again == settings
    assert repr(again) == repr(settings)  # which names what is cached
    with pytest.raises(ConfigError, match="unknown settings colour"):
        type(settings).from_dict({**settings.to_dict(), "colour": 1})


def test_what_is_cached_is_named_as_ever():
    """Names of cached files hold these texts; another text would train and draw everything anew."""
    assert repr(Recipe()) == (
        "Recipe(preserve=1.0, both_factors=False, turned=False, canonical=False, steps=800)"
    )
    assert repr(Plan(QUICK[:1], repeats=0)) == (
        f"Plan(scenes=({QUICK[0]!r},), repeats=0, steps=10, guidance=1.0, batch=64, noises=4, "
        "seed=0, half=True)"
    )
    for name in ("DreamBooth LoRA", "Textual Inversion"):
        config = METHODS[name].config(TrainingSettings())
        assert repr(config) == (
            "YardstickConfig(steps=400, batch=4, weighting='uniform', evaluate_every=50, "
            "precision='no', seed=0, accumulate=1, checkpointing=False, patience=0, "
            f"rate={METHODS[name].rates[0]}, rank=4, guidance=1.5)"
        )


def test_other_rates_reach_the_recipe():
    for method in METHODS.values():
        chosen = (0.5, 0.25)[: len(method.rates)]
        config = replace(method, rates=chosen).config(TrainingSettings(seed=3))
        found = [
            getattr(config, field)
            for field in ("value_rate", "word_rate", "learning_rate", "rate")
            if hasattr(config, field)
        ]
        assert tuple(found) == chosen
        assert (config.seed, config.steps, config.guidance) == (3, 400, 1.5)


def test_choices_are_among_what_was_tried():
    for name, method in METHODS.items():
        assert method.name == name
        assert method.rates in method.rate_grid
        assert len(set(method.settings)) == len(method.settings) >= 3
    shared = {"steps": 400, "batch": 4, "seed": 0, "guidance": 1.5}
    assert json.loads(TrainingSettings().to_json()) == shared
