"""Which stage made which file, and whether the files are still what it made."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...config import parse_json
from ...storage.atomic import write_text
from ...storage.file_digest import hashed
from .. import paths

Digests = dict[str, str]
"""Path of a file, from the root of the pack, to the SHA-256 of what is in it."""


def begin(stage: str) -> int:
    """When a stage began, in nanoseconds; one that was stopped began before that."""
    path = _begun(stage)
    if not path.exists():
        write_text(path, "")
    return path.stat().st_mtime_ns


def end(stage: str) -> None:
    """A stage is done: if it is made again, it begins anew."""
    _begun(stage).unlink(missing_ok=True)


def made_since(begun: int) -> Digests:
    """Digests of the files that were written since, also those that came out as they were."""
    return {_name(p): hashed(p).hexdigest() for p in _files() if p.stat().st_mtime_ns >= begun}


def _files() -> list[Path]:
    """What a later stage, or a user, reads: artefacts, and what the build keeps for itself."""
    kept = (paths.FIRST_BASE, paths.FACE_READER)
    folders = (paths.ARTEFACTS, paths.BUILD / "vae" / "trained", paths.TRAINED_VAE)
    files = (*kept, *(path for folder in folders for path in folder.rglob("*")))
    others = (paths.MANIFEST, paths.LINEAR, paths.STRENGTHS)
    return sorted(path for path in files if path.is_file() and path not in others)


def foreign(records: Sequence[tuple[str, Mapping[str, Any]]]) -> Iterator[str]:
    """Sentences about files that are not what the stages made, in the order of the stages.

    A file belongs to the last stage that wrote it; a stage that was stopped may have written what
    is newer than its beginning. Records without files are of older builds.

    Args:
        records: name and record of every stage that is done, in their order.
    """
    owners: dict[str, tuple[str, str]] = {}
    for stage, record in records:
        owners |= {name: (stage, made) for name, made in record.get("files", {}).items()}
    for name, (stage, made) in owners.items():
        path = paths.ROOT / name
        if path.exists() and (
            _written_by_a_stopped_stage(path) or hashed(path).hexdigest() == made
        ):
            continue
        what = "is another file than" if path.exists() else "is missing, which"
        yield (
            f"{name} {what} the stage {stage} made: put that file back, or delete "
            f"{_name(marker(stage))} to make it again, and with it what was made from it."
        )


def artefacts() -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every artefact but the manifest, by its path among them."""
    files = sorted(p for p in paths.ARTEFACTS.rglob("*") if p.is_file() and p != paths.MANIFEST)
    return {
        str(path.relative_to(paths.ARTEFACTS)): {
            "bytes": path.stat().st_size,
            "sha256": hashed(path).hexdigest(),
        }
        for path in files
    }


def list_artefacts() -> None:
    """The manifest's list of files as they are now; what it says of the stages stays.

    For what writes an artefact and is no stage.
    """
    manifest = read(paths.MANIFEST) | {"files": artefacts()}
    write_text(paths.MANIFEST, json.dumps(manifest, indent=1) + "\n")


def marker(stage: str) -> Path:
    """The file that says that a stage is done."""
    return paths.BUILD / "done" / f"{stage}.json"


def read(path: Path) -> dict[str, Any]:
    """A JSON table."""
    return dict(parse_json(path.read_bytes(), path.name))


def _written_by_a_stopped_stage(path: Path) -> bool:
    """Whether a file is newer than the beginning of a stage that is not done."""
    begun = [mark.stat().st_mtime_ns for mark in _begun("").glob("*")]
    return bool(begun) and path.stat().st_mtime_ns >= min(begun)


def _begun(stage: str) -> Path:
    return paths.BUILD / "begun" / stage


def _name(path: Path) -> str:
    return path.relative_to(paths.ROOT).as_posix()
