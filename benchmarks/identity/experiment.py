"""One table: people, rows, pictures, judges, at any strength."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from safetensors.torch import load_file
from torch import Tensor

from difflora_core.lora.weights import LoRAWeights
from difflora_core.storage.safetensors_io import write_atomic

from .artefacts import Artefacts
from .drawing import Adaptation, PictureSampler, Plan, unseen_latents
from .measure import Evaluator, file_kilobytes
from .people import People, benchmark_people
from .rows import BASE, REAL, REAL_VAE, DreamBoothRuns, Row, build_rows

PROTOCOL = 3
"""To be raised with every change of drawing or judging: it makes cached trials invalid."""

Columns = dict[str, Tensor]


@dataclass(frozen=True)
class Trial:
    """One row at one strength: `columns` (I,) each, or () where they are of all people together;
    `facts`: what the row costs."""

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
        self.sampler = PictureSampler(artefacts.base, plan, self.people.seeds)
        self.unseen = unseen_latents(artefacts.base, self.people.unseen, plan, self.people.seeds)
        self.evaluator = Evaluator(artefacts.judges, self.people, plan)

    def rows(self, runs: DreamBoothRuns, wanted: Sequence[str] | None = None) -> list[Row]:
        """Train, predict, reconstruct; see `build_rows`."""
        return build_rows(self.artefacts, self.people, runs, wanted)

    def real_pictures(self) -> dict[str, Tensor]:
        """Of the prompted scenes (I, cells, H, W, 3): as they are, and through the VAE."""
        images = self.people.prompted.images
        base = self.artefacts.base
        again = base.decode_latents(base.encode_images(images.flatten(0, 1)))
        return {REAL: images, REAL_VAE: again.unflatten(0, images.shape[:2])}

    def real(self) -> list[Trial]:
        """The ceiling: real pictures, judged as a row is."""
        shown = self.real_pictures()
        return [Trial(name, 0.0, self.evaluator.columns(p), {}) for name, p in shown.items()]

    def base(self) -> Trial:
        """The base model without any LoRA."""
        return Trial(BASE, 0.0, self._columns(None, 0.0), {"step_ms": self.step_ms})

    @cached_property
    def step_ms(self) -> float:
        """What the base alone takes for a step; a LoRA in its weights takes no more."""
        return 1000 * self.sampler.step_seconds()[1]

    def _step_ms(self, made: Adaptation) -> float:
        """Of a row: as many times the base's as the two differ when they take turns."""
        if isinstance(made, LoRAWeights):
            return self.step_ms
        own, plain = self.sampler.step_seconds(made)
        return self.step_ms * own / plain

    def trial(self, row: Row, strength: float) -> Trial:
        """A row at a strength."""
        columns = self._columns(row.weights, strength)
        return Trial(row.name, strength, columns, self._costs(row) | {"strength": strength})

    def _columns(self, made: Adaptation | None, strength: float) -> Columns:
        """What the judges say of pictures; read from the cache where it was measured before."""
        path = self.artefacts.cache / "trials" / f"{self._key(made, strength)}.safetensors"
        if path.exists():
            return load_file(path)
        columns = self.evaluator.columns(self.sampler.pictures(made, strength))
        columns["denoising_loss"] = self.sampler.losses(self.unseen, made, strength)
        write_atomic(columns, {}, path)
        return columns

    def _costs(self, row: Row) -> dict[str, float]:
        """Seconds from photos to person, milliseconds a step, sizes."""
        made = row.weights
        lora = isinstance(made, LoRAWeights)
        costs = {
            "step_ms": self._step_ms(made),
            "file_kb": file_kilobytes(made) if lora else made.kilobytes,
            "seconds": row.seconds,
            "model_mb": row.megabytes,
        }
        return {name: value for name, value in costs.items() if value is not None}

    def _key(self, made: Adaptation | None, strength: float) -> str:
        """Digest of all that a trial's columns depend on, but the benchmark's own code."""
        digest = hashlib.sha256()
        facts = (self.artefacts.base_hash, self.plan, self.people.seeds, strength, PROTOCOL)
        digest.update(repr(facts).encode())
        for judge in self.artefacts.judges.networks.values():
            for tensor in judge.state_dict().values():
                digest.update(tensor.numpy().tobytes())
        if isinstance(made, LoRAWeights):
            parts = {
                f"{name} {layer.alpha}": (layer.down, layer.up)
                for name, layer in made.layers.items()
            }
        else:
            own = {} if made is None else made.tensors()
            parts = {name: (tensor,) for name, tensor in own.items()}
        for name, tensors in parts.items():
            digest.update(name.encode())
            for tensor in tensors:
                digest.update(tensor.detach().float().contiguous().numpy().tobytes())
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
