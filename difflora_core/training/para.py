"""The PaRa recipe: directions are taken out of the base until its pictures are like the given ones.

arXiv 2406.05641, on the pictures and prompts of DreamBooth (2208.12242) without prior preservation.
The paper does not say how B starts, and random directions do harm at once. So B starts at what the
base uses least, or at random with a strength that rises from nothing (both ours).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..adapters.base import AdapterEntry, AdapterSet
from ..adapters.para import ParaAdapter, least_harmful, orthonormal
from ..base_model.protocol import layer_weight
from ..config import check_range
from ..errors import ConfigError
from ..lora.layout import ATTENTION_PROJECTIONS, module_size
from ..methods.base import Facts, TrainedAdaptation
from ..methods.para import BOUND, KERNEL, PaRa, PaRaConfig, check_rank
from ..text.encoders import EncodedPrompts
from .adaptation_run import AdaptationTraining, masked_loss
from .loop import LoopConfig
from .losses import check_guidance
from .picture_task import PictureTask

SELF_ATTENTION = tuple(name for name in ATTENTION_PROJECTIONS if name.startswith("attn1."))
FEED_FORWARD = ("ff.net.0.proj", "ff.net.2")
CONV_1X1 = ("proj_in", "proj_out", "skip_connection")
TARGETS = {
    "no_cross_attention": (*SELF_ATTENTION, *FEED_FORWARD, *CONV_1X1),
    "attention": ATTENTION_PROJECTIONS,
    "all": (*ATTENTION_PROJECTIONS, *FEED_FORWARD, *CONV_1X1),
}
"""Endings of layer names. The paper found the first the best; the second is a LoRA's usual set."""
WARM_UP = 0.1
"""Share of the steps in which the strength rises, where B starts at random."""


@dataclass(frozen=True)
class PaRaTraining(AdaptationTraining):
    """Settings of the recipe (related.md 1): rank 4 to 8, 1000 steps of one picture at 1e-4.

    `rank`: directions of every layer; more are more faithful and less editable. `learning_rate`: of
    the directions. `targets`: see `TARGETS`. `start`: `least_used` directions of each weight, or
    `warm_up` of the strength over random ones. `bound`: see `PaRaConfig`. `guidance`: see
    `losses.under_guidance`. The rest: see `AdaptationTraining`.
    """

    steps: int = 1000
    batch: int = 1
    learning_rate: float = 1e-4
    rank: int = 4
    targets: Literal["no_cross_attention", "attention", "all"] = "no_cross_attention"
    start: Literal["least_used", "warm_up"] = "least_used"
    bound: float = BOUND
    guidance: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        PaRaConfig(self.bound)
        check_range("PaRa", "rank", self.rank, 1, 128)
        if not 0 < self.learning_rate <= 10:
            raise ConfigError(f"The learning rate must lie in 0 to 10, got {self.learning_rate}.")
        check_guidance(self.guidance)

    @classmethod
    def for_distillation(cls, rank: int, **course: Any) -> PaRaTraining:
        """What is trained by a teacher: every layer, as far as `bound` lets.

        Args:
            rank: directions of every layer.
            course: fields that all recipes have.
        """
        return cls(rank=rank, targets="all", **course)

    @property
    def loop(self) -> LoopConfig:
        """The run."""
        return self.course(self.learning_rate)


class PaRaObjective(nn.Module):
    """B of every target layer; forward maps a batch to (loss, metrics).

    Args:
        task: the frozen setting. config: the recipe.

    Raises:
        ConfigError: the rank is above the bound of a layer.
    """

    name: ClassVar[str] = PaRa.name
    Config: ClassVar[type[PaRaTraining]] = PaRaTraining

    def __init__(self, task: PictureTask, config: PaRaTraining) -> None:
        super().__init__()
        self.task, self.config = task, config
        self.layout = task.base.layout(task.base_name, config.rank, TARGETS[config.targets])
        for shape in self.layout:
            check_rank(shape.name, config.rank, shape.out_features, config.bound)
        self.directions = nn.ParameterList(self._starts())
        self.register_buffer("done", torch.zeros((), dtype=torch.int64))

    def _starts(self) -> list[Tensor]:
        """B (out, r) of every layer, on the CPU."""
        config, names = self.config, self.module_names
        if config.start == "least_used":
            weights = (layer_weight(self.task.base, path) for path in names.values())
            return [least_harmful(weight, config.rank).cpu().clone() for weight in weights]
        generator = torch.Generator().manual_seed(config.seed)
        return [
            orthonormal(torch.randn(shape.out_features, config.rank, generator=generator))
            for shape in self.layout
        ]

    @property
    def module_names(self) -> Mapping[str, str]:
        """Layer name to module path of the base's UNet."""
        return self.layout.module_names

    @property
    def strength(self) -> float:
        """1; less while a random start is warmed up."""
        steps = WARM_UP * self.config.steps
        if self.config.start == "least_used" or not self.training:
            return 1.0
        return min(1.0, (int(self.get_buffer("done")) + 1) / max(1.0, steps))

    def after_step(self, done: int) -> None:
        """So many steps are done."""
        self.get_buffer("done").fill_(done)

    def bases(self) -> list[Tensor]:
        """Q (out, r) of every layer; those of one shape are computed together."""
        groups: dict[torch.Size, list[int]] = {}
        for number, b in enumerate(self.directions):
            groups.setdefault(b.shape, []).append(number)
        found: dict[int, Tensor] = {}
        for numbers in groups.values():
            stacked = orthonormal(torch.stack([self.directions[k] for k in numbers]))
            found.update(zip(numbers, stacked, strict=True))
        return [found[k] for k in range(len(self.directions))]

    def prepare(self, prompts: Sequence[str]) -> tuple[EncodedPrompts, AdapterSet]:
        """Encoded prompts and the adapters that belong to them."""
        entries = tuple(
            AdapterEntry(layer, ParaAdapter(q), self.strength)
            for layer, q in zip(self.module_names, self.bases(), strict=True)
        )
        return self.task.encode(prompts), AdapterSet(entries)

    def forward(self, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Masked denoising loss."""
        return masked_loss(self, batch, self.config.guidance), {}

    @torch.no_grad()
    def adaptations(self, facts: Facts) -> list[TrainedAdaptation]:
        """What was trained so far, one record."""
        layers, unet = {}, self.task.base.unet
        for (layer, path), q in zip(self.module_names.items(), self.bases(), strict=True):
            width, _, *kernel = module_size(unet.get_submodule(path))
            layers[layer] = {"directions": q.cpu().clone(), "width": torch.tensor([float(width)])}
            if kernel:
                layers[layer][KERNEL] = torch.tensor([float(side) for side in kernel])
        facts = {**facts, "rank": self.config.rank, "targets": self.config.targets}
        settings = PaRaConfig(self.config.bound)
        base = self.task.base_name
        return [TrainedAdaptation(self.name, base, settings, {}, layers, facts=facts)]


RECIPE = PaRaObjective
