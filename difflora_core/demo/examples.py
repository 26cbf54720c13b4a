"""The person that `make demo` shows: seen by no trained part, drawn from the split `example`."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from ..lora.weights import LoRAWeights
from ..storage.image_files import write_image
from ..training.base_model import BaseModel
from ..training.dreambooth import DreamBoothConfig, DreamBoothExamples, train_dreambooth
from ..training.loop import Progress
from .identities import split_seeds
from .scenes import Pictures, Scene, render_portraits

PERSON = 2
"""Number of the person within the split."""
PHOTOS = 8
REFERENCE = Scene("photo", "neutral", "blue", "plain", "white")
DREAMBOOTH = DreamBoothConfig(
    steps=300,
    learning_rate=1e-2,
    decay="cosine",
    warmup=10,
    loss_weighting="uniform",
    precision="bf16",
)
"""The DreamBooth baseline, as tuned on validation identities."""


def reference_picture(person: int = PERSON) -> Tensor:
    """The reference photo (64, 64, 3) in [0, 1] of an example person."""
    seed = split_seeds("example", 1, person)
    return render_portraits(seed, [0], [REFERENCE]).images[0]


def other_pictures(count: int = PHOTOS, person: int = PERSON) -> Pictures:
    """Further pictures of the person: DreamBooth's training photos, and what likeness means."""
    seed = split_seeds("example", 1, person)[0]
    return render_portraits([seed] * count, range(1, count + 1), looks=("photo", "cartoon"))


def write_reference(path: Path) -> None:
    """Write the reference photo as a picture file."""
    write_image(reference_picture(), path)


def dreambooth_lora(base: BaseModel, progress: Progress | None = None) -> LoRAWeights:
    """The person's own LoRA, trained the slow way on eight pictures."""
    pictures = other_pictures()
    latents = base.encode_images(pictures.images)
    examples = DreamBoothExamples(latents[None], [pictures.captions])
    trained = train_dreambooth(base, examples, DREAMBOOTH, progress)
    return trained[DREAMBOOTH.steps].batch_item(0)
