"""What a training step needs of a device's memory, and how to make it fit."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import comfy.model_management
from comfy.model_patcher import ModelPatcher

from ...difflora_core.errors import ConfigError

AUTO, SAVING, FAST = "auto", "saving", "fast"
CHOICES = (AUTO, SAVING, FAST)

PLAIN, CHECKPOINTED = 1.18e6, 1.6e5
"""Bytes of activations for each latent pixel of SDXL in half precision, adapters on its attention:
all remembered (18 GiB at 1024 x 1024), and with layers computed again (2.4 GiB)."""
FEATURES = 4.9e4
"""Bytes of what SDXL's blocks put out for each latent pixel, where a student learns from a teacher:
4,040 numbers of each, in half precision and again in float32 for the loss."""
TRAINED = 16
"""Bytes of a trained number in float32: itself, its gradient and two moments."""
CHANNELS = 320
"""Of SDXL's first block, which these numbers are for."""
SHARE = 0.9
"""Of a device's memory that a plan may fill."""


@dataclass(frozen=True)
class MemoryPlan:
    """How a run is made to fit.

    `checkpointing`: compute layers again; `needed`: bytes of activations of a step's part; `there`:
    bytes of the device; `weights`: of the model, and of its teacher.
    """

    checkpointing: bool
    needed: float
    there: float
    weights: float

    def summary(self, trained: float) -> str:
        """What a step takes, in an artist's words, with so many bytes of what is trained."""
        return (
            f"a step takes about {_gib(self.weights + self.needed + trained)} of memory: "
            f"{_gib(self.weights)} of weights, {_gib(self.needed)} of activations, "
            f"{_gib(trained)} of what is trained"
        )


def activation_bytes(model: ModelPatcher, area: int, samples: int, checkpointing: bool) -> float:
    """Estimate of what is remembered between the forward and the backward pass.

    Args:
        model: ComfyUI's.
        area: latent pixels of a picture.
        samples: pictures at once.
        checkpointing: layers are computed again.
    """
    each = CHECKPOINTED if checkpointing else PLAIN
    return each * _scale(model) * area * samples


def feature_bytes(model: ModelPatcher, area: int, samples: int) -> float:
    """Estimate of what the blocks of a teacher and its student put out; see `activation_bytes`."""
    return FEATURES * _scale(model) * area * samples


def cast_bytes(model: ModelPatcher) -> float:
    """What copies of the weights take that a backward pass waits for; 0 where there are none.

    A model that computes in another type than it is stored in (fp8, or half precision on a CPU)
    casts each weight when it is used, and autograd keeps the copy: of SDXL in float32 10 GB. Layers
    that are computed again make theirs again.
    """
    stored, used = model.model.get_dtype(), model.model.get_dtype_inference()
    if stored == used:
        return 0.0
    sizes = comfy.model_management.dtype_size(used) / comfy.model_management.dtype_size(stored)
    return float(model.model_size() * sizes)


def plan_memory(
    model: ModelPatcher, area: int, config: Any, choice: str, teacher: ModelPatcher | None = None
) -> MemoryPlan:
    """How to run a recipe on a model.

    Args:
        model: ComfyUI's, which is trained on.
        area: latent pixels of a picture.
        config: of the recipe.
        choice: one of CHOICES.
        teacher: the model whose outputs are learned, which is on the device too.
    """
    samples = -(-config.batch // config.accumulate)
    there = comfy.model_management.get_total_memory(model.load_device)
    weights, features = float(model.model_size()), 0.0
    if teacher is not None:
        weights += teacher.model_size()
        features = feature_bytes(model, area, samples)
    plain = activation_bytes(model, area, samples, False) + features + cast_bytes(model)
    checkpointing = choice == SAVING or (choice == AUTO and plain + weights > SHARE * there)
    saved = activation_bytes(model, area, samples, True) + features
    return MemoryPlan(checkpointing, saved if checkpointing else plain, float(there), weights)


def trained_bytes(objective: Any) -> float:
    """What the trained numbers of an objective need on the device."""
    return float(TRAINED * sum(p.numel() for p in objective.parameters() if p.requires_grad))


def _scale(model: ModelPatcher) -> float:
    """How much larger than those of SDXL in half precision a model's activations are."""
    width = model.model.model_config.unet_config.get("model_channels", CHANNELS)
    size = comfy.model_management.dtype_size(model.model.get_dtype_inference()) / 2
    return float(size * width / CHANNELS)


@contextmanager
def fits(plan: MemoryPlan, config: Any) -> Iterator[None]:
    """A block that trains; want of memory becomes a sentence that says what to change.

    Raises:
        ConfigError: the device's memory is too small for a step.
    """
    try:
        yield
    except comfy.model_management.OOM_EXCEPTION as error:
        raise ConfigError(_advice(plan, config)) from error


def _advice(plan: MemoryPlan, config: Any) -> str:
    """What would fit; the first two choices go on from where the run is."""
    problem = (
        f"A training step does not fit: about {_gib(plan.weights)} of weights and "
        f"{_gib(plan.needed)} of activations on a device with {_gib(plan.there)}. "
    )
    kept = " What was trained so far is kept: queue again and it goes on."
    if not plan.checkpointing:
        return f"{problem}Set memory to saving.{kept}"
    if config.accumulate < config.batch:
        return f"{problem}Set accumulate to {config.batch}.{kept}"
    return (
        f"{problem}One picture at a time is the least there is: use smaller pictures (a lower "
        "resolution), a lower rank, or an fp8 checkpoint; each of them starts anew."
    )


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"
