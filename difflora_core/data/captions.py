"""What a picture shows, in words: by the user, by a command, or by a template.

A command is any captioner that is a program: it reads paths of picture files, one a line, from its
standard input, and writes a caption a line to its standard output, in the same order.
"""

from __future__ import annotations

import hashlib
import shlex
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DatasetError, counted, shown
from .records import encoded
from .sources import cleaned

SECONDS_EACH = 60
"""A command that takes longer for a picture is ended."""


def by_template(template: str, person: str) -> str:
    """The template's caption of a person: `{person}` stands for the name.

    Raises:
        DatasetError: the template is blank, or holds another pair of braces.
    """
    left = template.replace("{person}", "")
    if not left.strip() or "{" in left or "}" in left:
        raise DatasetError(
            f"The caption template is '{shown(template)}'. Write what every picture shows, such as "
            "'a photo of a person'; {person} stands for the name, no other braces."
        )
    return template.replace("{person}", person)


def by_command(command: str, pictures: Sequence[np.ndarray[Any, Any]]) -> list[str]:
    """The captions that a program gives to pictures.

    Args:
        command: the program and its arguments; no shell reads it.
        pictures: (H, W, 3) uint8 each; it sees them as PNG files.

    Raises:
        DatasetError: it cannot be started, fails, takes too long, or gives other than one caption
            for each picture.
    """
    with tempfile.TemporaryDirectory(prefix="captions-") as folder:
        paths = [Path(folder) / f"{number:06d}.png" for number in range(len(pictures))]
        for path, pixels in zip(paths, pictures, strict=True):
            with path.open("wb") as file:
                file.write(encoded(pixels, "png"))
        try:
            done = subprocess.run(
                shlex.split(command),
                input="".join(f"{path}\n" for path in paths).encode(),
                capture_output=True,
                timeout=SECONDS_EACH * max(1, len(paths)),
                check=False,
            )
        except (OSError, ValueError, subprocess.TimeoutExpired) as failure:
            raise DatasetError(f"The caption command does not work: {failure}.") from failure
    if done.returncode:
        said = done.stderr.decode("utf-8", "replace").strip()[-300:]
        raise DatasetError(f"The caption command ended with {done.returncode}: {shown(said, 300)}.")
    lines = done.stdout.decode("utf-8", "replace").splitlines()
    captions = [cleaned([line]) for line in lines]
    if len(lines) != len(pictures) or not all(captions):
        raise DatasetError(
            f"The caption command gave {len(lines)} lines for "
            f"{counted(len(pictures), 'picture')}; it must give one caption a line, for each "
            "picture in order, and no blank one."
        )
    return [caption for (caption,) in captions]


def command_digest(*parts: object) -> str:
    """Under what the captions of a command are kept: the command and what it is shown."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()
