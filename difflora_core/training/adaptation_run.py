"""One run of a recipe that adapts a base model from a few pictures, whatever the method.

The state with the lowest loss on fixed batches is what a run leaves, also when it is stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from ..adapters.attach import attach
from ..adapters.base import AdapterSet
from ..base_model.protocol import TextCondition, compute_device, compute_dtype
from ..config import check_range
from ..diffusion.objective import abar_at, add_noise, to_x0
from ..errors import ConfigError, InterruptedTraining
from ..methods.base import Facts
from ..text.encoders import EncodedPrompts
from .concept_task import ConceptExamples, ConceptTask
from .fingerprint import fingerprint
from .loop import Batch, Hooks, LoopConfig, Stopped, train
from .losses import denoising_error

EVALUATION_BATCHES = 6
"""Enough that the state that is kept was better, not luckier."""
EVALUATION_SEED = 71
PREVIEW_TIMESTEP = 600

Watch = Callable[[int, int, dict[str, float], Callable[[], Tensor]], None]
"""Called at every log as (step, steps, metrics, preview); preview() draws a (1, H, W, 3)."""

Trained = TypeVar("Trained")


class Settings(Protocol):
    """What the runner reads of a recipe's settings, a dataclass."""

    @property
    def weighting(self) -> str:
        """Kind of `diffusion.objective.loss_weight`."""


class RunSettings(Settings, Protocol):
    """Settings of a whole recipe."""

    @property
    def steps(self) -> int:
        """Optimiser steps."""

    @property
    def batch(self) -> int:
        """Pictures of a step."""

    @property
    def evaluate_every(self) -> int:
        """Steps between looks at the evaluation batches."""

    @property
    def seed(self) -> int:
        """Of batches and noise."""

    @property
    def loop(self) -> LoopConfig:
        """The run, for instance of `adaptation_loop`."""


def check_run(where: str, settings: RunSettings) -> None:
    """Raises ConfigError where a recipe's course makes no sense."""
    if min(settings.steps, settings.batch, settings.evaluate_every) < 1:
        raise ConfigError("steps, batch and evaluate_every must be at least 1.")
    check_range(where, "seed", settings.seed, 0, 2**62)


class AdapterObjective(Protocol):
    """What makes adapters for prompts, to be trained or drawn with."""

    @property
    def task(self) -> ConceptTask:
        """The frozen setting."""

    @property
    def config(self) -> Settings:
        """The recipe."""

    @property
    def module_names(self) -> Mapping[str, str]:
        """Layer name to module path of the base's UNet."""

    def prepare(self, prompts: Sequence[str]) -> tuple[EncodedPrompts, AdapterSet]:
        """Encoded prompts and the adapters that belong to them; gradients flow.

        In evaluation mode it changes nothing and speaks to no other process.
        """


