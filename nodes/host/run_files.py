"""Where a training writes: one name is one file, however often it is stopped and goes on."""

import json
from collections.abc import Sequence
from pathlib import Path

from ...difflora_core.config import parse_json
from ...difflora_core.errors import ConfigError
from ...difflora_core.storage.atomic import write_text
from .. import model_paths

WRITTEN = "written.json"
"""Beside the state of a stopped training: the files that it wrote."""


def run_file(run: Path, folder: str, name: str, number: int = 0) -> Path:
    """Where a training run writes: its own file of before, when it was stopped, else an unused one.

    Args:
        run: the folder of its state, which knows what it wrote.
        folder: of models/.
        name: as the artist typed it.
        number: of the file, where a run writes several.
    """
    try:
        record = parse_json((run / WRITTEN).read_bytes(), WRITTEN)
        before = Path(record[name][number])
    except (OSError, ConfigError, LookupError, TypeError):
        return model_paths.unused_file(folder, name)
    mine = before.is_file() and before.parent == model_paths.new_file(folder, name).parent
    return before if mine else model_paths.unused_file(folder, name)


def remember_files(run: Path, name: str, files: Sequence[Path]) -> None:
    """Keeps beside the state of a stopped run which files it wrote under a name."""
    write_text(run / WRITTEN, json.dumps({name: [str(path) for path in files]}))
