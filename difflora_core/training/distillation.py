"""Distillation: a style of any method learns to draw as a teacher draws, another base model.

arXiv 2401.13942, distillation from a community model; the losses are those of BK-SDM (2305.15798)
without its task loss, for which there are no pictures of the quality wanted:

    L = w_out E|T(z_t, c_T, t) - S(z_t, c_S, t)|^2  +  w_feat sum_l E(|f_T^l - f_S^l|^2 / |f_T^l|^2)

T is the teacher, S the student with the style on it, f^l the output of block l of a UNet. Weights
and blocks are ours, they are lost. Where both read prompts by the same text encoders, outputs and
features are compared; else outputs alone (scenario 2), since features would overwrite what the
student makes of its own language. Clean latents come from the teacher, see `distillation_data`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.attach import attach
from ..adapters.base import AdapterSet
from ..base_model.block_outputs import recorded_blocks
from ..base_model.protocol import BaseModel, TextCondition, compute_device, compute_dtype, predict
from ..config import Config, check_ranges
from ..diffusion.objective import abar_at, add_noise
from ..errors import ConfigError
from ..methods.base import Facts, TrainedAdaptation
from ..text.encoders import EncodedPrompts, check_probe, text_probe
from .adaptation_run import (
    AdaptationResult,
    AdaptationTraining,
    Objective,
    Watch,
    run_adaptation,
)
from .fingerprint import weights_digest
from .picture_examples import PictureExamples
from .picture_task import PictureTask

SAME = 1e-6
"""Relative distance of predictions below which a teacher has nothing to teach."""
OTHER_TEXT = (
    "the text encoders differ, so only outputs are compared: features would overwrite how the "
    "student reads"
)
OTHER_LAYERS = "the models have other layers, so only outputs are compared, not features"


@dataclass(frozen=True)
class DistillationLoss(Config):
    """Weights of the loss.

    `output`: of the squared error of what both predict, a mean over its numbers; `features`: of
    the squared error of each block's output, relative to the teacher's.
    """

    output: float = 1.0
    features: float = 0.1

    def __post_init__(self) -> None:
        check_ranges("Distillation", self, 0, 1000, "output", "features")
        if self.output == self.features == 0:
            raise ConfigError("Distillation: output and features cannot both weigh 0.")


@dataclass(frozen=True, eq=False)
class DistillationTask(PictureTask):
    """A student and its teacher, all frozen; made by `distillation_task`.

    Args:
        teacher: the base model to learn from, with its text encoders.
        loss: what counts here.
        spoken: a prompt of the student to the teacher's words for it, where they differ.
        remarks: what the artist should know, in words.
    """

    teacher: PictureTask
    loss: DistillationLoss
    spoken: Mapping[str, str]
    remarks: tuple[str, ...] = ()

    @property
    def facts(self) -> tuple[object, ...]:
        """Also the teacher, its prompts, and the loss."""
        teacher = (*self.teacher.facts, weights_digest(self.teacher.base.unet))
        return (*super().facts, *teacher, self.loss, self.spoken)

    def taught(self, prompts: Sequence[str]) -> TextCondition:
        """What the teacher reads for the student's prompts."""
        encoded = self.teacher.encode([self.spoken.get(prompt, prompt) for prompt in prompts])
        return TextCondition(encoded.context, encoded.pooled)


def distillation_task(
    student: PictureTask,
    teacher: PictureTask,
    loss: DistillationLoss,
    spoken: Mapping[str, str] | None = None,
) -> DistillationTask:
    """A student and a teacher that fit each other.

    Args:
        student: the base model that the style is for.
        teacher: whom it learns from.
        loss: what the artist asks for; features count only where both read by the same text
            encoders and have the same layers.
        spoken: see `DistillationTask`.

    Raises:
        ConfigError: the teacher is of another family, predicts something else, or has other
            latents or noise; or nothing of the loss is left.
    """
    _check_fits(student, teacher)
    remarks = []
    if loss.features:
        if not _same_text(student, teacher):
            remarks.append(OTHER_TEXT)
        elif _shapes(student.base.unet) != _shapes(teacher.base.unet):
            remarks.append(OTHER_LAYERS)
    if remarks and loss.output == 0:
        raise ConfigError(f"There is no loss left: {remarks[0]}, and output weighs 0. Give it 1.")
    left = replace(loss, features=0.0) if remarks else loss
    return DistillationTask(
        base=student.base,
        text=student.text,
        base_name=student.base_name,
        teacher=teacher,
        loss=left,
        spoken=dict(spoken or {}),
        remarks=tuple(remarks),
    )


