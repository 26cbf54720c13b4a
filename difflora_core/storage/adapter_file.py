"""Adapter files: one small .safetensors for a trained adaptation of any method.

The tensors of all layers lie packed under their names, in the order of the table in the metadata,
as float16 or as 8-bit integers with one scale per layer. Nothing in a file is trusted. The
super-class is kept as a word: what depends on it is recomputed from the live text encoders. File
names of pictures are never stored.

Version 1 is what every pack since 0.1.0 reads: a word, and one vector for each value projection of
cross-attention. Whatever else a method needs is written as version 2.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import parse_json
from ..errors import CheckpointError, ConfigError, LayoutError, counted, described
from ..limits import LAYERS
from ..methods.base import TrainedAdaptation, layout_hash
from ..methods.registry import method
from ..text.new_words import TEMPLATES, LearnedWord
from .safetensors_io import Header, open_tensors, write_atomic

FORMAT = "difflora-concept"  # named after what it held first
VERSIONS = (1, 2)
METADATA_KEY = "difflora_concept"
KIND = "concept or style file"
SUFFIX = ".attn2.to_v"  # of every layer in version 1, left out there
VECTOR = "values"  # the only tensor of a layer in version 1
MAX_VALUES = 2**28
MAX_ENCODERS = 8
MAX_TENSORS = 64  # names of a method's tensors, over all layers; as many again are shared
KINDS = {torch.float16: "F16", torch.float32: "F32", torch.int8: "I8"}
HALF = (2.0**-6, 2.0**10)  # largest entries that float16 keeps well without a scale

Table = dict[str, dict[str, tuple[int, ...]]]
"""Layer to its tensors' shapes."""


@dataclass(frozen=True)
class Written:
    """What writing did: `path`, `size` in bytes, `error` of the layers (relative, Frobenius)."""

    path: Path
    size: int
    error: float


