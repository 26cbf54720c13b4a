"""`make demo-world`: rebuild every artefact of the demo world from seeds, stage by stage.

A stage that is done is skipped, a stopped one goes on where it was; delete .cache/build to start
anew. A file that is no longer what its stage made stops the build, and what another commit made is
said. The manifest beside the artefacts says what each stage measured and how long it took.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from ...errors import InterruptedTraining
from ...storage.atomic import write_text
from .. import paths
from . import (
    controlnet,
    made,
    stages,
    stages_concepts,
    stages_faces,
    stages_lora,
    stages_shipped_styles,
    stages_styles,
    words,
)

Report = Callable[[int, int, dict[str, float]], None]


@dataclass(frozen=True)
class Stage:
    """One step of the build: `minutes` is what it took on 2 cores."""

    name: str
    minutes: float
    run: Callable[[Report], dict[str, object]]


STAGES = (
    Stage("pictures", 3, stages.pictures),
    Stage("clip_vision", 10, stages_faces.clip_vision),
    Stage("recogniser", 6, stages_faces.recogniser),
    Stage("detector", 7, stages_faces.detector),
    Stage("judges", 15, stages_faces.judges),
    Stage("vae", 15, stages.vae),
    Stage("decoder", 60, stages.decoder),
    Stage("base", 45, stages.base),
    Stage("words", 50, words.words),
    Stage("concept_judge", 14, stages_concepts.judge),
    Stage("prompt_judge", 13, stages_concepts.prompt_judge),
    Stage("concepts", 5, stages_concepts.concepts),
    Stage("style_judge", 1, stages_styles.style_judge),
    Stage("teachers", 12, stages_styles.teachers),
    Stage("chinese", 5, stages_styles.chinese),
    Stage("styles", 12, stages_shipped_styles.styles),
    Stage("controlnet", 7, controlnet.controlnet),
    Stage("dataset", 8, stages_lora.dataset),
    Stage("functional", 126, stages_lora.functional),
    Stage("corpus", 48, stages_lora.corpus),
    Stage("encoder", 1, stages_lora.encoder),
    Stage("paper_corpus", 100, stages_lora.paper_corpus),
    Stage("paper", 10, stages_lora.paper),
    Stage("example", 1, stages_lora.example),
)


def main(arguments: list[str] | None = None) -> int:
    """Command line of the build."""
    parser = argparse.ArgumentParser(description="Rebuild the demo world from seeds.")
    parser.add_argument("--only", nargs="+", choices=[s.name for s in STAGES], help="these stages")
    parser.add_argument("--list", action="store_true", help="say what is done, and stop")
    options = parser.parse_args(arguments)
    console = Console()
    torch.set_num_threads(max(1, int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))))
    chosen = [s for s in STAGES if not options.only or s.name in options.only]
    left = [s for s in chosen if not _done(s.name)]
    for stage in chosen:
        console.print(f"  {stage.name:<14}{_state(stage)}")
    console.print(f"about {sum(s.minutes for s in left):.0f} minutes on 2 cores")
    done = [(s.name, made.read(made.marker(s.name))) for s in STAGES if _done(s.name)]
    problems = list(made.foreign(done))
    for problem in problems:
        console.print(problem)
    if options.list or problems:
        return int(bool(problems))
    for stage in left:
        try:
            _run(stage, console)
        except InterruptedTraining as stop:
            console.print(f"{stage.name}: {stop}")
            return 1
    write_manifest()
    return 0


def write_manifest() -> None:
    """Hashes of the artefacts with the figures of every finished stage.

    A stage that was not run here keeps the record of the run that made its artefacts.
    """
    before = made.read(paths.MANIFEST)["stages"] if paths.MANIFEST.exists() else {}
    manifest = {
        "files": made.artefacts(),
        "stages": {
            s.name: _record(s.name) if _done(s.name) else before[s.name]
            for s in STAGES
            if _done(s.name) or s.name in before
        },
    }
    write_text(paths.MANIFEST, json.dumps(manifest, indent=1) + "\n")


def _record(name: str) -> dict[str, Any]:
    """What the manifest says of a stage: its record, but the files, which the manifest lists."""
    record = made.read(made.marker(name))
    return {key: value for key, value in record.items() if key != "files"}


def _state(stage: Stage) -> str:
    """What is to be said of a stage before the build goes on."""
    if not _done(stage.name):
        return f"about {stage.minutes:g} min"
    commit = made.read(made.marker(stage.name)).get("commit", "unknown")
    return "done" if commit == _commit() else f"done, by commit {commit[:12]}"


def _run(stage: Stage, console: Console) -> None:
    started, begun = time.monotonic(), made.begin(stage.name)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bar:
        row = bar.add_task(stage.name, total=None)

        def report(step: int, total: int, metrics: dict[str, float]) -> None:
            words = "  ".join(f"{k} {v:.4g}" for k, v in metrics.items())
            bar.update(row, completed=step, total=total, description=f"{stage.name}  {words}")

        figures = stage.run(report)
    seconds = time.monotonic() - started
    record = {
        "figures": figures,
        "seconds": round(seconds, 1),
        "commit": _commit(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores"
        + (f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ", no GPU"),
        "torch": torch.__version__,
        "files": made.made_since(begun),
    }
    write_text(made.marker(stage.name), json.dumps(record, indent=1))
    made.end(stage.name)
    console.print(f"{stage.name}: {seconds / 60:.1f} min  {figures}")


def _done(name: str) -> bool:
    return made.marker(name).exists()


def _commit() -> str:
    command = ["git", "-C", str(paths.ROOT), "rev-parse", "HEAD"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    return answer.stdout.strip() or "unknown"


if __name__ == "__main__":
    raise SystemExit(main())
