"""Construction of a LoRA corpus of any size: DreamBooth group after group, into a sharded store."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ...base_model.protocol import BaseModel
from ...data.lora_store import NewLoRA, StoreWriter
from ...errors import DivergedError
from ...lora.layout import edited_layers
from ...lora.weights import LoRAWeights
from ..fingerprint import fingerprint, weights_digest
from ..loop import Progress
from ..lora.dreambooth import DreamBoothExamples, train_dreambooth
from ..processes import launched
from ..state_file import remove_run
from .lora_corpus import CorpusConfig

Examples = Callable[[Sequence[str]], DreamBoothExamples]
Likeness = Callable[[str, LoRAWeights], float]
WORK = "work"
"""Folder in the store, of groups that are in training."""


def open_store(
    folder: Path, base: BaseModel, config: CorpusConfig, start: Iterable[str] | None = None
) -> StoreWriter:
    """The store of LoRAs that are trained on a base model.

    Args:
        folder: of the store.
        base: its layout and its weights are what the store is for.
        config: names the base's family and the rank.
        start: names of the layers of what the LoRAs start from, which they edit too.

    Raises:
        DatasetError: the store is for another base.
    """
    course = config.dreambooth
    layout = base.layout(config.base, course.rank, edited_layers(course.targets, start))
    return StoreWriter(folder, layout, weights_digest(base.unet))


@dataclass(frozen=True)
class StorePlan:
    """What a store lacks.

    Attributes:
        sources: name to the digest of what its LoRA is made from, for `StoreWriter.write_index`.
        failed: name to reason of each identity that could not be trained before.
        groups: those who are missing, as they are trained together. What is stopped and planned
            again has the same groups, but for those that are done.
    """

    sources: Mapping[str, str]
    failed: Mapping[str, str]
    groups: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, eq=False)
class StoreTrainer:
    """Trains LoRAs of a store; any number of them, in as many processes, may.

    What is there is known by the pictures, captions and settings that it was made from. One whose
    loss is no number any more is named and noted, and the rest of its group is trained without it.

    Args:
        base: frozen base model.
        examples: gives pictures, captions and seeds of some people: their own, whatever the group.
        config: settings of the training, and how many are trained in one batch.
        writer: of the store, see `open_store`.
        likeness: measures how like the person the pictures of a LoRA are, in [-1, 1].
        shared_down: as in `train_dreambooth`.
    """

    base: BaseModel
    examples: Examples
    config: CorpusConfig
    writer: StoreWriter
    likeness: Likeness | None = None
    shared_down: Mapping[str, Tensor] | None = None

    def plan(self, identities: Sequence[str]) -> StorePlan:
        """Who has to be trained.

        Raises:
            DatasetError: the store cannot be read.
        """
        there = {(row.identity, row.source): row.reason for row in self.writer.rows()}
        sources = {name: self._source(name) for name in identities}
        failed = {own[0]: there[own] for own in sources.items() if there.get(own)}
        missing = [name for name, source in sources.items() if (name, source) not in there]
        starts = range(0, len(missing), self.config.group)
        groups = (tuple(missing[start : start + self.config.group]) for start in starts)
        return StorePlan(sources, failed, tuple(groups))

    def train(self, names: Sequence[str], progress: Progress | None = None) -> dict[str, str]:
        """Trains a group and adds it to the store.

        Args:
            names: of people.
            progress: called after every step as (step, steps, metrics); it may raise
                InterruptedTraining.

        Returns:
            Name to reason of each that could not be trained.

        Raises:
            InterruptedTraining: stopped; the same call goes on.
            DatasetError: the store cannot be written.
        """
        sources = [self._source(name) for name in names]
        run = self.writer.folder / WORK / fingerprint(names, sources)[:24]
        loras = []
        trained = self._weights(names, run, progress)
        for name, source, (weights, reason) in zip(names, sources, trained, strict=True):
            alike = self.likeness(name, weights) if self.likeness and weights is not None else None
            loras.append(NewLoRA(name, weights, alike, source, reason))
        launched().on_main(lambda: self.writer.add(loras))
        launched().on_main(lambda: remove_run(run))
        return {lora.identity: lora.failure for lora in loras if lora.failure}

    def train_all(self, plan: StorePlan, progress: Progress | None = None) -> dict[str, str]:
        """Trains every group of a plan, one after the other; progress is that of the whole.

        Returns:
            Name to reason of each that could not be trained, now or before.
        """
        steps, failed = self.config.dreambooth.steps, dict(plan.failed)
        for number, names in enumerate(plan.groups):
            report = _shifted(progress, number * steps, len(plan.groups) * steps)
            failed |= self.train(names, report)
        return failed

    def _source(self, name: str) -> str:
        """Digest of what a LoRA is made from."""
        layout = self.writer.layout
        parts = self.examples([name]), self.config.dreambooth, layout.hash
        return fingerprint(*parts, *([] if self.shared_down is None else [self.shared_down]))

    def _weights(
        self, names: Sequence[str], run: Path, progress: Progress | None
    ) -> Iterator[tuple[LoRAWeights | None, str]]:
        """Weights of each, or None and the reason; a group that diverges is trained one by one."""
        course = self.config.dreambooth
        pictures, folder = self.examples(names), run / "group"
        try:
            trained = train_dreambooth(
                *(self.base, pictures, course, progress),
                shared_down=self.shared_down,
                folder=folder,
            )
        except DivergedError as failure:
            if len(names) == 1:
                yield None, str(failure)
                return
            for row, name in enumerate(names):
                yield from self._weights([name], run / str(row), progress)
            return
        yield from ((trained[course.steps].batch_item(row), "") for row in range(len(names)))


def _shifted(progress: Progress | None, done: int, total: int) -> Progress | None:
    """Progress of one group told as progress of the whole."""
    if progress is None:
        return None
    return lambda step, steps, metrics: progress(done + step, total, metrics)
