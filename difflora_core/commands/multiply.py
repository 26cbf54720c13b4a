"""`multiply`: a portrait a person to many pictures of each, drawn by a ComfyUI workflow."""

from __future__ import annotations

import urllib.error
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from websocket import WebSocketException, WebSocketTimeoutException

from ..comfy_client import ComfyClient, ComfyInterrupted, ComfyPromptError
from ..config import Config, check_range
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
    picture_of,
    write_dropped,
)
from ..data.generator_workflow import GeneratorWorkflow, read_prompts, read_workflow
from ..data.looker import LookSettings, face_encoder
from ..data.looks import SeenFace
from ..data.shared_work import (
    JobFailedError,
    Patience,
    ServerDownError,
    ServerUnfitError,
    SharedWork,
)
from ..errors import ConfigError, DatasetError, counted, shown
from .run_folder import RunFolder, run_folder

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
    comfyui: tuple[str, ...] = ("http://127.0.0.1:8188",)
    prompts: str = ""
    drawn: DrawnConfig = field(default_factory=DrawnConfig)
    faces: str = ""
    provider: str = "cpu"
    timeout: float = 600.0
    tries: int = 3
    wait: float = 60.0

    def __post_init__(self) -> None:
        check_range("multiply", "timeout", self.timeout, 1, 86_400)
        check_range("multiply", "tries", self.tries, 1, 100)
        check_range("multiply", "wait", self.wait, 0, 86_400)
        wrong = [url for url in self.comfyui if not url.startswith(("http://", "https://"))]
        if wrong or not self.comfyui or len(set(self.comfyui)) != len(self.comfyui):
            raise ConfigError(
                "--comfyui takes different addresses such as http://127.0.0.1:8188, one a server; "
                f"got {', '.join(map(shown, self.comfyui)) or 'none'}."
            )


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
        dropped |= _draw(settings, workflow, missing, own)
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


def _draw(
    settings: Settings, workflow: GeneratorWorkflow, missing: Sequence[Drawing], own: RunFolder
) -> dict[str, str]:
    """Draws; gives file to reason of each picture that failed.

    Raises:
        DatasetError: pictures are left, and no server.
    """
    if not missing:
        return {}
    servers = {url: _Server(url, workflow, settings.timeout) for url in settings.comfyui}
    work = SharedWork[Drawing](servers, Patience(settings.tries, settings.wait), own.say)
    done, failed = 0, dict[str, str]()
    with own.watch("draw") as watch:
        for outcome in work.run(missing):
            done += 1
            if outcome.failure:
                failed[outcome.job.file.relative_to(own.path).as_posix()] = outcome.failure
            watch(done, len(missing), {})
    if done < len(missing):
        raise DatasetError(
            f"No server is left, and {counted(len(missing) - done, 'picture')} of {len(missing)} "
            f"are not drawn. Start ComfyUI at {', '.join(settings.comfyui)} and run the same again."
        )
    if len(failed) == len(missing):
        raise DatasetError(f"No picture could be drawn: {next(iter(failed.values()))}")
    return failed


class _Server:
    """One ComfyUI: draws one picture after the other."""

    def __init__(self, url: str, workflow: GeneratorWorkflow, timeout: float) -> None:
        self.client = ComfyClient(url.rstrip("/"))
        self.workflow, self.timeout = workflow, timeout

    def __call__(self, drawing: Drawing) -> None:
        """Uploads the portrait if need be, draws, and keeps the picture."""
        try:
            name = self.client.upload_picture(drawing.portrait.file)  # it may have been restarted
            graph = self.workflow.filled(name, drawing.prompt, drawing.seed)
            result = self.client.run(graph, timeout=self.timeout)
            picture = picture_of(result.picture(self.workflow.shows))
        except ComfyInterrupted as stopped:
            raise JobFailedError(str(stopped)) from stopped
        except ComfyPromptError as refusal:
            raise self._meant(refusal) from refusal
        except (OSError, WebSocketException, ValueError) as silence:
            raise ServerDownError(_reason(silence)) from silence
        keep_drawing(drawing, picture)

    def _meant(self, refusal: ComfyPromptError) -> Exception:
        """What an error of a prompt says of server and job."""
        if isinstance(refusal.__cause__, urllib.error.HTTPError):
            return ServerUnfitError(str(refusal))
        if isinstance(refusal.__cause__, WebSocketTimeoutException) or refusal.__cause__ is None:
            return JobFailedError(str(refusal))
        return ServerDownError(str(refusal))


def _reason(silence: Exception) -> str:
    """Why a server does not answer, in short."""
    cause = getattr(silence, "reason", None) or silence
    return shown(str(cause) or type(cause).__name__, 120)


def _faces_of(settings: Settings) -> Faces:
    """Finds faces, the largest first."""
    encoder = face_encoder(settings.faces, settings.provider)

    def find(picture: Image.Image) -> list[SeenFace]:
        pixels = torch.from_numpy(np.asarray(picture).copy())
        faces = [SeenFace.of(face, 1.0) for face in encoder.detect(pixels)]
        return sorted(faces, key=lambda face: -face.area)

    return find
