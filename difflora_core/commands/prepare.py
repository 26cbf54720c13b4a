"""`prepare`: photos of people to a dataset that training reads."""

from __future__ import annotations

import dataclasses
import os
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from ..config import check_range
from ..data.encodings import encode_latents, encode_prompts
from ..data.prepare import PrepareConfig, prepare
from ..data.prepared import PreparedDataset, summary
from ..data.workers import open_workers
from ..training.fingerprint import weights_digest
from .encoders import chosen_device
from .local_base import open_base
from .progress import Watch
from .run_folder import RunFolder, run_folder


@dataclass(frozen=True, kw_only=True)
class Settings(PrepareConfig):
    """Makes a dataset of photos: opened, turned, faces found, people told apart, cut to size.

    Called again with the same words it goes on where it was stopped; pictures that are done are
    known by their content.

    Args:
        source: a folder with one folder a person, of kohya's (10_name), with metadata.jsonl, of
            parquet files, or a dataset that `datasets` saved to disk.
        out: folder of the dataset.
        workers: processes that open pictures; 0 takes one a core, or all that a cluster has.
        ray: address of a Ray cluster that opens them, auto, or local to start one; the folders
            must be the same on all its machines. Empty takes processes.
        update: take up pictures and settings that have changed since the dataset was made.
        kind: of the source: auto, folders, kohya, metadata, parquet or arrow.
        picture_column: of a table; empty takes image or picture.
        person_column: of a table; empty takes person, identity, name or label.
        caption_column: of a table; empty takes captions, caption, text or prompt.
        resolution: side in pixels of the square that the base model was made for.
        smallest: pixels that the shorter side of a picture must have; 0: half of the resolution.
        faces: folder of a face analysis; empty looks for no faces.
        provider: what the face analysis runs on: cpu, cuda.
        smallest_face: pixels that a face must have.
        choices: how people are told apart, and which pictures go.
        framing: whole pictures, or the square around the face.
        face_margin: side of that square over that of the face; 2.2 holds hair and neck.
        template: caption of pictures that have none; {person} stands for the name.
        caption_command: a program that reads paths of pictures, one a line, and writes a caption
            a line.
        encoding: how pictures are stored: jpeg or png.
        sheets: contact sheets at most.
        licence: of the pictures, in words.
        base: base model whose latents and encoded captions are kept beside the pictures; empty
            leaves that to the training.
        mirrored: also keep latents of the mirrored pictures.
        device: that the base computes on: auto, cpu, or cuda.
    """

    source: str
    out: str
    workers: int = 0
    ray: str = ""
    update: bool = False
    base: str = ""
    mirrored: bool = False
    device: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("Prepare", "workers", self.workers, 0, 1024)

    @property
    def recipe(self) -> PrepareConfig:
        """The settings of the dataset alone."""
        names = [field.name for field in dataclasses.fields(PrepareConfig)]
        return PrepareConfig(**{name: getattr(self, name) for name in names})


def run(settings: Settings, console: Console) -> None:
    """Prepares, and says what became of the pictures.

    Raises:
        DiffLoRAError: see `data.prepare.prepare`.
    """
    folder = Path(settings.out)
    with run_folder(folder, settings, console) as own:
        workers = settings.workers if settings.ray else settings.workers or os.cpu_count() or 1
        with ExitStack() as shown, open_workers(workers, settings.ray) as crew:
            stages = _Stages(own, shown)
            data = prepare(settings.source, folder, settings.recipe, crew, settings.update, stages)
            if settings.base:
                _encode(data, settings, stages)
        own.say(f"{summary(data.facts)}.")
        for note in data.facts.notes:
            own.say(note)
        if (folder / "sheet-000.png").exists():
            own.say(f"Look at {folder / 'sheet-000.png'}; {folder / 'dropped.jsonl'} says why.")


def _encode(data: PreparedDataset, settings: Settings, stages: _Stages) -> None:
    """Keeps what the base's encoders make of the dataset."""
    base = open_base(settings.base, chosen_device(settings.device)).model
    vae, unet = weights_digest(base.vae), weights_digest(base.unet)
    encode_latents(data, base, vae, settings.mirrored, stages)
    encode_prompts(data, base, f"text encoders beside {unet}", stages)


class _Stages:
    """Tells one stage after the other, each with a watch of its own."""

    def __init__(self, run: RunFolder, shown: ExitStack) -> None:
        self._run, self._shown = run, shown
        self._what = ""
        self._watch: Watch | None = None

    def __call__(self, what: str, done: int, total: int) -> None:
        if what != self._what:
            self._shown.close()
            self._what, self._watch = what, None
            if total:
                self._watch = self._shown.enter_context(self._run.watch(what))
            else:
                self._run.say(f"{what} …")
        if self._watch is not None:
            self._watch(done, total, {})
