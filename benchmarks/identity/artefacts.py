"""What the identity benchmarks measure: the frozen base, encoders, judges and trained models."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from difflora_core.base_model.diffusers_base import DiffusersBase
from difflora_core.demo import paths
from difflora_core.demo.build.features import demo_encoders
from difflora_core.demo.networks.base import load_base
from difflora_core.demo.networks.judges import Judges, load_judge, load_judges
from difflora_core.lora.layout import LoRALayout
from difflora_core.models.difflora import DiffLoRAModel
from difflora_core.storage.checkpoint import load_model
from difflora_core.vision.face_choice import FaceOptions
from difflora_core.vision.face_encoder import FaceEncoder
from difflora_core.vision.features import ImageFeatures, extract_features
from difflora_core.vision.image_encoder import ImageEncoder

from ..command import CACHE, Log, silent
from .dreambooth import CORPUS_SETTINGS, DreamBoothTrainer
from .linear import Linear, load_linear


@dataclass(frozen=True)
class Artefacts:
    """Everything frozen: base model, encoders, judges, trained DiffLoRA models, linear baselines.

    `layout`: of the corpus's LoRAs, which need not be a model's; `models`: row name to model;
    `linear`: None when not fitted; `cache`: folder for DreamBooth LoRAs and trials; `log`: prints a
    line; `megabytes`: size of each model's file, by row name.
    """

    base: DiffusersBase
    base_hash: str
    layout: LoRALayout
    judges: Judges
    encoders: tuple[FaceEncoder, ImageEncoder]
    models: Mapping[str, DiffLoRAModel]
    linear: Linear | None
    cache: Path
    log: Log = silent
    megabytes: Mapping[str, float] = field(default_factory=dict)

    @property
    def trainer(self) -> DreamBoothTrainer:
        """DreamBooth training on this base."""
        folder = self.cache / "dreambooth"
        down = None if self.linear is None else self.linear.down
        return DreamBoothTrainer(self.base, self.base_hash, down, folder, self.log)

    def photo_features(self, images: Tensor) -> ImageFeatures:
        """Features of photos (N, H, W, 3) of one person, as a user's photo is read."""
        face, image = self.encoders
        options = FaceOptions(on_missing="image_only")
        return extract_features(images, face, image, options).features

    def features(self, images: Tensor) -> list[ImageFeatures]:
        """Features of the photos (I, N, H, W, 3) of I people."""
        return [self.photo_features(person) for person in images]


def load_artefacts(models: Mapping[str, Path] | None = None, log: Log = silent) -> Artefacts:
    """Read the artefacts; a model or baseline whose file is missing is left out with a line.

    Args:
        models: further models by row name; a name of `paths.MODELS` replaces the shipped file.
        log: prints a line.
    """
    wanted = paths.MODELS | dict(models or {})
    found, megabytes = {}, {}
    for name, path in wanted.items():
        if Path(path).exists():
            found[name] = load_model(path).eval().requires_grad_(False)
            megabytes[name] = Path(path).stat().st_size / 1e6
        else:
            log(f"left out: {name}, there is no {Path(path).name}")
    base = load_base(paths.BASE)
    prompts = load_judge(paths.PROMPT_JUDGE)  # reads expressions better than the one it replaces
    return Artefacts(
        base=base,
        base_hash=hashlib.sha256(paths.BASE.read_bytes()).hexdigest(),
        layout=base.layout("demo", CORPUS_SETTINGS.rank),
        judges=Judges({**load_judges(paths.JUDGES).networks, "attributes": prompts}),
        encoders=demo_encoders(),
        models=found,
        linear=_linear(log),
        cache=CACHE,
        log=log,
        megabytes=megabytes,
    )


def _linear(log: Log) -> Linear | None:
    """The linear baselines."""
    if not paths.LINEAR.exists():
        log("left out: ridge and PCA, run make bench name=fit_linear")
        return None
    linear = load_linear(paths.LINEAR)[0]
    if not linear.down:
        older = f"{paths.LINEAR.name} is older"
        log(f"left out: ridge and PCA, {older}; run make bench name=fit_linear")
        return None
    return linear