def write_adaptation(
    path: str | Path, adaptation: TrainedAdaptation, int8: bool = False
) -> Written:
    """Write one adaptation, atomically.

    Args:
        path: file to write, ending in ``.safetensors``; its folder is made when missing.
        adaptation: what was trained.
        int8: keep the layers' numbers as 8-bit integers with a scale for each layer: half the size.

    Returns:
        Path, size, and the error that rounding made: |stored - exact| / |exact| over all layers.

    Raises:
        CheckpointError: the ending is wrong, a value is too large for float16, or the disk is full.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise CheckpointError(f"A concept or style file must end in .safetensors, got {path.name}.")
    try:
        method(adaptation.method).check(adaptation)
    except (LayoutError, ConfigError) as refusal:
        raise CheckpointError(f"{adaptation.title} was not saved: {refusal}") from refusal
    table = {
        layer: {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        for layer, tensors in adaptation.layers.items()
    }
    stored, scales = _shared_tensors(adaptation)
    if taken := sorted(set(stored) & {*_names(table), *map(_scales, _names(table))}):
        raise CheckpointError(
            f"{adaptation.title} was not saved: two tensors are called {taken[0]}."
        )
    error = exact = 0.0
    for name in _names(table):
        own = [tensors[name] for tensors in adaptation.layers.values() if name in tensors]
        rows = [tensor.detach().cpu().double().flatten() for tensor in own]
        stored |= _packed(name, rows, int8)
        kept = _unpacked(stored, name, [len(row) for row in rows])
        lost = (k.double() - r for k, r in zip(kept, rows, strict=True))
        error += sum(float(row.square().sum()) for row in lost)
        exact += sum(float(row.square().sum()) for row in rows)
    if not all(bool(torch.isfinite(t).all()) for t in stored.values() if t.is_floating_point()):
        raise CheckpointError(
            f"{adaptation.title} was not saved: a value is too large for float16."
        )
    text = json.dumps(_description(adaptation, table, scales), separators=(",", ":"))
    kinds = {name: (KINDS[t.dtype], tuple(t.shape)) for name, t in stored.items()}
    _checked(path, Header(kinds, {METADATA_KEY: text}))  # what is written can be read
    write_atomic({k: t.contiguous() for k, t in stored.items()}, {METADATA_KEY: text}, path)
    return Written(path, path.stat().st_size, math.sqrt(error / max(exact, 1e-30)))


def read_adaptation(path: str | Path) -> TrainedAdaptation:
    """Read one adaptation; strict.

    Returns:
        The adaptation in float32.

    Raises:
        CheckpointError: the file is missing, damaged, no adaptation, of a later format, or of a
            method that is not known here.
    """
    path = Path(path)
    with open_tensors(path, KIND) as file:
        document, table = _checked(path, file.header)
        tensors = file.read_all()
    try:
        return _adaptation(document, table, tensors)
    except (LayoutError, ConfigError) as error:
        raise CheckpointError(f"{path.name}: {error}") from error


def _checked(path: Path, header: Header) -> tuple[dict[str, Any], Table]:
    """Description and table of a file, both checked against its tensors."""
    document = _document(path, header)
    table = _table(path, document)
    _check_tensors(path, header, document, table)
    return document, table


def _adaptation(
    document: Mapping[str, Any], table: Table, tensors: Mapping[str, Tensor]
) -> TrainedAdaptation:
    """The record that checked parts of a file describe."""
    kind = method(document["method"])
    layers: dict[str, dict[str, Tensor]] = {layer: {} for layer in table}
    for name in _names(table):
        own = {layer: shapes[name] for layer, shapes in table.items() if name in shapes}
        rows = _unpacked(tensors, name, [math.prod(shape) for shape in own.values()])
        for (layer, shape), row in zip(own.items(), rows, strict=True):
            layers[layer][name] = row.reshape(shape)
    shared = {
        name: tensors[name].float() * document.get("shared_scales", {}).get(name, 1.0)
        for name in _shared_names(tensors, table)
    }
    word = None
    if document["word"]:
        word = LearnedWord(
            document["word"],
            document["superclass"],
            tuple(tensors[f"embedding.{k}"].float() for k in range(_encoders(tensors))),
            tensors["probe"].float(),
            tuple(document["contexts"]) or TEMPLATES,
        )
    own_tensors = [tensor for tensors in layers.values() for tensor in tensors.values()]
    halves = [t for t in own_tensors if t.numel() > 1] + list(word.embeddings if word else ())
    if any(float(t.abs().max()) > torch.finfo(torch.float16).max for t in halves):
        raise LayoutError("it holds a value too large for float16; it was altered.")
    settings = kind.Config.from_dict(document.get("settings", {}))
    made = TrainedAdaptation(
        kind.name, document["base"], settings, shared, layers, word, document["facts"]
    )
    kind.check(made)
    layout = layout_hash(kind.layer_sizes(made))
    if document.get("layout_hash", layout) != layout:
        raise LayoutError("its layers do not match their own hash; the file was altered.")
    return kind.restored(made)


def _description(
    adaptation: TrainedAdaptation, table: Table, scales: Mapping[str, float]
) -> dict[str, Any]:
    """What the metadata say: enough to rebuild everything from the tensors."""
    word, settings = adaptation.word, adaptation.settings.to_dict()
    plain = word is not None and all(
        layer.endswith(SUFFIX) and [*shapes] == [VECTOR] and len(shapes[VECTOR]) == 1
        for layer, shapes in table.items()
    )
    layers: dict[str, Any] = {
        layer.removesuffix(SUFFIX): shapes[VECTOR][0] for layer, shapes in table.items() if plain
    }
    document = {
        "format": FORMAT,
        "version": 1 if plain else 2,
        "method": adaptation.method,
        "word": word.word if word else "",
        "superclass": word.superclass if word else "",
        "base": adaptation.base,
        "layers": layers or table,
        "facts": dict(adaptation.facts),
        "contexts": [] if word is None or word.contexts == TEMPLATES else list(word.contexts),
        "layout_hash": layout_hash(method(adaptation.method).layer_sizes(adaptation)),
    }
    optional = {"settings": settings, "shared_scales": dict(scales)}
    return document | {name: value for name, value in optional.items() if value}


def _shared_tensors(adaptation: TrainedAdaptation) -> tuple[dict[str, Tensor], dict[str, float]]:
    """What all layers share and the word's own tensors, as float16, and scales to multiply by."""
    stored, scales = {}, {}
    for name, tensor in adaptation.shared.items():
        if name == "probe" or name.startswith("embedding."):
            raise CheckpointError(f"{adaptation.title} was not saved: {name} is a word's tensor.")
        fine, largest = tensor.detach().cpu().float(), float(tensor.abs().max())
        if largest and not HALF[0] <= largest <= HALF[1]:
            scales[name] = largest
            fine = fine / largest
        stored[name] = fine.half()
    if adaptation.word:
        stored["probe"] = adaptation.word.probe.detach().cpu().float()
        for k, embedding in enumerate(adaptation.word.embeddings):
            stored[f"embedding.{k}"] = embedding.detach().cpu().half()
    return stored, scales


