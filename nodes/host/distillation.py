"""A style that learns from a teacher, on ComfyUI's models: both in its care, drawn once, kept."""

from dataclasses import dataclass, replace
from typing import ClassVar

import comfy.model_management
import comfy.utils
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP, VAE
from torch import Tensor

from ...difflora_core.errors import ConfigError
from ...difflora_core.methods.base import PreparedAdaptation
from ...difflora_core.storage.prompt_file import read_prompt_file
from ...difflora_core.training.adaptation_run import AdaptationTraining
from ...difflora_core.training.distillation import (
    DistillationLoss,
    DistillationObjective,
    DistillationTask,
    check_differs,
    distillation_task,
    run_distillation,
)
from ...difflora_core.training.distillation_data import (
    DistillationPictures,
    PromptPair,
    distillation_examples,
    held_out_prompts,
    read_prompts,
)
from ...difflora_core.training.loop_config import MAX_TRAINING_SEED
from ...difflora_core.training.picture_examples import PictureExamples
from ...difflora_core.training.picture_task import PictureTask
from .. import model_paths
from . import training
from .adapters import check_bare
from .base import ComfyBase, keep_together
from .memory import plan_memory, trained_bytes
from .text import ComfyText


@dataclass(frozen=True, eq=False)
class DistillationParts:
    """What is connected: teacher and student, each with its CLIP, and the student's VAE."""

    teacher: ModelPatcher
    teacher_clip: CLIP
    model: ModelPatcher
    clip: CLIP
    vae: VAE


@dataclass(frozen=True)
class DistillationRequest:
    """What the artist asks for, beside the recipe's settings.

    `prompts`, `prompt_file`: see `lines`; `width`, `height`: pixels; `held_out`: percent of the
    prompts that only choose the best state.
    """

    folder: ClassVar[str] = model_paths.STYLES
    prompts: str
    prompt_file: str
    file_name: str
    small_file: bool
    width: int
    height: int
    held_out: int
    loss: DistillationLoss
    pictures: DistillationPictures

    def pairs(self) -> list[PromptPair]:
        """The prompts of the box and of the file.

        Raises:
            ConfigError: there are none.
        """
        path = model_paths.prompt_file(self.prompt_file)
        return read_prompts("\n".join([self.prompts, read_prompt_file(path) if path else ""]))

    def shares(
        self, trained: list[PromptPair], apart: list[PromptPair]
    ) -> list[tuple[list[PromptPair], DistillationPictures]]:
        """The pictures of prompts to train on, and of those held out, by other seeds."""
        everything, pictures = len(trained) + len(apart), self.pictures
        kept = max(1, len(apart), round(pictures.count * len(apart) / everything))
        seed = (pictures.seed + pictures.count) % (MAX_TRAINING_SEED + 1)
        return [(trained, pictures), (apart, replace(pictures, count=kept, seed=seed))]


def distil(
    recipe: training.Recipe,
    config: AdaptationTraining,
    request: DistillationRequest,
    parts: DistillationParts,
    memory: str,
) -> tuple[list[PreparedAdaptation], str]:
    """Trains a style by its teacher, and writes its file; errors as `training.train`.

    Args:
        recipe: one of `distillation_recipes`.
        config: its settings.
        request: prompts, pictures and file.
        parts: what is connected.
        memory: a choice of `memory.CHOICES`.
    """
    done = training.guarded(lambda: _run(recipe, config, request, parts, memory))
    styles, _, report = training.kept(done, request, parts.clip)
    return styles, report


def _run(
    recipe: training.Recipe,
    config: AdaptationTraining,
    request: DistillationRequest,
    parts: DistillationParts,
    memory: str,
) -> training.Trained:
    """The recipe with its progress bars."""
    model_paths.new_file(request.folder, request.file_name)  # refuse before anything is loaded
    trained, apart = held_out_prompts(request.pairs(), request.held_out)
    task, student = _task(request, parts, [*trained, *apart])
    size = _latent_size(request, parts.vae)
    check_differs(task, trained[0].student, size)
    plan = plan_memory(parts.model, size[0] * size[1], config, memory, parts.teacher)
    config = replace(config, checkpointing=plan.checkpointing)
    objective = DistillationObjective(recipe(task, config))  # refuse before the teacher draws
    shares = request.shares(trained, apart)
    examples = [_draw(task.teacher, pairs, size, drawn) for pairs, drawn in shares if pairs]
    student.load(plan.needed + trained_bytes(objective))
    held_out = examples[1] if apart else None
    told = [*task.remarks, plan.summary(trained_bytes(objective))]
    return training.learned(objective, plan, examples[0], held_out, told, run_distillation)


def _task(
    request: DistillationRequest, parts: DistillationParts, pairs: list[PromptPair]
) -> tuple[DistillationTask, ComfyBase]:
    """Student and teacher with all prompts read, while the text encoders are loaded."""
    _check_teacher(parts)
    student = ComfyBase(parts.model, parts.vae)
    # A teacher that is the student's checkpoint with LoRAs on it shares its weights, which can be
    # patched one way at a time: it gets its own.
    shares = parts.teacher.model is student.patcher.model
    teacher = ComfyBase(parts.teacher, parts.vae, apart=shares)
    tasks = [
        PictureTask(base, ComfyText(clip), type(model.model).__name__.lower())
        for base, clip, model in (
            (student, parts.clip, parts.model),
            (teacher, parts.teacher_clip, parts.teacher),
        )
    ]
    spoken = {pair.student: pair.teacher for pair in pairs}
    task = distillation_task(tasks[0], tasks[1], request.loss, spoken)
    task.encode(list(spoken))
    task.teacher.encode(list(spoken.values()))
    _ = task.teacher.nothing
    keep_together(student, teacher)
    student.load(0)
    return task, student


def _check_teacher(parts: DistillationParts) -> None:
    """Refuses a teacher whose pictures the student's VAE cannot show, or that nobody would see.

    Raises:
        ConfigError: its latents are others, or it draws through styles or concepts on it.
    """
    formats = [m.model.latent_format for m in (parts.teacher, parts.model)]
    facts = [(f.latent_channels, f.scale_factor) for f in formats]
    if facts[0] != facts[1]:
        raise ConfigError(
            f"Teacher and student have other latents, of (channels, scale) {facts[0]} and "
            f"{facts[1]}: their VAEs differ. Take a teacher of the student's own family."
        )
    check_bare(parts.teacher, "teacher")
    check_bare(parts.model, "model")


def _latent_size(request: DistillationRequest, vae: VAE) -> tuple[int, int]:
    """Height and width of the latents of a picture."""
    ratio = int(vae.spacial_compression_encode())
    return request.height // ratio, request.width // ratio


def _draw(
    teacher: PictureTask,
    pairs: list[PromptPair],
    size: tuple[int, int],
    config: DistillationPictures,
) -> PictureExamples:
    """The teacher's pictures of prompts, with previews."""
    bar = comfy.utils.ProgressBar(config.count)

    def progress(done: int, count: int, latent: Tensor) -> None:
        picture = training.as_picture(teacher.base.decode_latents(latent))
        bar.update_absolute(done, count, ("JPEG", picture, training.PREVIEW_SIZE))

    folder = model_paths.drawn_folder()
    return distillation_examples(teacher, pairs, size, config, folder, progress)
