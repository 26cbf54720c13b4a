"""Every method on the same base, pictures, batches, optimiser and number of steps."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from difflora_core.base_model.diffusers_base import DiffusersBase
from difflora_core.base_model.precision import autocast
from difflora_core.base_model.protocol import TextCondition
from difflora_core.config import Config
from difflora_core.demo import paths
from difflora_core.demo.build import stages_lora
from difflora_core.demo.build.stages import pool_latents
from difflora_core.demo.networks.base import STEPS
from difflora_core.demo.world.pool import PicturePool, cached_pool, portrait_pool
from difflora_core.models.face_reader import FaceReader, FaceReaderConfig
from difflora_core.models.layers import DrawnFrom
from difflora_core.models.mif import MIFConfig
from difflora_core.storage.checkpoint import save_model
from difflora_core.storage.safetensors_io import read_file, write_atomic
from difflora_core.training.difflora import face_reader, functional
from difflora_core.training.fingerprint import fingerprint
from difflora_core.training.loop import Hooks, LoopConfig, Progress, train
from difflora_core.training.losses import NoisedBatch, denoise
from difflora_core.vision.features import FeatureSizes

from ..demo_training import new_model, person_pictures, pool_features
from .base import Baseline, BaselineObjective
from .registry import BASELINES

PICTURES = 10
JUDGED_PEOPLE, JUDGED_BATCHES = 40, 4
"""Validation people whose denoising loss is printed, and batches of them."""


@dataclass(frozen=True)
class Budget(Config):
    """What every method gets.

    `people`: of the split `train`, with PICTURES pictures each; `steps`; `batch`: pictures drawn a
    step; `photos`: most that are seen of a person; `seed`: of start and batches.
    """

    people: int = 3000
    steps: int = 2400
    batch: int = 64
    photos: int = 4
    seed: int = 0


BUDGETS: Mapping[str, Budget] = {
    "quick": Budget(people=400, steps=150, batch=16),
    "medium": Budget(people=1500, steps=800, batch=32),
    "full": Budget(),
}
SAME = "DiffLoRA, same budget"
OURS: Mapping[str, dict[str, Any]] = {
    SAME: {},
    f"{SAME}, face alone": {"sources": ("face",)},
    f"{SAME}, picture alone": {"sources": ("image", "tokens")},
    f"{SAME}, likeness loss": {"likeness": stages_lora.FUNCTIONAL.likeness},
    f"{SAME}, likeness loss, feed-forward layers": {
        "likeness": stages_lora.FUNCTIONAL.likeness,
        "targets": "transformer",
    },
}
"""DiffLoRA's functional preset by the same budget, and its ablations, each trained anew. Like the
baselines it has no likeness loss, but where that is what is asked."""
METHODS = (*OURS, *BASELINES)


@dataclass(frozen=True)
class TrainingSet:
    """Pictures of many people as the recipes take them, with the points of each face."""

    data: functional.PersonPictures
    keypoints: Tensor

    def batches(self, budget: Budget) -> Callable[[torch.Generator], dict[str, Tensor]]:
        """The batches of the functional recipe, with `keypoints` (B, 5, 2) of what is drawn."""
        config = functional.FunctionalConfig(batch=budget.batch, photos=budget.photos)
        draw = functional.person_batches(self.data, new_model(0), config, STEPS)

        def with_points(generator: torch.Generator) -> dict[str, Tensor]:
            batch = draw(generator)
            return {**batch, "keypoints": self.keypoints[batch["pictures"]]}

        return with_points


def training_set(
    base: DiffusersBase, split: str, people: int, progress: Progress | None = None
) -> TrainingSet:
    """Pictures, latents and features of the first people of a split, kept on disk."""
    name = f"baselines-{split}-{people}"
    pool: PicturePool = cached_pool(
        paths.POOLS / f"{name}.safetensors", lambda: portrait_pool(split, people, PICTURES)
    )
    latents = pool_latents(base.vae, name, pool)
    features = pool_features(name, pool, progress)
    return TrainingSet(person_pictures(base, latents, pool, features), pool.keypoints[:, 0])


def loop_of(budget: Budget) -> LoopConfig:
    """The run of every method: that of the functional recipe, at the length of the budget."""
    usual = stages_lora.FUNCTIONAL_LOOP
    return replace(usual, steps=budget.steps, seed=budget.seed, checkpoint_every=50)


def file_of(name: str, budget: Budget, folder: Path, base_hash: str) -> Path:
    """Where a trained method is kept; another base or budget is another file."""
    digest = fingerprint(base_hash, budget, name)[:16]
    return folder / f"{re.sub(r'[^A-Za-z]+', '_', name)}-{digest}.safetensors"


def train_baseline(
    name: str,
    base: DiffusersBase,
    sets: tuple[TrainingSet, TrainingSet],
    budget: Budget,
    path: Path,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Train one baseline and write its file; a stopped run goes on.

    Args:
        name: key of BASELINES.
        base: frozen base.
        sets: training people and validation people.
        budget: how much.
        path: of the file; the run's state lies beside it.
        progress: of the loop.

    Returns:
        The denoising loss on validation people, of the method and of the base alone.
    """
    method = new_baseline(name, base, sets[0].data.features.sizes, budget.seed)
    method.fit_statistics(sets[0].data.features)
    objective, draw = BaselineObjective(method, base), sets[0].batches(budget)
    hooks = Hooks(progress, base=base, fingerprint=fingerprint(name, budget, sets[0].data))
    train(objective, draw, loop_of(budget), path.with_suffix(""), hooks)
    write_atomic(method.learned(), {"method": name, "budget": budget.to_json()}, path)
    return {"validation": held_out(objective, sets[1], budget)}


