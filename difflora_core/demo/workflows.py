"""Runs every file in workflows/ in real ComfyUI: `make workflows`."""

import json
import sys
import time
from pathlib import Path

from rich.console import Console

from ..errors import DiffLoRAError
from .comfy_client import PromptResult
from .comfy_server import ComfyServer
from .workflow_api import PACK, workflow_pictures, workflow_to_prompt


def run_workflow(server: ComfyServer, path: Path) -> PromptResult:
    """Runs one workflow file through /prompt, its pictures put into ComfyUI's input folder first.

    Raises:
        DiffLoRAError: the file, a node or ComfyUI refused; the message names the node.
    """
    workflow = json.loads(path.read_text(encoding="utf-8"))
    for picture in workflow_pictures(workflow):
        server.client.upload_picture(picture)
    return server.client.run(workflow_to_prompt(workflow, server.client.object_info()))


def main() -> int:
    """Runs them all; the last line counts those that worked, the exit status is 0 when all did."""
    console = Console(highlight=False)
    paths = sorted((PACK / "workflows").glob("*.json"))
    done = 0
    with ComfyServer(PACK / "output" / "workflows") as server:
        for path in paths:
            begun = time.monotonic()
            try:
                run_workflow(server, path)
            except DiffLoRAError as error:
                console.print(f"{path.name}: {error}", markup=False)
            else:
                done += 1
                console.print(f"{path.name}: {time.monotonic() - begun:.1f} s")
    console.print(f"workflows: {done} of {len(paths)}")
    return 0 if done == len(paths) else 1


if __name__ == "__main__":
    sys.exit(main())
