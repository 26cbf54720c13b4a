"""The StyleInject recipe on a tiny base."""

from dataclasses import replace

import pytest
import torch

from difflora_core.adapters.attach import attach
from difflora_core.adapters.styleinject import CONVOLUTIONS, StyleInjectConfig, StyleInjectPlan
from difflora_core.base_model.protocol import TextCondition
from difflora_core.errors import ConfigError
from difflora_core.methods.base import AppliedAdaptation, PreparedAdaptation
from difflora_core.methods.styleinject import StyleInject, style_layers
from difflora_core.training.adaptation_run import run_adaptation
from difflora_core.training.picture_buckets import BucketedExamples
from difflora_core.training.picture_examples import PictureExamples
from difflora_core.training.picture_task import PictureTask
from difflora_core.training.processes import split
from difflora_core.training.styleinject import StyleInjectObjective, StyleInjectTraining

PLAN = StyleInjectPlan(
    styles=2,
    rank=2,
    targets=("attn1.to_q", "attn2.to_q", "attn2.to_v", *CONVOLUTIONS),
    spread_targets=("attn1.to_q", *CONVOLUTIONS),
)
PROMPTS = ["photo of a hat", "the red hat"]


@pytest.fixture
def setting(base, text):
    """A base and its text encoders, no word."""
    return PictureTask(base, text, "tiny")


def examples(count=4, seed=4):
    g = torch.Generator().manual_seed(seed)
    noise = [torch.randn(n, 4, 4, 4, generator=torch.Generator().manual_seed(9)) for n in (1,)]
    return PictureExamples(
        noise[0] + 0.1 * torch.randn(count, 4, 4, 4, generator=g), [PROMPTS] * count
    )


def training(**changes):
    settings = {"steps": 40, "evaluate_every": 10, "learning_rate": 0.01, "plan": PLAN}
    return StyleInjectTraining(**(settings | changes))


def predictions(task, adapters=None, names=None):
    """What the base predicts for fixed noise and prompts."""
    encoded = task.text.encode(PROMPTS, {})
    g = torch.Generator().manual_seed(3)
    noisy, steps = torch.randn(2, 4, 4, 4, generator=g), torch.tensor([300, 700])
    text = TextCondition(encoded.context, encoded.pooled)
    with torch.no_grad():
        if adapters is None:
            return task.base.predict(noisy, steps, text)
        with attach(task.base.unet, adapters, names=names):
            return task.base.predict(noisy, steps, text)


def test_untrained_it_is_the_base_and_every_target_is_there(setting):
    objective = StyleInjectObjective(setting, training())
    names = list(objective.module_names)
    assert {next(t for t in PLAN.targets if name.endswith(t)) for name in names} == set(
        PLAN.targets
    )
    made = objective.prepare(PROMPTS)[1]
    untouched = predictions(setting)
    assert torch.equal(predictions(setting, made, objective.module_names), untouched)
    for name, layer in objective.layers().items():
        assert (layer.spread is not None) == name.endswith(PLAN.spread_targets)


def test_it_learns_and_what_it_leaves_draws_as_it_was_trained(setting, tmp_path):
    result = run_adaptation(
        StyleInjectObjective(setting, training()), examples(), tmp_path, held_out=examples(2, 8)
    )
    (style,) = result.adaptations
    StyleInject.check(style)
    assert result.finished
    assert (style.method, style.base, style.word) == ("styleinject", "tiny", None)
    assert style.facts["pictures"] == 4
    losses = {}
    for name, strength in (("base", 0.0), ("style", 1.0)):
        objective = StyleInjectObjective(setting, training())
        for key, own in zip(objective.module_names, objective.parts, strict=True):
            for part, tensor in style.layers[key].items():
                own[part].data.copy_(tensor if strength else own[part])
        generator, draw = torch.Generator().manual_seed(71), examples(2, 8).draw(4, 1000)
        with torch.no_grad():
            losses[name] = sum(float(objective(draw(generator))[0]) for _ in range(6)) / 6
    assert losses["style"] == pytest.approx(result.loss, rel=1e-5)  # on pictures it has not seen
    assert losses["style"] < 0.98 * losses["base"]
    applied = AppliedAdaptation(PreparedAdaptation(style), style.settings)
    names = StyleInjectObjective(setting, training()).module_names
    drawn = predictions(setting, StyleInject.adapters([applied]), names)
    trained = predictions(setting, objective.prepare(PROMPTS)[1], names)
    torch.testing.assert_close(drawn, trained)
    assert all(bool((layer.up != 0).any()) for layer in style_layers(style).values())
    assert all(float(layer.alpha) == 2.0 for layer in style_layers(style).values())


