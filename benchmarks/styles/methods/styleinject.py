"""StyleInject and its two parts in the styles benchmark, and what its paper claims."""

from __future__ import annotations

from dataclasses import replace

import torch

from difflora_core.adapters.styleinject import PRESETS, StyleInjectConfig, StyleInjectPlan
from difflora_core.training.picture_task import PictureTask
from difflora_core.training.styleinject import StyleInjectObjective, StyleInjectTraining

from . import full, lora
from .base import StyleRow

RANK = 4
RATES = (3e-3, 6e-3, 1e-2)
PLAN = PRESETS["distillation"].of_size(4, RANK)
SPREAD_PLAN = replace(PLAN, rank=1, targets=PLAN.spread_targets)

DMA, STA = "DMA alone, n = 4", "STA alone, n = 4"
ONE, FOUR, SIXTEEN = "StyleInject, n = 1", "StyleInject, n = 4", "StyleInject, n = 16"
SAME_RANK = "LoRA on StyleInject's layers, its rank"
SAME_LAYERS = "LoRA on StyleInject's layers, equal"
EQUAL_RANK = 15
"""Of a LoRA on these layers with as many parameters as n = 4."""
SPREAD_STD = 0.05
"""Of spreads that start at random, relative to a channel's own."""
DECIDED_STD = 0.3
"""Of routers that prefer some styles from the start: logits of about 1."""


class SpreadObjective(StyleInjectObjective):
    """STA alone: the spread is learned, and the low-rank change stays at nothing."""

    def __init__(self, task: PictureTask, config: StyleInjectTraining) -> None:
        super().__init__(task, config)
        for part in self.parts:
            for name in ("downs", "up"):
                part[name].requires_grad_(False)


class LowRankObjective(StyleInjectObjective):
    """A LoRA: with n = 1 and no spread nothing else is left, and the router chooses nothing."""

    def __init__(self, task: PictureTask, config: StyleInjectTraining) -> None:
        super().__init__(task, config)
        for part in self.parts:
            part["router"].requires_grad_(False)


class RandomSpreadObjective(StyleInjectObjective):
    """Its styles differ in the spread from the start: zeros are moved alike by an even router."""

    def __init__(self, task: PictureTask, config: StyleInjectTraining) -> None:
        super().__init__(task, config)
        generator = torch.Generator().manual_seed(config.seed)
        with torch.no_grad():
            for part in self.parts:
                if "spread" in part:
                    part["spread"].normal_(0, SPREAD_STD, generator=generator)


class DecidedRouterObjective(StyleInjectObjective):
    """Its routers tell pictures apart from the start, and do not have to learn it first."""

    def __init__(self, task: PictureTask, config: StyleInjectTraining) -> None:
        super().__init__(task, config)
        generator = torch.Generator().manual_seed(config.seed)
        with torch.no_grad():
            for part in self.parts:
                part["router"].normal_(0, DECIDED_STD, generator=generator)


def _row(
    name: str,
    plan: StyleInjectPlan,
    rate: float,
    recipe: type[StyleInjectObjective] = StyleInjectObjective,
    rates: tuple[float, ...] = RATES,
    acting: StyleInjectConfig | None = None,
    option_of: str = "",
) -> StyleRow:
    acts = acting or StyleInjectConfig()
    settings = StyleInjectTraining(learning_rate=rate, plan=plan, acting=acts)
    late = name in (SAME_LAYERS, DMA, STA, FOUR)
    return StyleRow(name, recipe, settings, rates, option_of, late)


ACTING = StyleInjectConfig()
OPTIONS = {
    "tokens routed apart": (PLAN, replace(ACTING, routing="token")),
    "router sees sums": (PLAN, replace(ACTING, pooling="sum")),
    "spread added": (PLAN, replace(ACTING, spread="add")),
    "spread of values too": (replace(PLAN, spread_targets=PLAN.targets), ACTING),
}
"""What the paper's text leaves open, each the other way than n = 4 has it."""
LOW_RANK_PLAN = replace(PLAN.of_size(1, RANK), spread_targets=())
ROWS = (
    _row(SAME_RANK, LOW_RANK_PLAN, 6e-3, LowRankObjective),
    _row(SAME_LAYERS, LOW_RANK_PLAN.of_size(1, EQUAL_RANK), 6e-3, LowRankObjective),
    _row(DMA, replace(PLAN, spread_targets=()), 6e-3, rates=(6e-3, 1e-2, 2e-2)),
    _row(STA, SPREAD_PLAN, 4e-2, SpreadObjective, (2e-2, 4e-2, 8e-2)),
    _row(ONE, PLAN.of_size(1, RANK), 6e-3),
    _row(FOUR, PLAN, 6e-3),
    _row(SIXTEEN, PLAN.of_size(16, RANK), 6e-3),
    *(
        _row(f"option, {name}", plan, 6e-3, acting=acting, option_of=FOUR)
        for name, (plan, acting) in OPTIONS.items()
    ),
    _row("option, spread starts at random", PLAN, 6e-3, RandomSpreadObjective, option_of=FOUR),
    _row("option, routers start decided", PLAN, 6e-3, DecidedRouterObjective, option_of=FOUR),
)

CLAIMS = (
    *((FOUR, other) for other in (full.FULL, lora.EQUAL, lora.TIMES_4, lora.TIMES_16)),
    *((FOUR, other) for other in (SAME_LAYERS, DMA, STA, ONE)),
    (SIXTEEN, FOUR),
    *((part, lora.EQUAL) for part in (DMA, STA, ONE)),
    *((part, SAME_RANK) for part in (DMA, ONE)),  # the ablation; its STA is n = 1 by its counts
)
