"""One run of a recipe that adapts a base model from a few pictures, whatever the method.

The state with the lowest loss on fixed batches is what a run leaves, also when it is stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from ..adapters.attach import attach
from ..adapters.base import AdapterSet
from ..base_model.protocol import TextCondition, compute_device, compute_dtype
from ..config import Config, check_range
from ..diffusion.objective import LossWeight, abar_at, add_noise, to_x0
from ..errors import ConfigError, InterruptedTraining
from ..methods.base import Facts
from ..text.encoders import EncodedPrompts
from .fingerprint import SAME_COURSE, fingerprint, weights_digest
from .loop import Batch, Hooks, LoopConfig, Stopped, train
from .loop_config import MAX_TRAINING_SEED, Precision
from .losses import denoising_error
from .picture_examples import Examples
from .picture_task import PictureTask

EVALUATION_BATCHES = 6
"""Enough that the state that is kept was better, not luckier."""
EVALUATION_SEED = 71
PREVIEW_TIMESTEP = 600

Watch = Callable[[int, int, dict[str, float], Callable[[], Tensor]], None]
"""Called at every log as (step, steps, metrics, preview); preview() draws a (1, H, W, 3)."""

Trained = TypeVar("Trained")


@dataclass(frozen=True)
class AdaptationTraining(Config):
    """What the settings of all these recipes have in common.

    Args:
        steps: of the optimiser.
        batch: pictures of a step.
        weighting: of the denoising loss, see `diffusion.objective.loss_weight`.
        evaluate_every: steps between looks at the evaluation batches.
        precision, accumulate, checkpointing: see `LoopConfig`.
        seed: of batches and noise.
        patience: evaluations without a new best before it stops; 0 takes all steps.

    Raises:
        ConfigError: a value out of range.
    """

    steps: int = 400
    batch: int = 4
    weighting: LossWeight = "uniform"
    evaluate_every: int = 25
    precision: Precision = "no"
    seed: int = 0
    accumulate: int = field(default=1, metadata=SAME_COURSE)
    checkpointing: bool = field(default=False, metadata=SAME_COURSE)
    patience: int = 0

    def __post_init__(self) -> None:
        self.check_choices(type(self).__name__)
        for name in ("steps", "batch", "evaluate_every", "accumulate"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}.")
        check_range(type(self).__name__, "seed", self.seed, 0, MAX_TRAINING_SEED)
        check_range(type(self).__name__, "patience", self.patience, 0, 10_000)

    @property
    def evaluation_batches(self) -> int:
        """Batches that a state is judged by."""
        return EVALUATION_BATCHES

    @property
    def loop(self) -> LoopConfig:
        """The run; a recipe says at which rate."""
        raise NotImplementedError

    def course(self, rate: float) -> LoopConfig:
        """The course that all these recipes take: AdamW without decay, the rate falls at the end.

        Args:
            rate: learning rate.
        """
        return LoopConfig(
            steps=self.steps,
            learning_rate=rate,
            warmup=1,
            decay=0.3,
            weight_decay=0.0,
            betas=(0.9, 0.999),
            checkpoint_every=max(self.evaluate_every, 100),
            log_every=self.evaluate_every,
            precision=self.precision,
            seed=self.seed,
            accumulate=self.accumulate,
            checkpointing=self.checkpointing,
            validate_every=self.evaluate_every,
            validate_first=True,
            patience=self.patience,
        )


class AdapterObjective(Protocol):
    """What makes adapters for prompts, to be trained or drawn with."""

    @property
    def task(self) -> PictureTask:
        """What is frozen around the training."""

    @property
    def config(self) -> AdaptationTraining:
        """The recipe."""

    @property
    def module_names(self) -> Mapping[str, str]:
        """Layer name to module path of the base's UNet."""

    def prepare(self, prompts: Sequence[str]) -> tuple[EncodedPrompts, AdapterSet]:
        """Encoded prompts and the adapters that belong to them; gradients flow.

        In evaluation mode it changes nothing and speaks to no other process.
        """


