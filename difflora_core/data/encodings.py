"""What a base model's encoders make of a dataset, kept beside it: latents and encoded prompts.

    encoded/latents/00000.safetensors   of the rows of data-00000.arrow: "row 17", "row 17 mirrored"
    encoded/prompts/00000.safetensors   PROMPTS_EACH encoded prompts: "context" and "pooled"
    encoded/prompts/rows.safetensors    which prompts each row has
    encoded/*/facts.json                written last: without it there is nothing

Numbers are float16: latents have unit spread. Files are written one at a time and known by what
they were made from, so a stopped run goes on; memory is that of one file.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from array import array
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..base_model.protocol import BaseModel, TextCondition
from ..config import build, parse_json
from ..errors import ConfigError, DatasetError, shown
from ..limits import JSON_BYTES
from ..storage.atomic import write_text
from ..storage.safetensors_io import open_tensors, read_header, write_atomic
from .prepared import SHARD_ROWS, PreparedDataset

LATENTS, PROMPTS = "encoded/latents", "encoded/prompts"
FACTS, ROWS = "facts.json", "rows.safetensors"
PROMPTS_EACH = 256
_AT_ONCE = 16
_KIND = "file of encoded pictures or prompts"

Report = Callable[[str, int, int], None]


@dataclass(frozen=True)
class EncodedFacts:
    """What `facts.json` says: the dataset's digest, whose encoders, files, and what is in them."""

    dataset: str
    maker: str
    files: int
    mirrored: bool = False


def encode_latents(
    dataset: PreparedDataset,
    base: BaseModel,
    maker: str,
    mirrored: bool = False,
    report: Report | None = None,
) -> Latents:
    """Encodes every picture, or what is missing.

    Args:
        dataset: prepared.
        base: its VAE encodes, one picture at a time: the result depends on the picture alone.
        maker: tells this VAE from others, such as a digest of its weights.
        mirrored: also encodes every picture mirrored; a VAE is not symmetric. What this VAE has
            encoded mirrored before stays so.
        report: told what is being done.

    Raises:
        DatasetError: pictures are damaged, a file cannot be written, or a latent is not finite.
    """
    files = dataset.facts.files
    mirrored = mirrored or _is_mirrored(dataset, maker)
    facts = EncodedFacts(dataset.facts.digest, maker, len(files), mirrored)

    def make(number: int) -> dict[str, Tensor]:
        dataset.check_file(number)
        tensors, start = {}, number * SHARD_ROWS
        for row in range(start, start + files[number].rows):
            image = dataset[row].picture[None]
            tensors[_row(row)] = _half(base.encode_images(image))[0]
            if mirrored:
                tensors[_row(row, True)] = _half(base.encode_images(image.flip(2)))[0]
        return tensors

    folder = dataset.folder / LATENTS
    _write_missing(folder, facts, lambda number: files[number].digest, make, report)
    return Latents(dataset)


