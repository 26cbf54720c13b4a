"""What saved workflows and files rely on, written down: `make contracts` records additions.

`nodes.json` holds the schema of every node as ComfyUI tells it, `formats.json` the fields of every
file that we write, `<version>/` the workflows of that version with the prompts they gave, and small
files written by it. What an old workflow or file would not survive is refused, here and in the
tests.
"""

import json
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from contract_files import WRITERS

from difflora_core import __version__
from difflora_core.demo.comfyui.server import ComfyServer
from difflora_core.demo.comfyui.workflow_api import PACK, workflow_to_prompt
from difflora_core.storage.safetensors_io import read_header

FOLDER = Path(__file__).parent
LOCALE = PACK / "locales" / "en" / "nodeDefs.json"
OURS = "DiffLoRA_"
FIELDS = ("default", "min", "max", "options", "control_after_generate")
FIXED = ("format", "version")
"""Fields of our files whose value is part of the format."""
NAMES = {"lora": "LoRA", "difflora": "DiffLoRA", "clip": "CLIP", "vae": "VAE"}

Json = dict[str, Any]


def inputs_of(info: Mapping[str, Any], group: str) -> list[Json]:
    """The inputs of a node in their order; a list of files, empty here, is no promise."""
    inputs = []
    for name, (kind, *rest) in (info["input"].get(group) or {}).items():
        options = rest[0] if rest else {}
        facts = {field: options[field] for field in FIELDS if options.get(field) is not None}
        inputs.append({"id": name, "type": kind, **facts})
    return inputs


def node_contract(object_info: Mapping[str, Any]) -> Json:
    """The promise of each of our nodes, from /object_info."""
    return {
        node: {
            "required": inputs_of(info, "required"),
            "optional": inputs_of(info, "optional"),
            "outputs": [
                {"type": kind, **({"list": True} if is_list else {})}
                for kind, is_list in zip(info["output"], info["output_is_list"], strict=True)
            ],
        }
        for node, info in sorted(object_info.items())
        if node.startswith(OURS)
    }


def node_breaks(frozen: Json, live: Json, replaced: Mapping[str, Any] | None = None) -> list[str]:
    """What an old workflow would not survive; `replaced` are the old ids with a NodeReplace."""
    breaks = []
    for node, promise in frozen.items():
        if node not in live:
            if node not in (replaced or {}):
                breaks.append(f"{node} is gone and has no replacement")
            continue
        now = live[node]
        if len(now["required"]) > len(promise["required"]):
            breaks.append(f"{node} has a new required input; new ones are optional")
        for group in ("required", "optional", "outputs"):
            if len(now[group]) < len(promise[group]):
                breaks.append(f"{node} lost one of its {group}")
            for old, new in zip(promise[group], now[group], strict=False):
                breaks += [f"{node} {group}: {line}" for line in socket_breaks(old, new)]
    return breaks


def socket_breaks(old: Json, new: Json) -> list[str]:
    """How one input or output fails those who used it."""
    name = old.get("id", old["type"])
    if old.get("id") != new.get("id"):
        return [f"{name} became {new.get('id')}; order and ids stay"]
    breaks = []
    before, after = set(old["type"].split(",")), set(new["type"].split(","))
    if not (before <= after if "id" in old else before == after):
        breaks.append(f"{name} was {old['type']} and is {new['type']}")
    for field in ("default", "list"):
        if old.get(field) != new.get(field):
            breaks.append(f"{name}: {field} was {old.get(field)!r} and is {new.get(field)!r}")
    control = "control_after_generate"  # how it starts is no promise: files hold how it was left
    if bool(old.get(control)) != bool(new.get(control)):
        breaks.append(f"{name}: {control} was {old.get(control)!r} and is {new.get(control)!r}")
    if not set(old.get("options", ())) <= set(new.get("options", ())):
        breaks.append(f"{name} lost a choice of {old['options']}")
    if new.get("min", -1e99) > old.get("min", -1e99) or new.get("max", 1e99) < old.get("max", 1e99):
        breaks.append(f"{name} allows less than before")
    return breaks


def shape_of(value: Any, key: str = "") -> Any:
    """A JSON value as names and kinds; what `FIXED` names keeps its value."""
    if key in FIXED:
        return value
    if isinstance(value, dict):
        return {name: shape_of(item, name) for name, item in sorted(value.items())}
    if isinstance(value, list):
        return [shape_of(value[0])] if value else []
    return type(value).__name__


