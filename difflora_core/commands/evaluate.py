"""`evaluate`: models, LoRAs and other programs' pictures to a table of measures, with the pictures.

Pictures, what networks saw in them, and the report are kept in the run's folder; called again, a
run draws and looks at what is missing.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import torch
from rich.console import Console

from ..config import Config, check_range
from ..demo.world.scenes import render_portraits
from ..errors import ConfigError, counted, shown
from ..evaluation.backbones import weight_files
from ..evaluation.drawing import Adaptation, ProtocolDrawer
from ..evaluation.pictures import (
    LORA_SECONDS,
    NAMING,
    PROMPT,
    SECONDS,
    Cell,
    foreign_pictures,
    is_drawn,
    keep,
    seconds_of,
)
from ..evaluation.protocol import Protocol, chosen_people, read_protocol
from ..evaluation.report import Interval, bootstrap_interval
from ..evaluation.scores import Eyes, Known, Shown, by_person, columns, whole_row
from ..storage.image_files import SUFFIXES, read_texts
from ..training.fingerprint import fingerprint, weights_digest
from .comfy_servers import Servers
from .encoders import chosen_device, open_encoders
from .evaluate_backbones import Backbones, OpenBackbones, open_backbones
from .evaluate_report import NAME as REPORT
from .evaluate_report import Table, WholeReport, device_name, markdown, write_report
from .evaluate_rows import PHOTOS, REAL, BaseRow, PictureRow, Row, Setting, open_rows
from .evaluate_workflows import WorkflowRow, draw_row
from .local_base import DEMO, LocalBase, open_base
from .run_folder import RunFolder, run_folder

DRAWING = 1
"""Goes up when the same settings would draw other pictures."""
PICTURES, FEATURES, PEOPLE = "pictures", "features", "people"
DEMO_PHOTOS = 8
FIRST = ("Face Sim", "R-FaceSim", "face found", "copy-paste", "DINO", "DINOv2", "CLIP-I", "CLIP-T")
"""Columns that come first in the table."""


@dataclass(frozen=True)
class Settings(Config):
    """Compares models that make LoRAs of photos, LoRA files, and pictures of other programs.

    A row is NAME=PATH or PATH: a DiffLoRA model, a HyperLoRA folder, a LoRA file (for everybody), a
    folder with PERSON.safetensors, a folder with pictures PERSON/PROMPT-SEED.png, numbers from 1
    (anna/03-1.png), or a workflow as multiply takes it, which running ComfyUIs draw by. The base
    without any is always a row.

    Args:
        folder: of the run: pictures, report.md, report.json, report.html.
        rows: what is compared.
        protocol: demo, sdxl, or a JSON file; empty takes that of the base.
        base: the base model: demo, or a checkpoint file or a diffusers folder of SDXL.
        tokenizer: folder of CLIP's vocab.json and merges.txt, for a checkpoint file; empty takes
            that of ComfyUI (COMFYUI_PATH).
        people: folder with one folder of photos a person; the first by name is shown to models.
            Empty draws the demo world's.
        photos: how many of the first photos are shown to models.
        faces: folder of the face analysis that the models were trained with.
        clip_vision: folder or file of the CLIP vision that they were trained with.
        backbones: the networks that judge.
        real: folder of pictures that FID and KID compare with; empty takes all photos of the
            people.
        strengths: of the LoRAs; each is a row.
        first_people: only so many of the people; 0 takes all.
        first_prompts: only so many of the prompts; 0 takes all.
        seeds: pictures of each prompt; 0 takes the protocol's.
        steps: of the sampler; 0 takes the protocol's.
        side: of the pictures in pixels; 0 takes the protocol's.
        batch: pictures that are drawn at once.
        servers: that draw the rows of workflows.
        device: auto, cpu, or cuda.
    """

    folder: str
    rows: tuple[str, ...]
    protocol: str = ""
    base: str = DEMO
    tokenizer: str = ""
    people: str = ""
    photos: int = 1
    faces: str = ""
    clip_vision: str = ""
    backbones: Backbones = field(default_factory=Backbones)
    real: str = ""
    strengths: tuple[float, ...] = (1.0,)
    first_people: int = 0
    first_prompts: int = 0
    seeds: int = 0
    steps: int = 0
    side: int = 0
    batch: int = 8
    servers: Servers = field(default_factory=Servers)
    device: str = "auto"

    def __post_init__(self) -> None:
        for name, least in (("photos", 1), ("batch", 1), ("seeds", 0), ("steps", 0), ("side", 0)):
            check_range("evaluate", name, getattr(self, name), least, 8192)
        for name in ("first_people", "first_prompts"):
            check_range("evaluate", name, getattr(self, name), 0, 1_000_000)
        if not self.strengths or len(set(self.strengths)) < len(self.strengths):
            raise ConfigError("evaluate: name at least one strength, and none twice.")
        for strength in self.strengths:
            check_range("evaluate", "strengths", strength, -20, 20)


def run(settings: Settings, console: Console) -> None:
    """Draws what is missing, looks at it, and writes the report.

    Raises:
        DiffLoRAError: a row, a photo, the base or a network cannot be used.
    """
    with run_folder(Path(settings.folder), settings, console) as folder:
        device = chosen_device(settings.device)
        backbones = open_backbones(settings.backbones, device)
        for title, files in backbones.files.items():
            for name, digest in files.items():
                folder.say(f"{shown(title)}: {shown(name)} SHA-256 {digest}")
        for sentence in backbones.missing:
            folder.say(sentence)
        work = _Work(settings, folder, device)
        drawn, foreign = open_rows(settings.rows, work.setting, settings.strengths)
        shown_rows = {row.name: work.draw(row) for row in (BaseRow(), *drawn)}
        shown_rows |= {row.name: work.foreign(row) for row in foreign}
        table, per_person = work.look(shown_rows, backbones)
        write_report(work.report(table, per_person, shown_rows, backbones), folder.path)
        folder.say(markdown(table))
        folder.say(f"{shown(str(folder.path / REPORT), 300)}.html, .md, .json")


class _Work:
    """What the stages of a run share."""

    def __init__(self, settings: Settings, folder: RunFolder, device: torch.device) -> None:
        self.settings, self.run, self.device = settings, folder, device
        self.base: LocalBase = open_base(settings.base, device, settings.tokenizer)
        name = settings.protocol or ("demo" if settings.base == DEMO else "sdxl")
        self.protocol = _narrowed(read_protocol(name), settings)
        self.photos = self._people()
        self.people = list(self.photos)
        self.drawer = ProtocolDrawer(self.base.model, self.protocol)
        self.setting = self._setting()
        self.base_key = weights_digest(self.base.model.unet)
        asked = read_protocol(name)
        if (len(self.people), self.protocol.cells) != (asked.count, asked.cells):
            folder.say(
                f"{counted(len(self.people), 'person')}, "
                f"{counted(len(self.protocol.prompts), 'prompt')}, "
                f"{counted(self.protocol.seeds, 'seed')}; the protocol asks for {asked.count}, "
                f"{len(asked.prompts)} and {asked.seeds}."
            )

    def draw(self, row: Row) -> Shown:
        """Every picture of a row; those that are there are left."""
        cells = self.protocol.cells
        folder = self.run.path / PICTURES / row.name
        total, done = len(self.people) * len(cells), 0
        with self.run.watch(f"{row.name}: drawing") as watch:
            for person in self.people:
                keys = {cell: self._key(row, person, cell) for cell in cells}
                missing = {
                    cell
                    for cell in cells
                    if not is_drawn(Cell(person, *cell).path(folder), keys[cell])
                }
                given = row.adaptation(person) if missing else None
                for start in range(0, len(cells), self.settings.batch):
                    part = cells[start : start + self.settings.batch]
                    if given is not None and missing & set(part):
                        for cell, image, facts in self._drawn(given, person, part):
                            if cell in missing:
                                keep(image, Cell(person, *cell).path(folder), keys[cell], facts)
                    done += len(part)
                    watch(done, total, {})
        places = [Cell(person, *cell) for person in self.people for cell in cells]
        return self._shown({place: place.path(folder) for place in places})

    def _drawn(
        self, given: Adaptation, person: str, cells: Sequence[tuple[int, int]]
    ) -> Iterator[tuple[tuple[int, int], torch.Tensor, dict[str, str]]]:
        """Pictures of a batch with their places and facts; a batch is always of the same cells."""
        begun = time.perf_counter()
        images = self.drawer.draw(given, person, cells)
        facts = {SECONDS: f"{(time.perf_counter() - begun) / len(cells):.4f}"}
        if given.seconds is not None:
            facts[LORA_SECONDS] = f"{given.seconds:.4f}"
        for cell, image in zip(cells, images, strict=True):
            yield cell, image, {PROMPT: self.protocol.text(cell[0], given.trigger), **facts}

    def foreign(self, row: PictureRow | WorkflowRow) -> Shown:
        """The pictures of another program, drawn now or before; what is missing is told."""
        if isinstance(row, WorkflowRow):
            folder, servers = self.run.path / PICTURES / row.name, self.settings.servers
            return self._shown(
                draw_row(row, self.setting.photos, self.protocol, servers, self.run, folder)
            )
        found = foreign_pictures(
            row.folder, self.people, len(self.protocol.prompts), self.protocol.seeds
        )
        wanted = len(self.people) * len(self.protocol.cells)
        if len(found) < wanted:
            self.run.say(
                f"{shown(row.name)}: {len(found)} of {wanted} pictures are there; the others do "
                f"not count. They are named {NAMING}."
            )
        return self._shown(dict(sorted(found.items())))

    def look(
        self, rows: Mapping[str, Shown], backbones: OpenBackbones
    ) -> tuple[Table, dict[str, dict[str, list[float]]]]:
        """The table, and its numbers of each person."""
        eyes = Eyes(backbones.networks, backbones.digests, self.run.path / FEATURES)
        known = self._known(eyes)
        table: dict[str, dict[str, Interval | float]] = {}
        per_person: dict[str, dict[str, list[float]]] = {}
        for name, pictures in rows.items():
            seen = self._seen(eyes, name, pictures)
            found = columns(seen, pictures, known, len(self.people)) | self._seconds(pictures)
            order = [*(c for c in FIRST if c in found), *(c for c in found if c not in FIRST)]
            own = {c: found[c][~found[c].isnan()] for c in order}
            table[name] = {c: bootstrap_interval(v) for c, v in own.items() if len(v)}
            table[name] |= {**whole_row(seen, known), "pictures": float(len(pictures.paths))}
            per_person[name] = {c: found[c].tolist() for c in order}
        return table, per_person

    def _known(self, eyes: Eyes) -> Known:
        """What the networks see in people's photos."""
        paths = [path for own in self.photos.values() for path in own]
        owners = [k for k, own in enumerate(self.photos.values()) for _ in own]
        given = [n < self.settings.photos for own in self.photos.values() for n in range(len(own))]
        seen = self._seen(eyes, PHOTOS, _bare(paths, owners))
        real = self._real(eyes) if self.settings.real and "Inception" in eyes.backbones else None
        return Known(seen, torch.tensor(owners), torch.tensor(given), real)

    def _real(self, eyes: Eyes) -> torch.Tensor:
        """What Inception sees in the pictures that FID and KID compare with."""
        folder = Path(self.settings.real)
        files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in SUFFIXES)
        if not files:
            raise ConfigError(f"There is no picture in {shown(str(folder), 300)}.")
        only = Eyes({"Inception": eyes.backbones["Inception"]}, eyes.digests, eyes.folder)
        return self._seen(only, REAL, _bare(files, [0] * len(files)))["Inception"]

    def _seen(self, eyes: Eyes, name: str, pictures: Shown) -> dict[str, torch.Tensor]:
        """What the networks see in some pictures."""
        with self.run.watch(f"{name}: looking") as watch:
            return eyes.look(name, pictures, lambda done, total: watch(done, total, {}))

    def _seconds(self, pictures: Shown) -> dict[str, torch.Tensor]:
        """Seconds of drawing, and of making a LoRA, as the pictures' files tell them."""
        texts = [read_texts(path) for path in pictures.paths]
        owners = torch.tensor(pictures.owners)
        found = {
            name: torch.tensor([seconds_of(own, key) for own in texts], dtype=torch.double)
            for name, key in (("LoRA seconds", LORA_SECONDS), ("picture seconds", SECONDS))
        }
        return {name: by_person(values, owners, len(self.people)) for name, values in found.items()}

    def _shown(self, found: Mapping[Cell, Path]) -> Shown:
        """Pictures by place, with what they were to show."""
        number = {person: k for k, person in enumerate(self.people)}
        return Shown(
            tuple(found.values()),
            tuple(number[cell.person] for cell in found),
            tuple(self.protocol.text(cell.prompt) for cell in found),
            tuple((cell.prompt, cell.seed) for cell in found),
        )

    def _key(self, row: Row, person: str, cell: tuple[int, int]) -> str:
        """Digest of everything that a picture depends on."""
        p = self.protocol
        how = (p.negative, p.steps, p.guidance, p.sampler, p.side, p.noise_seed(person, *cell))
        words = p.text(cell[0])
        return fingerprint(DRAWING, self.base_key, words, how, row.strength, row.key(person))

    def _people(self) -> dict[str, list[Path]]:
        """Person to photos, the first of which models are shown."""
        s = self.settings
        folder = Path(s.people)
        if not s.people:
            if s.base != DEMO:
                raise ConfigError("Name the folder with one folder of photos a person: --people.")
            folder = self.run.path / PEOPLE
            _draw_demo_people(folder, self.protocol.people)
        if not folder.is_dir():
            raise ConfigError(f"There is no folder {shown(str(folder), 300)}.")
        there = {
            own.name: sorted(f for f in own.iterdir() if f.suffix.lower() in SUFFIXES)
            for own in sorted(folder.iterdir())
            if own.is_dir()
        }
        names = chosen_people(self.protocol, [name for name, files in there.items() if files])
        return {name: there[name] for name in names[: s.first_people or None]}

    def _setting(self) -> Setting:
        """What rows share."""
        s = self.settings
        named = [Path(place) for place in (s.faces, s.clip_vision) if place]
        return Setting(
            photos={person: own[: s.photos] for person, own in self.photos.items()},
            unet=self.base.model.unet,
            encoders=cache(lambda: open_encoders(s.faces, s.clip_vision, self.device)),
            faces=bool(s.faces),
            encoder_key=fingerprint([weight_files(path) for path in named]),
            device=self.device,
            say=self.run.say,
        )

    def report(
        self,
        table: Table,
        per_person: Mapping[str, Mapping[str, Sequence[float]]],
        rows: Mapping[str, Shown],
        backbones: OpenBackbones,
    ) -> WholeReport:
        """Everything that the files of the report say."""
        facts = {
            "base": f"{Path(self.settings.base).name} {self.base_key[:16]}",
            "device": device_name(self.device),
        }
        networks = (backbones.files, backbones.missing)
        people = {person: own[0] for person, own in self.photos.items()}
        return WholeReport(self.protocol, people, table, per_person, rows, *networks, facts)


