"""`make full-size`, also `make bench name=workflows`: SDXL's workflows at full size in ComfyUI.

Random weights of the real size (16 GB, written once); every `sdxl_` workflow, and those that draw
people for `multiply`, at 256 pixels and 2 steps, and 2 steps of every training node. What is asked:
does it run, how long does each node take, how much memory, does what is applied change the picture,
and does the base draw the same pixels afterwards.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from difflora_core.comfy_client import ComfyPromptError
from difflora_core.demo.comfyui.server import ComfyServer
from difflora_core.demo.paths import WORK
from difflora_core.demo.workflows.needs import SDXL_FILES
from difflora_core.errors import DiffLoRAError
from difflora_core.storage.atomic import write_text

from ..comfyui_run import difference, run
from ..command import benchmark_console, command_parser, commit, machine
from .sdxl import graphs
from .sdxl.files import build

FOLDER = WORK / "full-size"
LIMIT_GB = 16 * 2**30 / 1e9
"""Of ComfyUI's memory: a computer with a small card has 16 GB, which are powers of two."""
SHOWN = 4
"""Nodes named in the table, the slowest first."""
COMFYUI = ("--bf16-unet", "--cache-classic")
"""Half precision; and a result is kept only while the next prompt asks for it too."""
MEMORY = {"MALLOC_MMAP_THRESHOLD_": "1000000", "THP_MEM_ALLOC_ENABLE": "1"}
"""glibc's allocator returns tensors to the system at once, so that what is freed is not counted;
torch asks for huge pages, without which a fifth of the time goes into making small ones."""


@dataclass(frozen=True)
class Row:
    """What became of one workflow.

    `seconds`: by node type; `peak_gb`: most memory of ComfyUI; `changed`: grey levels (0 to 255) by
    which bypassing everything applied changes the last such picture, None where nothing is
    applied; `restored`: the base draws the same pixels afterwards; `problem`: empty when it ran.
    """

    name: str
    seconds: Mapping[str, float] = field(default_factory=dict)
    peak_gb: float = 0.0
    changed: float | None = None
    restored: bool | None = None
    problem: str = ""

    @property
    def good(self) -> bool:
        """It ran within the limits, changed what it was to change and left nothing behind."""
        fits = self.peak_gb <= LIMIT_GB
        return not self.problem and fits and self.changed != 0.0 and self.restored is not False


