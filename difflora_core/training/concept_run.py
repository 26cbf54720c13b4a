"""One run of a concept recipe: batches, a fixed evaluation batch, the best state so far."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..adapters.attach import attach
from ..base_model.protocol import TextCondition, compute_device, compute_dtype
from ..diffusion.objective import abar_at, add_noise, to_x0
from ..errors import CheckpointError, InterruptedTraining
from ..storage.safetensors_io import write_atomic
from ..text.new_words import Concept
from .concept_task import ConceptExamples
from .loop import LoopConfig, train
from .losses import denoising_error

EVALUATION_BATCHES = 6
"""Enough that the state that is kept was better, not luckier."""
EVALUATION_SEED = 71
PREVIEW_TIMESTEP = 600

Watch = Callable[[int, int, dict[str, float], Callable[[], Tensor]], None]
"""Called at every log as (step, steps, metrics, preview); preview() draws a (1, H, W, 3)."""


def concept_loop(
    steps: int, rate: float, evaluate_every: int, seed: int, precision: str = "no"
) -> LoopConfig:
    """The course that all concept recipes take: AdamW without decay, the rate falls at the end.

    Args:
        steps: of the optimiser.
        rate: its learning rate.
        evaluate_every: steps between looks at the evaluation batch.
        seed: of batches and noise.
        precision: "no" or "bf16".
    """
    return LoopConfig(
        steps=steps,
        learning_rate=rate,
        warmup=1,
        decay=0.3,
        weight_decay=0.0,
        betas=(0.9, 0.999),
        checkpoint_every=max(evaluate_every, 100),
        log_every=evaluate_every,
        precision=precision,
        seed=seed,
    )


@dataclass(frozen=True, eq=False)
class ConceptResult:
    """What a run left.

    `concepts`: at the lowest evaluation loss; `finished`: False when it was stopped; `step`: of
    that state; `loss`: its evaluation loss.
    """

    concepts: list[Concept]
    finished: bool
    step: int
    loss: float


class _Best:
    """The state with the lowest loss on fixed batches, kept on disk beside the checkpoint."""

    def __init__(
        self, objective: nn.Module, examples: ConceptExamples, batch: int, folder: Path
    ) -> None:
        self.objective, self.path = objective, folder / "best.safetensors"
        generator = torch.Generator().manual_seed(EVALUATION_SEED)
        draw = examples.draw(batch)
        self.batches = [draw(generator) for _ in range(EVALUATION_BATCHES)]
        self.step, self.loss = 0, float("inf")
        if self.path.exists():
            self.step, self.loss = self._read()
        else:
            self.look(0)

    def look(self, step: int) -> float:
        """Loss of the present state; keeps it when it is the lowest so far."""
        loss = self._measure()
        if loss < self.loss:
            self.step, self.loss = step, loss
            state = {k: v.detach().cpu().contiguous() for k, v in self._state().items()}
            write_atomic(state, {"step": str(step), "loss": repr(loss)}, self.path)
        return loss

    def beaten(self) -> bool:
        """Whether the present state is better still, as a run stopped between looks may be.

        The file stays as a straight run's, so that the run can be taken up.
        """
        loss = self._measure()
        if loss >= self.loss:
            return False
        self.loss = loss
        return True

    def _measure(self) -> float:
        self.objective.eval()
        device = next(self.objective.parameters()).device
        total = 0.0
        with torch.no_grad():
            for batch in self.batches:
                here = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
                total += float(self.objective(here)[0])
        self.objective.train()
        return total / len(self.batches)

    def restore(self) -> None:
        """Put the best state back into the objective."""
        with safe_open(self.path, "pt") as file, torch.no_grad():
            for name, parameter in self._state().items():
                parameter.copy_(file.get_tensor(name))

    def _state(self) -> dict[str, Tensor]:
        return dict(self.objective.named_parameters())

    def _read(self) -> tuple[int, float]:
        try:
            with safe_open(self.path, "pt") as file:
                facts = file.metadata() or {}
                shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
            step, loss = int(facts["step"]), float(facts["loss"])
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise CheckpointError(f"{self.path} is damaged; delete it to start anew.") from error
        if shapes != {name: tuple(p.shape) for name, p in self._state().items()}:
            raise CheckpointError(f"{self.path} belongs to another model; move it away.")
        return step, loss


def run_concepts(
    objective: Any,
    examples: ConceptExamples,
    batch: int,
    loop: LoopConfig,
    folder: Path,
    watch: Watch | None = None,
    stop: Callable[[], bool] | None = None,
) -> ConceptResult:
    """Train an objective; a stopped run returns its best state and can be taken up again.

    Args:
        objective: PerfusionObjective or InfusionObjective.
        examples: pictures.
        batch: pictures of a step.
        loop: the run.
        folder: of this run's state; taken up again when settings and pictures are the same.
        watch: see `Watch`; `evaluation` is among the metrics. It may raise InterruptedTraining.
        stop: asked before every step; True stops the run.

    Raises:
        CheckpointError: the folder holds a run with other settings or pictures.
    """
    _same_run(folder, objective, examples, batch, loop)
    best = _Best(objective, examples, batch, folder)

    def report(step: int, total: int, metrics: dict[str, float]) -> None:
        metrics = {**metrics, "evaluation": best.look(step)}
        if watch is not None:
            watch(step, total, metrics, lambda: preview(objective, examples))

    drawn = examples.draw(batch)

    def draw(generator: torch.Generator) -> dict[str, object]:
        if stop is not None and stop():
            raise InterruptedTraining("stopped between two steps")
        return drawn(generator)

    finished = True
    try:
        train(objective, draw, loop, folder, report)
    except InterruptedTraining:
        finished = False
    if finished or not best.beaten():
        best.restore()
    objective.to("cpu")
    facts: dict[str, str | int | float] = {"steps": best.step, "pictures": len(examples)}
    return ConceptResult(objective.concepts(facts), finished, best.step, best.loss)


def masked_loss(objective: Any, batch: Mapping[str, Any], guidance: float = 1.0) -> Tensor:
    """Mean denoising loss of a batch under its own prompts, inside its masks (perfusion.md 3).

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


def _same_run(
    folder: Path, objective: Any, examples: ConceptExamples, batch: int, loop: LoopConfig
) -> None:
    """Refuse to take up a run with other settings."""
    latents = [*examples.latents.shape, float(examples.latents.double().sum())]
    words = [[word.word, word.superclass] for word in objective.task.words]
    prompts = [list(options) for options in examples.prompts]
    text = json.dumps([repr(objective.config), words, latents, prompts, batch, repr(loop)])
    mark = hashlib.sha256(text.encode()).hexdigest()
    path = folder / "run.txt"
    folder.mkdir(parents=True, exist_ok=True)
    if path.exists() and path.read_text() != mark:
        raise CheckpointError(
            f"{folder} holds the state of another training (other words, pictures or settings); "
            "delete it or take another folder."
        )
    path.write_text(mark)


@torch.no_grad()
def preview(objective: Any, examples: ConceptExamples) -> Tensor:
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
    objective.eval()
    encoded, adapters = objective.prepare([examples.prompts[0][0]])
    objective.train()
    text = TextCondition(encoded.context.to(device, dtype), encoded.pooled.to(device, dtype))
    with attach(base.unet, adapters, names=objective.module_names):
        prediction = base.predict(noisy.to(dtype), when, text)
    latents = to_x0(prediction.float(), noisy, abar, base.prediction_type)
    image: Tensor = base.decode_latents(latents)
    return image