def encode_prompts(
    dataset: PreparedDataset, base: BaseModel, maker: str, report: Report | None = None
) -> Prompts:
    """Encodes every caption once, and "" for guidance, or what is missing.

    Args:
        dataset: prepared.
        base: its text encoders encode.
        maker: tells these text encoders from others.
        report: told what is being done.

    Raises:
        DatasetError: a file cannot be written, a number is not finite, or captions have encodings
            of several lengths.
    """
    folder = dataset.folder / PROMPTS
    (folder / FACTS).unlink(missing_ok=True)
    with closing(_Numbers()) as numbers:
        starts, of_rows = array("q", [0]), array("q")
        for captions in dataset.column("captions"):
            of_rows.extend(numbers.of(caption) for caption in captions)
            starts.append(len(of_rows))
        facts = EncodedFacts(dataset.facts.digest, maker, -(-len(numbers) // PROMPTS_EACH))

        def make(number: int) -> dict[str, Tensor]:
            texts = numbers.part(number)
            parts = [
                base.encode_prompts(texts[k : k + _AT_ONCE]) for k in range(0, len(texts), _AT_ONCE)
            ]
            if len({part.context.shape[1] for part in parts}) > 1:
                raise DatasetError("Some captions are too long to be trained with others.")
            return {
                "context": torch.cat([_half(part.context) for part in parts]),
                "pooled": torch.cat([_half(part.pooled) for part in parts]),
            }

        rows = {"starts": torch.tensor(starts), "numbers": torch.tensor(of_rows)}
        write_atomic(rows, {}, folder / ROWS, DatasetError)
        _write_missing(folder, facts, lambda n: json.dumps(numbers.part(n)), make, report)
    return Prompts(dataset)


class Latents:
    """Latents of a dataset's pictures, read one by one.

    Args:
        dataset: whose.

    Attributes:
        facts: what is known of them.

    Raises:
        DatasetError: they are not there, or are those of another dataset.
    """

    def __init__(self, dataset: PreparedDataset) -> None:
        self._folder = dataset.folder / LATENTS
        self.facts = _read_facts(self._folder, dataset)

    def read(self, row: int, mirrored: bool = False) -> Tensor:
        """The scaled latent (C, h, w) float16 of a row.

        Raises:
            DatasetError: the file is damaged, or mirrored pictures were not encoded.
        """
        path = self._folder / _file(row // SHARD_ROWS)
        with open_tensors(path, _KIND, DatasetError) as file:
            if _row(row, mirrored) not in file.header.tensors:
                raise DatasetError(
                    f"There is no latent of {_row(row, mirrored)}. Encode the pictures again."
                )
            return file.read(_row(row, mirrored))


class Prompts:
    """Encoded prompts of a dataset.

    Args:
        dataset: whose.

    Attributes:
        facts: what is known of them.

    Raises:
        DatasetError: they are not there, or are those of another dataset.
    """

    def __init__(self, dataset: PreparedDataset) -> None:
        self._folder = dataset.folder / PROMPTS
        self.facts = _read_facts(self._folder, dataset)
        with open_tensors(self._folder / ROWS, _KIND, DatasetError) as file:
            self._starts, self._numbers = (file.read(name) for name in ("starts", "numbers"))

    def of_row(self, row: int) -> list[int]:
        """Numbers of the row's captions, in their order; the number of "" is 0."""
        return [int(n) for n in self._numbers[self._starts[row] : self._starts[row + 1]]]

    def read(self, numbers: Sequence[int]) -> TextCondition:
        """Encoded prompts by number, float16.

        Raises:
            DatasetError: a file is damaged.
        """
        context, pooled = [], []
        for number in numbers:
            path = self._folder / _file(number // PROMPTS_EACH)
            with open_tensors(path, _KIND, DatasetError) as file:
                place = number % PROMPTS_EACH
                context.append(file.read("context")[place])
                pooled.append(file.read("pooled")[place])
        return TextCondition(torch.stack(context), torch.stack(pooled))


class _Numbers:
    """Texts by number in the order of their first appearance, kept on disk while they are made."""

    def __init__(self) -> None:
        self._db = sqlite3.connect("")  # a file of the system's own, gone when it is closed
        self._db.execute("CREATE TABLE text(number INTEGER PRIMARY KEY, value TEXT UNIQUE)")
        self._count = 0
        self.of("")

    def __len__(self) -> int:
        return self._count

    def of(self, text: str) -> int:
        """The number of a text, a new one where it is new."""
        added = self._db.execute("INSERT OR IGNORE INTO text VALUES(?, ?)", (self._count, text))
        if added.rowcount:
            self._count += 1
            return self._count - 1
        found = self._db.execute("SELECT number FROM text WHERE value=?", (text,)).fetchone()
        return int(found[0])

    def part(self, number: int) -> list[str]:
        """The texts of one file."""
        query = "SELECT value FROM text WHERE number>=? AND number<? ORDER BY number"
        ends = (number * PROMPTS_EACH, (number + 1) * PROMPTS_EACH)
        return [row[0] for row in self._db.execute(query, ends)]

    def close(self) -> None:
        """Forgets all."""
        self._db.close()


def _write_missing(
    folder: Path,
    facts: EncodedFacts,
    source: Callable[[int], str],
    make: Callable[[int], dict[str, Tensor]],
    report: Report | None,
) -> None:
    """Writes the files that are not there yet for these sources, then the facts."""
    (folder / FACTS).unlink(missing_ok=True)
    for number in range(facts.files):
        path = folder / _file(number)
        made_from = f"{facts.maker} {facts.mirrored} {source(number)}"
        digest = hashlib.sha256(made_from.encode()).hexdigest()
        if not _is_made_from(path, digest):
            tensors = make(number)
            if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
                raise DatasetError(
                    "An encoded picture or prompt is not finite. Half precision does that to some "
                    "VAEs: use float32 or bfloat16."
                )
            write_atomic(tensors, {"made_from": digest}, path, DatasetError)
        if report is not None:
            report(f"writing {folder.name}", number + 1, facts.files)
    for old in folder.glob("[0-9]*.safetensors"):
        if int(old.stem) >= facts.files:
            old.unlink()
    write_text(folder / FACTS, json.dumps(asdict(facts), sort_keys=True) + "\n", DatasetError)


def _is_made_from(path: Path, digest: str) -> bool:
    """Whether a file is there, whole, and of the same sources."""
    if not path.exists():
        return False
    try:
        return read_header(path, _KIND, DatasetError).metadata.get("made_from") == digest
    except DatasetError:
        return False


def _read_facts(folder: Path, dataset: PreparedDataset) -> EncodedFacts:
    """What is known of encoded pictures or prompts."""
    try:
        with (folder / FACTS).open("rb") as file:
            text = file.read(JSON_BYTES)
        facts: EncodedFacts = build(EncodedFacts, parse_json(text, FACTS), FACTS)
    except (OSError, ConfigError) as missing:
        raise DatasetError(
            f"There are no encoded {folder.name} in {shown(str(dataset.folder), 300)}. Run prepare "
            "with a base model."
        ) from missing
    if facts.dataset != dataset.facts.digest:
        raise DatasetError(
            f"The encoded {folder.name} in {shown(str(dataset.folder), 300)} are those of the "
            "dataset as it was before. Run prepare with the base model again."
        )
    return facts


def _is_mirrored(dataset: PreparedDataset, maker: str) -> bool:
    """Whether there are latents of mirrored pictures of this dataset by this VAE."""
    try:
        facts = Latents(dataset).facts
    except DatasetError:
        return False
    return facts.mirrored and facts.maker == maker


def _half(tensor: Tensor) -> Tensor:
    """On the CPU, in float16."""
    return tensor.detach().cpu().half()


def _row(row: int, mirrored: bool = False) -> str:
    """Name of a row's latent."""
    return f"row {row} mirrored" if mirrored else f"row {row}"


def _file(number: int) -> str:
    """Name of a file."""
    return f"{number:05d}.safetensors"
