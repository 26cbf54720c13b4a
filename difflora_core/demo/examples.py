"""The people that `make demo` and the workflows show, of the split `example`: no trained part has
seen them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..base_model.protocol import BaseModel
from ..lora.weights import LoRAWeights
from ..storage.image_files import write_image
from ..training.loop import Progress
from ..training.lora.dreambooth import DreamBoothConfig, DreamBoothExamples, train_dreambooth
from .world.identities import split_seeds
from .world.scenes import Pictures, Scene, render_portraits

PERSON, SECOND, SITTER, MODEL = 2, 1, 5, 14
"""Numbers within the split: the person, another one, one whose pose and one whose picture is used.
"""
PHOTOS = 8
REFERENCE = Scene("photo", "neutral", "blue", "plain", "white")
DREAMBOOTH = DreamBoothConfig(
    targets="transformer",
    steps=300,
    learning_rate=1e-2,
    decay="cosine",
    warmup=10,
    loss_weighting="uniform",
    precision="bf16",
)
"""The DreamBooth baseline, as tuned on validation identities."""


@dataclass(frozen=True)
class Photo:
    """A photo that a workflow loads: who, the number that names the pose, what is on it, and how
    far the head may be from its usual place."""

    person: int
    picture: int
    scene: Scene
    spread: float = 1.0


PHOTO_FILES = {
    "difflora_demo_person.png": Photo(PERSON, 0, REFERENCE),
    "difflora_demo_person_2.png": Photo(
        PERSON, 2, Scene("photo", "smiling", "grey", "plain", "green")
    ),
    "difflora_demo_person_3.png": Photo(
        PERSON, 3, Scene("photo", "surprised", "yellow", "striped", "purple")
    ),
    "difflora_demo_second_person.png": Photo(SECOND, 0, REFERENCE),
    "difflora_demo_pose.png": Photo(SITTER, 4, REFERENCE, spread=3.0),
    "difflora_demo_scene.png": Photo(
        MODEL, 2, Scene("photo", "smiling", "pink", "striped", "yellow", "flower", "red")
    ),
}
"""The photos in workflows/; all names begin alike, so that they stand together in a list."""


def photo(name: str) -> Tensor:
    """One of PHOTO_FILES: (64, 64, 3) in [0, 1]."""
    p = PHOTO_FILES[name]
    seed = split_seeds("example", 1, p.person)
    return render_portraits(seed, [p.picture], [p.scene], spread=p.spread).images[0]


def reference_picture(person: int = PERSON) -> Tensor:
    """The reference photo (64, 64, 3) in [0, 1] of an example person."""
    seed = split_seeds("example", 1, person)
    return render_portraits(seed, [0], [REFERENCE]).images[0]


def other_pictures(count: int = PHOTOS, person: int = PERSON) -> Pictures:
    """Further pictures of the person: DreamBooth's training photos, and what likeness means."""
    seed = split_seeds("example", 1, person)[0]
    return render_portraits([seed] * count, range(1, count + 1), looks=("photo", "cartoon"))


def write_photos(folder: Path) -> None:
    """Write the photos of the workflows as picture files."""
    for name in PHOTO_FILES:
        write_image(photo(name), folder / name)


def dreambooth_lora(base: BaseModel, progress: Progress | None = None) -> LoRAWeights:
    """The person's own LoRA, trained the slow way on eight pictures."""
    pictures = other_pictures()
    latents = base.encode_images(pictures.images)
    examples = DreamBoothExamples(latents[None], [pictures.captions])
    trained = train_dreambooth(base, examples, DREAMBOOTH, progress)
    return trained[DREAMBOOTH.steps].batch_item(0)
