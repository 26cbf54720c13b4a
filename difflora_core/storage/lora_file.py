"""LoRA .safetensors files: the only reader and writer. Nothing in a file is trusted.

The header is checked here, before any tensor is touched, so that every way in which a file can be
wrong has its own sentence. Files never hold face embeddings or the names of reference pictures: the
metadata record has no place for them.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .. import __version__
from ..errors import LoRAFileError
from ..lora.key_report import ReadResult
from ..lora.keys import Names, Naming, from_state_dict, to_state_dict
from ..lora.layout import LoRALayout
from ..lora.weights import LoRAWeights

MAX_HEADER_BYTES = 16 * 2**20  # a LoRA of 10,000 tensors needs about 2 MiB
_ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 1),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
    **dict.fromkeys(("I32", "U32", "F32"), 4),
    **dict.fromkeys(("I64", "U64", "F64"), 8),
}
# base family of a layout: (modelspec.architecture, ss_base_model_version)
_FAMILIES = {
    "sdxl": ("stable-diffusion-xl-v1-base/lora", "sdxl_base_v1-0"),
    "sd15": ("stable-diffusion-v1/lora", "sd_v1"),
}


@dataclass(frozen=True)
class LoRAInfo:
    """What a written LoRA says about itself; every field is optional.

    Args:
        title: shown by model browsers.
        description: one or two sentences.
        license: licence of the result.
        model_hash: digest of the DiffLoRA model that made it.
        seed: seed of the sampled latent.
        steps: sampling steps, 0 for the mean latent.
        guidance_scale: guidance of the sampling.
        gate: face and image weight of the MIF gate, each 0 to 1.
    """

    title: str = "DiffLoRA"
    description: str = "LoRA predicted from reference photos by DiffLoRA."
    license: str = ""
    model_hash: str = ""
    seed: int | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    gate: tuple[float, float] | None = None


@dataclass(frozen=True, eq=False)
class LoRAFile:
    """Raw content of a LoRA file."""

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]


def lora_metadata(weights: LoRAWeights, base: str, info: LoRAInfo | None = None) -> dict[str, str]:
    """Metadata of a LoRA file: modelspec.*, ss_* (kohya) and difflora.* strings.

    Args:
        weights: for rank and alpha; differing values are written as ``Dynamic`` (kohya's word).
        base: base family name of the layout.
        info: what else to say.
    """
    info = info or LoRAInfo()
    architecture, version = _FAMILIES.get(base, (f"{base}/lora", base))
    ranks = {layer.rank for layer in weights.layers.values()}
    alphas = {layer.alpha for layer in weights.layers.values()}
    stated = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": architecture,
        "modelspec.implementation": "https://github.com/kohya-ss/sd-scripts",
        "modelspec.title": info.title,
        "modelspec.description": info.description,
        "modelspec.date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "modelspec.license": info.license,
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(ranks.pop()) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": f"{alphas.pop():g}" if len(alphas) == 1 else "Dynamic",
        "ss_base_model_version": version,
        "difflora.version": __version__,
        "difflora.base": base,
        "difflora.model_hash": info.model_hash,
        "difflora.seed": info.seed,
        "difflora.steps": info.steps,
        "difflora.guidance_scale": info.guidance_scale,
        "difflora.gate": None if info.gate is None else ",".join(f"{g:.4g}" for g in info.gate),
    }
    return {key: str(value) for key, value in stated.items() if value not in (None, "")}


def write_lora_file(
    path: str | Path,
    weights: LoRAWeights,
    layout: LoRALayout,
    info: LoRAInfo | None = None,
    naming: Naming = "kohya_ldm",
    dtype: torch.dtype = torch.float16,
) -> Path:
    """Write one LoRA, atomically: the file is complete or not there.

    Args:
        path: file to write, ending in ``.safetensors``; its folder is made when missing.
        weights: one LoRA that fits the layout.
        layout: names the base model and its layers.
        info: what the metadata says.
        naming: key names, see ``lora.keys.to_state_dict``.
        dtype: of the factors; float16 is what LoRA files usually hold.

    Returns:
        The path.

    Raises:
        LayoutError: when the weights do not fit the layout.
        LoRAFileError: when the ending is wrong, a value does not fit the dtype, or the disk is
            full or read-only.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise LoRAFileError(f"A LoRA file must end in .safetensors, got {path.name}.")
    layout.check(weights)
    state = to_state_dict(weights, naming, layout, dtype)
    metadata = lora_metadata(weights, layout.base, info)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(".part", f".{path.stem}", path.parent)
        os.close(handle)
        save_file(state, temporary, metadata=metadata)
        os.chmod(temporary, 0o644)  # safetensors and mkstemp leave 0600; other users share folders
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        raise LoRAFileError(f"The LoRA could not be written to {path}: {error}.") from error
    return path


def read_lora_file(path: str | Path) -> LoRAFile:
    """Tensors and metadata of a LoRA file after a full check of its header.

    Raises:
        LoRAFileError: when the file is missing, truncated, not safetensors, or inconsistent.
    """
    path = Path(path)
    metadata = _checked_header(path)
    try:
        return LoRAFile(load_file(path), metadata)
    except (OSError, SafetensorError) as error:
        raise LoRAFileError(f"{path.name} cannot be read: {error}.") from error


def load_lora(path: str | Path, names: Names, rank: int | None = None) -> ReadResult:
    """Weights of a LoRA file in canonical names, with a report.

    Args:
        path: a .safetensors file of any known key family.
        names: layout or name map, see ``lora.keys.from_state_dict``.
        rank: rank for LoKr, LoHa and whole weight changes.

    Raises:
        LoRAFileError: when the file is damaged or not a readable LoRA; the message names it.
        LayoutError: when the LoRA is for another base model.
    """
    file = read_lora_file(path)
    try:
        return from_state_dict(file.tensors, names, rank, file.metadata)
    except LoRAFileError as error:
        raise LoRAFileError(f"{Path(path).name}: {error}") from error


def _checked_header(path: Path) -> dict[str, str]:
    """Metadata of a safetensors file whose header is consistent with the file."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            sound = len(start) == 8 and 2 <= length <= min(size - 8, MAX_HEADER_BYTES)
            text = file.read(length) if sound else b""
    except FileNotFoundError as error:
        raise LoRAFileError(f"There is no LoRA file {path}.") from error
    except OSError as error:
        raise LoRAFileError(f"{path} cannot be opened: {error.strerror}.") from error
    if not sound:
        raise LoRAFileError(f"{path.name}: {_why_not(start, length, size)}")
    try:
        header = json.loads(text, object_pairs_hook=_no_repeats)
    except (ValueError, RecursionError) as error:
        raise LoRAFileError(f"{path.name}: the header is damaged. Download it again.") from error
    problem = _problem(header, size - 8 - length)
    if problem:
        raise LoRAFileError(f"{path.name}: {problem} The file is damaged; download it again.")
    metadata: dict[str, str] = header.get("__metadata__") or {}
    return metadata


def _why_not(start: bytes, length: int, size: int) -> str:
    """Sentence for a file that does not begin like safetensors."""
    if start[:4] == b"PK\x03\x04" or (start[:1] == b"\x80" and length > MAX_HEADER_BYTES):
        return (
            "this is a pickle (.pt, .ckpt) with another name. Pickles can run code and are not "
            "read; convert it to safetensors in a program that you trust."
        )
    if size < 8 or start[:1] in (b"<", b"{") or length < 2:
        return "this is not a safetensors file (or the download was cut short)."
    if length > MAX_HEADER_BYTES:
        return f"not a safetensors file: it claims a header of {length} bytes."
    return f"the file is truncated: a header of {length} bytes in a file of {size} bytes."


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """JSON object whose keys are unique."""
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("repeated key")
    return result


def _problem(header: object, data_bytes: int) -> str | None:
    """What is wrong with a parsed header, None when it describes the data exactly."""
    if not isinstance(header, dict):
        return "the header is not a table of tensors."
    metadata = header.get("__metadata__") or {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        return "the metadata is not a table of texts."
    spans = []
    for key, entry in header.items():
        if key == "__metadata__":
            continue
        span = _span(entry)
        if span is None:
            return f"the entry of tensor {key[:80]} makes no sense."
        spans.append((*span, key))
    position = 0
    for begin, end, key in sorted(spans):
        if begin != position:
            return f"tensor {key[:80]} overlaps another one or leaves a gap."
        position = end
    if position != data_bytes:
        return f"the tensors need {position} bytes, but {data_bytes} are there."
    return None


def _span(entry: object) -> tuple[int, int] | None:
    """Byte range of a header entry, None when dtype, shape and range do not agree."""
    if not isinstance(entry, dict):
        return None
    item, shape, span = (entry.get(k) for k in ("dtype", "shape", "data_offsets"))
    for numbers in (shape, span):
        if not isinstance(numbers, list) or not all(type(n) is int and n >= 0 for n in numbers):
            return None
    if item not in _ITEM_BYTES or not isinstance(span, list) or len(span) != 2:
        return None
    begin, end = span
    fits = isinstance(shape, list) and end - begin == math.prod(shape) * _ITEM_BYTES[item]
    return (begin, end) if fits else None
