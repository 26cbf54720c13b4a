"""Rows of an evaluation that running ComfyUIs draw, by another program's workflow."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..data.drawn_people import Portrait, as_portrait
from ..data.generator_workflow import GeneratorWorkflow
from ..data.pictures import open_picture
from ..errors import counted, shown
from ..evaluation.pictures import PROMPT, Cell, is_drawn, keep
from ..evaluation.protocol import Protocol
from ..training.fingerprint import fingerprint
from .comfy_servers import Order, Servers, draw_on_servers
from .run_folder import RunFolder

SEEDS = 2**53
"""More than the numbers that a workflow can hold exactly."""


@dataclass(frozen=True)
class WorkflowRow:
    """A workflow in API form, see `data.generator_workflow`.

    Attributes:
        name: of the row.
        workflow: what draws.
    """

    name: str
    workflow: GeneratorWorkflow


def draw_row(
    row: WorkflowRow,
    photos: Mapping[str, Sequence[Path]],
    protocol: Protocol,
    servers: Servers,
    run: RunFolder,
    folder: Path,
) -> dict[Cell, Path]:
    """Draws what is missing of a row; gives the pictures that are there.

    Args:
        row: which.
        photos: of each person; the workflow sees the first.
        protocol: people's prompts and seeds.
        servers: that draw.
        run: where copies of the photos lie; told of progress and failures.
        folder: of the row's pictures.

    Raises:
        DiffLoRAError: no server can draw, a photo cannot be read, or a picture not be written.
    """
    orders, wanted = [], {}
    for person, own in photos.items():
        portrait = as_portrait(person, open_picture(own[0].read_bytes()), run.path)
        for cell, order, key in _orders(row, portrait, protocol, folder):
            wanted[cell] = cell.path(folder)
            if not is_drawn(wanted[cell], key):
                orders.append(order)
    failed = draw_on_servers(servers, row.workflow, orders, run, f"{row.name}: drawing")
    if failed:
        name, reason = next(iter(failed.items()))
        run.say(
            f"{shown(row.name)}: {counted(len(failed), 'picture')} of {len(wanted)} could not be "
            f"drawn and do not count; {shown(name)}: {reason}"
        )
    return {cell: path for cell, path in wanted.items() if path.exists()}


def _orders(
    row: WorkflowRow, portrait: Portrait, protocol: Protocol, folder: Path
) -> Iterator[tuple[Cell, Order, str]]:
    """Every picture of a person: its place, what to draw, and a digest of all it depends on."""
    for prompt, number in protocol.cells:
        cell, text = Cell(portrait.name, prompt, number), protocol.text(prompt)
        seed = protocol.noise_seed(portrait.name, prompt, number) % SEEDS
        key = fingerprint(row.workflow.digest, portrait.digest, text, seed)
        path = cell.path(folder)
        name = path.relative_to(folder).as_posix()
        yield cell, Order(name, portrait.file, text, seed, partial(_keep, path, key, text)), key


def _keep(path: Path, key: str, text: str, picture: Image.Image) -> None:
    """Writes a picture with its key and prompt."""
    pixels = torch.from_numpy(np.asarray(picture.convert("RGB")).copy()).float() / 255
    keep(pixels, path, key, {PROMPT: text})
