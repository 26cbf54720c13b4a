"""The stage of the styles that ship, one for each method that learns a look; see stages.py."""

from __future__ import annotations

import shutil
from typing import Any

from ...adapters.styleinject import ATTENTION, StyleInjectPlan
from ...storage.adapter_file import write_adaptation
from ...training.adaptation_run import AdaptationTraining, run_adaptation
from ...training.concept_task import PictureTask, concept_examples
from ...training.loop import Progress
from ...training.para import PaRaObjective, PaRaTraining
from ...training.styleinject import StyleInjectObjective, StyleInjectTraining
from .. import paths
from ..networks.base import load_base
from ..networks.concept_text import demo_concept_text
from ..world.shipped_styles import SHIPPED, style_pictures
from .stages import Figures

PICTURES = 200
PLAN = StyleInjectPlan(
    styles=4,
    rank=2,
    targets=(*ATTENTION, "out_layers.3"),
    spread_targets=("attn1.to_q", "attn2.to_q", "out_layers.3"),
)
"""As for distillation, with one convolution of a block: the other one doubles the file."""
RECIPES: dict[str, tuple[Any, AdaptationTraining]] = {
    "demo_cyanotype": (
        StyleInjectObjective,
        StyleInjectTraining(steps=400, batch=6, learning_rate=6e-3, plan=PLAN, patience=0),
    ),
    # The demo's layers are narrow: 8 of 64 directions are more than the paper's share of 1280.
    "demo_sepia": (
        PaRaObjective,
        PaRaTraining(
            steps=300, batch=8, learning_rate=3e-3, rank=8, targets="all", bound=0.5,
            evaluate_every=50,
        ),
    ),
}  # fmt: skip
"""File name without suffix to recipe and settings; rates are high because the base is tiny."""


def styles(progress: Progress) -> Figures:
    """Learn the styles that ship."""
    base, text = load_base(paths.BASE), demo_concept_text(paths.BASE)
    figures: Figures = {}
    for name, (recipe, config) in RECIPES.items():
        images, captions = style_pictures(SHIPPED[name], PICTURES)
        examples = concept_examples(base, images, prompts=[[line] for line in captions])
        result = run_adaptation(
            recipe(PictureTask(base, text, "demo"), config),
            examples,
            paths.BUILD / "styles" / name,
            lambda step, of, seen, _: progress(step, of, seen),
        )
        written = write_adaptation(paths.STYLES / f"{name}.safetensors", result.adaptations[0])
        figures[name] = {"loss": result.loss, "step": result.step, "bytes": written.size}
    shutil.rmtree(paths.BUILD / "styles")
    return figures
