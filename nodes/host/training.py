"""What the training nodes of all methods share: the run with progress, the file, the report."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import numpy as np
import torch
from comfy.sd import CLIP
from PIL import Image
from torch import Tensor

from ...difflora_core.errors import InterruptedTraining
from ...difflora_core.methods.base import PreparedAdaptation, TrainedAdaptation
from ...difflora_core.storage.adapter_file import write_adaptation
from ...difflora_core.training.adaptation_run import (
    AdaptationResult,
    AdaptationTraining,
    Objective,
    Watch,
    run_adaptation,
    run_fingerprint,
)
from ...difflora_core.training.picture_examples import Examples
from ...difflora_core.training.state_file import remove_run
from .. import model_paths
from .adapters import check_bare
from .base import ComfyBase
from .browser import show_here
from .memory import FAST, MemoryPlan, fits, plan_memory, trained_bytes
from .run_files import remember_files, run_file
from .text import ComfyText, prepare
from .training_request import Parts, PictureParts, PictureRequest, Request
from .words import teach

Recipe = Callable[[Any, Any], Objective[TrainedAdaptation]]
"""A `RECIPE` of training/: an objective of a task and the settings of its own."""

logger = logging.getLogger(__name__)

NOTHING = "nothing was learned: it only got worse. Lower the learning rates, or take more steps"
PREVIEW_SIZE = 512


@dataclass(frozen=True, eq=False)
class Trained:
    """A run: what it left, sentences for its report, and the folder of its state."""

    result: AdaptationResult
    remarks: list[str]
    folder: Path


def train(
    recipe: Recipe,
    config: AdaptationTraining,
    request: PictureRequest,
    parts: PictureParts,
    memory: str = FAST,
) -> tuple[list[PreparedAdaptation], CLIP, str]:
    """Trains, writes a file for each word, and returns what was trained, the CLIP and a report.

    Args:
        recipe: a `RECIPE` of training/: its objective.
        config: its settings.
        request: what to teach, prompts and file.
        parts: what is connected.
        memory: see `run`.

    Raises:
        InterruptProcessingException: ComfyUI's, when the user stopped; the best so far is kept.
    """
    return kept(run(recipe, config, request, parts, memory), request, parts.clip)


def kept(done: Trained, request: Any, own_clip: CLIP) -> tuple[list[PreparedAdaptation], CLIP, str]:
    """Writes what a run left; returns and raises as `train`.

    Args:
        done: the run.
        request: has `folder`, `file_name` and `small_file`.
        own_clip: the CLIP that is connected.
    """
    files, paths, clip = [], [], own_clip
    for number, adaptation in enumerate(done.result.adaptations):
        place = (request.folder, request.file_name)
        path = run_file(done.folder, *place, number)
        with torch.inference_mode(False):
            written = write_adaptation(path, adaptation, request.small_file)
            clip = teach(clip, adaptation)
        word = adaptation.word.word if adaptation.word else adaptation.method
        paths.append(path)
        files.append(
            f"{path.name}: {word}, {written.size / 1024:.1f} KiB, rounding error "
            f"{written.error:.1e}"
        )
    report = finished(done, files, request.file_name, paths)
    with torch.inference_mode(False):
        return [prepare(one, own_clip) for one in done.result.adaptations], clip, report


def run(
    recipe: Recipe, config: AdaptationTraining, request: Request, parts: Parts, memory: str = FAST
) -> Trained:
    """Trains, from where an unfinished run of the same settings and pictures is.

    Args:
        recipe: makes an objective of a task and settings.
        config: the settings.
        request: a `PictureRequest`, or what asks for a task and pictures as one does.
        parts: what is connected.
        memory: a choice of `memory.CHOICES`.

    Raises:
        InterruptProcessingException: the user stopped before the first step.
        ConfigError: a step does not fit into memory; the message says what would.
    """
    return guarded(lambda: _run(recipe, config, request, parts, memory))


def guarded(training: Callable[[], Trained]) -> Trained:
    """What a training does inside a node; raises as `run`."""
    # ComfyUI runs nodes in inference mode, whose tensors cannot take part in training.
    with torch.inference_mode(False), torch.enable_grad():
        try:
            return training()
        except InterruptedTraining as early:  # before the first step there is nothing to keep
            raise comfy.model_management.InterruptProcessingException from early


def finished(done: Trained, files: list[str], name: str, paths: Sequence[Path]) -> str:
    """The report of a run whose files are written; its state is no longer needed.

    Args:
        done: the run.
        files: a line for each file.
        name: as it was typed.
        paths: of the files, which a run that goes on replaces.

    Raises:
        InterruptProcessingException: the user stopped; the report stands on the node and in the
            log.
    """
    result, report = done.result, "\n".join([*files, *done.remarks])
    if not result.finished:
        remember_files(done.folder, name, paths)
        told = f"Stopped. The best so far is kept; queue again to go on. {report}"
        logger.info("%s", told)
        show_here(told)
        raise comfy.model_management.InterruptProcessingException
    remove_run(done.folder)
    if result.step == 0:
        logger.warning("%s", report)
    return report


def _run(
    recipe: Recipe, config: AdaptationTraining, request: Request, parts: Parts, memory: str
) -> Trained:
    """The recipe over ComfyUI's models, with its progress bar.

    Pictures and prompts are encoded first, and only then the UNet is brought in.
    """
    request.check()
    check_bare(parts.model, "model")
    model_paths.new_file(request.folder, request.file_name)  # refuse before training
    base, text = ComfyBase(parts.model, parts.vae), ComfyText(parts.clip)
    task, examples = request.task_and_examples(base, text, parts)
    held_out = request.held_out_examples(base, parts)
    plan = plan_memory(parts.model, examples.area, config, memory)
    base.load(plan.needed)
    config = replace(config, checkpointing=plan.checkpointing)
    objective = recipe(task, config)
    base.load(plan.needed + trained_bytes(objective))
    return learned(objective, plan, examples, held_out, request.remarks(examples, parts))


def learned(
    objective: Objective[TrainedAdaptation],
    plan: MemoryPlan,
    examples: Examples,
    held_out: Examples | None,
    remarks: Sequence[str],
    by: Callable[..., AdaptationResult] = run_adaptation,
) -> Trained:
    """The steps of a run, with progress bar and interruption; its state goes on from where it is.

    Args:
        objective: on the device.
        plan: how a step fits.
        examples: to train on.
        held_out: what only chooses the best state.
        remarks: for the report.
        by: `run_adaptation`, or what is called as it is.
    """
    config = objective.config
    folder = model_paths.run_folder(run_fingerprint(objective, examples, held_out)[:24])
    watch = watch_on(comfy.utils.ProgressBar(config.steps))
    with fits(plan, config):
        result = by(objective, examples, folder, watch, interrupted, held_out)
    return Trained(result, remarks_of(result, config.steps, remarks), folder)


def remarks_of(result: AdaptationResult, steps: int, own: Sequence[str]) -> list[str]:
    """What a report says of a run of so many steps, with remarks of its own."""
    best = f"best at step {result.step} of {steps}, evaluation loss {result.loss:.4f}"
    worse = result.finished and result.step == 0
    return [best, *own, *([NOTHING] if worse else [])]


def watch_on(bar: comfy.utils.ProgressBar) -> Watch:
    """What moves a progress bar of ComfyUI and shows previews."""

    def watch(step: int, total: int, metrics: dict[str, float], preview: Any) -> None:
        try:
            bar.update_absolute(step, total, ("JPEG", as_picture(preview()), PREVIEW_SIZE))
        except comfy.model_management.InterruptProcessingException as stop:
            raise InterruptedTraining(f"stopped after step {step}") from stop

    return watch


def interrupted() -> bool:
    """True when the user asked ComfyUI to stop; the request is used up."""
    try:
        comfy.model_management.throw_exception_if_processing_interrupted()
    except comfy.model_management.InterruptProcessingException:
        return True
    return False


def as_picture(images: Tensor) -> Image.Image:
    """The first of some images (N, H, W, 3) as a picture."""
    return Image.fromarray(np.uint8(images[0].clamp(0, 1).cpu().numpy() * 255))