class Objective(AdapterObjective, Protocol[Trained]):
    """What a method trains: a module (`nn.Module`) whose forward is the loss.

    Its `after_step`, where it has one, is called with the number of steps done; `scale_gradients`
    does what `Hooks` says. What a run depends on beside settings, task and pictures stands in
    `facts`.
    """

    def forward(self, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """A batch of `PictureExamples.draw` to (loss, metrics)."""

    def adaptations(self, facts: Facts) -> list[Trained]:
        """What was trained so far, one record for each word, with facts for its file."""


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
    examples: Examples,
    folder: Path,
    watch: Watch | None = None,
    stop: Callable[[], bool] | None = None,
    held_out: Examples | None = None,
) -> AdaptationResult[Trained]:
    """Train an objective; a stopped run returns its best state and can be taken up again.

    Args:
        objective: of the method.
        examples: pictures.
        folder: of this run's state; taken up again when settings and pictures are the same.
        watch: see `Watch`; `evaluation` is among the metrics. It may raise InterruptedTraining.
        stop: asked before every step; True stops the run.
        held_out: pictures to choose the best state by; `examples` unless given.

    Raises:
        InterruptedTraining: stopped before anything was evaluated.
        CheckpointError: the folder holds a run with other settings or pictures.
        TypeError: the objective is no module.
    """
    module = _module(objective)
    config, steps = objective.config, len(objective.task.base.alphas_cumprod)
    unseen = examples if held_out is None else held_out

    hooks = Hooks(
        progress=_progress(objective, examples, watch),
        validate=_evaluation(module, unseen.draw(config.batch, steps), config.evaluation_batches),
        stop=stop,
        after_step=getattr(module, "after_step", None),
        scale_gradients=getattr(module, "scale_gradients", None),
        base=objective.task.base,
        fingerprint=run_fingerprint(objective, examples, held_out),
        settings=(config,),
    )
    finished, device = True, compute_device(objective.task.base)
    try:
        trained = examples.draw(config.batch, steps)
        result = train(module, trained, config.loop, folder, hooks, device)
    except Stopped as early:
        if "validation" not in early.result:
            raise InterruptedTraining(str(early)) from early
        finished, result = False, early.result
    module.to("cpu")
    step = int(result["best_step"])
    made = objective.adaptations({"steps": step, "pictures": len(examples)})
    return AdaptationResult(made, finished, step, result["validation"])


def _progress(
    objective: AdapterObjective, examples: Examples, watch: Watch | None
) -> Callable[[int, int, dict[str, float]], None]:
    """What the loop reports to, in the words of `watch`."""

    def report(step: int, total: int, metrics: dict[str, float]) -> None:
        named = {"evaluation" if k == "validation" else k: v for k, v in metrics.items()}
        if watch is not None:
            watch(step, total, named, lambda: preview(objective, examples))

    return report


def run_fingerprint(
    objective: Objective[Trained],
    examples: Examples,
    held_out: Examples | None = None,
) -> str:
    """Digest of everything that a run depends on: settings, task, base and pictures."""
    task, config = objective.task, objective.config
    own = getattr(objective, "facts", ())
    named = (type(objective).__name__, config, *task.facts, *own)
    pictures = (examples,) if held_out is None else (examples, held_out)
    return fingerprint(*named, weights_digest(task.base.unet), *pictures)


def _evaluation(
    module: nn.Module, draw: Callable[[torch.Generator], Batch], count: int
) -> Callable[[], float]:
    """Mean loss of a module on so many fixed batches."""
    generator = torch.Generator().manual_seed(EVALUATION_SEED)
    batches = [draw(generator) for _ in range(count)]

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
    """Mean denoising loss () of a batch under its own prompts, inside its masks.

    Args:
        objective: prepares prompts and adapters.
        batch: of `PictureExamples.draw`.
        guidance: see `losses.under_guidance`.
    """
    encoded, adapters = objective.prepare(batch["prompts"])
    noised = objective.task.noised(batch, encoded, guidance)
    base, weighting = objective.task.base, objective.config.weighting
    with attach(base.unet, adapters, names=objective.module_names):
        return denoising_error(base, noised, weighting, batch.get("masks")).mean()


@torch.no_grad()
def preview(objective: AdapterObjective, examples: Examples) -> Tensor:
    """What the model makes of the first picture under much noise, in one step: (1, H, W, 3).

    The noise is always the same, so the pictures of a run can be compared.
    """
    base = objective.task.base
    device, dtype = compute_device(base), compute_dtype(base)
    latents, prompt = examples.first
    clean = latents.to(device).float()
    generator = torch.Generator().manual_seed(EVALUATION_SEED)
    noise = torch.randn(clean.shape, generator=generator).to(clean)
    when = torch.tensor([PREVIEW_TIMESTEP], device=device)
    abar = abar_at(base.alphas_cumprod, when, clean)
    noisy = add_noise(clean, noise, abar)
    with _evaluating(_module(objective)):
        encoded, adapters = objective.prepare([prompt])
    text = TextCondition(encoded.context.to(device, dtype), encoded.pooled.to(device, dtype))
    with attach(base.unet, adapters, names=objective.module_names):
        prediction = base.predict(noisy.to(dtype), when, text)
    estimate = to_x0(prediction.float(), noisy, abar, base.prediction_type)
    image: Tensor = base.decode_latents(estimate)
    return image
