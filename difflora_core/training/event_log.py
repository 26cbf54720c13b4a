"""The log of a run, events.jsonl: one line of JSON for each step that is reported (ours)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from ..config import parse_json
from ..errors import CheckpointError, ConfigError
from ..storage.atomic import replacing

EVENTS = "events.jsonl"


def append_event(folder: Path, step: int, metrics: Mapping[str, float]) -> None:
    """Add a line.

    Raises:
        CheckpointError: it cannot be written.
    """
    path = folder / EVENTS
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
    except OSError as error:
        raise CheckpointError(f"{path} could not be written: {error.strerror}.") from error


def forget_events_after(folder: Path, step: int) -> None:
    """Drop what a killed run logged after the state that is gone on from, half a line included.

    Raises:
        CheckpointError: the log cannot be read or written.
    """
    path = folder / EVENTS
    try:
        if not path.exists():
            return
        lines = path.read_bytes().splitlines(keepends=True)
        kept = [line for line in lines if line.endswith(b"\n") and _step(line) <= step]
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    if kept != lines:
        with replacing(path) as temporary:
            temporary.write_bytes(b"".join(kept))


def _step(line: bytes) -> float:
    """The step of a line; infinity for what is no line of a log."""
    try:
        step = parse_json(line, "event")["step"]
    except (ConfigError, KeyError, TypeError):
        return float("inf")
    return step if type(step) is int else float("inf")
