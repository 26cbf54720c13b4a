"""Pictures of people to a dataset that training reads: all of it, or what is left to do of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Literal

from filelock import FileLock, Timeout

from ..config import Config, build, check_range, parse_json
from ..errors import DatasetError, shown
from ..storage.atomic import replacing, write_text
from ..vision.face_folder import find_face_folder
from .captions import by_command, by_template, command_digest
from .catalogue import Catalogue, Changes, Choice
from .choices import ChoiceSettings, choose
from .contact_sheet import draw_sheets
from .find_source import Kind, find_source
from .libraries import datasets_library
from .looker import Looker, LookSettings
from .prepared import (
    FACTS,
    FORMAT,
    SHARD_ROWS,
    VERSION,
    DatasetFacts,
    PreparedDataset,
    ShardFile,
    dataset_problem,
    read_facts,
)
from .records import columns
from .shards import Framing, Row, ShardJob, ShardWriter, jobs
from .sources import Source
from .table_sources import TableNames
from .workers import Crew, Workers

MOST_NOTES = 200
LOOKS = 32
"""Pictures that a worker looks at before what it found is kept."""

Report = Callable[[str, int, int], None]
"""Progress: what is being done, how much of it is done, how much there is (0: nobody knows)."""


@dataclass(frozen=True)
class PrepareConfig(Config):
    """Settings of `prepare`.

    Args:
        kind: of the source, see `folder_sources` and `table_sources`; "auto" looks.
        picture_column, person_column, caption_column: of a table; the usual names where empty.
        resolution: side in pixels of the square that the base model was made for.
        smallest: pixels that the shorter side of a picture must have; 0: half of the resolution.
        faces: folder of an insightface package; empty looks for no faces.
        provider: what it runs on: "cpu", "cuda", ….
        smallest_face: pixels that a face must have.
        choices: how people are told apart, and which pictures go.
        framing: "whole" pictures, or the square around the "face".
        face_margin: side of that square over that of the face; 2.2 holds hair and neck.
        template: the caption of pictures that have none; `{person}` stands for the name.
        caption_command: a program that captions pictures, see `captions`; the user's captions stay.
        encoding: how pictures are stored: "jpeg" of high quality, or "png".
        sheets: contact sheets at most.
        licence: of the pictures, in words; it goes into the facts.

    Raises:
        ConfigError: a value is out of range.
    """

    kind: Kind = "auto"
    picture_column: str = ""
    person_column: str = ""
    caption_column: str = ""
    resolution: int = 1024
    smallest: int = 0
    faces: str = ""
    provider: str = "cpu"
    smallest_face: int = 32
    choices: ChoiceSettings = field(default_factory=ChoiceSettings)
    framing: Literal["whole", "face"] = "whole"
    face_margin: float = 2.2
    template: str = "a photo of a person"
    caption_command: str = ""
    encoding: Literal["jpeg", "png"] = "jpeg"
    sheets: int = 8
    licence: str = ""

    def __post_init__(self) -> None:
        self.check_choices("Prepare")
        check_range("Prepare", "resolution", self.resolution, 32, 8192)
        check_range("Prepare", "smallest", self.smallest, 0, 65_536)
        check_range("Prepare", "smallest_face", self.smallest_face, 1, 65_536)
        check_range("Prepare", "face_margin", self.face_margin, 1, 10)
        check_range("Prepare", "sheets", self.sheets, 0, 1000)

    @property
    def looks(self) -> LookSettings:
        """What a look at a picture needs to know."""
        smallest = self.smallest or self.resolution // 2
        return LookSettings(smallest, self.faces, self.provider, self.smallest_face)

    @property
    def frames(self) -> Framing:
        """How pictures are cut and stored."""
        crowd = self.face_margin if self.choices.several == "crop" else 0.0
        close = self.face_margin if self.framing == "face" else 0.0
        return Framing(self.resolution, close, max(close, crowd), self.encoding)

    @property
    def tables(self) -> TableNames:
        """Columns of a table."""
        return TableNames(self.picture_column, self.person_column, self.caption_column)


def prepare(
    place: str | Path,
    folder: str | Path,
    config: PrepareConfig | None = None,
    workers: int | Crew = 1,
    update: bool = False,
    report: Report | None = None,
) -> PreparedDataset:
    """Prepares the pictures of a place; called again, it goes on where it was stopped.

    The files are the same for the same pictures and settings, whatever the workers and stops.

    Args:
        place: of the pictures, see `find_source`.
        folder: of the dataset, see `prepared`.
        config: settings.
        workers: that open pictures: so many processes, or those of an engine, opened.
        update: takes up changes of the pictures or settings since the dataset was prepared.
        report: told what is being done.

    Returns:
        The dataset.

    Raises:
        DatasetError: there are no pictures, none is left, another process prepares the same, the
            pictures or settings have changed and `update` is not set, or a file cannot be written.
        EncoderError: the face package cannot be used.
    """
    config = config or PrepareConfig()
    by_template(config.template, "")
    source = find_source(place, config.kind, config.tables)
    own = Workers(workers) if isinstance(workers, int) else nullcontext(workers)
    with _alone(Path(folder)), own as processes:
        run = _Run(source, Path(folder), config, processes, report or _silent)
        catalogue = Catalogue(run.folder / "work" / "catalogue.sqlite3")
        try:
            changes = _look(run, catalogue)
            notes = _decide(run, catalogue)
            digest = _digest(run, catalogue)
            if _is_done(run, digest, changes, update):
                return PreparedDataset(run.folder)
            _write(run, catalogue, digest, notes)
        finally:
            catalogue.close()
    return PreparedDataset(run.folder)


def _silent(what: str, done: int, total: int) -> None:
    """Reports nothing."""


@dataclass(frozen=True)
class _Run:
    """What all steps need."""

    source: Source
    folder: Path
    config: PrepareConfig
    workers: Crew
    report: Report


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """A block in which no other process prepares the same dataset."""
    path = folder / "work" / "lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path, timeout=0):
            yield
    except Timeout as busy:
        raise DatasetError(
            f"Another process prepares {shown(str(folder), 300)}; wait for it, or stop it."
        ) from busy
    except OSError as closed:
        place, reason = shown(str(folder), 300), closed.strerror or closed
        raise DatasetError(f"{place} cannot be written: {reason}.") from closed


def _look(run: _Run, catalogue: Catalogue) -> Changes:
    """Lists the pictures and looks at those that are new or changed."""
    number = catalogue.start_run()
    listed = catalogue.list_entries(run.source.entries(), number)
    total, done, changed = catalogue.counts()["pictures"], 0, 0
    if not total:
        raise DatasetError(
            "There are no pictures. Choose a folder with pictures, or with one folder a person."
        )
    signature = run.config.looks.digest()
    looker = Looker(run.source, run.config.looks, signature)
    for looks in run.workers.each(looker, catalogue.unseen(number, LOOKS)):
        changed += catalogue.keep_looks(looks, signature, number)
        done += len(looks)
        run.report("looking at pictures", done, total)
    return Changes(listed.added, changed, listed.gone)


def _decide(run: _Run, catalogue: Catalogue) -> tuple[str, ...]:
    """Chooses what becomes of each picture, and lets the command caption those that stay.

    Returns:
        Sentences about people of whom it is not clear who is meant.
    """
    config = run.config
    run.report("telling people apart", 0, 0)
    notes = choose(catalogue, config.choices, bool(config.faces), run.folder / "work")
    if not any(True for _ in catalogue.choices("WHERE kind=''", most=1)):
        counts = ", ".join(f"{n} {name}" for name, n in catalogue.counts().items())
        raise DatasetError(
            f"No picture is left ({counts}). {shown(str(run.folder / 'work'), 300)} knows the "
            "reasons; other settings may keep more."
        )
    if config.caption_command:
        missing = (row for row in _rows(run, catalogue) if not row.captions)
        while batch := list(islice(missing, LOOKS)):
            pictures = [row.framed(run.source, config.frames).pixels for row in batch]
            captions = by_command(config.caption_command, pictures)
            catalogue.keep_captions(
                (_shown_as(row.known.look.digest, row.choice), _command(run), caption)
                for row, caption in zip(batch, captions, strict=True)
            )
            run.report("captioning", 0, 0)
    return notes


def _shown_as(digest: str, choice: Choice) -> str:
    """What a captioner sees: a picture, and around which of its faces."""
    return f"{digest} {choice.face}"


def _command(run: _Run) -> str:
    """Under what captions of the command are kept."""
    return command_digest(run.config.caption_command, run.config.frames)


def _rows(run: _Run, catalogue: Catalogue) -> Iterator[Row]:
    """The rows of the dataset, by person and key; without captions where a command gives them and
    has not yet."""
    config, person, number = run.config, None, -1
    for choice in catalogue.choices("WHERE kind=''"):
        number += choice.person != person
        person = choice.person
        known, faces = catalogue.known(choice.key), catalogue.faces(choice.key)
        captions = known.captions
        if not captions and config.caption_command:
            given = catalogue.caption(_shown_as(known.look.digest, choice), _command(run))
            captions = (given,) if given else ()
        elif not captions:
            captions = (by_template(config.template, choice.person),)
        face = faces[choice.face] if choice.face >= 0 else None
        yield Row(known, choice, number, captions, len(faces), face)


def _digest(run: _Run, catalogue: Catalogue) -> str:
    """Digest of all that the dataset is made of, what is left out included."""
    digest = hashlib.sha256(run.config.to_json().encode())
    for row in _rows(run, catalogue):
        digest.update(row.plan().encode() + b"\n")
    for choice in catalogue.choices("WHERE kind<>''"):
        digest.update(_dropped(choice).encode())
    return digest.hexdigest()


def _dropped(choice: Choice) -> str:
    """A line of `dropped.jsonl`."""
    facts = {"source": choice.key, "person": choice.person, "kind": choice.kind}
    return json.dumps(facts | {"reason": choice.reason}, ensure_ascii=False) + "\n"


def _is_done(run: _Run, digest: str, changes: Changes, update: bool) -> bool:
    """Whether the dataset is there as it should be.

    Raises:
        DatasetError: it is there, but of other pictures or settings, and may not be replaced.
    """
    if not (run.folder / FACTS).exists():
        return False
    facts = read_facts(run.folder)
    if facts.digest == digest:
        return not dataset_problem(run.folder)
    if not update:
        same = facts.settings == parse_json(run.config.to_json(), "settings", DatasetError)
        what = f"the pictures have changed ({changes})" if same else "the settings are others"
        raise DatasetError(
            f"{shown(str(run.folder), 300)} is a prepared dataset, but {what}. Ask for an update "
            "to take that up, or prepare into another folder."
        )
    return False


def _write(run: _Run, catalogue: Catalogue, digest: str, notes: tuple[str, ...]) -> None:
    """Writes what is missing of the dataset; it is one when the facts are there."""
    facts_file = run.folder / FACTS
    facts_file.unlink(missing_ok=True)  # what follows takes a dataset apart that may be there
    files = list(_write_shards(run, catalogue))
    for old in sorted(run.folder.glob("data-*.arrow")):
        if old.name not in {file.name for file in files}:
            old.unlink()
    with replacing(run.folder / "dropped.jsonl", DatasetError) as temporary:
        with temporary.open("w", encoding="utf-8") as out:
            out.writelines(map(_dropped, catalogue.choices("WHERE kind<>''")))
    run.report("drawing contact sheets", 0, 0)
    draw_sheets(catalogue, run.source, run.folder, run.config.sheets)
    _describe_for_datasets(run.folder, files, digest)
    package = find_face_folder(run.config.faces) if run.config.faces else None
    facts = DatasetFacts(
        FORMAT,
        VERSION,
        run.config.to_dict(),
        digest,
        f"{package.path.name}/{package.recogniser}" if package else "",
        tuple(files),
        catalogue.people(),
        catalogue.counts(),
        notes[:MOST_NOTES],
    )
    write_text(facts_file, facts.to_json(), DatasetError)


def _write_shards(run: _Run, catalogue: Catalogue) -> Iterator[ShardFile]:
    """The Arrow files in order; those that are there already are not written again."""
    frames, total = run.config.frames, catalogue.kept()
    plans: dict[int, str] = {}
    there: dict[int, ShardFile] = {}

    def missing() -> Iterator[ShardJob]:
        for job in jobs(_rows(run, catalogue)):
            plans[job.number] = job.plan(frames)
            plan, text = catalogue.shard(job.number)
            same = plan == plans[job.number]
            file = build(ShardFile, parse_json(text, "a shard"), "a shard") if same else None
            path = run.folder / job.name
            if file and path.is_file() and path.stat().st_size == file.bytes:
                there[job.number] = file
            else:
                yield job

    writer = ShardWriter(run.source, run.folder, frames)
    for file in run.workers.each(writer, missing()):
        number = int(file.name[len("data-") : -len(".arrow")])
        catalogue.keep_shard(number, plans[number], json.dumps(vars(file)))
        there[number] = file
        run.report("writing pictures", min(total, len(there) * SHARD_ROWS), total)
    yield from (there[number] for number in sorted(there))


def _describe_for_datasets(folder: Path, files: list[ShardFile], digest: str) -> None:
    """The two files by which `datasets.load_from_disk` knows the folder."""
    library = datasets_library()
    info = library.DatasetInfo(features=columns())
    scratch = folder / "work"
    info.write_to_directory(str(scratch))
    made = (scratch / "dataset_info.json").read_text("utf-8")
    write_text(folder / "dataset_info.json", made, DatasetError)
    state: dict[str, object] = {
        "_data_files": [{"filename": file.name} for file in files],
        "_fingerprint": digest[:16],
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    write_text(folder / "state.json", json.dumps(state, indent=2) + "\n", DatasetError)
