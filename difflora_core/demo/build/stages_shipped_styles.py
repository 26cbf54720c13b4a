"""The stage of the styles that ship, one for each method that learns a look; see stages.py."""

from __future__ import annotations

import shutil
from importlib import import_module
from importlib.util import find_spec

from ...methods.base import StyleMethod
from ...methods.registry import METHODS
from ...storage.adapter_file import write_adaptation
from ...training.adaptation_run import run_adaptation
from ...training.loop import Progress
from ...training.picture_examples import picture_examples
from ...training.picture_task import PictureTask
from .. import paths
from ..networks.base import load_base
from ..networks.concept_text import demo_concept_text
from ..world.shipped_styles import SHIPPED, style_pictures
from .shipped_styles.base import ShippedStyle
from .stages import Figures

PICTURES = 200


def shipped_styles() -> list[ShippedStyle]:
    """Those of the registered methods, each from the method's file in `shipped_styles/`."""
    learn = [name for name, kind in METHODS.items() if issubclass(kind, StyleMethod)]
    files = [f".shipped_styles.{name}" for name in learn]
    return [
        import_module(file, __package__).STYLE for file in files if find_spec(file, __package__)
    ]


def styles(progress: Progress) -> Figures:
    """Learn the styles that ship."""
    base, text = load_base(paths.BASE), demo_concept_text(paths.BASE)
    figures: Figures = {}
    for style in shipped_styles():
        images, captions = style_pictures(SHIPPED[style.name], PICTURES)
        examples = picture_examples(base, images, prompts=[[line] for line in captions])
        result = run_adaptation(
            style.recipe(PictureTask(base, text, "demo"), style.config),
            examples,
            paths.BUILD / "styles" / style.name,
            lambda step, of, seen, _: progress(step, of, seen),
        )
        path = paths.STYLES / f"{style.name}.safetensors"
        written = write_adaptation(path, result.adaptations[0])
        figures[style.name] = {"loss": result.loss, "step": result.step, "bytes": written.size}
    shutil.rmtree(paths.BUILD / "styles")
    return figures
