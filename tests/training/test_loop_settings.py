"""Settings of a run: what they do, which are refused, and how a run is known by them."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from difflora_core.errors import ConfigError
from difflora_core.training.fingerprint import fingerprint
from difflora_core.training.loop import ByStep, LoopConfig, train
from difflora_core.training.lora.dreambooth_config import DreamBoothConfig

LOOP = LoopConfig(steps=40, learning_rate=1e-2, warmup=5, ema=0.9, seed=3)


@pytest.mark.parametrize("eps", [1e-8, 0.5])
def test_eps_decides_whether_steps_follow_the_gradient(eps):
    """Two steps of Adam in float64, by arXiv:1412.6980; with a large eps a large gradient moves
    its number further, with a small one all move alike."""
    gradients = torch.tensor([[3.0, 0.01], [1.0, 0.02]], dtype=torch.float64)
    expected, first, second = torch.zeros(2).double(), torch.zeros(2), torch.zeros(2)
    for step, gradient in enumerate(gradients, 1):
        first = 0.8 * first + 0.2 * gradient
        second = 0.9 * second + 0.1 * gradient.square()
        size = (second / (1 - 0.9**step)).sqrt() + eps
        expected = expected - 0.1 * first / (1 - 0.8**step) / size
    model = nn.ParameterList([nn.Parameter(torch.zeros(2))])

    class Slope(nn.Module):
        """The loss whose gradient is the batch."""

        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, batch):
            return (self.model[0] * batch["slope"]).sum(), {}

    course = {"schedule": "constant", "warmup": 0, "weight_decay": 0.0, "clip": 0.0}
    loop = LoopConfig(2, learning_rate=0.1, betas=(0.8, 0.9), eps=eps, **course)
    train(Slope(), ByStep(lambda step: {"slope": gradients[step].float()}), loop, None)
    moved = model[0].detach().double()
    assert moved == pytest.approx(expected, rel=1e-5)
    assert (float(moved[0] / moved[1]) > 20) == (eps > 0.1)


def test_settings_are_strict():
    for bad in (
        {"steps": 0}, {"steps": 5, "precision": "fp8"}, {"steps": 5, "schedule": "up"},
        {"steps": 5, "ema": 1.0}, {"steps": 5, "accumulate": 0}, {"steps": 5, "validate_every": 0},
        {"steps": 5, "eps": 0.0},
    ):  # fmt: skip
        with pytest.raises(ConfigError):
            LoopConfig(**bad)
    loop = LoopConfig(steps=5, betas=(0.8, 0.9), precision="bf16")
    assert LoopConfig.from_json(loop.to_json()) == loop
    with pytest.raises(ConfigError, match="unknown settings"):
        LoopConfig.from_dict({"steps": 5, "step": 3})
    with pytest.raises(ConfigError, match="2 values"):
        LoopConfig.from_dict({"steps": 5, "betas": [0.9]})


def test_a_fingerprint_tells_what_differs():
    tensor = torch.arange(6.0)
    same = fingerprint(LOOP, {"a": [tensor, None]}, "word")
    assert same == fingerprint(LOOP, {"a": (tensor.clone(), None)}, "word")
    others = [
        fingerprint(replace(LOOP, seed=9), {"a": [tensor, None]}, "word"),
        fingerprint(LOOP, {"a": [tensor.view(2, 3), None]}, "word"),
        fingerprint(LOOP, {"a": [tensor.half(), None]}, "word"),
        fingerprint(LOOP, {"a": [tensor + 1e-6, None]}, "word"),
        fingerprint(LOOP, {"a": [tensor], "b": None}, "word"),
        fingerprint(LOOP, {"a": [tensor, None]}, "words"),
        fingerprint(LOOP, {"a": [tensor, None]}, "wo", "rd"),
    ]
    assert len({same, *others}) == 8
    assert same == fingerprint(
        replace(LOOP, log_every=9, accumulate=2), {"a": [tensor, None]}, "word"
    )
    with pytest.raises(TypeError):
        fingerprint(object())


RUNS = {
    DreamBoothConfig(): "0fbf5d34bb0ac52ed01498ff786e203282c74d4cb47395df0b60f63edfd7c05a",
    LoopConfig(5): "18e4abd86da88598659aee93ceacb3c38e2e68cb21db034ca01d7686d579efec",
}
"""Settings and what runs with them were known by on 2026-11-30."""


@pytest.mark.parametrize("settings", RUNS, ids=lambda settings: type(settings).__name__)
def test_a_later_setting_does_not_forget_what_was_trained(settings):
    """A corpus knows its LoRAs, and a run its state, by the settings: days of training."""
    assert fingerprint(settings) == RUNS[settings]
    assert fingerprint(replace(settings, eps=0.1)) != RUNS[settings]
