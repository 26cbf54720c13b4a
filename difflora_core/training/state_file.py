"""Files that a stopped training goes on from: whole and of this very run, or refused (ours).

A state file names its format, its run and the settings that count, and holds a digest of all that
is in it. So a bit that fell over is noticed, a file of another version or run is refused with what
differs, and what is taken up is what was written.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from ..config import Config, parse_json
from ..errors import CheckpointError, ConfigError
from ..storage import safetensors_io
from .fingerprint import fingerprint

FORMAT, VERSION = "difflora_training_state", "1"
STATE = "state.safetensors"
"""The file whose presence means that a folder holds a run to go on with."""

AnyFacts = TypeVar("AnyFacts", bound=Config)


@dataclass(frozen=True)
class RunIdentity:
    """Which run a state belongs to.

    Args:
        fingerprint: of settings and data; runs that share it compute the same.
        settings: the settings that count, by name; they only serve to say what differs.
    """

    fingerprint: str
    settings: Mapping[str, Any] = field(default_factory=dict)


def write_state(path: Path, tensors: Mapping[str, Tensor], facts: Config, run: RunIdentity) -> None:
    """Write a state file.

    Args:
        path: of the file.
        tensors: what the run holds.
        facts: its numbers.
        run: whose state it is.

    Raises:
        CheckpointError: it cannot be written; a file that was there is as it was.
    """
    stored = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    texts = {
        "format": FORMAT,
        "version": VERSION,
        "fingerprint": run.fingerprint,
        "settings": json.dumps(dict(run.settings), sort_keys=True),
        "facts": facts.to_json(),
    }
    texts["digest"] = _digest(stored, texts)
    safetensors_io.write_atomic(stored, texts, path)


def read_state(
    path: Path, run: RunIdentity, kind: type[AnyFacts]
) -> tuple[dict[str, Tensor], AnyFacts]:
    """Tensors and facts of a state file.

    Raises:
        CheckpointError: it is missing, damaged, of another version, or of another run; the message
            says which settings differ.
    """
    try:
        tensors, texts = safetensors_io.read_file(path, "state file", finite=False)
    except CheckpointError as error:
        if isinstance(error.__cause__, OSError):
            raise  # it may be sound, but cannot be opened
        raise damaged(path) from error
    if texts.get("format") != FORMAT or texts.get("version") != VERSION:
        raise CheckpointError(
            f"{path} is no training state of this version of the node pack. Finish that training "
            f"with the version that began it, or delete {path.parent} to start anew."
        )
    if texts.get("digest") != _digest(tensors, texts):
        raise damaged(path)
    if texts.get("fingerprint") != run.fingerprint:
        raise CheckpointError(
            f"{path.parent} holds the state of another training ({_what_differs(texts, run)}). Go "
            "on with what it began with, take another folder, or delete it."
        )
    try:
        return tensors, kind.from_json(texts.get("facts", ""))
    except ConfigError as error:
        raise damaged(path) from error


def damaged(path: Path) -> CheckpointError:
    """What to say of a file that cannot be taken up."""
    return CheckpointError(f"{path} is damaged; delete it to start anew.")


def check_tensors(path: Path, found: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> None:
    """Raises CheckpointError unless tensors have names, shapes and kinds of others, and are finite.

    Args:
        path: of the file, for the message.
        found: what was read.
        like: what the run holds; where this is not finite, the same is accepted.
    """
    if _kinds(found) != _kinds(like) or not all(_finite(t, like[n]) for n, t in found.items()):
        raise damaged(path)


def remove_run(folder: Path) -> None:
    """Remove a run's folder, its state first: what is left of it after a kill starts anew."""
    (folder / STATE).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """What is set differently, one phrase each: "seed 3 there and 9 here".

    Args:
        there: settings as JSON gave them, of whatever file.
        here: ours, which name what is compared.
    """
    before = dict(_flat(there))
    phrases = []
    for name, value in _flat(json.loads(json.dumps(here))):
        old = before.get(name)
        if name not in before or old != value or type(old) is not type(value):
            phrases.append(f"{name} {old!r:.40} there and {value!r:.40} here")
    return phrases


def settings_that_count(*records: Config) -> dict[str, Any]:
    """The settings of records that change what comes out of a run; the last one's where shared."""
    return {
        entry.name: value
        for record in records
        for entry, value in zip(dataclasses.fields(record), record.to_dict().values(), strict=True)  # type: ignore[arg-type]
        if not entry.metadata.get("same_course")
    }


def _what_differs(texts: Mapping[str, str], run: RunIdentity) -> str:
    """Words for the settings in which a file's run is not this one."""
    try:
        there = parse_json(texts.get("settings", ""), "settings")
    except ConfigError:
        there = None
    found = differences(there, run.settings) if isinstance(there, dict) else []
    return "; ".join(found[:5]) or "other words, pictures or base model"


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Names and values, those of groups with the group's name before them."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _digest(tensors: Mapping[str, Tensor], texts: Mapping[str, str]) -> str:
    """Digest of everything in a file but itself."""
    others = {name: text for name, text in texts.items() if name != "digest"}
    return fingerprint(dict(sorted(tensors.items())), dict(sorted(others.items())))


def _kinds(tensors: Mapping[str, Tensor]) -> dict[str, tuple[object, ...]]:
    return {name: (t.dtype, *t.shape) for name, t in tensors.items()}


def _finite(found: Tensor, like: Tensor) -> bool:
    """True when numbers are finite; a mask's infinities are those of the module itself."""
    finite = found.isfinite()
    return bool(finite.all()) or bool((finite | (found == like.to(found.device))).all())
