"""Single portraits to folders of pictures of each person: which to draw, and which to keep.

drawn/NAME/DIGEST.png       a picture, named by portrait, workflow, prompt and seed
drawn/NAME/DIGEST.txt       its prompt
drawn/NAME/DIGEST.json      what was seen in it
pictures/NAME/              the portrait and the pictures that are kept, for `prepare`
dropped.jsonl               the others, and why
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ..config import Config, build, check_range, parse_json
from ..errors import ConfigError, DatasetError, shown
from ..storage.atomic import replacing, write_text
from .duplicates import SAME, duplicates, perceptual_hash
from .folder_sources import SUFFIXES
from .generator_workflow import GeneratorWorkflow
from .looks import SeenFace
from .pictures import open_picture
from .sources import name_of

DRAWN, PICTURES, DROPPED, WORK = "drawn", "pictures", "dropped.jsonl", "work"
Faces = Callable[[Image.Image], Sequence[SeenFace]]
"""Finds the faces of a picture, the largest first."""


@dataclass(frozen=True)
class DrawnConfig(Config):
    """Which pictures of a person are drawn and kept.

    Args:
        pictures: drawn of each person.
        likeness: cosine of the face with the portrait's that a picture must reach.
        same: bits of the perceptual hash, of 256, in which two pictures differ at most that count
            as one; the portrait counts too. -1 keeps them all.

    Raises:
        ConfigError: a value is out of range.
    """

    pictures: int = 16
    likeness: float = 0.4
    same: int = SAME

    def __post_init__(self) -> None:
        check_range("Drawn people", "pictures", self.pictures, 1, 100_000)
        check_range("Drawn people", "likeness", self.likeness, -1, 1)
        check_range("Drawn people", "same", self.same, -1, 256)


@dataclass(frozen=True)
class Portrait:
    """A person: name, the picture as PNG that servers get, and the digest of its content."""

    name: str
    file: Path
    digest: str


@dataclass(frozen=True)
class Drawing:
    """A picture to draw: of whom, what, with which seed, and its file."""

    portrait: Portrait
    prompt: str
    seed: int
    file: Path


@dataclass(frozen=True)
class Seen:
    """What is kept of a look: by which judge, faces, likeness to the portrait, perceptual hash."""

    judge: str
    faces: int
    likeness: float
    hash: str


def find_portraits(source: Path, folder: Path) -> tuple[list[Portrait], dict[str, str]]:
    """The portraits of a folder, turned and copied as PNG; a picture's name is its person's.

    Args:
        source: pictures, in folders below too.
        folder: of the run.

    Returns:
        The portraits by name, and file to reason of what cannot be used.

    Raises:
        DatasetError: there is none, or two have one name.
    """
    found: dict[str, Portrait] = {}
    useless: dict[str, str] = {}
    for path in sorted(p for p in source.rglob("*") if p.suffix.lower() in SUFFIXES):
        place = path.relative_to(source)
        name = name_of(str(place.with_suffix("")).replace("/", "-").encode())
        if name in found:
            raise DatasetError(f"Two portraits are called {shown(name)}: rename one of them.")
        try:
            picture = open_picture(path.read_bytes())
        except (DatasetError, OSError) as reason:
            useless[place.as_posix()] = str(reason)
            continue
        found[name] = as_portrait(name, picture, folder)
    if not found:
        raise DatasetError(f"There is no portrait in {shown(str(source), 300)}.")
    return [found[name] for name in sorted(found)], useless


def as_portrait(name: str, picture: Image.Image, folder: Path) -> Portrait:
    """A person's portrait, copied as PNG into the folder of a run.

    Raises:
        DatasetError: the copy cannot be written.
    """
    digest = hashlib.sha256(repr(picture.size).encode() + picture.tobytes()).hexdigest()
    file = folder / WORK / f"difflora-{digest[:24]}.png"
    if not file.exists():
        _write_png(picture, file)
    return Portrait(name, file, digest)


def drawings(
    portrait: Portrait,
    workflow: GeneratorWorkflow,
    prompts: Sequence[str],
    count: int,
    folder: Path,
) -> list[Drawing]:
    """The pictures of a person; the same for the same portrait, workflow and prompts.

    Args:
        portrait: of the person.
        workflow: that draws.
        prompts: taken in turns.
        count: pictures.
        folder: of the run.
    """
    made = []
    for number in range(count):
        prompt = prompts[number % len(prompts)]
        seed = int(_digest(portrait.digest, number)[:12], 16)
        name = _digest(portrait.digest, workflow.digest, prompt, seed)[:24]
        made.append(Drawing(portrait, prompt, seed, folder / DRAWN / portrait.name / f"{name}.png"))
    return made


def keep_drawing(drawing: Drawing, picture: Image.Image) -> None:
    """Writes a picture and its prompt, whole or not at all.

    Raises:
        DatasetError: they cannot be written.
    """
    write_text(drawing.file.with_suffix(".txt"), drawing.prompt + "\n", DatasetError)
    _write_png(picture, drawing.file)


class DrawnFilter:
    """Chooses pictures that show the person and differ from each other.

    Args:
        folder: of the run.
        config: what counts.
        faces: finds faces; None asks for none.
        judge: tells this face analysis from others.
    """

    def __init__(self, folder: Path, config: DrawnConfig, faces: Faces | None, judge: str) -> None:
        self.folder, self.config, self.faces, self.judge = folder, config, faces, judge

    def choose(self, portrait: Portrait, drawn: Sequence[Drawing]) -> dict[str, str]:
        """Fills the person's folder of pictures with what is kept.

        Args:
            portrait: of the person.
            drawn: pictures that are there.

        Returns:
            File to reason of each that is not kept; of everything where the portrait shows no
            face, and then there is no folder.

        Raises:
            DatasetError: a file cannot be read or written.
        """
        target = self.folder / PICTURES / portrait.name
        with Image.open(portrait.file) as picture:
            own = self._faces(picture)
            looks = [Seen("", 0, 1.0, perceptual_hash(picture).hex())]
        if self.faces is not None and not own:
            shutil.rmtree(target, ignore_errors=True)
            return {portrait.name: "the portrait shows no face"}
        looks += [self._seen(drawing, own) for drawing in drawn]
        reasons = {n: reason for n, seen in enumerate(looks[1:], 1) if (reason := self._why(seen))}
        left = [n for n in range(len(looks)) if n not in reasons]
        hashes = [bytes.fromhex(looks[n].hash) for n in left]
        for gone, kept in duplicates(hashes, [2] + [1] * len(left), self.config.same).items():
            like = drawn[left[kept] - 1].file.name if left[kept] else "the portrait"
            reasons[left[gone]] = f"it is nearly the same as {like}"
        self._fill(target, portrait, [d for n, d in enumerate(drawn, 1) if n not in reasons])
        return {
            drawn[n - 1].file.relative_to(self.folder).as_posix(): reason
            for n, reason in sorted(reasons.items())
        }

    def _faces(self, picture: Image.Image) -> Sequence[SeenFace]:
        return self.faces(picture.convert("RGB")) if self.faces is not None else ()

    def _seen(self, drawing: Drawing, own: Sequence[SeenFace]) -> Seen:
        """A look at a picture, from its file of looks where the same judge had one."""
        path = drawing.file.with_suffix(".json")
        try:
            seen: Seen = build(Seen, parse_json(path.read_bytes(), path.name), path.name)
            if seen.judge == self.judge:
                return seen
        except (OSError, ConfigError):
            pass  # nobody has looked, or the file is damaged
        with Image.open(drawing.file) as opened:
            picture = opened.convert("RGB")
        found = self._faces(picture)
        likeness = float(found[0].vector @ own[0].vector) if found and own else 0.0
        seen = Seen(self.judge, len(found), round(likeness, 6), perceptual_hash(picture).hex())
        write_text(path, json.dumps(asdict(seen)) + "\n", DatasetError)
        return seen

    def _why(self, seen: Seen) -> str:
        """Why a picture is not kept, whatever the others are."""
        if self.faces is None:
            return ""
        if seen.faces != 1:
            return f"it shows {seen.faces or 'no'} face{'s' * (seen.faces > 1)}"
        if seen.likeness < self.config.likeness:
            return f"its likeness is {seen.likeness:.3f}, below {self.config.likeness:g}"
        return ""

    def _fill(self, target: Path, portrait: Portrait, kept: Sequence[Drawing]) -> None:
        """Brings a folder to hold the portrait and these pictures."""
        wanted = {"portrait.png": portrait.file}
        for drawing in kept:
            for file in (drawing.file, drawing.file.with_suffix(".txt")):
                wanted[file.name] = file
        target.mkdir(parents=True, exist_ok=True)
        for path in target.iterdir():
            if path.name not in wanted:
                path.unlink()
        for name, file in sorted(wanted.items()):
            if name == "portrait.png" or not (target / name).exists():
                with replacing(target / name, DatasetError) as temporary:
                    temporary.write_bytes(file.read_bytes())


def picture_of(pixels: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> Image.Image:
    """A picture (H, W, C) of 8 bits as RGB."""
    return Image.fromarray(pixels).convert("RGB")


def write_dropped(folder: Path, dropped: Iterator[tuple[str, str]]) -> None:
    """Writes what was left out, and why.

    Raises:
        DatasetError: it cannot be written.
    """
    lines = [json.dumps({"source": f, "reason": r}, ensure_ascii=False) + "\n" for f, r in dropped]
    write_text(folder / DROPPED, "".join(lines), DatasetError)


def _digest(*parts: object) -> str:
    """SHA-256 of texts and numbers."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _write_png(picture: Image.Image, path: Path) -> None:
    """Writes a picture whole; without what another program's metadata say."""
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(picture)).save(buffer, "PNG", compress_level=3)
    with replacing(path, DatasetError) as temporary:
        temporary.write_bytes(buffer.getvalue())