def _check_fits(student: PictureTask, teacher: PictureTask) -> None:
    """Raises ConfigError unless both predict the same of the same noisy latents."""
    own, other = student.base, teacher.base
    kinds = [
        ("family", student.base_name, teacher.base_name),
        ("prediction", own.prediction_type, other.prediction_type),
        ("latent channels", latent_channels(own), latent_channels(other)),
        ("steps of noise", len(own.alphas_cumprod), len(other.alphas_cumprod)),
    ]
    for what, mine, theirs in kinds:
        if mine != theirs:
            raise ConfigError(
                f"The teacher cannot teach this student, their {what} differ: {theirs} and "
                f"{mine}. Take a teacher that is a fine-tune of the student's own family."
            )
    if not torch.allclose(own.alphas_cumprod.cpu(), other.alphas_cumprod.cpu(), atol=1e-4):
        raise ConfigError(
            "The teacher cannot teach this student, their noise schedules differ (zero terminal "
            "SNR, or a shifted one). Take a teacher with the student's own."
        )


def latent_channels(base: BaseModel) -> int:
    """Channels of the latents that a base model reads."""
    convolutions = (part for part in base.unet.modules() if isinstance(part, nn.Conv2d))
    return next(convolutions).in_channels


def _same_text(student: PictureTask, teacher: PictureTask) -> bool:
    """True when both read prompts alike."""
    try:
        check_probe(text_probe(student.text), text_probe(teacher.text), "The teacher")
    except ConfigError:
        return False
    return True


