"""One table: people, rows, pictures, judges, at any strength."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from safetensors.torch import load_file
from torch import Tensor

from difflora_core.lora.weights import LoRAWeights
from difflora_core.storage.safetensors_io import write_atomic

from .artefacts import Artefacts
from .drawing import PictureSampler, Plan, unseen_latents
from .measure import Evaluator, file_kilobytes
from .people import People, benchmark_people
from .rows import BASE, REAL, REAL_VAE, DreamBoothRuns, Row, build_rows

PROTOCOL = 2
"""To be raised with every change of drawing or judging: it makes cached trials invalid."""

Columns = dict[str, Tensor]


@dataclass(frozen=True)
class Trial:
    """One row at one strength: `columns` (I,) each; `facts`: numbers of the whole row."""

    row: str
    strength: float
    columns: Columns
    facts: Mapping[str, float]

    def means(self) -> dict[str, float]:
        """Means over people, then the facts of the row."""
        return {k: float(v.mean()) for k, v in self.columns.items()} | dict(self.facts)


class Experiment:
    """People of a split, drawn under one plan.

    Args:
        artefacts: artefacts.
        plan: what is drawn.
        split: whose people. count: how many.
    """

    def __init__(self, artefacts: Artefacts, plan: Plan, split: str, count: int) -> None:
        self.artefacts, self.plan = artefacts, plan
        self.people: People = benchmark_people(split, count, plan.scenes)
        self.sampler = PictureSampler(artefacts.base, artefacts.layout, plan, self.people.seeds)
        self.unseen = unseen_latents(artefacts.base, self.people.unseen, plan, self.people.seeds)
        self.evaluator = Evaluator(artefacts.judges, self.people, plan)

    def rows(self, runs: DreamBoothRuns) -> list[Row]:
        """Train, predict, reconstruct."""
        return build_rows(self.artefacts, self.people, runs)

    def real(self) -> list[Trial]:
        """The ceiling: real pictures of the prompted scenes, as they are and through the VAE."""
        images = self.people.prompted.images
        base = self.artefacts.base
        again = base.decode_latents(base.encode_images(images.flatten(0, 1)))
        pairs = ((REAL, images), (REAL_VAE, again.unflatten(0, images.shape[:2])))
        return [Trial(name, 0.0, self.evaluator.columns(shown), {}) for name, shown in pairs]

    def base(self) -> Trial:
        """The base model without any LoRA."""
        columns = self.evaluator.columns(self.sampler.pictures())
        columns["denoising_loss"] = self.sampler.losses(self.unseen)
        return Trial(BASE, 0.0, columns, {})

    def trial(self, row: Row, strength: float) -> Trial:
        """A row at a strength; what was measured before is read from the cache."""
        path = self.artefacts.cache / "trials" / f"{self._key(row.weights, strength)}.safetensors"
        if path.exists():
            columns = load_file(path)
        else:
            columns = self.evaluator.columns(self.sampler.pictures(row.weights, strength))
            columns["denoising_loss"] = self.sampler.losses(self.unseen, row.weights, strength)
            write_atomic(columns, {}, path)
        facts = {"strength": strength, "file_kb": file_kilobytes(row.weights)}
        if row.seconds is not None:
            facts["seconds"] = row.seconds
        return Trial(row.name, strength, columns, facts)

    def _key(self, weights: LoRAWeights, strength: float) -> str:
        """Digest of all that a trial's columns depend on, but the benchmark's own code."""
        digest = hashlib.sha256()
        facts = (self.artefacts.base_hash, self.plan, self.people.seeds, strength, PROTOCOL)
        digest.update(repr(facts).encode())
        for judge in self.artefacts.judges.networks.values():
            for tensor in judge.state_dict().values():
                digest.update(tensor.numpy().tobytes())
        for name, layer in weights.layers.items():
            digest.update(f"{name} {layer.alpha}".encode())
            for factor in (layer.down, layer.up):
                digest.update(factor.detach().float().contiguous().numpy().tobytes())
        return digest.hexdigest()[:32]

    def trials(self, wanted: list[tuple[Row, float]], console: Console) -> list[Trial]:
        """All of these, with a progress bar."""
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        done = []
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task("drawing", total=len(wanted))
            for row, strength in wanted:
                bar.update(task, description=f"{row.name}, strength {strength:g}")
                done.append(self.trial(row, strength))
                bar.advance(task)
        return done


def score(trial: Trial, base: Trial, real: Trial) -> float:
    """How far a row is from the base to real pictures; both judges count the same (ours)."""
    shares = []
    for column in ("face_similarity", "parameter_error"):
        start, end = float(base.columns[column].mean()), float(real.columns[column].mean())
        shares.append((float(trial.columns[column].mean()) - start) / (end - start))
    return float(torch.tensor(shares).mean())