def _packed(name: str, rows: Iterable[Tensor], int8: bool) -> dict[str, Tensor]:
    """Vectors as one tensor: float16, or symmetric 8-bit integers with one scale for each.

    Single numbers stay float32: they cost nothing, and may be factors of everything else.
    """
    rows = list(rows)
    if all(len(row) == 1 for row in rows):
        return {name: torch.cat(rows).float()}
    if not int8:
        return {name: torch.cat(rows).half()}
    integers, scales = [], []
    for row in rows:
        scale = (row.float().abs().max() / 127).clamp_min(1e-12)
        integers.append((row.float() / scale).round().to(torch.int8))
        scales.append(scale)
    return {name: torch.cat(integers), _scales(name): torch.stack(scales)}


def _unpacked(tensors: Mapping[str, Tensor], name: str, sizes: list[int]) -> tuple[Tensor, ...]:
    """Vectors of these sizes, float32."""
    values = tensors[name].float()
    if _scales(name) in tensors:
        repeats = torch.tensor(sizes)
        values = values * tensors[_scales(name)].float().repeat_interleave(repeats)
    return values.split(sizes)


def _scales(name: str) -> str:
    """Name of the tensor with the scales of another one."""
    return "scales" if name == VECTOR else f"scales.{name}"


def _names(table: Table) -> list[str]:
    """Names of the layers' tensors, in order of first appearance."""
    return list(dict.fromkeys(name for shapes in table.values() for name in shapes))


def _encoders(names: Iterable[str]) -> int:
    """How many text encoders a file's word has embeddings for."""
    return sum(name.startswith("embedding.") for name in names)


def _shared_names(names: Iterable[str], table: Table) -> list[str]:
    """The tensors of a file that belong to no layer and to no word."""
    packed = _names(table)
    others = {*packed, *map(_scales, packed), "probe"}
    return [name for name in names if name not in others and not name.startswith("embedding.")]


