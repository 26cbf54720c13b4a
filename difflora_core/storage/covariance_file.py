"""Covariance files: C of one pair of text encoders, shared by all concepts trained with it."""

from __future__ import annotations

import json
from pathlib import Path

from ..errors import CheckpointError, ConfigError
from ..text.covariance import Covariance
from .safetensors_io import read_header, read_tensors, write_atomic

FORMAT = "difflora-covariance"
FORMAT_VERSION = 1
METADATA_KEY = "difflora_covariance"
KIND = "covariance file"
MAX_DIM = 8192


def write_covariance(path: str | Path, covariance: Covariance) -> Path:
    """Write C (float32, without its ridge), atomically.

    Raises:
        CheckpointError: the ending is wrong, the fingerprint is missing, or the disk is full.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise CheckpointError(f"A covariance file must end in .safetensors, got {path.name}.")
    if covariance.probe is None:
        raise CheckpointError("A covariance is stored with the fingerprint of its text encoders.")
    document = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "tokens": covariance.tokens,
        "ridge": covariance.ridge,
    }
    tensors = {"matrix": covariance.matrix.cpu().float(), "probe": covariance.probe.cpu().float()}
    stored = {name: tensor.contiguous() for name, tensor in tensors.items()}
    return write_atomic(stored, {METADATA_KEY: json.dumps(document)}, path)


def read_covariance(path: str | Path) -> Covariance:
    """Read C; strict.

    Raises:
        CheckpointError: the file is missing, damaged, no covariance, or cannot be inverted.
    """
    path = Path(path)
    header = read_header(path, KIND, CheckpointError)
    shapes = {name: shape for name, (kind, shape) in header.tensors.items() if kind == "F32"}
    side = shapes.get("matrix", (0,))[0]
    if set(shapes) != {"matrix", "probe"} or len(header.tensors) != 2:
        raise CheckpointError(f"{path.name} is a .safetensors file, but it holds no covariance.")
    if shapes["matrix"] != (side, side) or not 0 < side <= MAX_DIM or len(shapes["probe"]) != 1:
        raise CheckpointError(f"{path.name}: its covariance has impossible sizes.")
    try:
        document = json.loads(header.metadata[METADATA_KEY])
        if document["format"] != FORMAT or document["version"] != FORMAT_VERSION:
            raise CheckpointError(f"{path.name} has another format; update the node pack.")
        tokens, ridge = int(document["tokens"]), float(document["ridge"])
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError) as error:
        raise CheckpointError(f"{path.name}: its description is damaged ({error}).") from error
    tensors = read_tensors(path)
    try:
        return Covariance(tensors["matrix"], tokens, ridge, tensors["probe"])
    except ConfigError as error:
        raise CheckpointError(f"{path.name}: {error}") from error