class Harness:
    """A ComfyUI with all files: runs workflows in it one by one.

    Args:
        server: it runs.
        base: see `graphs.base_prompt`; drawn at once, before anything is applied.
        side: of pictures, see `graphs.smaller`.
    """

    def __init__(self, server: ComfyServer, base: graphs.Prompt, side: int = graphs.SIDE) -> None:
        self.server, self.base, self.side = server, base, side
        self.info = server.client.object_info()
        self.untouched = self._base_picture()

    def row(self, name: str, prompt: graphs.Prompt) -> Row:
        """Run one prompt, what it loads first; a failure becomes the row's `problem`.

        ComfyUI keeps models as long as there is memory, so those of the row before are let go.
        """
        try:
            self.server.client.free()
            for file in graphs.missing_files(prompt, self.server.base_directory / "models"):
                run(self.server, graphs.maker_prompt(file, self.info, self.side), self.info)
            with_witness = graphs.witnessed(prompt, self.info)
            done = run(self.server, with_witness or prompt, self.info)
            changed = None
            if with_witness:
                drawn = done.result.picture(graphs.WITNESS)
                changed = difference(drawn, self._without(with_witness))
            restored = bool(np.array_equal(self._base_picture(), self.untouched))
            return Row(name, done.seconds, done.peak_gb, changed, restored)
        except DiffLoRAError as error:
            self._revive()
            return Row(name, problem=str(error).replace("\n", " ").replace("|", "/"))

    def _without(self, prompt: graphs.Prompt) -> Any:
        """The witness's picture with everything bypassed."""
        plain = graphs.bypassed(prompt, self.info)
        cut = graphs.ancestors(plain, graphs.WITNESS)
        return self.server.client.run(cut, timeout=3600).picture(graphs.WITNESS)

    def _base_picture(self) -> Any:
        """What the base model draws, drawn anew.

        Raises:
            ComfyPromptError: ComfyUI kept the picture from an earlier run.
        """
        result = self.server.client.run(self.base, timeout=3600)
        if "sampler" in result.cached:
            raise ComfyPromptError("The base picture was not drawn anew.")
        return result.picture(graphs.BASE_PICTURE)

    def _revive(self) -> None:
        """Start ComfyUI again where it has ended."""
        try:
            self.server.running_pid()
        except DiffLoRAError:
            self.server.stop()
            self.server.start()


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; the exit status is 0 when every row is good."""
    options = _options(arguments)
    console = benchmark_console()
    if options.remove:
        shutil.rmtree(options.folder, ignore_errors=True)
        console.print(f"removed {options.folder}")
        return 0
    side = options.side
    size = build(options.folder, side, console.print)
    console.print(f"{size:.1f} GB in {options.folder}; args='--remove' deletes them")
    rows: list[Row] = []
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ComfyUI must not stay with 10 GB
    os.environ.update(MEMORY)  # ComfyUI is started with it
    with ComfyServer(options.folder, arguments=COMFYUI) as server:
        harness = Harness(server, graphs.base_prompt(SDXL_FILES["checkpoints"][0], side), side)
        prompts = graphs.all_prompts(harness.info, side)
        for name in chosen(options.only, list(prompts)):
            rows.append(harness.row(name, prompts[name]))
            console.print(line(rows[-1]), markup=False)
            _write(options.json, rows, {"stored_gb": size, "side": side})
    console.print(table(rows), markup=False)
    console.print(f"{sum(row.good for row in rows)} of {len(rows)} are good; {machine()}")
    return 0 if all(row.good for row in rows) else 1


def chosen(only: Sequence[str], names: Sequence[str]) -> list[str]:
    """The names asked for, all without a wish; `sdxl_` may be left out.

    Raises:
        SystemExit: there is none of that name; the message lists them.
    """
    wanted = [name if name in names else f"sdxl_{name}" for name in only]
    if unknown := sorted(set(wanted) - set(names)):
        raise SystemExit(f"There is no {', '.join(unknown)}; choose from: {', '.join(names)}")
    return wanted or list(names)


def line(row: Row) -> str:
    """One row for who waits."""
    if row.problem:
        return f"{row.name}: FAILED: {row.problem}"
    return f"{row.name}: {sum(row.seconds.values()):.0f} s, {row.peak_gb:.1f} GB"


def table(rows: Sequence[Row]) -> str:
    """All rows in Markdown."""
    lines = [
        "| workflow | seconds | of which | peak GB | changed | base back |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row.problem:
            lines.append(f"| {row.name} | FAILED | {row.problem} | – | – | – |")
            continue
        slowest = sorted(row.seconds.items(), key=lambda item: -item[1])[:SHOWN]
        nodes = ", ".join(f"{name.removeprefix('DiffLoRA_')} {s:.0f}" for name, s in slowest)
        changed = "–" if row.changed is None else f"{row.changed:.1f}"
        back = {None: "–", True: "yes", False: "NO"}[row.restored]
        total = sum(row.seconds.values())
        cells = (row.name, f"{total:.0f}", nodes, f"{row.peak_gb:.1f}", changed, back)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser("Every SDXL workflow at full size with random weights.", threads=None)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="of the 16 GB of random files")
    parser.add_argument("--side", type=int, default=graphs.SIDE, help="of pictures, in pixels")
    parser.add_argument("--only", nargs="+", default=[], help="names of workflows, for example")
    parser.add_argument("--remove", action="store_true", help="delete the folder and end")
    return parser.parse_args(arguments)


def _write(path: Path | None, rows: Sequence[Row], facts: Mapping[str, object]) -> None:
    """Everything so far, so that a stopped run leaves what it has."""
    if path:
        own = {"commit": commit(), "machine": machine(), "comfyui": COMFYUI}
        document = {"rows": [asdict(row) | {"good": row.good} for row in rows], **facts, **own}
        write_text(path, json.dumps(document, indent=1) + "\n")
