"""Writes workflow files in the form the front end saves (schema 0.4) from a short description.

Sockets, widgets and their order come from ComfyUI's /object_info, so a file can only be built when
every node, input and output it names exists. Where they stand is layout.py's.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ..comfyui.workflow_api import WIDGET_TYPES, WorkflowError, schema_inputs
from .layout import arrange
from .shapes import COLUMN, Group

Info = Mapping[str, Any]

MATCHES = "COMFY_MATCHTYPE_V3"
GROUP_COLOURS = ("#3f789e", "#3f9e56", "#8a5ba8", "#88885b", "#a1693b")
OURS = {"color": "#232", "bgcolor": "#353"}
SOCKET, WIDGET, TEXT_BOX, EDGE = 20, 24, 74, 14
"""Heights of a row of sockets, a widget, a box of text, and what a node has around them."""
PICTURE, REPORT = 224, 64
"""The least that the front end gives a picture and a text on a node."""
SHOWS = {
    "LoadImage": PICTURE,
    "LoadImageMask": PICTURE,
    "SaveImage": PICTURE,
    "PreviewImage": PICTURE,
    "PreviewAny": 200,
    "DiffLoRA_CompareGrid": PICTURE,
    "DiffLoRA_CompareIdentities": 260,
    "DiffLoRA_Personalize": PICTURE + REPORT,
    "DiffLoRA_ExtractFeatures": PICTURE + REPORT,
    "DiffLoRA_MixFeatures": PICTURE,
    "DiffLoRA_PickFromLibrary": PICTURE,
    "DiffLoRA_ListLibrary": PICTURE,
    "DiffLoRA_AddToLibrary": REPORT,
    "DiffLoRA_EncodeLoRA": REPORT,
    "DiffLoRA_StyleRouter": 236,
    "DiffLoRA_TrainLoRA": PICTURE + REPORT,
    "DiffLoRA_TrainPerfusionConcept": PICTURE + REPORT,
    "DiffLoRA_TrainStyleInject": PICTURE + REPORT,
    "DiffLoRA_TrainPaRa": PICTURE + REPORT,
}
"""Height of the pictures and texts that a node shows when it has run, or while it runs."""
FOLDED = {
    *("VAEDecode", "VAEEncode", "RebatchImages", "SetLatentNoiseMask", "SetHookKeyframes"),
    *("SolidMask", "ImageScaleBy"),
}
"""Nodes that nobody has to set: their titles alone are shown."""


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
        self.groups: list[Group] = []
        self._note: dict[str, Any] | None = None

    def note(self, text: str) -> None:
        """The note at the far left that says what this is and what to change."""
        self._note = self._append(
            {"type": "MarkdownNote", "title": "Read me", "pos": [0, 0], "size": [0, 0]},
            {"properties": {}, "widgets_values": [text]},
        )

    def note_first(self, text: str) -> None:
        """Put text into the note, directly below its title."""
        note = self.nodes[0]
        title, _, rest = note["widgets_values"][0].partition("\n")
        note["widgets_values"] = [f"{title}\n{text}\n\n{rest}"]

    @contextmanager
    def group(self, title: str, wide: bool = False) -> Iterator[None]:
        """What is added inside stands in a box of its own.

        Args:
            title: of the box, in the artist's words.
            wide: its nodes show a row of pictures.
        """
        self.groups.append(Group(title, wide))
        yield

    def add(
        self,
        kind: str,
        column: int,
        /,
        *,
        title: str = "",
        models: Sequence[Mapping[str, str]] = (),
        folded: bool = False,
        **inputs: Any,
    ) -> Node:
        """Add a node to the group.

        Args:
            kind: node type.
            column: nodes of a lower column stand before those of a higher one.
            title: shown instead of the node's own name.
            models: files it needs: name, url and directory each.
            folded: show its title alone, as of the kinds in FOLDED.
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
        properties = self._properties(kind, ours, models)
        outputs = _outputs(schema, sockets)
        entry = {
            "type": kind,
            "pos": [0, 0],
            "size": [COLUMN, _height(kind, schema, sockets, outputs)],
            "flags": {"collapsed": True} if folded or kind in FOLDED else {},
            "inputs": sockets,
            "outputs": outputs,
            "properties": properties,
            "widgets_values": widgets,
        }
        rest = {"title": title} if title else {}
        made = self._append(entry, rest | (OURS if ours else {}))
        self.groups[-1].nodes.append((column, made))
        return Node(made)

    def build(self) -> dict[str, Any]:
        """The content of the file.

        Raises:
            WorkflowError: too many nodes to be opened readable.
        """
        boxes = arrange(self._note, self.groups, self.links)
        return {
            "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"difflora/{self.name}")),
            "revision": 0,
            "last_node_id": len(self.nodes),
            "last_link_id": len(self.links),
            "nodes": self.nodes,
            "links": self.links,
            "groups": [
                {
                    "id": number + 1,
                    "title": group.title,
                    "bounding": list(box),
                    "color": GROUP_COLOURS[number % len(GROUP_COLOURS)],
                    "font_size": 24,
                    "flags": {},
                }
                for number, (group, box) in enumerate(zip(self.groups, boxes, strict=True))
            ],
            "config": {},
            "extra": {"ds": {"scale": 0.6, "offset": [120, 160]}},
            "version": 0.4,
        }

    def _properties(
        self, kind: str, ours: bool, models: Sequence[Mapping[str, str]]
    ) -> dict[str, Any]:
        """What the front end keeps of a node: whose it is, and files that it needs."""
        return {
            "cnr_id": "difflora" if ours else "comfy-core",
            "ver": self.version if ours else "0.30.0",
            "Node name for S&R": kind,
            **({"models": [dict(model) for model in models]} if models else {}),
        }

    def _append(self, entry: dict[str, Any], rest: Mapping[str, Any]) -> dict[str, Any]:
        number = len(self.nodes) + 1
        plain = {"id": number, "flags": {}, "order": number - 1, "mode": 0}
        made = {**plain, "inputs": [], "outputs": [], **entry, **rest}
        self.nodes.append(made)
        return made

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


def _height(
    kind: str,
    schema: Info,
    sockets: Sequence[Mapping[str, Any]],
    outputs: Sequence[Mapping[str, Any]],
) -> int:
    """Height of a node with what it shows when it has run."""
    rows = sum("widget" not in socket for socket in sockets)
    height = EDGE + SHOWS.get(kind, 0)
    for name, type_name, options in schema_inputs(schema):
        rows += type_name.startswith("COMFY_AUTOGROW")  # the empty one
        if type_name in WIDGET_TYPES and not options.get("forceInput"):
            height += TEXT_BOX if options.get("multiline") else WIDGET
            height += WIDGET * (name in ("seed", "noise_seed") or "image_upload" in options)
    return height + SOCKET * max(rows, len(outputs))


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
