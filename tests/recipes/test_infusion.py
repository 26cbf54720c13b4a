"""The Infusion recipe on a tiny base with its own text encoders."""

from dataclasses import replace

import pytest
import torch

from difflora_core.adapters.attach import attach
from difflora_core.base_model.protocol import TextCondition
from difflora_core.errors import ConfigError
from difflora_core.methods.base import AppliedAdaptation, PreparedAdaptation
from difflora_core.methods.infusion import Infusion, InfusionConfig
from difflora_core.training.adaptation_run import run_adaptation
from difflora_core.training.infusion import InfusionObjective, InfusionTraining

PROMPTS = ["photo of a <h1>", "a person wearing a <h1>, blue background", "the red <h1>"]


def train(task, examples, config, folder):
    objective = InfusionObjective(task, config)
    return run_adaptation(objective, examples, folder)


def test_infusion_starts_at_the_base_and_learns(task, tmp_path, pictures, evaluation_loss, numbers):
    config = InfusionTraining(
        steps=60, batch=4, evaluate_every=20, threshold=0.3, learning_rate=1.0
    )
    result = train(task, pictures(), config, tmp_path)
    (concept,) = result.adaptations
    losses = {}
    for sign in (0, 1, -1):  # untrained, trained, trained and turned round
        objective = InfusionObjective(task, config)
        for value, learned in zip(objective.values, concept.layers.values(), strict=True):
            value.data.add_(sign * learned["values"])
        losses[sign] = evaluation_loss(objective, config.batch)
    assert result.loss == pytest.approx(losses[1], rel=1e-6)
    assert losses[1] < 0.995 * losses[0]
    assert losses[-1] > losses[0]
    encoded = task.text.encode(PROMPTS, {concept.word.word: concept.word.embeddings})
    text = TextCondition(encoded.context, encoded.pooled)
    noisy, steps = torch.randn(3, 4, 4, 4), torch.tensor([400, 500, 600])
    assert concept.settings == InfusionConfig(threshold=0.3)  # travels with the file
    applied = AppliedAdaptation(PreparedAdaptation(concept), concept.settings)
    adapters = Infusion.adapters([applied])
    with torch.no_grad():
        plain = task.base.predict(noisy, steps, text)
        with attach(task.base.unet, adapters, names=task.layers):
            tuned = task.base.predict(noisy, steps, text)
    assert float((tuned - plain).abs().max()) > 1e-4
    nothing = {n: {"values": 0 * t["values"]} for n, t in concept.layers.items()}
    zero = PreparedAdaptation(replace(concept, layers=nothing))
    still = Infusion.adapters([AppliedAdaptation(zero, concept.settings)])
    with torch.no_grad(), attach(task.base.unet, still, names=task.layers):
        assert torch.equal(task.base.predict(noisy, steps, text), plain)
    again = train(task, pictures(), config, tmp_path / "again")
    assert torch.equal(numbers(again), numbers(result))


def test_guidance_while_training(task, pictures):
    """This base hardly listens to a residual at one token; the bound is far above rounding."""
    batch, losses = pictures().draw(8, 1000)(torch.Generator().manual_seed(3)), []
    for scale in (1.0, 2.0):
        objective = InfusionObjective(task, InfusionTraining(threshold=0.3, guidance=scale))
        with torch.no_grad():
            for value in objective.values:
                value.copy_(torch.linspace(-4, 4, value.numel()).view_as(value))
            losses.append(float(objective.eval()(batch)[0]))
    assert abs(losses[1] / losses[0] - 1) > 2e-5


def test_bad_settings():
    for bad in ({"guidance": 0.5}, {"learning_rate": 0.0}, {"steps": 0}, {"threshold": 0.0}):
        with pytest.raises(ConfigError):
            InfusionTraining(**bad)
