"""Writes workflow files in the form the front end saves (schema 0.4) from a short description.

Sockets, widgets and their order come from ComfyUI's /object_info, so a file can only be built when
every node, input and output it names exists. Nodes stand in columns; every group is a row of
columns, and the groups follow each other from left to right or one below the other.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ..comfyui.workflow_api import WIDGET_TYPES, WorkflowError, schema_inputs

Info = Mapping[str, Any]

GAP, TITLE, TOP = 40, 30, 50
"""Pixels between nodes, of a node's title, and of a group's."""
COLUMN, GRID_COLUMN = 300, 560
"""Widths of a column of nodes, and of one that shows a grid of pictures."""
MATCHES = "COMFY_MATCHTYPE_V3"
GROUP_COLOURS = ("#3f789e", "#3f9e56", "#8a5ba8", "#88885b", "#a1693b")
OURS = {"color": "#232", "bgcolor": "#353"}
SHOWS_PICTURES = {
    "LoadImage": 240,
    "SaveImage": 320,
    "PreviewImage": 300,
    "DiffLoRA_CompareGrid": 260,
    "DiffLoRA_CompareIdentities": 330,
    "DiffLoRA_Personalize": 280,
    "DiffLoRA_ExtractFeatures": 280,
    "DiffLoRA_MixFeatures": 230,
    "DiffLoRA_PickFromLibrary": 230,
    "DiffLoRA_ListLibrary": 230,
    "DiffLoRA_AddToLibrary": 90,
    "DiffLoRA_EncodeLoRA": 100,
    "DiffLoRA_StyleRouter": 420,
}
"""Height that a node's picture or answer takes; the front end gives a picture 220 at least."""


@dataclass(frozen=True)
class Out:
    """An output of a node: where a link starts."""

    node: int
    slot: int
    kind: str


class Node:
    """A node that was added; `node["name"]` is its output of that name or type."""

    def __init__(self, entry: dict[str, Any]) -> None:
        self.entry = entry

    def __getitem__(self, name: str) -> Out:
        for slot, output in enumerate(self.entry["outputs"]):
            if name in (output["name"], output["type"]):
                return Out(self.entry["id"], slot, output["type"])
        known = [output["name"] for output in self.entry["outputs"]]
        raise WorkflowError(f"{self.entry['type']} has no output {name!r}, only {known}.")


