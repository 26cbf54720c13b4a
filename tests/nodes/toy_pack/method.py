"""A method that the pack does not have: a learned gain on the outputs of layers (IA3, 2205.05638).

`make` builds it on any copy of the library: that of a test, or that of the pack in ComfyUI.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import ClassVar

import torch
from torch import nn

NAME = "gain"
Part = Callable[[str], ModuleType]
"""`part("adapters.base")` gives that module of the library."""


def make(part: Part) -> SimpleNamespace:
    """Method, settings, training settings and recipe."""
    adapter, settings, training = _adapter(part), _settings(part), _training(part)
    return SimpleNamespace(
        method=_method(part, adapter, settings),
        settings=settings,
        training=training,
        objective=_objective(part, adapter, settings, training),
    )


def _adapter(part: Part) -> type:
    """What changes a layer's outputs."""

    class GainAdapter(part("adapters.base").LayerAdapter):
        """y + gain * y."""

        def __init__(self, gain):
            self.gain = gain

        def edit(self, x, y):
            return y + self.gain.to(y) * y

    return GainAdapter


def _settings(part: Part) -> type:
    """Settings of the method."""
    config = part("config")

    @dataclass(frozen=True)
    class GainConfig(config.Config):
        """How far the gains may go."""

        limit: float = 10.0

        def __post_init__(self):
            config.check_range("Gain", "limit", self.limit, 0, 100)

    return GainConfig


def _method(part: Part, adapter: type, settings: type) -> type:
    """What reads, checks and applies what was trained."""
    adapters, methods, errors = part("adapters.base"), part("methods.base"), part("errors")

    class Gain(methods.Method):
        """Tensors of a layer: gain (out,), and width (1,), that of its input."""

        name: ClassVar[str] = NAME
        Config: ClassVar[type] = settings

        @classmethod
        def check(cls, adaptation):
            for layer, tensors in adaptation.layers.items():
                if set(tensors) != {"gain", "width"} or adaptation.shared:
                    raise errors.LayoutError(f"{adaptation.title} does not hold a gain of {layer}.")

        @classmethod
        def layer_sizes(cls, adaptation):
            return {n: (int(t["width"]), len(t["gain"])) for n, t in adaptation.layers.items()}

        @classmethod
        def adapters(cls, applied):
            entries = []
            for one in applied:
                limit = methods.settings_as(settings, one.settings).limit
                for layer, tensors in one.adaptation.layers.items():
                    gain = tensors["gain"].clamp(-limit, limit)
                    entries.append(adapters.AdapterEntry(layer, adapter(gain), one.strength))
            return adapters.AdapterSet(tuple(entries))

    return Gain


def _training(part: Part) -> type:
    """Settings of the recipe."""

    @dataclass(frozen=True)
    class GainTraining(part("training.adaptation_run").AdaptationTraining):
        """Settings of the recipe."""

        steps: int = 3
        batch: int = 2
        evaluate_every: int = 1
        rate: float = 0.1

        @property
        def loop(self):
            return self.course(self.rate)

    return GainTraining


def _objective(part: Part, adapter: type, settings: type, training: type) -> type:
    """The recipe."""
    adapters, methods = part("adapters.base"), part("methods.base")

    class GainObjective(nn.Module):
        """Gains of the attention projections of a base; they start at zero."""

        name: ClassVar[str] = NAME
        Config: ClassVar[type] = training

        def __init__(self, task, config):
            super().__init__()
            self.task, self.config = task, config
            self.layout = task.base.layout("demo", 1)
            self.gains = nn.ParameterList(torch.zeros(s.out_features) for s in self.layout)

        @property
        def module_names(self):
            return self.layout.module_names

        def prepare(self, prompts):
            with torch.no_grad():
                encoded = self.task.text.encode(prompts, {})
            pairs = zip(self.layout, self.gains, strict=True)
            entries = [adapters.AdapterEntry(shape.name, adapter(gain)) for shape, gain in pairs]
            return encoded, adapters.AdapterSet(tuple(entries))

        def forward(self, batch):
            return part("training.adaptation_run").masked_loss(self, batch), {}

        def adaptations(self, facts):
            layers = {
                shape.name: {
                    "gain": gain.detach().cpu().clone(),
                    "width": torch.tensor([float(shape.in_features)]),
                }
                for shape, gain in zip(self.layout, self.gains, strict=True)
            }
            return [methods.TrainedAdaptation(NAME, "demo", settings(), {}, layers, None, facts)]

    return GainObjective
