"""DiffLoRA checkpoints: one .safetensors file per model, everything needed to rebuild it inside.

The file's metadata holds one JSON document: format version, base family, configuration (with the
sizes of the encoders), LoRA layout and its hash. Reading is strict and never trusts the file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config import parse_json
from ..errors import CheckpointError, ConfigError, LayoutError, counted, described, shown
from ..lora.layout import LoRALayout
from ..models.difflora import DiffLoRAConfig, DiffLoRAModel
from ..models.mif import SOURCES
from .safetensors_io import TensorFile, open_tensors, write_atomic

FORMAT = "difflora"
FORMAT_VERSION = 1
METADATA_KEY = "difflora"
KIND = "DiffLoRA model"
STORAGE_TYPES = (torch.float32, torch.float16, torch.bfloat16)
# Statistics and the shared factors stay exact: they are small and everything is measured by them.
EXACT_PREFIXES = (
    *("latent_mean", "latent_scale", "lae.mean_", "lae.scale_"),
    *(f"mif.{source}_{what}" for source in SOURCES for what in ("mean", "scale")),
)
BASIS = "lae.decoder.basis."
"""Of the structured decoder, which casts it to the type of the latent."""


def save_model(
    model: DiffLoRAModel,
    path: str | Path,
    dtype: torch.dtype = torch.float32,
    source: Mapping[str, Any] | None = None,
) -> Path:
    """Writes a model as one file, atomically.

    Args:
        model: the model.
        path: file to write; its folder is made when missing.
        dtype: float32, float16 or bfloat16; statistics are always kept in float32.
        source: facts to keep (commit, seed, steps); must be JSON.

    Returns:
        The path.

    Raises:
        CheckpointError: a weight is NaN, infinite or too large for the dtype, or it cannot be
            written.
    """
    if dtype not in STORAGE_TYPES:
        raise CheckpointError(f"Models are stored as float32, float16 or bfloat16, not {dtype}.")
    tensors = {}
    for name, value in model.state_dict().items():
        kind = torch.float32 if name.startswith(EXACT_PREFIXES) else dtype
        tensors[name] = value.detach().to("cpu", kind).contiguous()
        if not bool(torch.isfinite(tensors[name]).all()):
            raise CheckpointError(
                f"The model was not saved: {name} holds values that are not finite as {kind}."
            )
    document = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "base": model.layout.base,
        "config": model.config.to_dict(),
        "layout": asdict(model.layout),
        "layout_hash": model.layout.hash,
        "source": dict(source or {}),
    }
    return write_atomic(tensors, {METADATA_KEY: json.dumps(document, sort_keys=True)}, path)


@dataclass(frozen=True)
class ModelDescription:
    """What a file says of the model in it: `config`, `layout`, and free facts of its making."""

    config: DiffLoRAConfig
    layout: LoRALayout
    source: Mapping[str, Any]


def read_description(path: str | Path) -> ModelDescription:
    """What a file says of its model, without the weights.

    Raises:
        CheckpointError: the file is missing, damaged, or no model.
    """
    path = Path(path)
    with open_tensors(path, KIND) as file:
        config, layout = _parse(path, file.header.metadata)
        document = parse_json(file.header.metadata[METADATA_KEY], path.name, CheckpointError)
    source = document.get("source")
    return ModelDescription(config, layout, source if isinstance(source, dict) else {})


def load_model(
    path: str | Path,
    operations: Any = nn,
    dtype: torch.dtype = torch.float32,
    base: str | None = None,
    as_stored: bool = False,
) -> DiffLoRAModel:
    """Rebuilds a model on the CPU, in evaluation mode.

    Args:
        path: a file that `save_model` wrote.
        operations: namespace of layer classes for the networks.
        dtype: floating type of the loaded weights; statistics stay float32.
        base: base family that is needed (for example `sdxl`); any, unless given.
        as_stored: layers keep the type of the file, which takes half the memory for a file in half
            precision. For `operations` that cast weights when they compute: the results are those
            of `dtype` bit for bit.

    Raises:
        CheckpointError: the file is missing, damaged, for another base, or its tensors do not fit.
    """
    path = Path(path)
    with open_tensors(path, KIND) as file:
        return _load(file, operations, dtype, base, as_stored)


def _load(
    file: TensorFile, operations: Any, dtype: torch.dtype, base: str | None, as_stored: bool
) -> DiffLoRAModel:
    """The model of an open file."""
    path = file.path
    config, layout = _parse(path, file.header.metadata)
    if base is not None and layout.base != base:
        raise CheckpointError(
            f"{shown(path.name)} makes LoRA for {layout.base}, but {base} is loaded: choose a "
            "DiffLoRA model made for this base model."
        )
    try:
        with torch.device("meta"):
            shapes = DiffLoRAModel(config, layout).state_dict()
            model = DiffLoRAModel(config, layout, operations)
    except (RuntimeError, OverflowError, ValueError) as error:
        raise _damaged(path, error) from error
    kept = _cast_when_used(model) if as_stored else frozenset()
    model.load_state_dict(_read_tensors(file, shapes, dtype, kept), strict=True, assign=True)
    model.license = _license(file.header.metadata)
    return model.eval()


def _license(metadata: Mapping[str, str]) -> str:
    """The terms that a file's source names, in words; empty where there are none."""
    source = parse_json(metadata[METADATA_KEY], "the description", CheckpointError).get("source")
    terms = source.get("license", "") if isinstance(source, dict) else ""
    return shown(terms, 500) if isinstance(terms, str) else ""


