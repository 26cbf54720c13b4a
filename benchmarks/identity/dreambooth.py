"""DreamBooth LoRAs of the benchmark's people, cached on disk by all that they depend on."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from difflora_core.base_model.diffusers_base import DiffusersBase
from difflora_core.demo.build.stages_lora import PAPER_COURSE
from difflora_core.demo.examples import DREAMBOOTH
from difflora_core.lora.weights import LoRALayer, LoRAWeights
from difflora_core.storage.safetensors_io import write_atomic
from difflora_core.training.lora.dreambooth import (
    DreamBoothConfig,
    DreamBoothExamples,
    train_dreambooth,
)

from ..command import Log
from .drawing import groups
from .people import RealPictures

GROUP = 16
ALONE_STEPS = 8
SETTINGS = DREAMBOOTH
"""The yardstick: both factors trained, tuned on validation people."""

CORPUS_SETTINGS = PAPER_COURSE
"""How the corpus was trained, over a shared `down`: the LoRAs that autoencoders are made for."""


@dataclass(frozen=True)
class DreamBoothTrainer:
    """What DreamBooth training needs beside the pictures.

    `base`: frozen base; `base_hash`: of its file; `shared_down`: the `down` factors of runs that
    do not train their own; `cache`: folder; `log`: prints a line.
    """

    base: DiffusersBase
    base_hash: str
    shared_down: Mapping[str, Tensor] | None
    cache: Path
    log: Log

    def train(
        self, pictures: RealPictures, seeds: Sequence[int], config: DreamBoothConfig
    ) -> LoRAWeights:
        """One LoRA per person, from the cache where possible, in groups of at most GROUP."""
        parts = []
        for rows in groups(len(seeds), GROUP):
            chosen = RealPictures(pictures.images[rows], [pictures.captions[r] for r in rows])
            parts.append(self._group(chosen, [seeds[r] for r in rows], config))
        return concatenate(parts)

    def seconds_alone(self, pictures: RealPictures, config: DreamBoothConfig) -> float:
        """Seconds per step for one person alone, measured over a few steps."""
        config = replace(config, snapshots=(), steps=ALONE_STEPS)
        examples = self.examples(RealPictures(pictures.images[:1], pictures.captions[:1]), [0])
        train_dreambooth(self.base, examples, replace(config, steps=1), **self._down(config))
        started = time.perf_counter()
        train_dreambooth(self.base, examples, config, **self._down(config))
        return (time.perf_counter() - started) / ALONE_STEPS

    def examples(self, pictures: RealPictures, seeds: Sequence[int]) -> DreamBoothExamples:
        """Latents and captions of real pictures."""
        people, count = pictures.images.shape[:2]
        latents = self.base.encode_images(pictures.images.flatten(0, 1))
        return DreamBoothExamples(
            latents.unflatten(0, (people, count)), pictures.captions, tuple(seeds)
        )

    def _group(
        self, pictures: RealPictures, seeds: Sequence[int], config: DreamBoothConfig
    ) -> LoRAWeights:
        path = self.cache / f"{self._key(pictures, seeds, config)}.safetensors"
        if path.exists():
            return _read(path)
        examples = self.examples(pictures, seeds)
        started = time.perf_counter()
        made = train_dreambooth(self.base, examples, config, **self._down(config))
        trained = made[config.steps]
        seconds = time.perf_counter() - started
        count = pictures.images.shape[1]
        self.log(
            f"trained DreamBooth LoRAs of {len(seeds)} people from {count} pictures each: "
            f"{config.steps} steps in {seconds:.0f} s"
        )
        _write(path, trained)
        return trained

    def _down(self, config: DreamBoothConfig) -> dict[str, object]:
        """The shared factors, for a run that does not train its own."""
        if config.train_down or self.shared_down is None:
            return {}
        return {"shared_down": self.shared_down}

    def _key(self, pictures: RealPictures, seeds: Sequence[int], config: DreamBoothConfig) -> str:
        digest = hashlib.sha256()
        facts = [self.base_hash, config.to_json(), list(seeds), pictures.captions]
        digest.update(json.dumps(facts).encode())
        digest.update((pictures.images * 255).round().byte().numpy().tobytes())
        for name, down in self._down(config).get("shared_down", {}).items():
            digest.update(name.encode() + down.detach().float().numpy().tobytes())
        return digest.hexdigest()[:32]


def concatenate(parts: Sequence[LoRAWeights]) -> LoRAWeights:
    """Batches of LoRAs, one after the other."""
    return LoRAWeights(
        {
            name: LoRALayer(
                torch.cat([part[name].down for part in parts]),
                torch.cat([part[name].up for part in parts]),
                layer.alpha,
            )
            for name, layer in parts[0].layers.items()
        }
    )


def _write(path: Path, weights: LoRAWeights) -> None:
    """Cache a group; all factors, so that the file needs nothing else."""
    tensors = {}
    for name, layer in weights.layers.items():
        tensors[f"{name}|down"] = layer.down.clone(memory_format=torch.contiguous_format)
        tensors[f"{name}|up"] = layer.up.clone(memory_format=torch.contiguous_format)
    alphas = {name: layer.alpha for name, layer in weights.layers.items()}
    write_atomic(tensors, {"alphas": json.dumps(alphas)}, path)


def _read(path: Path) -> LoRAWeights:
    """A group from the cache."""
    with safe_open(path, "pt") as file:
        alphas = json.loads(file.metadata()["alphas"])
        return LoRAWeights(
            {
                name: LoRALayer(
                    file.get_tensor(f"{name}|down"), file.get_tensor(f"{name}|up"), alpha
                )
                for name, alpha in alphas.items()
            }
        )
