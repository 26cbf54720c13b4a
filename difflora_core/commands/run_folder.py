"""The folder of a run: its settings, versions, log, events and samples; one process at a time.

A run that was stopped is called again with the same words and goes on. What a stage writes it
writes whole (storage/atomic.py), so that the next call can trust what is there.
"""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

from filelock import FileLock, Timeout
from rich.console import Console

from .. import __version__
from ..config import Config, parse_json
from ..errors import ConfigError, shown
from ..storage.atomic import write_text
from ..training.processes import launched
from ..training.state_file import differences
from .progress import Watch

SETTINGS, VERSIONS, LOG, SAMPLES, LOCK = (
    *("config.json", "versions.json", "log.txt", "samples", ".lock"),
)
PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "datasets")
"""Whose versions a run keeps."""


class RunFolder:
    """An open run; made by `run_folder`.

    Attributes:
        path: its folder. `path / SETTINGS` can be given to `--config`.
        samples: where its pictures go.
    """

    def __init__(self, path: Path, console: Console) -> None:
        self.path, self.samples, self._console = path, path / SAMPLES, console
        self.is_main = launched().is_main

    def say(self, text: str) -> None:
        """A line for whoever watches, and for the log; of several processes one speaks."""
        if self.is_main:
            self._console.print(text)
            self._log(text)

    @contextmanager
    def watch(self, stage: str) -> Iterator[Watch]:
        """How far a stage is, see `progress.Watch`; in the log there is a line now and then."""
        with Watch(stage, self._console, self._log if self.is_main else None) as watch:
            yield watch

    def _log(self, text: str) -> None:
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        with (self.path / LOG).open("a", encoding="utf-8") as file:
            file.writelines(f"{now} {line}\n" for line in text.splitlines())


@contextmanager
def run_folder(path: Path, settings: Config, console: Console) -> Iterator[RunFolder]:
    """Opens the folder of a run, makes it when missing, and keeps what the run is.

    Args:
        path: the folder.
        settings: resolved, of the command.
        console: where the run speaks.

    Raises:
        ConfigError: the folder holds something else, another process works in it, or it cannot be
            written.
    """
    run = RunFolder(path, console)
    if not run.is_main:
        yield run
        return
    try:
        path.mkdir(parents=True, exist_ok=True)
        if any(path.iterdir()) and not {SETTINGS, LOCK} & {own.name for own in path.iterdir()}:
            raise ConfigError(
                f"{shown(str(path), 300)} holds other files and no run ({SETTINGS} is not there). "
                "Name an empty or a new folder."
            )
        with FileLock(path / LOCK, timeout=0):
            run.say(_begin(path, settings))
            yield run
    except Timeout as taken:
        raise ConfigError(
            f"Another process works in {shown(str(path), 300)}: wait for its end, or stop it."
        ) from taken
    except OSError as failure:
        raise ConfigError(
            f"{shown(str(path), 300)} cannot be used: {failure.strerror or failure}."
        ) from failure


def _begin(path: Path, settings: Config) -> str:
    """Writes settings and versions; says whether a run begins, and what is set differently."""
    changed: list[str] = []
    goes_on = (path / SETTINGS).exists()
    if goes_on:
        before = parse_json((path / SETTINGS).read_bytes(), SETTINGS)
        changed = differences(before if isinstance(before, dict) else {}, settings.to_dict())
    write_text(path / SETTINGS, json.dumps(settings.to_dict(), indent=1) + "\n")
    write_text(path / VERSIONS, json.dumps(versions(), indent=1) + "\n")
    words = [f"{'The run in' if goes_on else 'A new run in'} {shown(str(path), 300)}"]
    words += ["goes on"] * goes_on
    return " ".join(words) + (f"; other settings: {'; '.join(changed)}" if changed else "") + "."


def versions() -> dict[str, str]:
    """Versions of this pack, of Python, of what computes, and the machine's kind."""
    found = {"difflora": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    found["machine"] = f"{platform.system()} {platform.machine()}"
    found["called"] = " ".join(sys.argv[1:])
    return found
