"""What a style is learned from: one entry for each task.

The style of a task is the name of one, or `EACH_LOOK`: three styles at once, told apart by the look
that a prompt names, so that a router has something to choose between.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from difflora_core.config import Config
from difflora_core.demo.networks.chinese import translate
from difflora_core.demo.world.art_styles import ART_STYLES
from difflora_core.demo.world.identities import split_seeds
from difflora_core.demo.world.scenes import Pictures, Scene, render_portraits
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
from difflora_core.training.fingerprint import fingerprint
from difflora_core.training.picture_examples import PictureExamples, picture_examples
from difflora_core.training.picture_task import PictureTask

from .world import StyleWorld

EACH_LOOK = "a style for each look"
OF_LOOK = {"photo": "ink", "cartoon": "poster", "painting": "pastel"}
"""The styles of `EACH_LOOK`."""
Answer = tuple[Tensor, dict[str, Tensor]]
"""Of a teacher: its prediction, and what its blocks put out."""
MOST_ANSWERS = 1000
"""That are remembered, of some megabytes each."""
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

    def look(self, prompt: str) -> str:
        """The look that one of its prompts names."""
        spoken: Mapping[str, str] = getattr(self.task, "spoken", {})
        return spoken.get(prompt, prompt).split()[0]


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
    return StyleTask(task, own, other, partial(RememberingObjective, answers=Answers()), said)


@dataclass
class Answers:
    """What a teacher said of the batches of a seed, by their fingerprint; all rows learn from them.

    No more than MOST_ANSWERS are kept.
    """

    seed: int = -1
    known: dict[str, Answer] = field(default_factory=dict)

    def of_seed(self, seed: int) -> Answers:
        """Those of this seed; others are forgotten."""
        if seed != self.seed:
            self.seed, self.known = seed, {}
        return self


class RememberingObjective(DistillationObjective):
    """Asks the teacher of each batch once, not once in every row and at every look."""

    def __init__(self, style: Any, answers: Answers) -> None:
        super().__init__(style)
        self.answers = answers.of_seed(self.config.seed)

    def teacher_answer(self, batch: Mapping[str, Any]) -> Answer:
        """As the teacher gave it before, or gives it now."""
        known = self.answers.known
        name = fingerprint(*(batch[k] for k in ("latents", "noise", "timesteps", "prompts")))
        if name in known:
            return known[name]
        answer = super().teacher_answer(batch)
        if len(known) < MOST_ANSWERS:
            known[name] = answer
        return answer


def few_shots(world: StyleWorld, style: str, size: TaskSize) -> StyleTask:
    """The denoising loss on a few painted pictures of each style with their captions."""

    def painted(split: str, count: int) -> PictureExamples:
        made = _portraits(split, count)
        prompts = [[caption] for caption in made.captions]
        pairs = zip(made.images, made.scenes, strict=True)
        images = [ART_STYLES[style_of(style, scene)](image[None]) for image, scene in pairs]
        return picture_examples(world.student.base, torch.cat(images), prompts=prompts)

    each = len(OF_LOOK) if style == EACH_LOOK else 1
    own = painted("train", each * size.shots)
    other = painted("validation", each * size.held_out)
    return StyleTask(world.student, own, other, lambda style: style)


def style_of(style: str, scene: Scene) -> str:
    """The style that a task wants a scene in."""
    return OF_LOOK[scene.look] if style == EACH_LOOK else style


def _portraits(split: str, count: int) -> Pictures:
    """A picture of each of so many people of a split."""
    return render_portraits(split_seeds(split, count, FIRST_PERSON), range(count))


@dataclass(frozen=True)
class TaskKind:
    """A task of the table.

    `make`: of a world, a style and a size. `each_look`: it is of all styles at once. `late`: rows
    are trained for long, at more than their best rate, and their last state is judged.
    """

    make: Callable[[StyleWorld, str, TaskSize], StyleTask]
    each_look: bool = False
    late: bool = False


TASKS: Mapping[str, TaskKind] = {
    "scenario 1": TaskKind(scenario_1),
    "scenario 2": TaskKind(scenario_2),
    "few shots": TaskKind(few_shots),
    "three looks": TaskKind(few_shots, each_look=True),
    "late training": TaskKind(scenario_1, late=True),
}
