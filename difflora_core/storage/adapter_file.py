"""Concept files: one small .safetensors for each concept. Nothing in a file is trusted.

Values of all layers lie in one tensor, in the order of the table in the metadata, as float16 or as
8-bit integers with one scale per layer. The super-class is kept as a word: keys are recomputed from
the base model, and C^-1 stays with the text encoders. File names of pictures are never stored.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CheckpointError, ConfigError, LayoutError
from ..text.new_words import METHODS, TEMPLATES, Concept
from .safetensors_io import Header, read_header, write_atomic

FORMAT = "difflora-concept"
FORMAT_VERSION = 1
METADATA_KEY = "difflora_concept"
KIND = "concept file"
SUFFIX = ".attn2.to_v"
MAX_LAYERS = 4096
MAX_VALUES = 2**24
MAX_ENCODERS = 8


@dataclass(frozen=True)
class Written:
    """What writing did: `path`, `size` in bytes, `error` of the values (relative, Frobenius)."""

    path: Path
    size: int
    error: float


def write_concept(path: str | Path, concept: Concept, int8: bool = False) -> Written:
    """Write one concept, atomically.

    Args:
        path: file to write, ending in ``.safetensors``; its folder is made when missing.
        concept: the concept.
        int8: keep values as 8-bit integers with a scale for each layer: half the size.

    Returns:
        Path, size, and the error that rounding made: |stored - exact| / |exact| over all values.

    Raises:
        CheckpointError: the ending is wrong, a value is too large for float16, or the disk is full.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise CheckpointError(f"A concept file must end in .safetensors, got {path.name}.")
    exact = torch.cat([value.detach().cpu().double() for value in concept.values.values()])
    tensors = {
        "direction": concept.direction,
        # the largest entry 1 keeps float16 exact enough; reading scales it back
        "covector": concept.covector / concept.covector.abs().max(),
        "probe": concept.probe.float(),
        **{f"embedding.{k}": e for k, e in enumerate(concept.embeddings)},
    }
    tensors = {k: t.detach().cpu() for k, t in tensors.items()}
    stored = {k: t if k == "probe" else t.half() for k, t in tensors.items()}
    if int8:
        stored |= _quantised(concept.values)
    else:
        stored["values"] = exact.half()
    if not all(bool(torch.isfinite(t).all()) for t in stored.values() if t.is_floating_point()):
        raise CheckpointError(f"{concept.word} was not saved: a value is too large for float16.")
    document = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "method": concept.method,
        "word": concept.word,
        "superclass": concept.superclass,
        "base": concept.base,
        "layers": {n.removesuffix(SUFFIX): len(v) for n, v in concept.values.items()},
        "facts": dict(concept.facts),
        "contexts": [] if concept.contexts == TEMPLATES else list(concept.contexts),
    }
    text = json.dumps(document, separators=(",", ":"))
    write_atomic({k: t.contiguous() for k, t in stored.items()}, {METADATA_KEY: text}, path)
    sizes = [len(value) for value in concept.values.values()]
    kept = _values(stored, sizes).double()
    error = float((kept - exact).norm() / exact.norm().clamp_min(1e-30))
    return Written(path, path.stat().st_size, error)


def read_concept(path: str | Path) -> Concept:
    """Read one concept; strict.

    Returns:
        The concept in float32.

    Raises:
        CheckpointError: the file is missing, damaged, or no concept.
    """
    path = Path(path)
    header = read_header(path, KIND, CheckpointError)
    document = _document(path, header)
    sizes = list(document["layers"].values())
    _check_tensors(path, header, sizes)
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path.name} cannot be read: {error}.") from error
    values = _values(tensors, sizes).split(sizes)
    direction, covector = tensors["direction"].float(), tensors["covector"].float()
    product = float((direction.double() * covector.double()).sum())
    if not abs(product) > 1e-12:
        raise CheckpointError(f"{path.name}: its direction and covector do not belong together.")
    count = sum(name.startswith("embedding.") for name in tensors)
    try:
        return Concept(
            method=document["method"],
            word=document["word"],
            superclass=document["superclass"],
            base=document["base"],
            embeddings=tuple(tensors[f"embedding.{k}"].float() for k in range(count)),
            direction=direction,
            covector=covector / product,
            values=dict(zip(_layer_names(document["layers"]), values, strict=True)),
            probe=tensors["probe"].float(),
            contexts=tuple(document["contexts"]) or TEMPLATES,
            facts=document["facts"],
        )
    except (LayoutError, ConfigError) as error:
        raise CheckpointError(f"{path.name}: {error}") from error


