"""The report of an evaluation: as JSON, as Markdown, and as a page with the pictures."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import counted
from ..evaluation.page import html_page
from ..evaluation.protocol import Protocol
from ..evaluation.report import Interval, Report
from ..evaluation.scores import Shown
from ..storage.atomic import write_text

NAME = "report"
DIGITS = {"pictures": 0, "KID": 4, "ImageReward": 2, "FID": 1}
MEANINGS = {
    "Face Sim": "cosine of the face to the photo that was given; no face counts as 0",
    "R-FaceSim": "cosine of the face to the other photos of the person (arXiv:2503.22352)",
    "copy-paste": "1 is the given photo again, 0 a new one, -1 another photo (arXiv:2510.14975)",
    "DINO": "mean cosine to all photos of the person, DINO ViT-S/16, class token",
    "DINOv2": "mean (1 + cosine) / 2 to all photos, DINOv2, mean over tokens",
    "CLIP-I": "mean cosine to all photos; (1 + x) / 2 is what some papers print",
    "CLIP-T": "cosine to the prompt without trigger words; (1 + x) / 2 is what some papers print",
    "diversity": "root mean square difference between seeds of a prompt, at 64 pixels",
    "FID": "depends on the number of pictures: compare only rows of the same number",
    "KID": "over all pairs, unbiased",
    "LoRA seconds": "photos to LoRA, models loaded",
}
"""What columns are, below the table."""

Table = Mapping[str, Mapping[str, Interval | float]]
"""Row to column to number, with its interval where it has one."""


@dataclass(frozen=True, eq=False)
class WholeReport:
    """A report before it is written.

    Attributes:
        protocol: what was drawn.
        people: name to the photo that models were shown.
        table: row to column to number.
        per_person: row to column to one number a person.
        rows: the pictures.
        backbones: files of the networks that judge, with their digests.
        left_out: a sentence for each that was not named.
        facts: what else belongs to it.
    """

    protocol: Protocol
    people: Mapping[str, Path]
    table: Table
    per_person: Mapping[str, Mapping[str, Sequence[float]]]
    rows: Mapping[str, Shown]
    backbones: Mapping[str, Mapping[str, str]]
    left_out: Sequence[str]
    facts: Mapping[str, object]


def write_report(report: WholeReport, folder: Path) -> None:
    """Writes report.json, report.md and report.html.

    Raises:
        CheckpointError: the disk is full or read-only.
    """
    values = _plain(report.table)
    intervals = {
        name: {c: [v.low, v.high] for c, v in row.items() if isinstance(v, Interval)}
        for name, row in report.table.items()
    }
    facts = {
        "interval_95": intervals,
        "protocol": report.protocol.to_dict(),
        "people": list(report.people),
        "backbones": report.backbones,
        "left_out": report.left_out,
        **report.facts,
        "per_person": report.per_person,
    }
    notes = _notes(report)
    write_text(folder / f"{NAME}.json", Report(values, facts).to_json() + "\n")
    lines = "\n".join(f"- {note}" for note in notes)
    title = report.protocol.title
    write_text(folder / f"{NAME}.md", f"# {title}\n\n{markdown(report.table)}\n\n{lines}\n")
    cells = {
        person: {"photo": [Path(os.path.relpath(photo, folder))]}
        | {
            name: _line(pictures, number, report.protocol, folder)
            for name, pictures in report.rows.items()
        }
        for number, (person, photo) in enumerate(report.people.items())
    }
    prompts = [report.protocol.text(k) for k in range(len(report.protocol.prompts))]
    page = html_page(title, report.table, notes, prompts, cells)
    write_text(folder / f"{NAME}.html", page)


def _line(pictures: Shown, person: int, protocol: Protocol, folder: Path) -> list[Path | None]:
    """The first seed of each prompt of a person, as paths from the page."""
    own = {
        prompt: path
        for path, owner, (prompt, seed) in zip(
            pictures.paths, pictures.owners, pictures.cells, strict=True
        )
        if owner == person and seed == 0
    }
    paths = [own.get(prompt) for prompt in range(len(protocol.prompts))]
    return [None if path is None else Path(os.path.relpath(path, folder)) for path in paths]


def markdown(table: Table) -> str:
    """The table without its intervals."""
    return Report(_plain(table)).to_markdown(DIGITS)


def _plain(table: Table) -> dict[str, dict[str, float]]:
    """Numbers alone."""
    return {
        name: {c: v.value if isinstance(v, Interval) else v for c, v in row.items()}
        for name, row in table.items()
    }


def _notes(report: WholeReport) -> list[str]:
    """What a reader has to know."""
    p, there = report.protocol, {c for row in report.table.values() for c in row}
    drawn = (
        f"{counted(len(report.people), 'person')}, {counted(len(p.prompts), 'prompt')}, "
        f"{counted(p.seeds, 'seed')}; {p.side} pixels, {p.steps} steps of {p.sampler}, guidance "
        f"{p.guidance:g}; base {report.facts['base']}; {report.facts['device']}"
    )
    means = [f"{name}: {meaning}" for name, meaning in MEANINGS.items() if name in there]
    files = [
        f"{title}: {name} SHA-256 {digest}"
        for title, own in report.backbones.items()
        for name, digest in own.items()
    ]
    intervals = "Intervals: 95 %, bootstrap over people (report.json)"
    return [drawn, intervals, *means, *files, *report.left_out]


def device_name(device: torch.device) -> str:
    """What computes, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {platform.machine()}, {counted(torch.get_num_threads(), 'thread')}"