def _document(path: Path, header: Header) -> dict[str, Any]:
    """The description in the metadata, every field checked."""
    text = header.metadata.get(METADATA_KEY)
    if text is None:
        raise CheckpointError(f"{path.name} is a .safetensors file, but holds no concept or style.")
    what = f"{path.name}: its description"
    document: dict[str, Any] = parse_json(text, what, CheckpointError)
    try:
        if document["format"] != FORMAT or document["version"] not in VERSIONS:
            own = f"{described(document['format'])} {described(document['version'])}"
            raise CheckpointError(
                f"{path.name} has format {own}; this version reads {FORMAT} up to {VERSIONS[-1]}. "
                "Update the node pack."
            )
        words = [document[name] for name in ("method", "word", "superclass", "base")]
        facts, contexts = document["facts"], document["contexts"]
        scales, settings = document.get("shared_scales", {}), document.get("settings", {})
        named = 2 if document["version"] == 1 or words[1] else 0  # a word has a super-class too
        sound = (
            all(isinstance(word, str) and len(word) <= 200 for word in words)
            and all([words[0], words[3], *words[1 : 1 + named]])
            and isinstance(facts, dict)
            and isinstance(settings, dict)
            and isinstance(contexts, list)
            and all(isinstance(context, str) for context in contexts)
            and isinstance(scales, dict)
            and all(type(s) in (int, float) and 0 < s < 1e30 for s in scales.values())
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path.name}: its description is damaged ({error}).") from error
    if not sound:
        raise CheckpointError(f"{path.name}: its description makes no sense; it was altered.")
    try:
        method(words[0])
    except ConfigError as error:
        raise CheckpointError(f"{path.name} cannot be used. {error}") from error
    return document


def _table(path: Path, document: Mapping[str, Any]) -> Table:
    """Layers and shapes of the description, checked."""
    layers = document.get("layers")
    table: Table = {}
    if isinstance(layers, dict) and 0 < len(layers) <= LAYERS:
        for name, entry in layers.items():
            first = document["version"] == 1
            layer, shapes = (name + SUFFIX, {VECTOR: [entry]}) if first else (name, entry)
            if not isinstance(shapes, dict) or not 0 < len(shapes) <= MAX_TENSORS:
                break
            if not all(_is_shape(shape) for shape in shapes.values()):
                break
            table[layer] = {tensor: tuple(shape) for tensor, shape in shapes.items()}
    total = sum(math.prod(shape) for shapes in table.values() for shape in shapes.values())
    whole = bool(table) and len(table) == len(layers or ()) and len(_names(table)) <= MAX_TENSORS
    if not whole or total > MAX_VALUES:
        raise CheckpointError(f"{path.name}: its description makes no sense; it was altered.")
    return table


def _is_shape(shape: object) -> bool:
    """True for one to four numbers from 1 to 65,536."""
    return (
        isinstance(shape, list)
        and 1 <= len(shape) <= 4
        and all(type(n) is int and 0 < n <= 2**16 for n in shape)
    )


def _check_tensors(path: Path, header: Header, document: Mapping[str, Any], table: Table) -> None:
    """Compare names, kinds and shapes with the description before anything is read."""
    found = dict(header.tensors)
    if len(found) > 4 * MAX_TENSORS:  # names, their scales, and what is shared
        raise CheckpointError(
            f"{path.name} holds {counted(len(found), 'tensor')}, more than any concept or style."
        )
    packed = _names(table)
    count = _encoders(found)
    expected = {*packed, *_shared_names(found, table)}
    expected |= {_scales(name) for name in packed if found.get(name, ("",))[0] == "I8"}
    if document["word"]:
        expected |= {"probe", *(f"embedding.{k}" for k in range(count))}
    if set(found) != expected or (document["word"] and not 0 < count <= MAX_ENCODERS):
        wrong = sorted(set(found) ^ expected)[:3]
        raise CheckpointError(
            f"{path.name} does not hold the parts of a concept or style: {described(wrong)}."
        )
    fits = True
    for name, (kind, shape) in found.items():
        own = [shapes[name] for shapes in table.values() if name in shapes]
        fits &= 0 not in shape and math.prod(shape) <= MAX_VALUES
        fits &= kind in (("F16", "F32", "BF16", "I8") if own else ("F16", "F32", "BF16"))
        fits &= not own or shape == (sum(math.prod(one) for one in own),)
        rows = found.get(_scales(name))
        fits &= rows is None or not own or rows[1] == (len(own),)
    if not fits:
        raise CheckpointError(f"{path.name}: its tensors do not fit its own description.")
