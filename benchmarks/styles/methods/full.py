"""A full fine-tune in the styles benchmark: the upper end of what can be learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from difflora_core.adapters.base import AdapterEntry, AdapterSet
from difflora_core.adapters.weight_change import WeightChangeAdapter
from difflora_core.lora.layout import module_size, unet_name_map
from difflora_core.methods.base import TrainedAdaptation
from difflora_core.methods.lora import LoRA, LoRASettings
from difflora_core.text.encoders import EncodedPrompts
from difflora_core.training.adaptation_run import AdaptationTraining, masked_loss
from difflora_core.training.loop import LoopConfig
from difflora_core.training.picture_task import PictureTask

from .base import StyleRow


@dataclass(frozen=True)
class FullTraining(AdaptationTraining):
    """Settings; `learning_rate` is constant."""

    learning_rate: float = 6e-4

    @property
    def loop(self) -> LoopConfig:
        """The run."""
        return replace(self.course(self.learning_rate), schedule="constant")


class FullObjective(nn.Module):
    """A full fine-tune: every weight and bias of linear layers and convolutions is learned.

    They are learned as changes beside the layers, since the base stays as it is.
    """

    def __init__(self, task: PictureTask, config: FullTraining) -> None:
        super().__init__()
        self.task, self.config = task, config
        self.module_names: dict[str, str] = {}
        self.changes = nn.ModuleList()
        for path, name in unet_name_map(dict(task.base.unet.config)).items():
            layer = task.base.unet.get_submodule(path)
            if module_size(layer):
                self.module_names[name] = path
                own = {"diff": layer.weight, "bias": layer.bias}
                zeros = {k: torch.zeros_like(w) for k, w in own.items() if w is not None}
                self.changes.append(nn.ParameterDict(zeros))

    def layers(self) -> dict[str, dict[str, Tensor]]:
        """Layer name to its changes; gradients flow into them."""
        pairs = zip(self.module_names, self.changes, strict=True)
        return {name: dict(change.items()) for name, change in pairs}

    def prepare(self, prompts: Sequence[str]) -> tuple[EncodedPrompts, AdapterSet]:
        """Encoded prompts and the adapters that belong to them."""
        entries = (AdapterEntry(n, WeightChangeAdapter(c)) for n, c in self.layers().items())
        return self.task.encode(prompts), AdapterSet(tuple(entries))

    def forward(self, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Denoising loss."""
        return masked_loss(self, batch), {}

    def adaptations(self, facts: Mapping[str, Any]) -> list[TrainedAdaptation]:
        """What was trained."""
        layers = {
            name: {key: tensor.detach().cpu().clone() for key, tensor in change.items()}
            for name, change in self.layers().items()
        }
        base = self.task.base_name
        return [TrainedAdaptation(LoRA.name, base, LoRASettings(), {}, layers, facts=facts)]


FULL = "full fine-tune"
ROWS = (StyleRow(FULL, FullObjective, FullTraining(), rates=(2e-4, 6e-4, 2e-3)),)
