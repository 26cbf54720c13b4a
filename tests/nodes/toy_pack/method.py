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


def make(part: Callable[[str], ModuleType]) -> SimpleNamespace:
    """Method, settings, training settings and recipe; `part("adapters.base")` gives a module."""
    adapters, methods, config = part("adapters.base"), part("methods.base"), part("config")
    errors = part("errors")

    class GainAdapter(adapters.LayerAdapter):
        """y + gain * y."""

        def __init__(self, gain):
            self.gain = gain

        def edit(self, x, y):
            return y + self.gain.to(y) * y

    @dataclass(frozen=True)
    class GainConfig(config.Config):
        """How far the gains may go."""

        limit: float = 10.0

        def __post_init__(self):
            config.check_range("Gain", "limit", self.limit, 0, 100)

    class Gain(methods.Method):
        """Tensors of a layer: gain (out,), and width (1,), that of its input."""

        name: ClassVar[str] = NAME
        Config: ClassVar[type] = GainConfig

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
                limit = methods.settings_as(GainConfig, one.settings).limit
                for layer, tensors in one.adaptation.layers.items():
                    gain = tensors["gain"].clamp(-limit, limit)
                    entries.append(adapters.AdapterEntry(layer, GainAdapter(gain), one.strength))
            return adapters.AdapterSet(tuple(entries))

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

    class GainObjective(nn.Module):
        """Gains of the attention projections of a base; they start at zero."""

        name: ClassVar[str] = NAME
        Config: ClassVar[type] = GainTraining

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
            entries = [
                adapters.AdapterEntry(shape.name, GainAdapter(gain))
                for shape, gain in zip(self.layout, self.gains, strict=True)
            ]
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
            return [methods.TrainedAdaptation(NAME, "demo", GainConfig(), {}, layers, None, facts)]

    return SimpleNamespace(
        method=Gain, settings=GainConfig, training=GainTraining, objective=GainObjective
    )
