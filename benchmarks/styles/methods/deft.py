"""DEFT in the styles benchmark, by peft: as PaRa, and what was taken out is put in anew.

W' = (I - Q P') W + Q R with learned P and R, https://github.com/huggingface/peft, `DeftConfig`. Its
layers are peft's own, beside the base; peft has linear ones alone. Older versions of peft have no
DEFT, and then there is no row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import peft
import torch
from torch import Tensor, nn

from difflora_core.adapters.base import AdapterEntry, AdapterSet
from difflora_core.adapters.weight_change import WeightChangeAdapter
from difflora_core.lora.layout import ATTENTION_PROJECTIONS
from difflora_core.lora.weights import LoRALayer, LoRAWeights
from difflora_core.methods.base import TrainedAdaptation
from difflora_core.methods.lora import lora_adaptation
from difflora_core.models.layers import DrawnFrom
from difflora_core.text.encoders import EncodedPrompts
from difflora_core.training.adaptation_run import AdaptationTraining, masked_loss
from difflora_core.training.loop import LoopConfig
from difflora_core.training.picture_task import PictureTask

from .base import StyleRow

TARGETS = (*ATTENTION_PROJECTIONS, "ff.net.0.proj", "ff.net.2")


@dataclass(frozen=True)
class DeftTraining(AdaptationTraining):
    """Settings; `learning_rate` is constant."""

    learning_rate: float = 6e-3
    rank: int = 8

    @property
    def loop(self) -> LoopConfig:
        """The run."""
        return replace(self.course(self.learning_rate), schedule="constant")


class DeftObjective(nn.Module):
    """peft's DEFT layers around the base's, whose weights they share; it starts as the base."""

    def __init__(self, task: PictureTask, config: DeftTraining) -> None:
        super().__init__()
        self.task, self.config = task, config
        self.module_names = task.base.layout(task.base_name, config.rank, TARGETS).module_names
        bare = [task.base.unet.get_submodule(path) for path in self.module_names.values()]
        holder = nn.ModuleDict({str(k): layer for k, layer in enumerate(bare)})
        settings = peft.DeftConfig(r=config.rank, target_modules=list(holder))
        with DrawnFrom(torch.Generator().manual_seed(config.seed)):
            peft.inject_adapter_in_model(settings, holder)
        self._deft = tuple(holder.values())  # a tuple: the base's weights are not part of a run
        self.learned = nn.ParameterList(
            p for layer in self._deft for p in layer.parameters() if p.requires_grad
        )

    def changes(self) -> dict[str, Tensor]:
        """Layer name to the change of its weight (out, in); gradients flow into it."""
        layers = zip(self.module_names, self._deft, strict=True)
        return {name: layer.get_delta_weight("default") for name, layer in layers}

    def prepare(self, prompts: Sequence[str]) -> tuple[EncodedPrompts, AdapterSet]:
        """Encoded prompts and the adapters that belong to them."""
        changes = self.changes().items()
        entries = (AdapterEntry(n, WeightChangeAdapter({"diff": c})) for n, c in changes)
        return self.task.encode(prompts), AdapterSet(tuple(entries))

    def forward(self, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Denoising loss."""
        return masked_loss(self, batch), {}

    @torch.no_grad()
    def adaptations(self, facts: Mapping[str, Any]) -> list[TrainedAdaptation]:
        """What was trained; its change of this base has rank r, so it is a LoRA."""
        layers, rank = {}, self.config.rank
        for name, change in self.changes().items():
            left, sizes, right = torch.linalg.svd(change.cpu(), full_matrices=False)
            layers[name] = LoRALayer(right[:rank], left[:, :rank] * sizes[:rank], float(rank))
        made = lora_adaptation(LoRAWeights(layers), self.task.base_name)
        return [replace(made, facts=facts)]


DEFT = "DEFT by peft, equal"
ROWS = (
    (StyleRow(DEFT, DeftObjective, DeftTraining(rank=18), rates=(6e-4, 2e-3, 6e-3)),)
    if hasattr(peft, "DeftConfig")
    else ()
)
