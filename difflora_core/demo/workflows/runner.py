"""Runs every file in workflows/ in ComfyUI's real front end: `make workflows`."""

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from ...comfy_client import PromptResult
from ...config import parse_json
from ...errors import DiffLoRAError
from ..comfyui.browser import Chromium, FrontEnd
from ..comfyui.server import ComfyServer
from ..comfyui.workflow_api import PACK, WorkflowError, workflow_to_prompt
from .shown import complaints, shown

OUTPUT = PACK / "output" / "workflows"
FULL_SIZE = "sdxl_"
"""File names start so when a workflow needs model files that do not come with us."""
FIRST = "quickstart_demo"
"""The template that an artist who is new here meets first."""


def run_workflow(server: ComfyServer, path: Path) -> PromptResult:
    """Runs one workflow file through /prompt; its photos come with the pack.

    Raises:
        DiffLoRAError: the file, a node or ComfyUI refused; the message names the node.
    """
    prompt = workflow_to_prompt(read_workflow(path), server.client.object_info())
    return server.client.run(prompt)


def check_workflow(server: ComfyServer, front_end: FrontEnd, path: Path) -> str:
    """One workflow file as its artist meets it: loaded, queued, looked at, queued again.

    Nothing may cover anything, before the run and with its pictures (see shown.py). The front end's
    own conversion must equal ours, and both runs must give the same pixels: the
    first queued by a click, the second through /prompt with nothing cached. A full-size workflow is
    loaded and converted only.

    Returns:
        What was done, for a line of output.

    Raises:
        DiffLoRAError: what went wrong.
    """
    workflow = read_workflow(path)
    full_size = path.name.startswith(FULL_SIZE)
    server.client.free()  # or a node that the workflow before has run as well would show nothing
    front_end.load(workflow, path.stem, complete=not full_size)
    _check_looks(front_end)
    prompt = workflow_to_prompt(workflow, server.client.object_info())
    if front_end.prompt() != prompt:
        raise WorkflowError("The front end converts it to another prompt than we do.")
    if not full_size:
        begun = server.cpu_seconds()
        result = front_end.queue()
        taken = server.cpu_seconds() - begun
        _check_looks(front_end)
    front_end.screenshot(OUTPUT / f"{path.stem}.png")
    if front_end.problems:
        raise WorkflowError("The page complains: " + "; ".join(front_end.problems))
    if full_size:
        return "loads and converts; not run, it needs model files that do not come with the pack"
    compare(result, server.client.run_fresh(prompt))
    return (
        f"{result.seconds:.1f} s in the front end, {taken:.1f} s of processor time, the same "
        "pixels twice"
    )


def _check_looks(front_end: FrontEnd) -> None:
    found = complaints(shown(front_end))
    if found:
        raise WorkflowError(" ".join(found))


def first_picture(server: ComfyServer, chromium: Chromium) -> tuple[PromptResult, float, float]:
    """What an artist does first: a click on the template, which opens by itself, one on Run.

    Returns:
        What the run made; seconds from the first click until all of it is drawn; ComfyUI's
        processor time in them.

    Raises:
        DiffLoRAError: the front end or a node did not do it.
    """
    server.client.free()
    with FrontEnd(chromium, server.client, first_visit=True) as front_end:
        front_end.find_template("DiffLoRA", FIRST)
        begun, taken = time.monotonic(), server.cpu_seconds()
        front_end.open_template(FIRST)
        result = front_end.queue()
        return result, time.monotonic() - begun, server.cpu_seconds() - taken


def compare(shown: PromptResult, fresh: PromptResult) -> None:
    """Two runs made the same pictures, the second one with nothing cached.

    A node between others shows nothing in the first run when ComfyUI knew its answer already.

    Raises:
        WorkflowError: they did not.
    """
    if not shown.pictures or not shown.pictures.keys() <= fresh.pictures.keys():
        raise WorkflowError(f"Pictures of {list(shown.pictures)}, then of {list(fresh.pictures)}.")
    for node, pictures in shown.pictures.items():
        again = fresh.pictures[node]
        if len(pictures) != len(again) or not all(map(np.array_equal, pictures, again)):
            raise WorkflowError(f"Node {node} made other pixels in the second run.")


def read_workflow(path: Path) -> dict[str, Any]:
    """The content of a workflow file."""
    return dict(parse_json(path.read_bytes(), path.name))


def check_all(server: ComfyServer, front_end: FrontEnd, paths: list[Path], say: Console) -> int:
    """Checks workflow files and says what became of each; returns how many work."""
    done = 0
    for path in paths:
        begun = time.monotonic()
        try:
            line = check_workflow(server, front_end, path)
            done += 1
        except DiffLoRAError as error:
            line = f"FAILED: {error}"
        say.print(f"{path.name} ({time.monotonic() - begun:.0f} s): {line}", markup=False)
    return done


def main(names: list[str]) -> int:
    """Checks the files of these names, or all; the last line counts those that work."""
    console = Console(highlight=False, soft_wrap=True)
    paths = sorted((PACK / "workflows").glob("*.json"))
    paths = [path for path in paths if not names or path.stem in names]
    done = 0
    try:
        # A base directory of its own: a library that an earlier run left could be of another model.
        with (
            tempfile.TemporaryDirectory() as folder,
            ComfyServer(Path(folder)) as server,
            Chromium() as chromium,
        ):
            if not names:
                _, seconds, taken = first_picture(server, chromium)
                console.print(
                    f"first picture: {seconds:.1f} s after one click on the template and one on "
                    f"Run, {taken:.1f} s of processor time"
                )
            with FrontEnd(chromium, server.client) as front_end:
                done = check_all(server, front_end, paths, console)
    except DiffLoRAError as error:
        console.print(str(error), markup=False)
    console.print(f"screenshots: {OUTPUT}/*.png", markup=False)
    console.print(f"workflows: {done} of {len(paths)}")
    return 0 if done == len(paths) else 1
