"""The demo world as the benchmarks need it, and what they all say about machine and commit."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from difflora_core.base_model.diffusers_base import DiffusersBase
from difflora_core.demo import paths
from difflora_core.demo.build.features import demo_encoders
from difflora_core.demo.networks.base import load_base
from difflora_core.demo.networks.judges import Judges, load_judges
from difflora_core.evaluation.report import Report
from difflora_core.lora.layout import LoRALayout
from difflora_core.methods.difflora import DiffLoRAModel
from difflora_core.storage.checkpoint import load_model
from difflora_core.vision.face_choice import FaceOptions
from difflora_core.vision.face_encoder import FaceEncoder
from difflora_core.vision.features import ImageFeatures, extract_features
from difflora_core.vision.image_encoder import ImageEncoder

from .identity.dreambooth import SETTINGS, Workshop
from .identity.linear import Linear, load_linear

LINEAR = paths.ARTEFACTS / "linear.safetensors"
STRENGTHS = paths.ARTEFACTS / "strengths.json"
CACHE = paths.WORK / "benchmarks"
MODELS = {"functional": paths.DIFFLORA, "paper": paths.DIFFLORA_PAPER}

Say = Callable[[str], None]


@dataclass(frozen=True)
class World:
    """Everything frozen: base model, encoders, judges, trained DiffLoRA models, linear baselines.

    `models`: row name to model; `linear`: None when not fitted; `cache`: folder for DreamBooth
    LoRAs; `say`: prints a line.
    """

    base: DiffusersBase
    base_hash: str
    layout: LoRALayout
    judges: Judges
    encoders: tuple[FaceEncoder, ImageEncoder]
    models: Mapping[str, DiffLoRAModel]
    linear: Linear | None
    cache: Path
    say: Say = field(default=lambda line: None)

    @property
    def shared_down(self) -> dict[str, Tensor] | None:
        """The frozen `down` factors of the functional model, which the baselines share."""
        model = self.models.get("functional")
        factors = {} if model is None else model.lae.down_factors()
        return {name: down.detach() for name, down in factors.items()} or None

    @property
    def workshop(self) -> Workshop:
        """DreamBooth training on this base."""
        folder = self.cache / "dreambooth"
        return Workshop(self.base, self.base_hash, self.shared_down, folder, self.say)

    def photo_features(self, images: Tensor) -> ImageFeatures:
        """Features of photos (N, H, W, 3) of one person, as a user's photo is read."""
        face, image = self.encoders
        options = FaceOptions(on_missing="image_only")
        return extract_features(images, face, image, options).features

    def features(self, images: Tensor) -> list[ImageFeatures]:
        """Features of the photos (I, N, H, W, 3) of I people."""
        return [self.photo_features(person) for person in images]


def load_world(models: Mapping[str, Path] | None = None, say: Say = lambda line: None) -> World:
    """Read the artefacts; a model or baseline whose file is missing is left out with a line.

    Args:
        models: further models by row name; a name of MODELS replaces the shipped file.
        say: prints a line.
    """
    wanted = MODELS | dict(models or {})
    found = {}
    for name, path in wanted.items():
        if Path(path).exists():
            found[name] = load_model(path).eval().requires_grad_(False)
        else:
            say(f"left out: {name}, there is no {Path(path).name}")
    base = load_base(paths.BASE)
    layout = next(iter(found.values())).layout if found else base.layout("demo", SETTINGS.rank)
    return World(
        base=base,
        base_hash=hashlib.sha256(paths.BASE.read_bytes()).hexdigest(),
        layout=layout,
        judges=load_judges(paths.JUDGES),
        encoders=demo_encoders(),
        models=found,
        linear=_linear(found, say),
        cache=CACHE,
        say=say,
    )


def _linear(models: Mapping[str, DiffLoRAModel], say: Say) -> Linear | None:
    """The linear baselines, which need the shared `down` of the functional model."""
    if not LINEAR.exists() or "functional" not in models:
        say("left out: ridge and PCA, run python -m benchmarks fit_linear")
        return None
    return load_linear(LINEAR)[0]


def set_threads(count: int) -> None:
    """Use so many cores; 0 takes all."""
    torch.set_num_threads(count or os.cpu_count() or 1)


def benchmark_console() -> Console:
    """Where benchmarks print."""
    return Console(highlight=False, soft_wrap=True)


def write_report(report: Report, path: Path | None, console: Console) -> None:
    """Write everything to a JSON file, where one is asked for."""
    if path:
        path.write_text(report.to_json() + "\n")
        console.print(f"wrote {path}")


def machine() -> str:
    """Processor, cores and torch version in one line."""
    processor = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().split("\n") if line.startswith("model name")]
        processor = names[0].split(":")[1].strip() if names else processor
    cores = f"{torch.get_num_threads()} of {os.cpu_count()} cores"
    return f"{processor}, {cores}, torch {torch.__version__}"


def commit() -> str:
    """The commit that is measured; with a mark when files differ from it."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(paths.ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    name = git("rev-parse", "HEAD") or "unknown"
    return f"{name}+changes" if git("status", "--porcelain", "--untracked-files=no") else name