def _shapes(unet: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of all weights."""
    return {name: tuple(parameter.shape) for name, parameter in unet.named_parameters()}


class DistillationObjective(nn.Module):
    """A style that learns from a teacher; forward maps a batch to (loss, metrics).

    Args:
        style: the style's own objective, made with a `DistillationTask`: its layers are trained,
            its own loss is never asked for.

    Raises:
        ConfigError: it was made with another task.
        TypeError: it is no module.
    """

    def __init__(self, style: Objective[TrainedAdaptation]) -> None:
        super().__init__()
        if not isinstance(style, nn.Module):
            raise TypeError(f"{type(style).__name__} is not an nn.Module")
        if not isinstance(style.task, DistillationTask):
            raise ConfigError("A style that is distilled needs a task with a teacher.")
        self.style = style
        self.task: DistillationTask = style.task

    @property
    def config(self) -> AdaptationTraining:
        """The style's recipe."""
        config: AdaptationTraining = self.style.config
        return config

    @property
    def module_names(self) -> Mapping[str, str]:
        """Layer name to module path of the base's UNet."""
        names: Mapping[str, str] = self.style.module_names
        return names

    def after_step(self, done: int) -> None:
        """So many steps are done."""
        after_step: Callable[[int], None] | None = getattr(self.style, "after_step", None)
        if after_step is not None:
            after_step(done)

    def prepare(self, prompts: Sequence[str]) -> tuple[EncodedPrompts, AdapterSet]:
        """Encoded prompts and the adapters that belong to them."""
        made: tuple[EncodedPrompts, AdapterSet] = self.style.prepare(prompts)
        return made

    def forward(self, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss () of a batch of `PictureExamples.draw`, with its parts, unweighted, as metrics."""
        task = self.task
        wanted, theirs = self.teacher_answer(batch)
        encoded, adapters = self.prepare(batch["prompts"])
        text = TextCondition(encoded.context, encoded.pooled)
        with attach(task.base.unet, adapters, names=self.module_names):
            made, own = _run(task.base, batch, text)
        output = output_loss(wanted, made)
        metrics = {"output": output.detach()}
        loss = task.loss.output * output
        if task.loss.features:
            features = feature_loss(theirs, own)
            loss = loss + task.loss.features * features
            metrics["features"] = features.detach()
        return loss, metrics

    @torch.no_grad()
    def teacher_answer(self, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """What the teacher predicts of a batch (B, C, h, w), and its blocks' outputs by name."""
        return _run(self.task.teacher.base, batch, self.task.taught(batch["prompts"]))

    def adaptations(self, facts: Facts) -> list[TrainedAdaptation]:
        """What was trained so far, one record."""
        compared = "outputs and features" if self.task.loss.features else "outputs"
        made: list[TrainedAdaptation] = self.style.adaptations({**facts, "distilled_by": compared})
        return made


def output_loss(wanted: Tensor, made: Tensor) -> Tensor:
    """E|T - S|^2, a mean over all numbers: () of predictions (B, C, h, w)."""
    return (wanted - made).square().mean()


def feature_loss(wanted: Mapping[str, Tensor], made: Mapping[str, Tensor]) -> Tensor:
    """Sum over blocks of E(|f_T - f_S|^2 / |f_T|^2), each ratio of one sample: ().

    Args:
        wanted: name of a block to the teacher's features (B, C, h, w).
        made: the student's.
    """
    each = []
    for name, theirs in wanted.items():
        fine = torch.promote_types(theirs.dtype, torch.float32)
        theirs, own = theirs.to(fine).flatten(1), made[name].to(fine).flatten(1)
        size = theirs.square().sum(1).clamp_min(torch.finfo(fine).tiny)
        each.append(((theirs - own).square().sum(1) / size).mean())
    return torch.stack(each).sum()


def _run(
    base: BaseModel, batch: Mapping[str, Any], text: TextCondition
) -> tuple[Tensor, dict[str, Tensor]]:
    """What a base predicts of a noised batch (B, C, h, w), and what its blocks put out."""
    fine = torch.promote_types(compute_dtype(base), torch.float32)
    clean, noise = batch["latents"].to(fine), batch["noise"].to(fine)
    noisy = add_noise(clean, noise, abar_at(base.alphas_cumprod, batch["timesteps"], clean))
    with recorded_blocks(base.unet) as features:
        return predict(base, noisy, batch["timesteps"], text), features


def run_distillation(
    objective: DistillationObjective,
    examples: PictureExamples,
    folder: Path,
    watch: Watch | None = None,
    stop: Callable[[], bool] | None = None,
    held_out: PictureExamples | None = None,
) -> AdaptationResult[TrainedAdaptation]:
    """Train a style by its teacher; arguments and errors as `adaptation_run.run_adaptation`.

    Raises:
        ConfigError: teacher and student draw the same, so there is nothing to learn.
    """
    prompt, size = examples.prompts[0][0], tuple(examples.latents.shape[-2:])
    check_differs(objective.task, prompt, (size[0], size[1]))
    return run_adaptation(objective, examples, folder, watch, stop, held_out)


@torch.no_grad()
def check_differs(task: DistillationTask, prompt: str, size: tuple[int, int]) -> None:
    """Refuses a teacher that predicts what the bare student does.

    Args:
        task: both.
        prompt: of the student, asked in noise.
        size: height and width of a latent.

    Raises:
        ConfigError: they predict the same, or something that is not finite.
    """
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 1, latent_channels(task.base), *size, generator=generator)
    device = compute_device(task.base)
    half = torch.tensor([len(task.base.alphas_cumprod) // 2], device=device)
    batch = {"latents": noise[0].to(device), "noise": noise[1].to(device), "timesteps": half}
    encoded = task.encode([prompt])
    mine, _ = _run(task.base, batch, TextCondition(encoded.context, encoded.pooled))
    theirs, _ = _run(task.teacher.base, batch, task.taught([prompt]))
    distance = float((mine - theirs.to(mine)).norm() / theirs.norm())
    if not math.isfinite(distance):
        raise ConfigError("What teacher or student predict is not finite; the file is damaged.")
    if distance < SAME:
        raise ConfigError(
            "There is nothing to learn: teacher and student draw the same. Connect another model "
            "as the teacher; one with LoRAs must have them on it."
        )
