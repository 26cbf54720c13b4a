"""A workflow file as artists share it (UI form) → the prompt that ComfyUI runs (API form).

Ours, from ComfyUI's public /object_info only. Covered: links, widgets in their saved order, seeds
with their control value, Reroute, PrimitiveNode, muted and bypassed nodes, notes. Subgraphs and
dynamic combos are refused: our shipped workflows use neither.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ...errors import DiffLoRAError

PACK = Path(__file__).resolve().parents[3]
MUTED, BYPASSED = 2, 4
WIDGET_TYPES = frozenset({"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"})
SEED_CONTROLS = frozenset({"fixed", "increment", "decrement", "randomize"})
DRAWN_ONLY = frozenset({"Note", "MarkdownNote", "Reroute", "PrimitiveNode"})

Node = Mapping[str, Any]


class WorkflowError(DiffLoRAError):
    """A workflow file cannot be turned into a prompt."""


def workflow_to_prompt(
    workflow: Mapping[str, Any], object_info: Mapping[str, Any]
) -> dict[str, Any]:
    """Turns a workflow into a prompt.

    Args:
        workflow: a workflow file's content, schema 0.4.
        object_info: ComfyUI's /object_info.

    Returns:
        node id (text) to {class_type, inputs, _meta}.

    Raises:
        WorkflowError: an unknown node type, a subgraph, or widgets that do not fit the schema.
    """
    nodes: dict[int, Node] = {node["id"]: node for node in workflow["nodes"]}
    links = {link[0]: (link[1], link[2]) for link in workflow["links"]}
    prompt = {}
    for node_id, node in nodes.items():
        if node["type"] in DRAWN_ONLY or node.get("mode", 0) in (MUTED, BYPASSED):
            continue
        if node["type"] not in object_info:
            raise WorkflowError(
                f"Node {node_id} has the type {node['type']!r}, unknown to ComfyUI."
            )
        inputs = dict(_widgets(node, object_info[node["type"]]))
        for socket in node.get("inputs") or []:
            source = _source(socket.get("link"), nodes, links)
            if source is not None:
                inputs[socket["name"]] = source
        title = node.get("title") or object_info[node["type"]].get("display_name") or node["type"]
        prompt[str(node_id)] = {
            "class_type": node["type"],
            "inputs": inputs,
            "_meta": {"title": title},
        }
    return prompt


def workflow_pictures(workflow: Mapping[str, Any]) -> list[Path]:
    """The picture files that a workflow's LoadImage nodes name, found among the pack's own.

    Raises:
        WorkflowError: a picture does not come with the pack.
    """
    found = []
    for node in workflow["nodes"]:
        if node["type"] not in ("LoadImage", "LoadImageMask"):
            continue
        name = node["widgets_values"][0]
        places = [*(PACK / "workflows").glob(name), *(PACK / "difflora_core" / "demo").rglob(name)]
        if not places:
            raise WorkflowError(f"Node {node['id']} loads {name!r}, which does not come with us.")
        found.append(min(places))
    return found


def _widgets(node: Node, schema: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The widget values by name; a widget newer than the file takes its default."""
    saved = node.get("widgets_values") or []
    if isinstance(saved, Mapping):
        yield from saved.items()
        return
    values = list(saved)
    for name, kind, options in schema_inputs(schema):
        if kind.startswith("COMFY_DYNAMICCOMBO"):
            raise WorkflowError(f"Node {node['id']}: the dynamic widget {name!r} is not supported.")
        if kind not in WIDGET_TYPES or options.get("forceInput"):
            continue
        if values:
            yield name, values.pop(0)
            seeded = options.get("control_after_generate") or name in ("seed", "noise_seed")
            if seeded and values and values[0] in SEED_CONTROLS:
                values.pop(0)
        elif "default" in options:
            yield name, options["default"]
    # What may be left: the value of an upload button.
    if len(values) > 1:
        raise WorkflowError(
            f"Node {node['id']} ({node['type']}) has {len(values)} widget values too many."
        )


def schema_inputs(schema: Mapping[str, Any]) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Name, type and options of each input, required ones first; a bare list is a combo."""
    for group in ("required", "optional"):
        for name, spec in (schema["input"].get(group) or {}).items():
            options = spec[1] if len(spec) > 1 else {}
            if isinstance(spec[0], str):
                yield name, spec[0], options
            else:
                yield name, "COMBO", {"options": spec[0], **options}


def _source(
    link: int | None, nodes: Mapping[int, Node], links: Mapping[int, tuple[int, int]]
) -> Any | None:
    """Where a link starts: [node id, output], a primitive's value, or None."""
    if link is None or link not in links:
        return None
    node_id, output = links[link]
    node = nodes.get(node_id)
    if node is None:
        raise WorkflowError(f"Link {link} starts at node {node_id}, not in the file.")
    if node.get("mode", 0) == MUTED:
        return None
    if node["type"] == "PrimitiveNode":
        return node["widgets_values"][0]
    if node["type"] == "Reroute":
        return _source(node["inputs"][0].get("link"), nodes, links)
    if node.get("mode", 0) == BYPASSED:
        kind = node["outputs"][output]["type"]
        same = [socket.get("link") for socket in node["inputs"] if socket["type"] == kind]
        return _source(same[0], nodes, links) if same else None
    return [str(node_id), output]
