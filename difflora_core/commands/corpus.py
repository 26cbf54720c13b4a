"""`corpus`: people of a dataset, or LoRA files of theirs, to a corpus that `paper` learns from."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.console import Console

from ..config import Config, check_range
from ..data.collect_loras import collect_loras
from ..data.lora_checks import LoRACheckSettings
from ..data.lora_store import LoRAStore, StoreWriter
from ..data.prepared import FACTS
from ..data.workers import open_workers
from ..errors import ConfigError, DatasetError, counted, shown
from ..limits import RANK
from ..lora.layout import layout_from_unet_config
from ..training.difflora.dataset_people import JudgeSettings
from ..training.lora.dreambooth_config import DreamBoothConfig
from .bases import unet_config
from .corpus_training import PeopleJob, train_people
from .run_folder import RunFolder, run_folder

COURSE = DreamBoothConfig(
    rank=8,
    steps=600,
    samples_per_step=1,
    learning_rate=1e-4,
    decay="cosine",
    warmup=20,
    loss_weighting="min_snr",
    normalise_gradient=False,
    betas=(0.9, 0.999),
    weight_decay=0.01,
    precision="bf16",
    same_start=True,
    checkpointing=True,
)
"""For SDXL, as trainers in use have it; no corpus of full size has been trained with it."""


@dataclass(frozen=True)
class Settings(Config):
    """Makes a corpus of LoRAs, one a person: trains them on a dataset, or reads LoRA files.

    Of a dataset that prepare wrote, people are trained with DreamBooth, several at once on one
    frozen base. LoRA files are read in any family and brought to one rank. All are checked and
    indexed. Called again it adds what is new; what is there is known by its content. Other checks
    change what is used and train nothing again.

    Args:
        source: a dataset that prepare wrote; or a folder of LoRA files, one a person, where those
            in folders below count too.
        out: folder of the corpus.
        base: base model that the LoRAs are for: sdxl, sd15 or demo; to train, demo, or a checkpoint
            file or a diffusers folder of SDXL.
        rank: of the corpus; others are brought to it.
        most_lost: share of its change that a LoRA may lose by that.
        checks: which LoRAs are used.
        group: people that are trained at once.
        training: course of the training of everybody; its rank is that of the corpus.
        down: a DiffLoRA model whose shared `down` everybody begins with, and keeps with
            --training.no-train-down: LoRAs as its autoencoder makes them. Or a corpus, of other
            people too: the `down` that serves all its LoRAs best. Empty draws them.
        judge: of the likeness that each LoRA reached when it was trained.
        tokenizer: folder of CLIP's vocab.json and merges.txt, for a checkpoint file; empty takes
            that of ComfyUI (COMFYUI_PATH).
        device: to train on: auto, cpu, or cuda.
        workers: processes that train a group each; they need the memory of as many models. 0 takes
            all that a cluster has.
        ray: address of a Ray cluster that trains them, auto, or local to start one; the folders
            must be the same on all its machines. Empty takes processes.
        gpus: that each worker of a cluster needs.
    """

    source: str
    out: str
    base: str = "sdxl"
    rank: int = 8
    most_lost: float = 0.5
    checks: LoRACheckSettings = field(default_factory=LoRACheckSettings)
    group: int = 4
    training: DreamBoothConfig = COURSE
    down: str = ""
    judge: JudgeSettings = field(default_factory=JudgeSettings)
    tokenizer: str = ""
    device: str = "auto"
    workers: int = 1
    ray: str = ""
    gpus: float = 0.0

    def __post_init__(self) -> None:
        check_range("Corpus", "rank", self.rank, 1, RANK)
        check_range("Corpus", "most_lost", self.most_lost, 0, 1)
        check_range("Corpus", "group", self.group, 1, 65_536)
        check_range("Corpus", "workers", self.workers, 0 if self.ray else 1, 100_000)
        check_range("Corpus", "gpus", self.gpus, 0, 1024)
        if self.training.rank not in (COURSE.rank, self.rank):
            raise ConfigError(
                f"A corpus has one rank: --rank is {self.rank}, --training.rank is "
                f"{self.training.rank}. Name the first alone."
            )

    @property
    def course(self) -> DreamBoothConfig:
        """The training, at the corpus's rank."""
        return replace(self.training, rank=self.rank)


def run(settings: Settings, console: Console) -> None:
    """Trains or collects, indexes, and says what was left out.

    Raises:
        InterruptedTraining: stopped; the same call goes on.
        DiffLoRAError: there is nothing to make LoRAs of, the corpus is of another base, or it
            cannot be written.
    """
    source, folder = Path(settings.source), Path(settings.out)
    of_people = (source / FACTS).exists()
    files = [] if of_people else sorted(p for p in source.rglob("*.safetensors") if p.is_file())
    if not files and not of_people:
        raise DatasetError(
            f"There is neither a dataset that prepare finished ({FACTS}) nor a LoRA file "
            f"(.safetensors) in {shown(str(source), 300)}."
        )
    if settings.down and not of_people:
        raise ConfigError("LoRA files have a `down` of their own: --down is for a dataset alone.")
    with run_folder(folder, settings, console) as own:
        store, left = _train(settings, own) if of_people else _collect(settings, files, own)
        left |= {row.identity: row.reason for row in store.left_out}
        for name, reason in left.items():
            own.say(f"{shown(name)} left out: {reason}")
        own.say(f"{counted(len(store), 'LoRA')} in the corpus, {len(left)} left out.")


def _train(settings: Settings, own: RunFolder) -> tuple[LoRAStore, dict[str, str]]:
    """A dataset's people to a corpus; and of whom the training failed, with the reason."""
    training = PeopleJob(
        *(settings.source, settings.out, settings.base, settings.tokenizer, settings.device),
        *(settings.group, settings.course, settings.judge, settings.down),
    )
    with open_workers(settings.workers, settings.ray, settings.gpus) as workers:
        return train_people(training, settings.checks, workers, own)


def _collect(
    settings: Settings, files: list[Path], own: RunFolder
) -> tuple[LoRAStore, dict[str, str]]:
    """LoRA files to a corpus; and which could not be read, with the reason."""
    layout = layout_from_unet_config(settings.base, unet_config(settings.base), settings.rank)
    writer = StoreWriter(Path(settings.out), layout, "")
    source = Path(settings.source)
    names = [path.relative_to(source).with_suffix("").as_posix() for path in files]
    with own.watch("reading LoRA files") as watch:
        collected = collect_loras(
            *(files, names, writer, settings.most_lost),
            lambda what, done, total: watch(done, total, {}),
        )
    if beside := collected.summary():
        own.say(beside)
    return writer.write_index(settings.checks), collected.refused
