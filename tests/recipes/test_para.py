"""The PaRa recipe on a tiny base."""

import pytest
import torch
from torch import nn

from difflora_core.adapters.attach import attach
from difflora_core.base_model.protocol import TextCondition
from difflora_core.errors import ConfigError
from difflora_core.lora.layout import SDXL_UNET_CONFIG, layout_from_unet_config
from difflora_core.methods.base import AppliedAdaptation, PreparedAdaptation
from difflora_core.methods.para import PaRa
from difflora_core.storage.adapter_file import read_adaptation, write_adaptation
from difflora_core.training.adaptation_run import run_adaptation
from difflora_core.training.para import TARGETS, PaRaObjective, PaRaTraining
from difflora_core.training.picture_examples import PictureExamples, picture_examples
from difflora_core.training.picture_task import PictureTask

SETTINGS = {"rank": 1, "bound": 0.25, "batch": 4, "evaluate_every": 20, "learning_rate": 0.03}
PROMPTS = ["photo of a hat", "the red hat"]


@pytest.fixture
def setting(base, text):
    return PictureTask(base, text, "tiny")


@pytest.fixture
def examples(pictures):
    return PictureExamples(pictures().latents, [PROMPTS] * 3)


def predicted(setting, adapters, names):
    encoded = setting.text.encode(PROMPTS, {})
    text = TextCondition(encoded.context, encoded.pooled)
    noisy = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), attach(setting.base.unet, adapters, names=names):
        return setting.base.predict(noisy, torch.tensor([400, 600]), text)


def test_it_learns_and_what_it_leaves_is_what_was_evaluated(setting, examples, tmp_path):
    config = PaRaTraining(steps=60, **SETTINGS)
    start = PaRaObjective(setting, config)
    result = run_adaptation(PaRaObjective(setting, config), examples, tmp_path)
    (adaptation,) = result.adaptations
    assert result.finished
    assert result.step > 0
    untrained = run_adaptation(
        PaRaObjective(setting, PaRaTraining(**SETTINGS | {"learning_rate": 1e-9, "steps": 1})),
        examples,
        tmp_path / "untrained",
    )
    assert result.loss < 0.995 * untrained.loss
    PaRa.check(adaptation)
    assert adaptation.word is None
    assert adaptation.facts == {
        "steps": result.step, "pictures": 3, "rank": 1, "targets": "no_cross_attention",
    }  # fmt: skip
    kinds = {type(setting.base.unet.get_submodule(p)) for p in start.module_names.values()}
    assert kinds == {nn.Linear, nn.Conv2d}
    applied = AppliedAdaptation(PreparedAdaptation(adaptation), adaptation.settings)
    names = start.module_names
    tuned = predicted(setting, PaRa.adapters([applied]), names)
    moved = {}
    for layer, tensors in adaptation.layers.items():  # the same as new weights
        part, q = setting.base.unet.get_submodule(names[layer]), tensors["directions"]
        moved[layer] = part.weight.data
        flat = part.weight.data.flatten(1).double()
        new = flat - q.double() @ q.double().mT @ flat
        part.weight.data = new.reshape(part.weight.shape).float()
    torch.testing.assert_close(predicted(setting, PaRa.adapters([]), names), tuned)
    for layer, weight in moved.items():
        setting.base.unet.get_submodule(names[layer]).weight.data = weight
    path = write_adaptation(tmp_path / "para.safetensors", adaptation).path
    again = AppliedAdaptation(PreparedAdaptation(read_adaptation(path)), adaptation.settings)
    torch.testing.assert_close(
        predicted(setting, PaRa.adapters([again]), names), tuned, rtol=1e-2, atol=1e-2
    )


def test_the_same_seed_learns_the_same_and_a_stopped_run_goes_on(setting, examples, tmp_path):
    config = PaRaTraining(steps=30, start="warm_up", seed=4, **SETTINGS | {"evaluate_every": 5})
    once = run_adaptation(PaRaObjective(setting, config), examples, tmp_path / "once")
    calls = iter([False] * 12 + [True] * 9)
    stopped = run_adaptation(
        PaRaObjective(setting, config), examples, tmp_path / "two", stop=lambda: next(calls)
    )
    assert not stopped.finished
    resumed = run_adaptation(PaRaObjective(setting, config), examples, tmp_path / "two")
    assert (resumed.finished, resumed.loss) == (True, once.loss)
    for layer, tensors in once.adaptations[0].layers.items():
        assert torch.equal(
            resumed.adaptations[0].layers[layer]["directions"], tensors["directions"]
        )


def test_the_starts(setting, examples):
    """The least used directions harm least; a random start acts wholly only after its warm-up."""
    losses, batch = {}, examples.draw(8, 1000)(torch.Generator().manual_seed(3))
    for start in ("least_used", "warm_up"):
        objective = PaRaObjective(setting, PaRaTraining(steps=100, start=start, **SETTINGS))
        plain = predicted(setting, PaRa.adapters([]), {})
        _, adapters = objective.eval().prepare(["photo"])
        tuned = predicted(setting, adapters, objective.module_names)
        losses[start] = float((tuned - plain).square().mean())
        objective.train()
        strengths = []
        for done in (0, 4, 9, 50):
            objective.after_step(done)
            strengths.append(objective.strength)
        assert strengths == ([1.0] * 4 if start == "least_used" else [0.1, 0.5, 1.0, 1.0])
        assert objective.eval().strength == 1.0
        loss, _ = objective.train()(batch)
        loss.backward()
        assert all(float(b.grad.abs().max()) > 0 for b in objective.directions)
    assert losses["least_used"] < 0.5 * losses["warm_up"]


def test_sdxls_layers():
    counts = {
        name: len(layout_from_unet_config("sdxl", SDXL_UNET_CONFIG, 4, targets))
        for name, targets in TARGETS.items()
    }
    blocks, transformers, shortcuts = 70, 11, 11
    rest = 2 * blocks + 2 * transformers + shortcuts
    assert counts == {
        "no_cross_attention": 4 * blocks + rest, "attention": 560, "all": 560 + rest,
    }  # fmt: skip


def test_what_is_refused(setting, base):
    with pytest.raises(ConfigError, match=r"1 of 8 directions.*beyond 2\.5% pictures collapse"):
        PaRaObjective(setting, PaRaTraining(rank=1))
    for bad in ({"rank": 0}, {"bound": 0.0}, {"targets": "some"}, {"learning_rate": 0.0}):
        with pytest.raises(ConfigError):
            PaRaTraining(**bad)
    with pytest.raises(ConfigError, match="Say in a prompt"):
        picture_examples(base, torch.zeros(1, 8, 8, 3))
