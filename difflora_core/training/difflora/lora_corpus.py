"""Construction of a LoRA corpus: DreamBooth for many identities, group after group."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ...base_model.protocol import BaseModel
from ...config import Config, check_range
from ...errors import CheckpointError
from ...lora.layout import LoRALayout, edited_layers
from ...storage.lora_corpus import LoRACorpus, load_corpus, save_corpus
from ..fingerprint import fingerprint, weights_digest
from ..loop import Progress
from ..lora.dreambooth import DreamBoothConfig, DreamBoothExamples, train_dreambooth
from ..processes import launched
from ..state_file import differences, remove_run

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
    """Corpus of a LoRA trained for every identity, written to one file; an existing one is read.

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

    Raises:
        InterruptedTraining: stopped; the same call goes on.
        CheckpointError: a file cannot be read or written, or is of other settings or identities.
    """
    same = fingerprint(list(identities), config, shared_down, weights_digest(base.unet))
    facts = {"fingerprint": same, "settings": config.to_dict()}
    settings, folder = config.dreambooth, path.with_name(path.name + ".parts")
    layout = base.layout(config.base, settings.rank, edited_layers(settings.targets, shared_down))
    starts = range(0, 0 if path.exists() else len(identities), config.group)
    parts = []
    for number, start in enumerate(starts):
        group = tuple(identities[start : start + config.group])
        run = folder / f"group-{number:05d}"
        part = folder / f"{run.name}.safetensors"
        if not part.exists():
            report = _shifted(progress, number * settings.steps, len(starts) * settings.steps)
            pictures = replace(examples(group), seeds=group)
            trained = train_dreambooth(
                base, pictures, settings, report, shared_down=shared_down, folder=run
            )
            _write(LoRACorpus(layout, group, trained[settings.steps], facts), part)
            _remove(run)
        parts.append(_read(part, group, layout, facts))
    if parts:
        _write(LoRACorpus.join(parts), path)  # all have read the parts
    _remove(folder)
    return _read(path, identities, layout, facts)


def _write(corpus: LoRACorpus, path: Path) -> None:
    """Write a corpus once, whatever the number of processes; all go on when it is there."""
    signed = replace(corpus, source={**corpus.source, "digest": _digest(corpus)})
    launched().on_main(lambda: save_corpus(signed, path))


def _digest(corpus: LoRACorpus) -> str:
    """Digest of people, factors and settings: a bit that falls over is noticed."""
    layers = corpus.weights.folded().layers.items()
    factors = {name: [layer.down.float(), layer.up.float()] for name, layer in layers}
    settings = json.dumps(corpus.source.get("settings"), sort_keys=True)
    return fingerprint(list(corpus.identities), factors, settings)


def _remove(folder: Path) -> None:
    """Remove a folder whose result is on disk, if it is still there."""
    launched().on_main(lambda: remove_run(folder))


def _shifted(progress: Progress | None, done: int, total: int) -> Progress | None:
    """Progress of one group told as progress of the whole."""
    if progress is None:
        return None
    return lambda step, steps, metrics: progress(done + step, total, metrics)


def _read(
    path: Path, identities: Sequence[int], layout: LoRALayout, facts: Mapping[str, Any]
) -> LoRACorpus:
    """The corpus of a file, if it holds these people and was made with these facts."""
    corpus = load_corpus(path)
    if corpus.source.get("fingerprint") != facts["fingerprint"]:
        there = corpus.source.get("settings")
        found = differences(there, facts["settings"]) if isinstance(there, Mapping) else []
        what = "; ".join(found[:5]) or "other people or another base model"
        raise CheckpointError(
            f"{path} was made with other settings or identities ({what}); move it away to build "
            "anew."
        )
    if corpus.identities != tuple(identities) or corpus.layout != layout:
        raise CheckpointError(f"{path} holds other people than it should; delete it.")
    made = _digest(corpus)
    if corpus.source.get("digest", made) != made:  # corpora of version 0.1.0 have none
        raise CheckpointError(f"{path} is damaged; delete it to train its people anew.")
    return corpus