def format_contract() -> Json:
    """The fields of every kind of file, from files written now."""
    with tempfile.TemporaryDirectory() as folder:
        return {
            kind: file_contract(write(Path(folder) / f"{kind}.safetensors"))
            for kind, write in WRITERS.items()
        }


def file_contract(path: Path) -> Json:
    """Metadata fields, and type and number of dimensions of each tensor."""
    header = read_header(path, "file", ValueError)
    metadata = {
        key: shape_of(json.loads(text) if text.startswith("{") else text)
        for key, text in sorted(header.metadata.items())
    }
    tensors = {name: [kind, len(shape)] for name, (kind, shape) in sorted(header.tensors.items())}
    return {"metadata": metadata, "tensors": tensors}


def format_breaks(frozen: Any, live: Any, place: str = "") -> list[str]:
    """Fields that are gone or have another kind."""
    if isinstance(frozen, dict) and isinstance(live, dict):
        lost = [f"{place}/{key} is gone" for key in frozen if key not in live]
        kept = [key for key in frozen if key in live]
        return lost + [b for k in kept for b in format_breaks(frozen[k], live[k], f"{place}/{k}")]
    return [] if frozen == live else [f"{place} was {frozen} and is {live}"]


def english(object_info: Mapping[str, Any], known: Json) -> Json:
    """The English locale: texts of the schemas; names of sockets are kept once they are there."""
    locale = {}
    for node, info in object_info.items():
        if not node.startswith(OURS):
            continue
        names = known.get(node, {"inputs": {}, "outputs": {}})
        inputs = {
            name: {
                "name": names["inputs"].get(name, {}).get("name") or readable(name),
                "tooltip": spec[1]["tooltip"],
            }
            for group in ("required", "optional")
            for name, spec in (info["input"].get(group) or {}).items()
        }
        outputs = {}
        for k, (name, tooltip) in enumerate(
            zip(info["output_name"], info["output_tooltips"], strict=True)
        ):
            label = names["outputs"].get(str(k), {}).get("name") or readable(name)
            outputs[str(k)] = {"name": label, **({"tooltip": tooltip} if tooltip else {})}
        locale[node] = {
            "display_name": info["display_name"],
            "description": info["description"],
            "inputs": inputs,
            "outputs": outputs,
        }
    return locale


def readable(name: str) -> str:
    """`difflora_model` to `DiffLoRA model`."""
    return " ".join(NAMES.get(word, word) for word in name.split("_"))


def read(path: Path) -> Any:
    """The JSON in a file; an empty object when there is none."""
    return json.loads(path.read_text("utf-8")) if path.exists() else {}


def write(path: Path, content: Any) -> None:
    """Writes readable JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")


def keep_examples(object_info: Mapping[str, Any]) -> list[str]:
    """Keeps this version's workflows, their prompts and files; what is kept stays as it is."""
    folder, kept = FOLDER / __version__, []
    for path in sorted((PACK / "workflows").glob("*.json")):
        if not (folder / path.name).exists():
            workflow = read(path)
            prompt = workflow_to_prompt(workflow, object_info)
            write(folder / path.name, {"workflow": workflow, "prompt": prompt})
            kept.append(path.name)
    with tempfile.TemporaryDirectory() as scratch:
        for kind, write_file in WRITERS.items():
            path = folder / f"{kind}.safetensors"
            if not path.exists():
                shutil.copyfile(write_file(Path(scratch) / path.name), path)
                kept.append(path.name)
    return kept


def main() -> int:
    """Records additions; breaks are named and nothing is written."""
    with tempfile.TemporaryDirectory() as folder, ComfyServer(Path(folder)) as server:
        info = server.client.object_info()
        replaced = server.client.get("/node_replacements")
    nodes, formats = node_contract(info), format_contract()
    frozen = read(FOLDER / "nodes.json")
    breaks = node_breaks(frozen, nodes, replaced)
    breaks += format_breaks(read(FOLDER / "formats.json"), formats)
    if breaks:
        sys.stdout.write("refused, nothing was written:\n  " + "\n  ".join(breaks) + "\n")
        return 1
    write(FOLDER / "nodes.json", {**frozen, **nodes})
    write(FOLDER / "formats.json", formats)
    write(LOCALE, english(info, read(LOCALE)))
    kept = keep_examples(info)
    sys.stdout.write(f"contracts: {len(nodes)} nodes, {len(formats)} file formats, ")
    sys.stdout.write(f"newly kept: {', '.join(kept) or 'none'}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
