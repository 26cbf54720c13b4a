"""Construction of a LoRA corpus of any size: DreamBooth group after group, into a sharded store."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
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


def train_store(
    base: BaseModel,
    identities: Sequence[str],
    examples: Examples,
    config: CorpusConfig,
    writer: StoreWriter,
    likeness: Likeness | None = None,
    progress: Progress | None = None,
) -> dict[str, str]:
    """Trains the LoRAs that a store lacks; each finished group is a shard.

    What is there is known by the pictures, captions and settings that it was made from. One whose
    loss is no number any more is named and noted, and the rest of its group is trained without it.

    Args:
        base: frozen base model.
        identities: names; LoRAs do not depend on how they are grouped.
        examples: gives pictures, captions and a seed of some of them.
        config: settings of the training, and how many are trained in one batch.
        writer: of the store, see `open_store`.
        likeness: measures how like the person the pictures of a LoRA are, in [-1, 1].
        progress: called after every step as (step, steps, metrics) of the running group; it may
            raise InterruptedTraining.

    Returns:
        Name to reason of each identity that could not be trained.

    Raises:
        InterruptedTraining: stopped; the same call goes on.
        DatasetError: the store cannot be written.
    """
    missing, failed = _missing(identities, examples, config, writer)
    for start in range(0, len(missing), config.group):
        own = missing[start : start + config.group]
        run = writer.folder / "work" / fingerprint(own)[:24]
        names, course = [name for name, _ in own], config.dreambooth
        trained = _trained(base, names, examples, course, run, progress)
        loras = []
        for (identity, source), (weights, reason) in zip(own, trained, strict=True):
            alike = likeness(identity, weights) if likeness and weights is not None else None
            loras.append(NewLoRA(identity, weights, alike, source, reason))
            failed |= {identity: reason} if reason else {}
        launched().on_main(lambda added=loras: writer.add(added))  # type: ignore[misc]
        launched().on_main(lambda folder=run: remove_run(folder))  # type: ignore[misc]
    return failed


def _missing(
    identities: Sequence[str], examples: Examples, config: CorpusConfig, writer: StoreWriter
) -> tuple[list[tuple[str, str]], dict[str, str]]:
    """Who is not in the store as made from these pictures and settings, with the digest of both;
    and who could not be trained on them before, with the reason."""
    there = {(row.identity, row.source): row.reason for row in writer.rows()}
    sources = [
        fingerprint(examples([name]), config.dreambooth, writer.layout.hash) for name in identities
    ]
    pairs = list(zip(identities, sources, strict=True))
    failed = {pair[0]: there[pair] for pair in pairs if there.get(pair)}
    return [pair for pair in pairs if pair not in there], failed


def _trained(
    base: BaseModel,
    identities: Sequence[str],
    examples: Examples,
    config: DreamBoothConfig,
    run: Path,
    progress: Progress | None,
) -> Iterator[tuple[LoRAWeights | None, str]]:
    """Weights of each, or None and the reason; a group that diverges is trained one by one."""
    pictures = examples(identities)
    try:
        folder = run / "group"
        weights = train_dreambooth(base, pictures, config, progress, folder=folder)[config.steps]
    except DivergedError as failure:
        if len(identities) == 1:
            yield None, str(failure)
            return
        for row, identity in enumerate(identities):
            alone = _only(examples, identity, pictures.seeds[row])
            yield from _trained(base, [identity], alone, config, run / str(row), progress)
        return
    yield from ((weights.batch_item(row), "") for row in range(len(identities)))


def _only(examples: Examples, identity: str, seed: int) -> Examples:
    """Examples of one person with the seed that it has in its group."""
    return lambda names: replace(examples([identity]), seeds=(seed,))