def train_ours(
    name: str,
    base: DiffusersBase,
    sets: tuple[TrainingSet, TrainingSet],
    budget: Budget,
    path: Path,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Train DiffLoRA by the functional recipe under one of OURS; see `train_baseline`."""
    options = dict(OURS[name])
    likeness = float(options.pop("likeness", 0.0))
    targets = options.pop("targets", "attention")
    sizes, folder = sets[0].data.features.sizes, path.with_suffix("")
    mif = MIFConfig(
        face_dim=sizes.face,
        image_dim=sizes.image,
        token_dim=sizes.token_dim,
        image_token_count=sizes.tokens,
        **options,
    )
    model = new_model(budget.seed, targets, mif=mif)
    config = functional.FunctionalConfig(
        batch=budget.batch, photos=budget.photos, likeness=likeness
    )
    reader = _reader(sets[0], budget, folder / "reader") if likeness else None
    objective = functional.FunctionalObjective(model, base, config, reader)
    functional.fit(objective, sets[0].data, loop_of(budget), folder, progress)
    save_model(model, path, torch.float16, {"method": name, "budget": budget.to_json()})
    return {"validation": held_out(objective, sets[1], budget)}


def _reader(people: TrainingSet, budget: Budget, folder: Path) -> FaceReader:
    """What reads faces in latents, for the likeness loss; trained on the same pictures."""
    face, channels = people.data.features.sizes.face, people.data.latents[:1].shape[1]
    made = FaceReader(FaceReaderConfig(channels, face))
    loop = replace(stages_lora.READER_LOOP, steps=budget.steps)
    face_reader.fit(made, people.data, loop, folder)
    return made


def loss_of_base(base: DiffusersBase, people: TrainingSet, budget: Budget) -> float:
    """The loss of `held_out` without any method."""
    return held_out(BareObjective(base), people, budget)


class BareObjective(nn.Module):
    """Denoising loss of the base alone on a batch of `person_batches`."""

    def __init__(self, base: DiffusersBase) -> None:
        super().__init__()
        self.base = base

    def forward(self, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss () and metrics."""
        text = TextCondition(batch["context"], batch["pooled"])
        pictures = NoisedBatch(batch["latents"], batch["noise"], batch["timesteps"], text)
        error = denoise(self.base, pictures).error.mean()
        return error, {"denoising": error}


@torch.no_grad()
def held_out(objective: nn.Module, people: TrainingSet, budget: Budget) -> float:
    """Denoising loss on fixed batches of validation people, seen in one to four photos."""
    draw, losses = people.batches(replace(budget, batch=JUDGED_PEOPLE)), []
    for number in range(JUDGED_BATCHES):
        batch = draw(torch.Generator().manual_seed(7000 + number))
        quiet = {name: batch[name] * 0 for name in ("feature_noise", "latent_noise")}
        with autocast(torch.device("cpu"), "bf16"):
            losses.append(float(objective({**batch, **quiet})[1]["denoising"]))
    return sum(losses) / len(losses)


def new_baseline(name: str, base: DiffusersBase, sizes: FeatureSizes, seed: int) -> Baseline:
    """An untrained baseline with weights from `seed`."""
    with DrawnFrom(torch.Generator().manual_seed(seed)):
        return BASELINES[name](base, sizes)


def load_baseline(name: str, path: Path, base: DiffusersBase, sizes: FeatureSizes) -> Baseline:
    """A trained baseline, frozen."""
    method = new_baseline(name, base, sizes, 0)
    method.load_learned(read_file(path, "baseline")[0])
    return method.eval().requires_grad_(False)
