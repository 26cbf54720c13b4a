"""`generate`: photos of a person to that person's LoRA file, without ComfyUI."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from torch import Tensor

from ..config import Config, check_range
from ..diffusion.sampler import MAX_SEED, SampleSettings
from ..errors import ConfigError, shown
from ..limits import RANK
from ..lora.canonical import canonical
from ..lora.formats.state_dict import to_state_dict
from ..models.identity_model import IdentityModel
from ..models.lae.autoencoder import LoRALatent
from ..models.latent_math import select
from ..models.mif import IdentityCondition
from ..storage.identity_models import load_identity_model
from ..storage.image_files import read_image
from ..storage.lora_file import PRECISIONS, LoRAInfo, write_lora_state
from ..vision.face_choice import FaceOptions
from ..vision.features import extract_features
from .encoders import chosen_device, open_encoders, options_for


@dataclass(frozen=True)
class Settings(Config):
    """Makes the LoRA of a person from photos.

    Args:
        model: a DiffLoRA model (.safetensors), or the folder of a HyperLoRA model.
        photos: of one person.
        out: the LoRA file to write; of several variants, each gets its number.
        faces: folder of the face analysis that the model was trained with (see inspect).
        clip_vision: folder or file of the CLIP vision that the model was trained with.
        variants: 0 makes the best guess; else so many samples, each from a seed of its own.
        seed: of the first sample; those after it have the numbers after it.
        sampling: of the samples.
        strength: what every change of a weight is multiplied with.
        rank: of the LoRA; 0 takes the model's own.
        title: shown by model browsers; empty takes the file's name.
        face_options: which face of a photo is meant, and what becomes of photos without one.
        precision: of the numbers in the file.
        device: auto, cpu, or cuda.
    """

    model: str
    photos: tuple[str, ...]
    out: str = "person.safetensors"
    faces: str = ""
    clip_vision: str = ""
    variants: int = 0
    seed: int = 0
    sampling: SampleSettings = field(default_factory=SampleSettings)
    strength: float = 1.0
    rank: int = 0
    title: str = ""
    face_options: FaceOptions = field(default_factory=FaceOptions)
    precision: Literal["float16", "bfloat16", "float32"] = "float16"
    device: str = "auto"

    def __post_init__(self) -> None:
        self.check_choices("generate")
        check_range("generate", "variants", self.variants, 0, 10_000)
        check_range("generate", "seed", self.seed, 0, MAX_SEED)
        check_range("generate", "strength", self.strength, -20, 20)
        check_range("generate", "rank", self.rank, 0, RANK)


@torch.no_grad()
def run(settings: Settings, console: Console) -> None:
    """Writes the LoRA files.

    Raises:
        DiffLoRAError: model, encoders or photos do not fit each other, or cannot be read.
    """
    if not settings.photos:
        raise ConfigError("Name at least one photo of the person.")
    pictures = [read_photo(Path(photo)) for photo in settings.photos]
    begun, device = time.monotonic(), chosen_device(settings.device)
    model = load_identity_model(settings.model).to(device)
    encoders = open_encoders(settings.faces, settings.clip_vision, device)
    options = options_for(model, settings.face_options, bool(settings.faces))
    loaded = time.monotonic()
    found = extract_features(pictures, *encoders, options)
    for note in (*found.notes, model.other_recogniser(found.features)):
        console.print(note, end="\n" if note else "")
    condition = model.condition(model.complete(found.features).to(device))
    latent = _latents(model, condition, settings)
    for number in range(len(latent.z)):
        path = _write(model, latent, number, condition, settings)
        console.print(f"{shown(str(path), 300)}: {path.stat().st_size / 2**20:.1f} MB")
    if model.license:
        console.print(model.license)
    now = time.monotonic()
    console.print(f"loading {loaded - begun:.1f} s, photos to LoRA {now - loaded:.2f} s")


def read_photo(path: Path) -> Tensor:
    """A photo (H, W, 3) in [0, 1], turned as its EXIF data say.

    Raises:
        ImageError: it cannot be read.
    """
    return read_image(path)[0]


def _latents(model: IdentityModel, condition: IdentityCondition, settings: Settings) -> LoRALatent:
    """The best guess, or samples, as a batch."""
    if settings.variants == 0:
        return model.mean_latent(condition)
    return model.sample_latent(condition, _seeds(settings), settings.sampling)


def _seeds(settings: Settings) -> Sequence[int]:
    """One for each sample; they go round at the last."""
    return [(settings.seed + k) % (MAX_SEED + 1) for k in range(max(1, settings.variants))]


def _write(
    model: IdentityModel,
    latent: LoRALatent,
    number: int,
    condition: IdentityCondition,
    settings: Settings,
) -> Path:
    """Writes one LoRA of a batch, under its number where there are several."""
    path = Path(settings.out)
    if len(latent.z) > 1:
        path = path.with_stem(f"{path.stem}_{number + 1}")
    if path.suffix != ".safetensors":
        raise ConfigError(f"A LoRA file must end in .safetensors, not {shown(path.suffix)}.")
    weights = model.decode(select(latent, number)).batch_item(0).to(device="cpu")
    if settings.rank:
        weights = canonical(weights, settings.rank)
    sampled = settings.variants > 0
    info = LoRAInfo(
        title=settings.title or path.stem,
        license=model.license,
        seed=_seeds(settings)[number] if sampled else None,
        steps=settings.sampling.steps if sampled else 0,
        guidance_scale=settings.sampling.guidance_scale if sampled else None,
        gate=(float(condition.gate[0, 0]), float(condition.gate[0, 1])),
        method="DiffLoRA",
        strength=1.0,
    )
    state = to_state_dict(weights.scaled(settings.strength), "kohya_ldm")
    return write_lora_state(path, state, model.layout.base, info, PRECISIONS[settings.precision])
