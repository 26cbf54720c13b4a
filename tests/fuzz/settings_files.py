"""Settings as JSON: every `Config` of the library."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

from difflora_core import training
from difflora_core.config import Config
from difflora_core.demo.networks.clip_vision import ClipVisionRecipe
from difflora_core.demo.networks.judges import JudgeRecipe
from difflora_core.diffusion.objective import NoiseSchedule
from difflora_core.diffusion.sampler import SampleSettings
from difflora_core.lora.block_groups import GroupStrengths
from difflora_core.methods.registry import METHODS
from difflora_core.models.difflora import DiffLoRAConfig
from difflora_core.models.dit import DiTConfig
from difflora_core.models.lae.config import LAEConfig
from difflora_core.models.mif import MIFConfig
from difflora_core.models.predictor import PredictorConfig
from difflora_core.training.difflora.functional import FunctionalConfig
from difflora_core.training.difflora.lae import LAETrainConfig
from difflora_core.training.difflora.latent_dit import LatentDiTConfig
from difflora_core.training.difflora.lora_corpus import CorpusConfig
from difflora_core.training.loop_config import LoopConfig
from difflora_core.vision.face_choice import FaceOptions
from difflora_core.vision.features import FeatureSizes

from .reader import JSON_FILE_EDITS, Reader, as_text, sound

TRAINED = sorted({module.name for module in iter_modules(training.__path__)} & METHODS.keys())
MODULES = [import_module(f"{training.__name__}.{name}") for name in TRAINED]
RECIPES = [module.RECIPE for module in MODULES if hasattr(module, "RECIPE")]
EXAMPLES: tuple[Config, ...] = (
    DiffLoRAConfig.demo(FeatureSizes(4, 4, 2, 4)),
    FeatureSizes(4, 4, 2, 4),
    MIFConfig(12, 10, 8, 5, width=16, tokens=2, heads=2),
    PredictorConfig(),
    DiTConfig(),
    LAEConfig(),
    LoopConfig(steps=10),
    CorpusConfig(),
    FunctionalConfig(),
    LAETrainConfig(),
    LatentDiTConfig(),
    FaceOptions(),
    GroupStrengths(),
    SampleSettings(),
    NoiseSchedule(),
    ClipVisionRecipe(),
    JudgeRecipe(4, (4, 8)),
    *(method.Config() for method in METHODS.values()),
    *(recipe.Config() for recipe in RECIPES),
)
KINDS = {type(example).__name__: example for example in EXAMPLES}


def _read(path: Path, family: str) -> Config:
    return type(KINDS[family]).from_json(as_text(path))


def _check(settings: Config, path: Path) -> None:
    sound(settings)
    assert type(settings).from_json(settings.to_json()) == settings, "comes back changed"


FAMILIES = {name: (lambda e=example: e.to_json().encode()) for name, example in KINDS.items()}
READERS = (Reader("settings JSON", FAMILIES, _read, _check, JSON_FILE_EDITS, 5, file="file.json"),)
