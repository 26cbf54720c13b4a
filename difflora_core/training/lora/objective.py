"""The LoRA recipe: low-rank factors of one person, or thing, are trained on pictures with prompts.

DreamBooth (arXiv:2208.12242) on LoRA factors (arXiv:2106.09685); text encoders stay as they are. It
starts from nothing, or from any LoRA: with the settings of `difflora.refine` that is
HyperDreamBooth's fast fine-tuning (arXiv:2307.06949, section 4.3) of a predicted one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...adapters.base import AdapterSet
from ...adapters.lora import lora_adapter_set
from ...config import check_range
from ...diffusion.objective import LossWeight
from ...errors import ConfigError, LayoutError, counted
from ...lora.layout import LoRALayout, edited_layers, module_size
from ...lora.weights import LoRALayer, LoRAWeights
from ...methods.base import Facts, TrainedAdaptation
from ...methods.lora import LoRA, lora_adaptation
from ...text.encoders import EncodedPrompts
from ..adaptation_run import AdaptationTraining, masked_loss
from ..loop_config import LoopConfig, Schedule
from ..picture_task import PictureTask
from .dreambooth_start import mixed_generator

JUDGED = 12
"""Noised pictures that a state is judged by, at least."""


@dataclass(frozen=True)
class LoRATraining(AdaptationTraining):
    """Settings of the recipe.

    `learning_rate`: peak; `schedule`, `warmup`: its course, see `LoopConfig`. `rank`: components of
    every layer. `targets`: see `TARGETS`. `train_down`: both factors; False trains `up` alone, for
    a start whose `down` is right. `normalise_gradient`: every step counts the same, whatever its
    error (as in `DreamBoothConfig`); else gradients are clipped at norm 1. The rest: see
    `AdaptationTraining`.
    """

    steps: int = 1000
    batch: int = 1
    weighting: LossWeight = "min_snr"
    evaluate_every: int = 100
    learning_rate: float = 1e-4
    schedule: Schedule = "cosine"
    warmup: int = 10
    rank: int = 16
    targets: Literal["attention", "transformer", "attention_and_convolutions", "all"] = "attention"
    train_down: bool = True
    normalise_gradient: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("LoRA training", "rank", self.rank, 1, 1024)
        check_range("LoRA training", "learning_rate", self.learning_rate, 1e-9, 10)
        check_range("LoRA training", "warmup", self.warmup, 0, 2**40)

    @property
    def evaluation_batches(self) -> int:
        """As many as make `JUDGED` pictures, and at least the usual number."""
        return max(super().evaluation_batches, math.ceil(JUDGED / self.batch))

    @property
    def loop(self) -> LoopConfig:
        """The run."""
        course = self.course(self.learning_rate)
        return replace(course, schedule=self.schedule, warmup=self.warmup, betas=(0.9, 0.99))


class LoRAObjective(nn.Module):
    """The factors of a LoRA; forward maps a batch to (loss, metrics). From nothing: the base.

    Args:
        task: the frozen setting. config: the recipe.
        start: LoRA to go on from, of at most the same rank. Layers and components that it lacks
            start at zero; those that it has are trained, whatever `config.targets` says.

    Raises:
        LayoutError: the start has layers that the base lacks, or a higher rank.
        ConfigError: only `up` would be trained, and there is nothing that it could start from.
    """

    name: ClassVar[str] = LoRA.name
    Config: ClassVar[type[LoRATraining]] = LoRATraining

    def __init__(
        self, task: PictureTask, config: LoRATraining, start: LoRAWeights | None = None
    ) -> None:
        super().__init__()
        if start is None and not config.train_down:
            raise ConfigError(
                "To train up alone there must be a LoRA to start from: connect one, or train both "
                "factors."
            )
        self.task, self.config = task, config
        edited = edited_layers(config.targets, start)
        self.layout = task.base.layout(task.base_name, config.rank, edited)
        self.facts = (start,)
        self.factors = nn.ParameterList()
        self.scale_gradients = self._normalise if config.normalise_gradient else None
        if start is not None:
            check_start(start, self.layout)
        generator, layers = mixed_generator(config.seed, 0), {}
        for name, path in self.module_names.items():
            size = module_size(task.base.unet.get_submodule(path))
            own = None if start is None else start.layers.get(name)
            made = _start(size, config.rank, generator, own)
            down, up = nn.Parameter(made.down, config.train_down), nn.Parameter(made.up)
            self.factors.extend([down, up])
            layers[name] = replace(made, down=down, up=up)
        self.weights = LoRAWeights(layers)

    @property
    def module_names(self) -> Mapping[str, str]:
        """Layer name to module path of the base's UNet."""
        return self.layout.module_names

    def prepare(self, prompts: Sequence[str]) -> tuple[EncodedPrompts, AdapterSet]:
        """Encoded prompts and the adapters that belong to them."""
        return self.task.encode(prompts), lora_adapter_set(self.weights)

    def forward(self, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Masked denoising loss."""
        return masked_loss(self, batch), {}

    @torch.no_grad()
    def _normalise(self) -> None:
        """Give the gradient of all factors together norm 1."""
        gradients = [p.grad for p in self.factors if p.grad is not None]
        norm = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
        for gradient in gradients:
            gradient /= norm.clamp_min(torch.finfo(norm.dtype).tiny)

    @torch.no_grad()
    def adaptations(self, facts: Facts) -> list[TrainedAdaptation]:
        """What was trained so far, one record."""
        layers = {
            name: replace(layer, down=layer.down.cpu().clone(), up=layer.up.cpu().clone())
            for name, layer in self.weights.detach().layers.items()
        }
        made = lora_adaptation(LoRAWeights(layers), self.task.base_name)
        named = {"rank": self.config.rank, "targets": self.config.targets}
        return [replace(made, facts={**facts, **named})]


def check_start(start: LoRAWeights, layout: LoRALayout) -> None:
    """Refuse a LoRA that cannot be trained on.

    Raises:
        LayoutError: it has layers that the base lacks, or a higher rank; the message says what to
            do.
    """
    outside = [name for name in start if name not in layout.module_names]
    if outside:
        raise LayoutError(
            f"The LoRA to start from edits {counted(len(outside), 'layer')} that this model lacks "
            f"(for example {outside[0]}): start from another LoRA, or from none."
        )
    highest = max(layer.rank for layer in start.layers.values())
    if highest > layout.rank:
        raise LayoutError(
            f"The LoRA to start from has rank {highest}: set rank to {highest} or more."
        )


def _start(
    size: tuple[int, ...], rank: int, generator: torch.Generator, own: LoRALayer | None
) -> LoRALayer:
    """A layer at the start: components of its own LoRA, then random ones whose `up` is zero.

    Args:
        size: `module_size` of the layer.
        rank: of the result.
        generator: of the random `down`, uniform within 1 / sqrt(in) as in stock LoRA.
        own: what it has already.

    Raises:
        LayoutError: that is for a layer of another size.
    """
    inputs, outputs, *kernel = size
    seen = inputs * math.prod(kernel)
    down = (torch.rand(rank, seen, generator=generator) * 2 - 1) / math.sqrt(seen)
    up = torch.zeros(outputs, rank)
    if own is not None:
        if (own.in_features, own.out_features) != (seen, outputs):
            raise LayoutError(
                f"The LoRA to start from is for layers of {own.in_features} to {own.out_features} "
                f"features, where the model has {seen} to {outputs}: use one made for this model."
            )
        own = own.folded()
        down[: own.rank] = own.down.detach().to(down)
        up = F.pad(own.up.detach().to(up), (0, rank - own.rank))
    return LoRALayer(down, up, float(rank), tuple(kernel))


RECIPE = LoRAObjective