def _cast_when_used(model: DiffLoRAModel) -> frozenset[str]:
    """The weights that need not have the type of their input: those of layers, and the basis."""
    layers = {
        f"{name}.{own}"
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv1d | nn.ConvTranspose1d)
        for own, _ in layer.named_parameters(recurse=False)
    }
    return frozenset(layers | {n for n, _ in model.named_parameters() if n.startswith(BASIS)})


def _read_tensors(
    file: TensorFile, expected: Mapping[str, Tensor], dtype: torch.dtype, kept: AbstractSet[str]
) -> dict[str, Tensor]:
    """Tensors of the file, checked against the names and shapes the configuration asks for.

    Those in `kept` keep their type, the others get `dtype` or, where they are statistics, float32.
    """
    found, place = file.header.tensors, shown(file.path.name)
    missing, extra = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing or extra:
        raise CheckpointError(
            f"{place} does not fit its own settings: {counted(len(missing), 'tensor')} "
            f"missing {missing[:3]}, {len(extra)} unexpected {described(extra[:3])}. "
            "Download or save it again."
        )
    for name, like in expected.items():
        kind, shape = found[name]
        if kind not in ("F32", "F16", "BF16"):
            raise CheckpointError(f"{place}: {name} is stored as {kind}, not as a float.")
        if shape != tuple(like.shape):
            raise CheckpointError(
                f"{place}: {name} has shape {shape}, but its settings ask for {tuple(like.shape)}."
            )
    tensors = {}
    for name in expected:
        value, exact = file.read(name), name.startswith(EXACT_PREFIXES)
        if exact and "scale" in name and not bool((value > 0).all()):
            raise CheckpointError(f"{place}: {name} must be positive everywhere.")
        tensors[name] = value if name in kept else value.to(torch.float32 if exact else dtype)
        if not bool(torch.isfinite(tensors[name]).all()):
            raise CheckpointError(f"{place}: {name} holds values too large for {dtype}.")
    return tensors


def _parse(path: Path, metadata: Mapping[str, str]) -> tuple[DiffLoRAConfig, LoRALayout]:
    """Configuration and layout from the metadata, every field checked."""
    place, text = shown(path.name), metadata.get(METADATA_KEY)
    if text is None:
        raise CheckpointError(
            f"{place} is a .safetensors file, but no DiffLoRA model: it does not describe one."
        )
    document = parse_json(text, f"{place}: its description", CheckpointError)
    try:
        if document["format"] != FORMAT or document["version"] != FORMAT_VERSION:
            found = f"{described(document['format'])} {described(document['version'])}"
            raise CheckpointError(
                f"{place} has format {found}; this version reads {FORMAT} {FORMAT_VERSION}. "
                "Update the node pack."
            )
        config = DiffLoRAConfig.from_dict(document["config"])
        layout = LoRALayout.from_dict(document["layout"])
        if layout.hash != document["layout_hash"] or layout.base != document["base"]:
            raise CheckpointError(
                f"{place}: the LoRA layout does not match its own hash; the file was altered."
            )
    except (KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, error) from error
    except (ConfigError, LayoutError) as error:
        raise CheckpointError(f"{place} has unusable settings: {error}") from error
    return config, layout


def _damaged(path: Path, error: Exception) -> CheckpointError:
    """One sentence for a file that cannot be read."""
    return CheckpointError(
        f"{shown(path.name)} is damaged and cannot be read ({type(error).__name__}: {error}). "
        "Download or save it again."
    )
