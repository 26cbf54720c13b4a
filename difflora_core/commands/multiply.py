"""`multiply`: a portrait a person to many pictures of each, drawn by a ComfyUI workflow."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console

from ..config import Config
from ..data.drawn_people import (
    DROPPED,
    PICTURES,
    Drawing,
    DrawnConfig,
    DrawnFilter,
    Faces,
    drawings,
    find_portraits,
    keep_drawing,
    write_dropped,
)
from ..data.generator_workflow import read_prompts, read_workflow
from ..data.looker import LookSettings, face_encoder
from ..data.looks import SeenFace
from ..errors import counted
from .comfy_servers import Order, Servers, draw_on_servers
from .run_folder import run_folder

PROMPTS = (
    "portrait photo, neutral background, soft light",
    "photo smiling outdoors in a park, morning light",
    "close-up photo, laughing, evening light",
    "photo from the side, thoughtful, beside a window",
    "photo in a busy street, winter coat, overcast sky",
    "photo reading in a library, warm lamp light",
    "photo cooking in a kitchen, apron",
    "photo at the beach, wind in the hair, bright sun",
    "studio photo in formal clothes, dark background",
    "photo on a mountain path, backpack, sunlight",
    "photo in a cafe with a cup, candid",
    "photo at night, neon signs behind",
    "photo surprised, colourful wall behind",
    "photo playing a guitar on a sofa",
    "photo in the rain under an umbrella",
    "oil painting of the face, visible brush strokes",
)
"""Scenes that differ in place, light, expression and view."""


@dataclass(frozen=True)
class Settings(Config):
    """Draws pictures of people of whom there is one portrait each, by any ComfyUI workflow.

    The workflow is in API form and has {portrait}, {prompt} and {seed} where these go, and one node
    that saves or previews the picture. workflows/api has one for PhotoMaker. Several servers share
    the work. Called again it draws what is missing; what is there is known by portrait, workflow,
    prompt and seed. The pictures that are kept lie in OUT/pictures, for prepare.

    Args:
        portraits: folder of portraits; a picture's name is the person's.
        out: folder of the run.
        workflow: file of the workflow.
        comfyui: addresses of the servers.
        prompts: file of prompts, one a line; empty takes a list of usual scenes.
        drawn: which pictures are drawn and kept.
        faces: folder of a face analysis that compares the pictures with the portrait; empty keeps
            all that differ.
        provider: what it runs on: cpu, cuda.
        timeout: seconds that a picture may take.
        tries: of a picture that fails.
        wait: seconds to wait for a server that does not answer before it is given up.
    """

    portraits: str
    out: str
    workflow: str
    comfyui: tuple[str, ...] = Servers.comfyui
    prompts: str = ""
    drawn: DrawnConfig = field(default_factory=DrawnConfig)
    faces: str = ""
    provider: str = "cpu"
    timeout: float = Servers.timeout
    tries: int = Servers.tries
    wait: float = Servers.wait

    def __post_init__(self) -> None:
        _ = self.servers  # whose values are checked

    @property
    def servers(self) -> Servers:
        """The servers, and how long to wait for them."""
        return Servers(self.comfyui, self.timeout, self.tries, self.wait)


def run(settings: Settings, console: Console) -> None:
    """Draws what is missing, filters, and says what was left out.

    Raises:
        DiffLoRAError: workflow or portraits cannot be used, or no server is left.
    """
    workflow = read_workflow(Path(settings.workflow))
    prompts = read_prompts(Path(settings.prompts)) if settings.prompts else PROMPTS
    judge = LookSettings(faces=settings.faces, provider=settings.provider)
    signature = judge.digest()
    with run_folder(Path(settings.out), settings, console) as own:
        portraits, dropped = find_portraits(Path(settings.portraits), own.path)
        count = settings.drawn.pictures
        wanted = {p.name: drawings(p, workflow, prompts, count, own.path) for p in portraits}
        missing = [d for each in wanted.values() for d in each if not d.file.exists()]
        people = counted(len(portraits), "portrait")
        own.say(f"{people}, {counted(len(missing), 'picture')} to draw")
        orders = [_order(drawing, own.path) for drawing in missing]
        dropped |= draw_on_servers(settings.servers, workflow, orders, own)
        finder = _faces_of(settings) if settings.faces else None
        filtered = DrawnFilter(own.path, settings.drawn, finder, signature)
        kept = 0
        with own.watch("filter") as watch:
            for number, portrait in enumerate(portraits):
                there = [d for d in wanted[portrait.name] if d.file.exists()]
                left = filtered.choose(portrait, there)
                kept += 0 if portrait.name in left else len(there) - len(left)
                dropped |= left
                watch(number + 1, len(portraits), {})
        write_dropped(own.path, iter(dropped.items()))
        own.say(
            f"{counted(kept, 'picture')} of {people} in "
            f"{own.path / PICTURES}, {len(dropped)} left out: see {own.path / DROPPED}."
        )


def _order(drawing: Drawing, folder: Path) -> Order:
    """A drawing as servers take it; a failure is told by its file in the folder of the run."""
    name = drawing.file.relative_to(folder).as_posix()
    keep = partial(keep_drawing, drawing)
    return Order(name, drawing.portrait.file, drawing.prompt, drawing.seed, keep)


def _faces_of(settings: Settings) -> Faces:
    """Finds faces, the largest first."""
    encoder = face_encoder(settings.faces, settings.provider)

    def find(picture: Image.Image) -> list[SeenFace]:
        pixels = torch.from_numpy(np.asarray(picture).copy())
        faces = [SeenFace.of(face, 1.0) for face in encoder.detect(pixels)]
        return sorted(faces, key=lambda face: -face.area)

    return find