class Graph:
    """A workflow in the making.

    Args:
        name: of the file, without suffix. info: /object_info. version: of this pack.
    """

    def __init__(self, name: str, info: Info, version: str) -> None:
        self.name, self.info, self.version = name, info, version
        self.nodes: list[dict[str, Any]] = []
        self.links: list[list[Any]] = []
        self.groups: list[dict[str, Any]] = []
        self._left, self._right, self._bottom = 40, 40, 0
        self._cursor: dict[int, int] = {}
        self._width = COLUMN

    def note(self, text: str, width: int = 400) -> None:
        """The note at the far left that says what this is and what to change."""
        self._append(
            {"type": "MarkdownNote", "title": "Read me", "pos": [40, 40 + TITLE]},
            {"size": _note_size(text, width), "properties": {}, "widgets_values": [text]},
        )
        self._left = self._right = 40 + width + GAP

    def note_first(self, text: str) -> None:
        """Put text into the note, directly below its title."""
        note = self.nodes[0]
        title, _, rest = note["widgets_values"][0].partition("\n")
        whole = f"{title}\n{text}\n\n{rest}"
        note["widgets_values"] = [whole]
        note["size"] = _note_size(whole, note["size"][0])

    @contextmanager
    def group(self, title: str, below: bool = False, width: int = COLUMN) -> Iterator[None]:
        """What is added inside stands in a box of its own.

        Args:
            title: of the box, in the artist's words.
            below: under the group before instead of right of it.
            width: of its columns.
        """
        first = len(self.nodes)
        left = self._left if below else self._right
        top = self._bottom + GAP if below else 0
        self._left, self._width = left, width
        self._cursor, self._start = {}, top + TOP + TITLE
        yield
        added = self.nodes[first:]
        right = max(n["pos"][0] + n["size"][0] for n in added) + GAP // 2
        bottom = max(n["pos"][1] + n["size"][1] for n in added) + GAP // 2
        self._right = max(self._right, right + GAP)
        self._bottom = bottom
        colour = GROUP_COLOURS[len(self.groups) % len(GROUP_COLOURS)]
        self.groups.append(
            {
                "id": len(self.groups) + 1,
                "title": title,
                "bounding": [left, top, right - left, bottom - top],
                "color": colour,
                "font_size": 24,
                "flags": {},
            }
        )

    def add(
        self,
        kind: str,
        column: int,
        /,
        *,
        title: str = "",
        models: Sequence[Mapping[str, str]] = (),
        **inputs: Any,
    ) -> Node:
        """Add a node under the ones that stand in the column already.

        Args:
            kind: node type.
            column: within the group, from 0.
            title: shown instead of the node's own name.
            models: files it needs: name, url and directory each.
            inputs: outputs to link, lists of outputs for growing inputs, and widget values.

        Raises:
            WorkflowError: the node does not exist, or lacks one of the inputs.
        """
        if kind not in self.info:
            raise WorkflowError(f"ComfyUI has no node {kind!r}.")
        schema = self.info[kind]
        number = len(self.nodes) + 1
        sockets, widgets = self._inputs(number, kind, schema, dict(inputs))
        ours = str(schema.get("python_module", "")).startswith("custom_nodes")
        properties: dict[str, Any] = {
            "cnr_id": "difflora" if ours else "comfy-core",
            "ver": self.version if ours else "0.30.0",
            "Node name for S&R": kind,
        }
        if models:
            properties["models"] = [dict(model) for model in models]
        outputs = _outputs(schema, sockets)
        height = 20 + 20 * max(len(sockets), len(outputs)) + self._widget_height(schema)
        height += SHOWS_PICTURES.get(kind, 0)
        entry = {
            "type": kind,
            "pos": self._place(column, height),
            "size": [self._width, height],
            "inputs": sockets,
            "outputs": outputs,
            "properties": properties,
            "widgets_values": widgets,
        }
        rest = {"title": title} if title else {}
        return Node(self._append(entry, rest | (OURS if ours else {})))

    def build(self) -> dict[str, Any]:
        """The content of the file."""
        return {
            "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"difflora/{self.name}")),
            "revision": 0,
            "last_node_id": len(self.nodes),
            "last_link_id": len(self.links),
            "nodes": self.nodes,
            "links": self.links,
            "groups": self.groups,
            "config": {},
            "extra": {"ds": {"scale": 0.7, "offset": [40, 60]}},
            "version": 0.4,
        }

    def _append(self, entry: dict[str, Any], rest: Mapping[str, Any]) -> dict[str, Any]:
        number = len(self.nodes) + 1
        plain = {"id": number, "flags": {}, "order": number - 1, "mode": 0}
        made = {**plain, "inputs": [], "outputs": [], **entry, **rest}
        self.nodes.append(made)
        return made

    def _place(self, column: int, height: int) -> list[int]:
        x = self._left + GAP // 2 + column * (self._width + GAP)
        y = self._cursor.get(column, self._start)
        self._cursor[column] = y + height + TITLE + GAP // 2
        return [x, y]

    def _inputs(
        self, number: int, kind: str, schema: Info, given: dict[str, Any]
    ) -> tuple[list[dict[str, Any]], list[Any]]:
        """Sockets and widget values, in the schema's order."""
        sockets: list[dict[str, Any]] = []
        widgets: list[Any] = []
        buttons: list[Any] = []  # of uploads, which the front end puts last
        for name, type_name, options in schema_inputs(schema):
            value = given.pop(name, None)
            is_widget = type_name in WIDGET_TYPES and not options.get("forceInput")
            if type_name.startswith("COMFY_AUTOGROW"):
                for part, out in zip(_growing_names(name, options), value or (), strict=False):
                    self._socket(sockets, number, part, (out.kind, out))
                continue
            if not is_widget or isinstance(value, Out):
                self._socket(sockets, number, name, (type_name, value))
                if is_widget:
                    sockets[-1]["widget"] = {"name": name}
            if is_widget:
                linked = value is None or isinstance(value, Out)
                widgets.append(_default(type_name, options) if linked else value)
                if options.get("control_after_generate") or name in ("seed", "noise_seed"):
                    widgets.append("fixed")
                elif options.get("image_upload"):
                    buttons.append("image")
        if given:
            raise WorkflowError(f"{kind} has no input {sorted(given)}.")
        return sockets, widgets + buttons

    def _socket(
        self, sockets: list[dict[str, Any]], number: int, name: str, what: tuple[str, Any]
    ) -> None:
        """Add a socket and, when it is given where from, its link."""
        kind, source = what
        link = None
        if isinstance(source, Out):
            link = len(self.links) + 1
            if source.kind not in kind.split(",") and "*" not in (kind, source.kind):
                raise WorkflowError(f"{name} of node {number} takes {kind}, not {source.kind}.")
            self.links.append([link, source.node, source.slot, number, len(sockets), source.kind])
            self.nodes[source.node - 1]["outputs"][source.slot]["links"].append(link)
        elif source is not None:
            raise WorkflowError(f"{name} of node {number} needs a link, got {source!r}.")
        sockets.append({"name": name, "type": kind, "link": link})

    def _widget_height(self, schema: Info) -> int:
        height = 0
        for name, kind, options in schema_inputs(schema):
            if kind in WIDGET_TYPES and not options.get("forceInput"):
                height += 100 if options.get("multiline") else 26
                height += 26 * (name in ("seed", "noise_seed"))
        return height


def _note_size(text: str, width: int) -> list[int]:
    """A note as high as its text."""
    lines = sum(1 + len(line) // (width // 6) for line in text.splitlines())
    return [width, 60 + 14 * lines]


def _outputs(schema: Info, sockets: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A node's outputs; what a matching one carries is what the node is given."""
    given = next((socket["type"] for socket in sockets if socket["link"]), "*")
    return [
        {"name": name, "type": given if kind == MATCHES else kind, "links": []}
        for name, kind in zip(schema["output_name"], schema["output"], strict=True)
    ]


def _growing_names(name: str, options: Mapping[str, Any]) -> list[str]:
    """Names of the sockets of an input that grows with every link."""
    template = options["template"]
    if template.get("names"):
        return [f"{name}.{part}" for part in template["names"]]
    return [f"{name}.{template['prefix']}{k}" for k in range(template.get("max", 100))]


def _default(kind: str, options: Mapping[str, Any]) -> Any:
    """A widget's value when nothing was said."""
    if "default" in options:
        return options["default"]
    if kind == "COMBO":
        return next(iter(options.get("options") or [""]))
    return {"INT": 0, "FLOAT": 0.0, "BOOLEAN": False}.get(kind, "")