def _narrowed(protocol: Protocol, settings: Settings) -> Protocol:
    """The protocol with what the settings put in place of its own."""
    s = settings
    return replace(
        protocol,
        people=protocol.people[: s.first_people or None],
        prompts=protocol.prompts[: s.first_prompts or None],
        seeds=s.seeds or protocol.seeds,
        steps=s.steps or protocol.steps,
        side=s.side or protocol.side,
    )


def _draw_demo_people(folder: Path, people: Sequence[str]) -> None:
    """Photos of people of the demo world, whose names are their seeds.

    Raises:
        ConfigError: the protocol names nobody, or others.
    """
    if not people or not all(name.isdecimal() and len(name) < 10 for name in people):
        raise ConfigError("This protocol names no people of the demo world: name --people.")
    for name in people:
        paths = [folder / name / f"{number + 1}.png" for number in range(DEMO_PHOTOS)]
        keys = [fingerprint(DRAWING, name, number) for number in range(DEMO_PHOTOS)]
        if all(is_drawn(path, key) for path, key in zip(paths, keys, strict=True)):
            continue
        numbers = range(DEMO_PHOTOS)
        images = render_portraits([int(name)] * DEMO_PHOTOS, numbers, looks=("photo",)).images
        for image, path, key in zip(images, paths, keys, strict=True):
            keep(image, path, key, {})


def _bare(paths: Sequence[Path], owners: Sequence[int]) -> Shown:
    """Photos as pictures that nobody asked for."""
    return Shown(tuple(paths), tuple(owners), ("",) * len(paths), ((0, 0),) * len(paths))