def test_one_style_learns_and_its_router_has_nothing_to_choose(setting, tmp_path):
    config = training(plan=PLAN.of_size(1, 2))
    untrained = StyleInjectObjective(setting, config).layers()
    result = run_adaptation(StyleInjectObjective(setting, config), examples(), tmp_path)
    assert result.step > 0
    for name, layer in style_layers(result.adaptations[0]).items():
        assert bool((layer.up != 0).any())
        assert torch.equal(layer.router, untrained[name].router)


def test_pictures_of_several_sizes_under_prompts_of_several_lengths(setting):
    """Every batch has one size, and each of its samples the loss that it has alone."""
    g = torch.Generator().manual_seed(6)
    wide, tall = torch.randn(3, 4, 4, 8, generator=g), torch.randn(2, 4, 8, 4, generator=g)
    buckets = [PictureExamples(z, [PROMPTS] * len(z)) for z in (wide, tall)]
    draw = BucketedExamples(tuple(buckets), (1.0, 1.0)).draw(2, 1000)
    objective = StyleInjectObjective(setting, training())
    for parameter in objective.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=g)
    sizes, prompts = set(), set()
    for _ in range(8):
        batch = draw(g)
        sizes.add(tuple(batch["latents"].shape[2:]))
        prompts.add(tuple(batch["prompts"]))
        with torch.no_grad():
            alone = [float(objective(part)[0]) for part in split(batch, 2)]
            assert float(objective(batch)[0]) == pytest.approx(sum(alone) / 2, rel=1e-5)
    assert sizes == {(4, 8), (8, 4)}
    assert any(len(set(pair)) == 2 for pair in prompts)


def test_a_stopped_run_is_taken_up_again_to_the_same_numbers(setting, tmp_path):
    config = training(steps=20, evaluate_every=5)

    def run(folder, stop=None):
        objective = StyleInjectObjective(setting, config)
        return run_adaptation(objective, examples(), folder, stop=stop, held_out=examples(2, 8))

    whole = run(tmp_path / "whole")
    asked = iter([False] * 12 + [True])
    first = run(tmp_path / "parts", lambda: next(asked))
    again = run(tmp_path / "parts")
    assert (first.finished, again.finished) == (False, True)
    for name, tensors in whole.adaptations[0].layers.items():
        for key, tensor in tensors.items():
            assert torch.equal(again.adaptations[0].layers[name][key], tensor)


def test_pictures_that_were_held_out_end_a_run_that_only_learns_by_heart(setting, tmp_path):
    """The held-out pictures are of something else: training never helps them."""
    config = training(steps=500, evaluate_every=2, learning_rate=0.05, patience=3)
    other = PictureExamples(-3 * torch.ones(2, 4, 4, 4), [PROMPTS] * 2)
    steps = []
    result = run_adaptation(
        StyleInjectObjective(setting, config),
        examples(),
        tmp_path,
        lambda step, *rest: steps.append(step),
        held_out=other,
    )
    assert result.step < 100
    assert max(steps) <= result.step + 2 * 3


def test_other_held_out_pictures_are_another_run(setting, tmp_path):
    from difflora_core.training.adaptation_run import run_fingerprint

    objective = StyleInjectObjective(setting, training())
    prints = {
        run_fingerprint(objective, examples(), held) for held in (None, examples(2), examples(2, 5))
    }
    assert len(prints) == 3
    other = StyleInjectObjective(setting, training(acting=StyleInjectConfig("token")))
    assert run_fingerprint(other, examples()) not in prints


def test_prompts_are_encoded_once(setting):
    calls = []

    class Counting:
        def encode(self, prompts, words, padded=True):
            calls.extend(prompts)
            return setting.text.encode(prompts, words, padded)

    task = replace(setting, text=Counting())
    first = task.encode(["a", "b", "a"])
    again = task.encode(["b", "a"])
    assert calls == ["a", "b"]
    expected = setting.text.encode(["a", "b", "a"], {})
    torch.testing.assert_close(first.context, expected.context)
    torch.testing.assert_close(again.pooled, expected.pooled[1:])


def test_settings_are_strict():
    config = training()
    assert StyleInjectTraining.from_json(config.to_json()) == config
    for bad in ({"learning_rate": 0.0}, {"patience": -1}, {"guidance": 0.5}):
        with pytest.raises(ConfigError):
            training(**bad)
