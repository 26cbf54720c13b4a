"""Construction of a LoRA corpus of any size: DreamBooth group after group, into a sharded store."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...base_model.protocol import BaseModel
from ...data.lora_store import NewLoRA, StoreWriter
from ...errors import DivergedError
from ...lora.weights import LoRAWeights
from ..fingerprint import fingerprint, weights_digest
from ..loop import Progress
from ..lora.dreambooth import DreamBoothConfig, DreamBoothExamples, train_dreambooth
from ..processes import launched
from ..state_file import remove_run
from .lora_corpus import CorpusConfig

Examples = Callable[[Sequence[str]], DreamBoothExamples]
Likeness = Callable[[str, LoRAWeights], float]
WORK = "work"
"""Folder in the store, of groups that are in training."""


def open_store(folder: Path, base: BaseModel, config: CorpusConfig) -> StoreWriter:
    """The store of LoRAs that are trained on a base model.

    Args:
        folder: of the store.
        base: its layout and its weights are what the store is for.
        config: names the base's family and the rank.

    Raises:
        DatasetError: the store is for another base.
    """
    layout = base.layout(config.base, config.dreambooth.rank)
    return StoreWriter(folder, layout, weights_digest(base.unet))


@dataclass(frozen=True)
class Course:
    """How a run of `train_store` was: what it leaves beside the store.

    Attributes:
        sources: name to the digest of what its LoRA is made from, for `StoreWriter.write_index`.
        failed: name to reason of each identity that could not be trained.
    """

    sources: Mapping[str, str]
    failed: Mapping[str, str]


def train_store(
    base: BaseModel,
    identities: Sequence[str],
    examples: Examples,
    config: CorpusConfig,
    writer: StoreWriter,
    likeness: Likeness | None = None,
    progress: Progress | None = None,
) -> Course:
    """Trains the LoRAs that a store lacks; each finished group is a shard.

    What is there is known by the pictures, captions and settings that it was made from. One whose
    loss is no number any more is named and noted, and the rest of its group is trained without it.

    Args:
        base: frozen base model.
        identities: names; LoRAs do not depend on how they are grouped.
        examples: gives pictures, captions and seeds of some of them: their own, whatever the group.
        config: settings of the training, and how many are trained in one batch.
        writer: of the store, see `open_store`.
        likeness: measures how like the person the pictures of a LoRA are, in [-1, 1].
        progress: called after every step as (step, steps, metrics) over all groups; it may raise
            InterruptedTraining.

    Raises:
        InterruptedTraining: stopped; the same call goes on.
        DatasetError: the store cannot be written.
    """
    there = {(row.identity, row.source): row.reason for row in writer.rows()}
    sources = {name: _source(examples([name]), config, writer) for name in identities}
    failed = {own[0]: there[own] for own in sources.items() if there.get(own)}
    missing = [name for name, source in sources.items() if (name, source) not in there]
    course = config.dreambooth
    starts = range(0, len(missing), config.group)
    for number, start in enumerate(starts):
        names = missing[start : start + config.group]
        run = writer.folder / WORK / fingerprint([(name, sources[name]) for name in names])[:24]
        report = _shifted(progress, number * course.steps, len(starts) * course.steps)
        group = _Group(base, examples, course, report)
        loras = []
        for identity, (weights, reason) in zip(names, group.train(names, run), strict=True):
            alike = likeness(identity, weights) if likeness and weights is not None else None
            loras.append(NewLoRA(identity, weights, alike, sources[identity], reason))
            failed |= {identity: reason} if reason else {}
        launched().on_main(lambda added=loras: writer.add(added))  # type: ignore[misc]
        launched().on_main(lambda folder=run: remove_run(folder))  # type: ignore[misc]
    return Course(sources, failed)


def _source(pictures: DreamBoothExamples, config: CorpusConfig, writer: StoreWriter) -> str:
    """Digest of what a LoRA is made from."""
    return fingerprint(pictures, config.dreambooth, writer.layout.hash)


def _shifted(progress: Progress | None, done: int, total: int) -> Progress | None:
    """Progress of one group told as progress of the whole."""
    if progress is None:
        return None
    return lambda step, steps, metrics: progress(done + step, total, metrics)


@dataclass(frozen=True)
class _Group:
    """What the training of a group needs, whoever is in it."""

    base: BaseModel
    examples: Examples
    config: DreamBoothConfig
    progress: Progress | None

    def train(
        self, identities: Sequence[str], run: Path
    ) -> Iterator[tuple[LoRAWeights | None, str]]:
        """Weights of each, or None and the reason; a group that diverges is trained one by one."""
        try:
            trained = train_dreambooth(
                *(self.base, self.examples(identities), self.config, self.progress),
                folder=run / "group",
            )[self.config.steps]
        except DivergedError as failure:
            if len(identities) == 1:
                yield None, str(failure)
                return
            for row, identity in enumerate(identities):
                yield from self.train([identity], run / str(row))
            return
        yield from ((trained.batch_item(row), "") for row in range(len(identities)))