def _layer_names(layers: Mapping[str, int]) -> list[str]:
    """Full layer names of the table."""
    return [name + SUFFIX for name in layers]


def _quantised(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Symmetric 8-bit integers with one scale per layer."""
    integers, scales = [], []
    for value in values.values():
        fine = value.detach().cpu().float()
        scale = (fine.abs().max() / 127).clamp_min(1e-12)
        integers.append((fine / scale).round().to(torch.int8))
        scales.append(scale)
    return {"values": torch.cat(integers), "scales": torch.stack(scales)}


def _values(tensors: Mapping[str, Tensor], sizes: list[int]) -> Tensor:
    """All values (total,) float32."""
    values = tensors["values"].float()
    if "scales" not in tensors:
        return values
    return values * tensors["scales"].float().repeat_interleave(torch.tensor(sizes))


def _document(path: Path, header: Header) -> dict[str, Any]:
    """The description in the metadata, every field checked."""
    text = header.metadata.get(METADATA_KEY)
    if text is None:
        raise CheckpointError(f"{path.name} is a .safetensors file, but it holds no concept.")
    try:
        document: dict[str, Any] = json.loads(text)
        if document["format"] != FORMAT or document["version"] != FORMAT_VERSION:
            raise CheckpointError(
                f"{path.name} has format {document['format']} {document['version']}; this version "
                f"reads {FORMAT} {FORMAT_VERSION}. Update the node pack."
            )
        words = [document[name] for name in ("method", "word", "superclass", "base")]
        layers, facts, contexts = (document[name] for name in ("layers", "facts", "contexts"))
        sound = (
            all(isinstance(word, str) and 0 < len(word) <= 200 for word in words)
            and words[0] in METHODS
            and isinstance(layers, dict)
            and 0 < len(layers) <= MAX_LAYERS
            and all(type(n) is int and 0 < n <= 2**16 for n in layers.values())
            and sum(layers.values()) <= MAX_VALUES
            and isinstance(facts, dict)
            and isinstance(contexts, list)
            and all(isinstance(context, str) for context in contexts)
        )
    except (ValueError, KeyError, TypeError, RecursionError, AttributeError) as error:
        raise CheckpointError(f"{path.name}: its description is damaged ({error}).") from error
    if not sound:
        raise CheckpointError(f"{path.name}: its description makes no sense; it was altered.")
    return document


def _check_tensors(path: Path, header: Header, sizes: list[int]) -> None:
    """Compare names, kinds and shapes with the description before anything is read."""
    found = dict(header.tensors)
    count = sum(name.startswith("embedding.") for name in found)
    expected = {"direction", "covector", "values", "probe"}
    expected |= {f"embedding.{k}" for k in range(count)}
    integers = found.get("values", ("", ()))[0] == "I8"
    if integers:
        expected.add("scales")
    if set(found) != expected or not 0 < count <= MAX_ENCODERS:
        wrong = sorted(set(found) ^ expected)[:3]
        raise CheckpointError(f"{path.name} does not hold the parts of a concept: {wrong}.")
    shapes = {name: shape for name, (_, shape) in found.items()}
    kinds = {name: kind for name, (kind, _) in found.items() if name != "values" or not integers}
    fits = (
        shapes["values"] == (sum(sizes),)
        and shapes["direction"] == shapes["covector"]
        and all(len(shape) == 1 and 0 < shape[0] <= MAX_VALUES for shape in shapes.values())
        and (not integers or shapes["scales"] == (len(sizes),))
        and all(kind in ("F16", "F32", "BF16") for kind in kinds.values())
    )
    if not fits:
        raise CheckpointError(f"{path.name}: its tensors do not fit its own description.")
