"""DiffLoRA checkpoints: one .safetensors file per model, everything needed to rebuild it inside.

The file's metadata holds one JSON document: format version, base family, configuration (with the
sizes of the encoders), LoRA layout and its hash. Reading is strict and never trusts the file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..errors import CheckpointError, ConfigError, LayoutError
from ..lora.layout import LoRALayout
from ..models.difflora import DiffLoRAConfig, DiffLoRAModel
from ..models.mif import SOURCES
from .safetensors_io import write_atomic

FORMAT = "difflora"
FORMAT_VERSION = 1
METADATA_KEY = "difflora"
MAX_HEADER = 64 * 2**20
MAX_LAYERS = 20_000
STORAGE_TYPES = (torch.float32, torch.float16, torch.bfloat16)
# Statistics and the shared factors stay exact: they are small and everything is measured by them.
EXACT_PREFIXES = (
    *("latent_mean", "latent_scale", "lae.mean_", "lae.scale_"),
    *(f"mif.{source}_{what}" for source in SOURCES for what in ("mean", "scale")),
)


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint says about itself.

    Args:
        config: configuration of the model.
        layout: LoRA layout it decodes to.
        source: free facts about its making (commit, seed, steps); never needed to load.
    """

    config: DiffLoRAConfig
    layout: LoRALayout
    source: Mapping[str, Any]


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
        "layout": json.loads(model.layout.to_json()),
        "layout_hash": model.layout.hash,
        "source": dict(source or {}),
    }
    return write_atomic(tensors, {METADATA_KEY: json.dumps(document, sort_keys=True)}, path)


def read_info(path: str | Path) -> CheckpointInfo:
    """Reads configuration and layout without the weights.

    Raises:
        CheckpointError: the file is missing, damaged, or no DiffLoRA model.
    """
    path = Path(path)
    _check_header(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise _damaged(path, error) from error
    return _parse(path, metadata)


def load_model(
    path: str | Path,
    operations: Any = nn,
    dtype: torch.dtype = torch.float32,
    base: str | None = None,
) -> DiffLoRAModel:
    """Rebuilds a model on the CPU, in evaluation mode.

    Args:
        path: a file that `save_model` wrote.
        operations: namespace of layer classes for the networks.
        dtype: floating type of the loaded weights; statistics stay float32.
        base: base family that is needed (for example `sdxl`); any, unless given.

    Raises:
        CheckpointError: the file is missing, damaged, for another base, or its tensors do not fit.
    """
    path = Path(path)
    info = read_info(path)
    if base is not None and info.layout.base != base:
        raise CheckpointError(
            f"{path.name} makes LoRA for {info.layout.base}, but {base} is loaded: choose a "
            "DiffLoRA model made for this base model."
        )
    try:
        with torch.device("meta"):
            shapes = DiffLoRAModel(info.config, info.layout).state_dict()
            model = DiffLoRAModel(info.config, info.layout, operations)
    except (RuntimeError, OverflowError, ValueError) as error:
        raise _damaged(path, error) from error
    model.load_state_dict(_read_tensors(path, shapes, dtype), strict=True, assign=True)
    return model.eval()


def _read_tensors(
    path: Path, expected: Mapping[str, Tensor], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Tensors of the file, checked against the names and shapes the configuration asks for."""
    tensors = {}
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            missing, extra = sorted(set(expected) - names), sorted(names - set(expected))
            if missing or extra:
                raise CheckpointError(
                    f"{path.name} does not fit its own settings: {len(missing)} tensors are "
                    f"missing {missing[:3]}, {len(extra)} are unexpected {extra[:3]}. "
                    "Download or save it again."
                )
            for name, like in expected.items():
                view = file.get_slice(name)
                if view.get_dtype() not in ("F32", "F16", "BF16"):
                    raise CheckpointError(
                        f"{path.name}: {name} is stored as {view.get_dtype()}, not as a float."
                    )
                if tuple(view.get_shape()) != tuple(like.shape):
                    raise CheckpointError(
                        f"{path.name}: {name} has shape {tuple(view.get_shape())}, but its "
                        f"settings ask for {tuple(like.shape)}."
                    )
                value = file.get_tensor(name)
                if not bool(torch.isfinite(value).all()):
                    raise CheckpointError(
                        f"{path.name}: {name} holds NaN or infinite values; the training that "
                        "made it failed, use another file."
                    )
                exact = name.startswith(EXACT_PREFIXES)
                if exact and "scale" in name and not bool((value > 0).all()):
                    raise CheckpointError(f"{path.name}: {name} must be positive everywhere.")
                tensors[name] = value.to(torch.float32 if exact else dtype)
    except (OSError, SafetensorError) as error:
        raise _damaged(path, error) from error
    return tensors


def _check_header(path: Path) -> None:
    """Refuses what cannot be a safetensors file before any parser sees it."""
    if not path.is_file():
        raise CheckpointError(f"There is no DiffLoRA model at {path}.")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(9)
    header = int.from_bytes(start[:8], "little")
    if size >= 10 and header <= min(MAX_HEADER, size - 8) and start[8:] == b"{":
        return
    if start[:2] == b"PK" or start[:1] == b"\x80":
        raise CheckpointError(
            f"{path.name} is a pickle file with another name. It could run code, so it is not "
            "opened; use a .safetensors file."
        )
    raise CheckpointError(
        f"{path.name} is no complete .safetensors file ({size} bytes, header of {header}): "
        "it was cut off or is something else. Download it again."
    )


def _parse(path: Path, metadata: Mapping[str, str]) -> CheckpointInfo:
    """Configuration and layout from the metadata, every field checked."""
    text = metadata.get(METADATA_KEY)
    if text is None:
        raise CheckpointError(
            f"{path.name} is a .safetensors file, but no DiffLoRA model: it does not describe one."
        )
    try:
        document = json.loads(text)
        if document["format"] != FORMAT or document["version"] != FORMAT_VERSION:
            raise CheckpointError(
                f"{path.name} has format {document['format']} {document['version']}; this version "
                f"reads {FORMAT} {FORMAT_VERSION}. Update the node pack."
            )
        config = DiffLoRAConfig.from_dict(document["config"])
        if len(document["layout"]["layers"]) > MAX_LAYERS:
            raise CheckpointError(f"{path.name}: the LoRA layout has too many layers.")
        layout = LoRALayout.from_json(json.dumps(document["layout"]))
        sizes = [layout.rank] + [n for s in layout for n in (s.in_features, s.out_features)]
        if not layout.layers or not all(type(n) is int and 0 < n <= 2**20 for n in sizes):
            raise CheckpointError(f"{path.name}: the LoRA layout has impossible sizes.")
        if layout.hash != document["layout_hash"] or layout.base != document["base"]:
            raise CheckpointError(
                f"{path.name}: the LoRA layout does not match its own hash; the file was altered."
            )
        source = document.get("source", {})
    except (ValueError, KeyError, TypeError, RecursionError, AttributeError) as error:
        raise _damaged(path, error) from error
    except (ConfigError, LayoutError) as error:
        raise CheckpointError(f"{path.name} has unusable settings: {error}") from error
    return CheckpointInfo(config, layout, source if isinstance(source, dict) else {})


def _damaged(path: Path, error: Exception) -> CheckpointError:
    """One sentence for a file that cannot be read."""
    return CheckpointError(
        f"{path.name} is damaged and cannot be read ({type(error).__name__}: {error}). "
        "Download or save it again."
    )
