"""A ComfyUI workflow in API form that draws a person: where portrait, prompt and seed go."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import parse_json
from ..errors import DatasetError, shown
from ..limits import JSON_BYTES

PORTRAIT, PROMPT, SEED = "{portrait}", "{prompt}", "{seed}"
"""What stands in the workflow where the name of the uploaded portrait, a prompt and a number go.
The seed is a number where it stands alone."""

SHOWING = ("SaveImage", "PreviewImage")
_MARKS = re.compile("|".join(map(re.escape, (PORTRAIT, PROMPT, SEED))))

Graph = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class GeneratorWorkflow:
    """A workflow with marked places.

    Attributes:
        name: of its file.
        graph: node id to {class_type, inputs}.
    """

    name: str
    graph: Mapping[str, Mapping[str, Any]]

    def __post_init__(self) -> None:
        text = json.dumps(self.graph)
        missing = [mark for mark in (PORTRAIT, PROMPT, SEED) if mark not in text]
        if missing:
            raise DatasetError(
                f"{shown(self.name)} has no place for {' and '.join(missing)}. Write that text "
                f"into the input where it belongs: {PORTRAIT} as the picture of Load Image, "
                f"{PROMPT} in the prompt, {SEED} as the seed of the sampler."
            )

        if len(self._showing) > 1:
            nodes = ", ".join(map(shown, self._showing[:8]))
            raise DatasetError(
                f"{shown(self.name)} shows pictures in several nodes ({nodes}). Keep one Save "
                "Image or Preview Image."
            )

    @property
    def _showing(self) -> list[str]:
        """Nodes that save or preview pictures."""
        return [n for n, node in self.graph.items() if node["class_type"] in SHOWING]

    @property
    def shows(self) -> str | None:
        """The node whose picture counts; None: whichever shows one."""
        return next(iter(self._showing), None)

    @property
    def digest(self) -> str:
        """Of what the nodes do; titles do not count."""
        nodes = {n: [node["class_type"], node["inputs"]] for n, node in self.graph.items()}
        return hashlib.sha256(json.dumps(nodes, sort_keys=True).encode()).hexdigest()

    def filled(self, portrait: str, prompt: str, seed: int) -> Graph:
        """The workflow for one picture.

        Args:
            portrait: name of the file in ComfyUI's input folder.
            prompt: what to draw.
            seed: 0 to 2**53 - 1.
        """
        words = {PORTRAIT: portrait, PROMPT: prompt, SEED: str(seed)}

        def fill(value: Any) -> Any:
            if value == SEED:
                return seed
            if isinstance(value, str):
                return _MARKS.sub(lambda mark: words[mark[0]], value)
            return value

        return {
            number: {**node, "inputs": {k: fill(v) for k, v in node["inputs"].items()}}
            for number, node in self.graph.items()
        }


def read_workflow(path: Path) -> GeneratorWorkflow:
    """A workflow of a file.

    Raises:
        DatasetError: it cannot be read, is not in API form, or a place is not marked.
    """
    place = shown(str(path), 300)
    try:
        with path.open("rb") as file:
            data = parse_json(file.read(JSON_BYTES), path.name, DatasetError)
    except OSError as closed:
        raise DatasetError(f"{place} cannot be read: {closed.strerror}.") from closed
    if isinstance(data, dict) and isinstance(data.get("nodes"), list):
        raise DatasetError(
            f"{place} is a workflow as ComfyUI saves it. Export it in API form (Workflow, Export "
            "(API)), which servers run."
        )
    if not isinstance(data, dict) or not data or not all(map(_is_node, data.values())):
        raise DatasetError(f"{place} is no workflow in API form.")
    return GeneratorWorkflow(path.name, data)


def _is_node(node: Any) -> bool:
    """Whether this is a node in API form."""
    whole = isinstance(node, dict) and isinstance(node.get("class_type"), str)
    return whole and isinstance(node.get("inputs"), dict)


def read_prompts(path: Path) -> tuple[str, ...]:
    """Prompts of a text file, one a line; empty lines do not count.

    Raises:
        DatasetError: it cannot be read, or has none.
    """
    try:
        prompts = tuple(_lines(path.read_text("utf-8")))
    except (OSError, UnicodeDecodeError) as closed:
        raise DatasetError(f"{shown(str(path), 300)} cannot be read as text: {closed}.") from closed
    if not prompts:
        raise DatasetError(f"There is no prompt in {shown(str(path), 300)}.")
    return prompts


def _lines(text: str) -> Iterator[str]:
    """Lines that say something."""
    return filter(None, map(str.strip, text.splitlines()))
