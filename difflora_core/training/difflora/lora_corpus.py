"""Construction of a LoRA corpus: DreamBooth for many identities, group after group."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from ...base_model.protocol import BaseModel
from ...config import Config, check_range
from ...errors import CheckpointError
from ...storage.lora_corpus import LoRACorpus, load_corpus, save_corpus
from ..fingerprint import fingerprint, weights_digest
from ..loop import Progress
from ..lora.dreambooth import DreamBoothConfig, DreamBoothExamples, train_dreambooth
from ..processes import launched

__all__ = ["CorpusConfig", "build_corpus", "load_corpus"]


@dataclass(frozen=True)
class CorpusConfig(Config):
    """Settings of a corpus.

    Args:
        base: family name of the base model, kept in the layout.
        group: identities trained in one batch.
        dreambooth: settings of their training.

    Raises:
        ConfigError: a value out of range.
    """

    base: str = "demo"
    group: int = 16
    dreambooth: DreamBoothConfig = field(default_factory=DreamBoothConfig)

    def __post_init__(self) -> None:
        check_range("Corpus", "group", self.group, 1, 65_536)


def build_corpus(
    base: BaseModel,
    identities: Sequence[int],
    examples: Callable[[Sequence[int]], DreamBoothExamples],
    config: CorpusConfig,
    path: Path,
    shared_down: Mapping[str, Tensor] | None = None,
    progress: Progress | None = None,
) -> LoRACorpus:
    """Train a LoRA for every identity and write them to one file; an existing file is read.

    Args:
        base: frozen base model.
        identities: numbers of the people, 0 or more; also the seeds of their random draws, so the
            result does not depend on how they are grouped.
        examples: gives pictures and captions of some of them.
        config: settings.
        path: the corpus file. While it is made, finished groups and the state of the running one
            lie in a folder beside it; called again, it goes on from there.
        shared_down: as in `train_dreambooth`.
        progress: called after every step as (step, steps, metrics) over all groups; it may raise
            InterruptedTraining.

    Returns:
        The corpus.

    Raises:
        InterruptedTraining: stopped; the same call goes on.
        CheckpointError: the file or a part of it was made with other settings or identities.
    """
    wanted = fingerprint(list(identities), config, shared_down, weights_digest(base.unet))
    if path.exists():
        return _checked(load_corpus(path), wanted, path)
    layout, settings = base.layout(config.base, config.dreambooth.rank), config.dreambooth
    folder = path.with_name(path.name + ".parts")
    starts = range(0, len(identities), config.group)
    parts = []
    for number, start in enumerate(starts):
        group = tuple(identities[start : start + config.group])
        part = folder / f"group-{number:05d}.safetensors"
        if not part.exists():
            report = _shifted(progress, number * settings.steps, len(starts) * settings.steps)
            pictures = replace(examples(group), seeds=group)
            trained = train_dreambooth(
                base, pictures, settings, report, shared_down=shared_down, folder=folder
            )[settings.steps]
            facts = {"fingerprint": wanted, "settings": config.to_dict()}
            _write(LoRACorpus(layout, group, trained, facts), part)
        parts.append(_checked(load_corpus(part), wanted, part))
    return _finish(parts, path, folder)


def _write(corpus: LoRACorpus, path: Path) -> None:
    """Write a corpus once, whatever the number of processes; all go on when it is there."""
    if launched().is_main:
        save_corpus(corpus, path)
    launched().agree(None)


def _finish(parts: Sequence[LoRACorpus], path: Path, folder: Path) -> LoRACorpus:
    """Joins the groups in one file and removes theirs."""
    corpus = LoRACorpus.join(parts)
    _write(corpus, path)  # all have read the parts
    if launched().is_main:
        shutil.rmtree(folder)
    return corpus


def _shifted(progress: Progress | None, done: int, total: int) -> Progress | None:
    """Progress of one group told as progress of the whole."""
    if progress is None:
        return None
    return lambda step, steps, metrics: progress(done + step, total, metrics)


def _checked(corpus: LoRACorpus, wanted: str, path: Path) -> LoRACorpus:
    """The corpus, if it was made with these settings."""
    if corpus.source.get("fingerprint") != wanted:
        raise CheckpointError(
            f"{path} was made with other settings or identities; move it away to build anew."
        )
    return corpus