class Objective(AdapterObjective, Protocol[Trained]):
    """What a method trains: a module (`nn.Module`) whose forward is the loss."""

    @property
    def config(self) -> RunSettings:
        """The recipe."""

    def forward(self, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """A batch of `ConceptExamples.draw` to (loss, metrics)."""

    def adaptations(self, facts: Facts) -> list[Trained]:
        """What was trained so far, one record for each word, with facts for its file."""


def adaptation_loop(
    steps: int, rate: float, evaluate_every: int, seed: int, precision: str = "no"
) -> LoopConfig:
    """The course that all these recipes take: AdamW without decay, the rate falls at the end.

    Args:
        steps: of the optimiser.
        rate: its learning rate.
        evaluate_every: steps between looks at the evaluation batches.
        seed: of batches and noise.
        precision: see `LoopConfig`.
    """
    return LoopConfig.from_dict(
        {
            "steps": steps,
            "learning_rate": rate,
            "warmup": 1,
            "decay": 0.3,
            "weight_decay": 0.0,
            "betas": (0.9, 0.999),
            "checkpoint_every": max(evaluate_every, 100),
            "log_every": evaluate_every,
            "precision": precision,
            "seed": seed,
            "validate_every": evaluate_every,
            "validate_first": True,
            "patience": 0,
        }
    )


@dataclass(frozen=True, eq=False)
class AdaptationResult(Generic[Trained]):
    """What a run left.

    `adaptations`: at the lowest evaluation loss; `finished`: False when it was stopped; `step`: of
    that state; `loss`: its evaluation loss.
    """

    adaptations: list[Trained]
    finished: bool
    step: int
    loss: float


def run_adaptation(
    objective: Objective[Trained],
    examples: ConceptExamples,
    folder: Path,
    watch: Watch | None = None,
    stop: Callable[[], bool] | None = None,
) -> AdaptationResult[Trained]:
    """Train an objective; a stopped run returns its best state and can be taken up again.

    Args:
        objective: of the method.
        examples: pictures.
        folder: of this run's state; taken up again when settings and pictures are the same.
        watch: see `Watch`; `evaluation` is among the metrics. It may raise InterruptedTraining.
        stop: asked before every step; True stops the run.

    Raises:
        InterruptedTraining: stopped before anything was evaluated.
        CheckpointError: the folder holds a run with other settings or pictures.
        TypeError: the objective is no module.
    """
    module = _module(objective)
    config, draw = objective.config, examples.draw(objective.config.batch)

    def report(step: int, total: int, metrics: dict[str, float]) -> None:
        named = {"evaluation" if k == "validation" else k: v for k, v in metrics.items()}
        if watch is not None:
            watch(step, total, named, lambda: preview(objective, examples))

    hooks = Hooks(
        progress=report,
        validate=_evaluation(module, draw),
        stop=stop,
        base=objective.task.base,
        fingerprint=_identity(objective, examples),
    )
    finished, device = True, compute_device(objective.task.base)
    try:
        result = train(module, draw, config.loop, folder, hooks, device)
    except Stopped as early:
        if "validation" not in early.result:
            raise InterruptedTraining(str(early)) from early
        finished, result = False, early.result
    module.to("cpu")
    step = int(result["best_step"])
    facts: Facts = {"steps": step, "pictures": len(examples)}
    return AdaptationResult(objective.adaptations(facts), finished, step, result["validation"])


def _identity(objective: Objective[Trained], examples: ConceptExamples) -> str:
    """Digest of everything that a run depends on."""
    task, config = objective.task, objective.config
    setting = (task.words, task.contexts, task.base_name, task.probe)
    return fingerprint(type(objective).__name__, config, *setting, examples)


def _evaluation(module: nn.Module, draw: Callable[[torch.Generator], Batch]) -> Callable[[], float]:
    """Mean loss of a module on fixed batches."""
    generator = torch.Generator().manual_seed(EVALUATION_SEED)
    batches = [draw(generator) for _ in range(EVALUATION_BATCHES)]

    @torch.no_grad()
    def evaluate() -> float:
        device = next(module.parameters()).device
        total = 0.0
        with _evaluating(module):
            for batch in batches:
                here = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
                total += float(module(here)[0])
        return total / len(batches)

    return evaluate


def _module(objective: object) -> nn.Module:
    """An objective as the module that it must be."""
    if not isinstance(objective, nn.Module):
        raise TypeError(f"{type(objective).__name__} is not an nn.Module")
    return objective


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """A module in evaluation mode while the block runs."""
    module.eval()
    try:
        yield
    finally:
        module.train()


def masked_loss(
    objective: AdapterObjective, batch: Mapping[str, Any], guidance: float = 1.0
) -> Tensor:
    """Mean denoising loss of a batch under its own prompts, inside its masks.

    Args:
        objective: prepares prompts and adapters.
        batch: of `ConceptExamples.draw`.
        guidance: see `losses.under_guidance`.
    """
    encoded, adapters = objective.prepare(batch["prompts"])
    noised = objective.task.noised(batch, encoded, guidance)
    base, weighting = objective.task.base, objective.config.weighting
    with attach(base.unet, adapters, names=objective.module_names):
        return denoising_error(base, noised, weighting, batch.get("masks")).mean()


@torch.no_grad()
def preview(objective: AdapterObjective, examples: ConceptExamples) -> Tensor:
    """What the model makes of the first picture under much noise, in one step: (1, H, W, 3).

    The noise is always the same, so the pictures of a run can be compared.
    """
    base = objective.task.base
    device, dtype = compute_device(base), compute_dtype(base)
    clean = examples.latents[:1].to(device).float()
    generator = torch.Generator().manual_seed(EVALUATION_SEED)
    noise = torch.randn(clean.shape, generator=generator).to(clean)
    when = torch.tensor([PREVIEW_TIMESTEP], device=device)
    abar = abar_at(base.alphas_cumprod, when, clean)
    noisy = add_noise(clean, noise, abar)
    with _evaluating(_module(objective)):
        encoded, adapters = objective.prepare([examples.prompts[0][0]])
    text = TextCondition(encoded.context.to(device, dtype), encoded.pooled.to(device, dtype))
    with attach(base.unet, adapters, names=objective.module_names):
        prediction = base.predict(noisy.to(dtype), when, text)
    latents = to_x0(prediction.float(), noisy, abar, base.prediction_type)
    image: Tensor = base.decode_latents(latents)
    return image
