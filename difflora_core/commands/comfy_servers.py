"""Pictures of people that running ComfyUIs draw by a workflow; several servers share the work."""

from __future__ import annotations

import urllib.error
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from websocket import WebSocketException, WebSocketTimeoutException

from ..comfy_client import ComfyClient, ComfyInterrupted, ComfyPromptError
from ..config import Config, check_range
from ..data.drawn_people import picture_of
from ..data.generator_workflow import GeneratorWorkflow
from ..data.shared_work import (
    JobFailedError,
    Patience,
    ServerDownError,
    ServerUnfitError,
    SharedWork,
)
from ..errors import ConfigError, DatasetError, counted, shown
from .run_folder import RunFolder


@dataclass(frozen=True)
class Servers(Config):
    """Where pictures are drawn, and how long to wait for them.

    Args:
        comfyui: addresses of the servers.
        timeout: seconds that a picture may take.
        tries: of a picture that fails.
        wait: seconds to wait for a server that does not answer before it is given up.
    """

    comfyui: tuple[str, ...] = ("http://127.0.0.1:8188",)
    timeout: float = 600.0
    tries: int = 3
    wait: float = 60.0

    def __post_init__(self) -> None:
        check_range("ComfyUI", "timeout", self.timeout, 1, 86_400)
        check_range("ComfyUI", "tries", self.tries, 1, 100)
        check_range("ComfyUI", "wait", self.wait, 0, 86_400)
        wrong = [url for url in self.comfyui if not url.startswith(("http://", "https://"))]
        if wrong or not self.comfyui or len(set(self.comfyui)) != len(self.comfyui):
            raise ConfigError(
                "--comfyui takes different addresses such as http://127.0.0.1:8188, one a server; "
                f"got {', '.join(map(shown, self.comfyui)) or 'none'}."
            )


@dataclass(frozen=True)
class Order:
    """A picture to draw.

    Attributes:
        name: by which a failure is told.
        portrait: file of the person's photo; files of one name have the same content.
        prompt: what to draw.
        seed: 0 to 2**53 - 1.
        keep: takes the picture.
    """

    name: str
    portrait: Path
    prompt: str
    seed: int
    keep: Callable[[Image.Image], None]


def draw_on_servers(
    settings: Servers,
    workflow: GeneratorWorkflow,
    orders: Sequence[Order],
    run: RunFolder,
    title: str = "draw",
) -> dict[str, str]:
    """Draws; gives name to reason of each picture that failed.

    Args:
        settings: the servers.
        workflow: that draws.
        orders: what; they come in any order.
        run: told of progress, and of servers that do not answer.
        title: of the progress.

    Raises:
        DatasetError: pictures are left and no server, or none could be drawn.
    """
    if not orders:
        return {}
    servers = {url: _Server(url, workflow, settings.timeout) for url in settings.comfyui}
    work = SharedWork[Order](servers, Patience(settings.tries, settings.wait), run.say)
    done, failed = 0, dict[str, str]()
    with run.watch(title) as watch:
        for outcome in work.run(orders):
            done += 1
            if outcome.failure:
                failed[outcome.job.name] = outcome.failure
            watch(done, len(orders), {})
    if done < len(orders):
        raise DatasetError(
            f"No server is left, and {counted(len(orders) - done, 'picture')} of {len(orders)} "
            f"are not drawn. Start ComfyUI at {', '.join(settings.comfyui)} and run the same again."
        )
    if len(failed) == len(orders):
        raise DatasetError(f"No picture could be drawn: {next(iter(failed.values()))}")
    return failed


class _Server:
    """One ComfyUI: draws one picture after the other."""

    def __init__(self, url: str, workflow: GeneratorWorkflow, timeout: float) -> None:
        self.client = ComfyClient(url.rstrip("/"))
        self.workflow, self.timeout = workflow, timeout

    def __call__(self, order: Order) -> None:
        """Uploads the portrait if need be, draws, and hands over the picture."""
        try:
            name = self.client.upload_picture(order.portrait)  # it may have been restarted
            graph = self.workflow.filled(name, order.prompt, order.seed)
            result = self.client.run(graph, timeout=self.timeout)
            picture = picture_of(result.picture(self.workflow.shows))
        except ComfyInterrupted as stopped:
            raise JobFailedError(str(stopped)) from stopped
        except ComfyPromptError as refusal:
            raise self._meant(refusal) from refusal
        except (OSError, WebSocketException, ValueError) as silence:
            raise ServerDownError(_reason(silence)) from silence
        order.keep(picture)

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
