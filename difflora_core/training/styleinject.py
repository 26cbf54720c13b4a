"""The StyleInject recipe: a look is learned from pictures with prompts; the base stays as it is.

arXiv 2401.13942, data-driven fine-tuning: the denoising loss, AdamW at a constant 1e-4, and of all
checkpoints the best. At the start the adapters change nothing, see `adapters.styleinject`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..adapters.base import AdapterSet
from ..adapters.styleinject import (
    PRESETS,
    StyleInjectConfig,
    StyleInjectPlan,
    StyleLayer,
    new_layer,
)
from ..errors import ConfigError
from ..lora.layout import module_size
from ..methods.base import Facts, TrainedAdaptation
from ..methods.styleinject import StyleInject, style_adaptation, style_adapters
from ..text.encoders import EncodedPrompts
from .adaptation_run import AdaptationTraining, masked_loss
from .loop import LoopConfig
from .losses import check_guidance
from .picture_task import PictureTask


@dataclass(frozen=True)
class StyleInjectTraining(AdaptationTraining):
    """Settings of the recipe.

    `learning_rate`: constant. `plan`: layers, styles and rank. `acting`: how the style acts while
    it is trained, and later unless asked otherwise. `guidance`: see `losses.under_guidance`; 1 is
    the plain loss. The rest: see `AdaptationTraining`.
    """

    default_for_distillation: ClassVar[bool] = True

    steps: int = 2000
    evaluate_every: int = 50
    learning_rate: float = 1e-4
    plan: StyleInjectPlan = field(default_factory=StyleInjectPlan)
    acting: StyleInjectConfig = field(default_factory=StyleInjectConfig)
    guidance: float = 1.0
    patience: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.learning_rate <= 10:
            raise ConfigError(f"The learning rate must lie in 0 to 10, got {self.learning_rate}.")
        check_guidance(self.guidance)

    @classmethod
    def for_distillation(cls, rank: int, **course: Any) -> StyleInjectTraining:
        """What is trained by a teacher: convolutions too, which make what is seen.

        Args:
            rank: of each layer's matrices.
            course: fields that all recipes have.
        """
        plan = PRESETS["distillation"]
        return cls(plan=plan.of_size(plan.styles, rank), **course)

    @property
    def loop(self) -> LoopConfig:
        """The run."""
        course = self.course(self.learning_rate)
        return replace(course, schedule="constant")


class StyleInjectObjective(nn.Module):
    """The layers of a style; forward maps a batch to (loss, metrics). At the start: the base.

    Args:
        task: the frozen setting. config: the recipe.
    """

    name: ClassVar[str] = StyleInject.name
    Config: ClassVar[type[StyleInjectTraining]] = StyleInjectTraining

    def __init__(self, task: PictureTask, config: StyleInjectTraining) -> None:
        super().__init__()
        self.task, self.config, plan = task, config, config.plan
        self.layout = task.base.layout(task.base_name, plan.rank, plan.targets)
        generator = torch.Generator().manual_seed(config.seed)
        endings = tuple(f".{target}" for target in plan.spread_targets)
        parts = []
        for name, path in self.module_names.items():
            size = module_size(task.base.unet.get_submodule(path))
            layer = new_layer(size, plan, name.endswith(endings), generator)
            parts.append(nn.ParameterDict(layer.tensors()))
            parts[-1]["alpha"].requires_grad_(False)
        self.parts = nn.ModuleList(parts)

    @property
    def module_names(self) -> Mapping[str, str]:
        """Layer name to module path of the base's UNet."""
        return self.layout.module_names

    def layers(self) -> dict[str, StyleLayer]:
        """Layer name to its tensors; gradients flow into them."""
        parts = zip(self.module_names, self.parts, strict=True)
        return {name: StyleLayer(**dict(own.items())) for name, own in parts}  # type: ignore[operator]

    def prepare(self, prompts: Sequence[str]) -> tuple[EncodedPrompts, AdapterSet]:
        """Encoded prompts and the adapters that belong to them."""
        return self.task.encode(prompts), style_adapters(self.layers(), self.config.acting)

    def forward(self, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Denoising loss."""
        return masked_loss(self, batch, self.config.guidance), {}

    @torch.no_grad()
    def adaptations(self, facts: Facts) -> list[TrainedAdaptation]:
        """What was trained so far, one record."""
        made = style_adaptation(self.layers(), self.config.acting, self.task.base_name)
        layers = {
            name: {key: tensor.detach().cpu().clone() for key, tensor in tensors.items()}
            for name, tensors in made.layers.items()
        }
        return [replace(made, layers=layers, facts=facts)]


RECIPE = StyleInjectObjective
