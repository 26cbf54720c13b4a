"""A dataset's people to a corpus: latents, LoRAs group by group, likeness, index."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path

from torch import Tensor

from ..base_model.protocol import compute_device
from ..data.encodings import Latents, encode_latents
from ..data.lora_checks import LoRACheckSettings
from ..data.lora_rows import LoRARows
from ..data.lora_store import LoRAStore
from ..data.prepared import PreparedDataset
from ..data.workers import Crew
from ..errors import ConfigError, counted, shown
from ..lora.layout import LoRALayout, edited_layers
from ..storage.checkpoint import load_model
from ..training.difflora.dataset_people import DatasetPeople, JudgeSettings, LikenessJudge
from ..training.difflora.lae_stream import common_down
from ..training.difflora.lora_corpus import CorpusConfig
from ..training.difflora.lora_store import WORK, StorePlan, StoreTrainer, open_store
from ..training.fingerprint import weights_digest
from ..training.lora.dreambooth_config import DreamBoothConfig
from .bases import UNETS
from .encoders import chosen_device, open_encoders
from .local_base import DEMO, LocalBase, open_base
from .progress import Watch
from .run_folder import RunFolder


@dataclass(frozen=True)
class PeopleJob:
    """What is trained on what; every process that takes part makes the rest of it.

    Attributes:
        dataset: folder of a prepared dataset.
        folder: of the corpus.
        base, tokenizer, device: see `local_base.open_base`.
        group: people that are trained at once.
        course: settings of their training.
        judge: measures likeness, if it names a face analysis.
        down: file of the DiffLoRA model, or folder of the corpus, whose `down` everybody begins
            with; empty: none.
    """

    dataset: str
    folder: str
    base: str
    tokenizer: str
    device: str
    group: int
    course: DreamBoothConfig
    judge: JudgeSettings
    down: str = ""

    @cached_property
    def opened(self) -> LocalBase:
        """The base model.

        Raises:
            DiffLoRAError: it is known by its name alone, or cannot be read.
        """
        if self.base in UNETS and self.base != DEMO:
            raise ConfigError(
                f"LoRAs are trained on a model: name the checkpoint file or the diffusers folder "
                f"of SDXL with --base, not {self.base}. The name alone is enough for LoRA files."
            )
        return open_base(self.base, chosen_device(self.device), self.tokenizer)

    @cached_property
    def data(self) -> PreparedDataset:
        """The dataset."""
        return PreparedDataset(self.dataset)

    @cached_property
    def people(self) -> DatasetPeople:
        """Those who are trained; their latents are there."""
        return DatasetPeople(self.data, Latents(self.data))

    @cached_property
    def trainer(self) -> StoreTrainer:
        """Trains groups of them.

        Raises:
            DiffLoRAError: the dataset does not suit, or the corpus is of another base.
        """
        base, likeness = self.opened.model, None
        config = CorpusConfig(self.opened.family, self.group, self.course)
        if self.judge.faces:
            encoder, _ = open_encoders(self.judge.faces, "", compute_device(base))
            likeness = LikenessJudge(base, self.people, self.data, encoder, self.judge)
        shared = self._shared_down()
        writer = open_store(Path(self.folder), base, config, shared)
        return StoreTrainer(base, self.people, config, writer, likeness, shared)

    def _shared_down(self) -> dict[str, Tensor] | None:
        """Layer name to (r, in) of the model or corpus that is named, if one is.

        Of a corpus they are those that serve all its LoRAs best, see `lae.common_down`.

        Raises:
            DiffLoRAError: it cannot be read, has no shared `down`, or is for another base or rank.
        """
        if not self.down:
            return None
        place, rank = self.down, self.course.rank
        model = None if Path(place).is_dir() else load_model(place)
        edited = LoRAStore(place).layout if model is None else model.layout
        layers = edited_layers(self.course.targets, edited.module_names)
        wanted = self.opened.model.layout(self.opened.family, rank, layers)
        if model is None:
            loras = LoRARows(LoRAStore(place, wanted))
            device = compute_device(self.opened.model)
            return common_down(loras, tuple(wanted), wanted.rank, device)
        if model.layout.hash != wanted.hash:
            raise ConfigError(
                f"{shown(place, 300)} is for {_about(model.layout)}, the corpus for "
                f"{_about(wanted)}."
            )
        factors = model.lae.down_factors()
        if not factors:
            raise ConfigError(f"{shown(place, 300)} has no `down` that LoRAs could share.")
        return {name: part.detach() for name, part in factors.items()}


def _about(layout: LoRALayout) -> str:
    """A layout in words."""
    return f"{counted(len(layout), 'layer')} of {shown(layout.base)} at rank {layout.rank}"


class GroupWork:
    """Trains a group; it can be sent to another process, which opens what it needs once."""

    def __init__(self, training: PeopleJob) -> None:
        self._training = replace(training)  # without what is open here

    def __call__(self, names: tuple[str, ...]) -> dict[str, str]:
        """Name to reason of each that could not be trained."""
        return _kept(self._training).trainer.train(names)


@lru_cache(1)
def _kept(training: PeopleJob) -> PeopleJob:
    """What this process has opened for a training."""
    return training


def train_people(
    training: PeopleJob, checks: LoRACheckSettings, workers: Crew, run: RunFolder
) -> tuple[LoRAStore, dict[str, str]]:
    """Trains the LoRAs that the corpus in a run's folder lacks, and indexes it.

    Args:
        training: what on what.
        checks: which LoRAs are used.
        workers: who trains the groups.
        run: its folder is the corpus's.

    Returns:
        The store, and who is not in it because the training failed, with the reason.

    Raises:
        InterruptedTraining: stopped; the same call goes on.
        DiffLoRAError: the dataset does not suit, or the corpus is of another base.
    """
    vae = weights_digest(training.opened.model.vae)
    with run.watch("encode") as watch:
        encode_latents(
            *(training.data, training.opened.model, vae),
            report=lambda what, done, total: watch(done, total, {}),
        )
    trainer, names = training.trainer, training.people.names
    plan = trainer.plan(names)
    missing = sum(map(len, plan.groups))
    run.say(f"{counted(len(names), 'identity')}, {missing} to train, {training.group} at once")
    with run.watch("train") as watch:
        if workers.alone:
            failed = trainer.train_all(plan, watch)
        else:
            failed = _train_elsewhere(training, plan, workers, watch)
    store = trainer.writer.write_index(checks, plan.sources)
    shutil.rmtree(run.path / WORK, ignore_errors=True)  # of groups that were stopped at their end
    unknown = sum(row.likeness is None for row in store.rows)
    if training.judge.faces and unknown:
        run.say(f"Of {counted(unknown, 'LoRA')} nobody measured the likeness when they were made.")
    return store, failed


def _train_elsewhere(
    training: PeopleJob, plan: StorePlan, workers: Crew, watch: Watch
) -> dict[str, str]:
    """Trains a plan's groups in other processes; progress counts people."""
    failed, done, total = dict(plan.failed), 0, sum(map(len, plan.groups))
    watch(done, total, {})
    for names, missed in zip(
        plan.groups, workers.each(GroupWork(training), plan.groups), strict=True
    ):
        failed |= missed
        done += len(names)
        watch(done, total, {})
    return failed
