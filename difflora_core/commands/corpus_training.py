"""A dataset's people to a corpus: latents, LoRAs group by group, likeness, index."""

from __future__ import annotations

import shutil

from ..base_model.protocol import compute_device
from ..data.encodings import encode_latents
from ..data.lora_checks import LoRACheckSettings
from ..data.lora_store import LoRAStore
from ..data.prepared import PreparedDataset
from ..errors import ConfigError, counted
from ..training.difflora.dataset_people import DatasetPeople, JudgeSettings, LikenessJudge
from ..training.difflora.lora_corpus import CorpusConfig
from ..training.difflora.lora_store import WORK, open_store, train_store
from ..training.fingerprint import weights_digest
from .bases import UNETS
from .encoders import open_encoders
from .local_base import DEMO, LocalBase
from .run_folder import RunFolder


def check_trainable(base: str) -> None:
    """Refuses a base that is only known by its name.

    Raises:
        ConfigError: it is one.
    """
    if base in UNETS and base != DEMO:
        raise ConfigError(
            f"LoRAs are trained on a model: name the checkpoint file or the diffusers folder of "
            f"SDXL with --base, not {base}. The name alone is enough for LoRA files."
        )


def train_people(
    dataset: PreparedDataset,
    base: LocalBase,
    config: CorpusConfig,
    judge: JudgeSettings,
    checks: LoRACheckSettings,
    run: RunFolder,
) -> tuple[LoRAStore, dict[str, str]]:
    """Trains the LoRAs that the corpus in a run's folder lacks, and indexes it.

    Args:
        dataset: prepared.
        base: to train on.
        config: of the training.
        judge: measures likeness, if it names a face analysis.
        checks: which LoRAs are used.
        run: its folder is the corpus's.

    Returns:
        The store, and who is not in it because the training failed, with the reason.

    Raises:
        InterruptedTraining: stopped; the same call goes on.
        DiffLoRAError: the dataset does not suit, or the corpus is of another base.
    """
    writer = open_store(run.path, base.model, config)
    with run.watch("encode") as watch:
        latents = encode_latents(
            *(dataset, base.model, weights_digest(base.model.vae)),
            report=lambda what, done, total: watch(done, total, {}),
        )
    people = DatasetPeople(dataset, latents)
    likeness = None
    if judge.faces:
        encoder, _ = open_encoders(judge.faces, "", compute_device(base.model))
        likeness = LikenessJudge(base.model, people, dataset, encoder, judge)
    run.say(f"{counted(len(people.names), 'person')}, {config.group} at once")
    with run.watch("train") as watch:
        course = train_store(
            base.model, people.names, people, config, writer, likeness, progress=watch
        )
    store = writer.write_index(checks, course.sources)
    shutil.rmtree(run.path / WORK, ignore_errors=True)  # of groups that were stopped at their end
    unknown = sum(row.likeness is None for row in store.rows)
    if likeness and unknown:
        run.say(f"Of {counted(unknown, 'LoRA')} nobody measured the likeness when they were made.")
    return store, dict(course.failed)
