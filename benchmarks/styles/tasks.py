"""What a style is learned from: one entry for each task."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from difflora_core.config import Config
from difflora_core.demo.networks.chinese import translate
from difflora_core.demo.world.art_styles import ART_STYLES
from difflora_core.demo.world.identities import split_seeds
from difflora_core.demo.world.scenes import Pictures, render_portraits
from difflora_core.training.distillation import (
    DistillationLoss,
    DistillationObjective,
    distillation_task,
)
from difflora_core.training.distillation_data import (
    DistillationPictures,
    PromptPair,
    distillation_examples,
)
from difflora_core.training.picture_examples import PictureExamples, picture_examples
from difflora_core.training.picture_task import PictureTask

from .world import StyleWorld

FIRST_PERSON = 8_000
"""Of splits, behind the people whom teachers and their judge see."""


@dataclass(frozen=True)
class TaskSize(Config):
    """How much there is to learn from.

    `prompts`: of distillation; `shots`: pictures of the few; `held_out`: of either, which choose
    the best state; `sampling_steps`: of the teacher.
    """

    prompts: int = 64
    shots: int = 6
    held_out: int = 12
    sampling_steps: int = 15


@dataclass(frozen=True, eq=False)
class StyleTask:
    """A task with its pictures.

    `objective` makes of a row's layers what is trained; `said`: how the student is told a caption.
    """

    task: PictureTask
    examples: PictureExamples
    held_out: PictureExamples
    objective: Callable[[Any], Any]
    said: Callable[[str], str] = str


def scenario_1(world: StyleWorld, style: str, size: TaskSize) -> StyleTask:
    """Distillation from a teacher that reads by the student's text encoders; no pictures."""
    return _distilled(world, world.student, style, size, str)


def scenario_2(world: StyleWorld, style: str, size: TaskSize) -> StyleTask:
    """Distillation to a student that reads Chinese: outputs alone are compared."""
    return _distilled(world, world.chinese, style, size, translate)


def _distilled(
    world: StyleWorld, student: PictureTask, style: str, size: TaskSize, said: Callable[[str], str]
) -> StyleTask:
    """Distillation to a student that is told captions so."""
    teacher = world.teachers[style]
    latent = student.base.unet.config.sample_size
    spoken: dict[str, str] = {}

    def drawn(split: str, count: int, seed: int) -> PictureExamples:
        config = DistillationPictures("teacher", count, size.sampling_steps, 2.0, seed)
        pairs = [PromptPair(said(c), c) for c in _portraits(split, count).captions]
        spoken.update((pair.student, pair.teacher) for pair in pairs)
        folder = world.cache / "drawn"
        return distillation_examples(teacher, pairs, (latent, latent), config, folder)

    own, other = drawn("train", size.prompts, 0), drawn("validation", size.held_out, 10**6)
    task = distillation_task(student, teacher, DistillationLoss(), spoken)
    return StyleTask(task, own, other, DistillationObjective, said)


def few_shots(world: StyleWorld, style: str, size: TaskSize) -> StyleTask:
    """The denoising loss on a few painted pictures with their captions."""

    def painted(split: str, count: int) -> PictureExamples:
        made = _portraits(split, count)
        prompts = [[caption] for caption in made.captions]
        images = ART_STYLES[style](made.images)
        return picture_examples(world.student.base, images, prompts=prompts)

    own, other = painted("train", size.shots), painted("validation", size.held_out)
    return StyleTask(world.student, own, other, lambda style: style)


def _portraits(split: str, count: int) -> Pictures:
    """A picture of each of so many people of a split."""
    return render_portraits(split_seeds(split, count, FIRST_PERSON), range(count))


TASKS: Mapping[str, Callable[[StyleWorld, str, TaskSize], StyleTask]] = {
    "scenario 1": scenario_1,
    "scenario 2": scenario_2,
    "few shots": few_shots,
}
