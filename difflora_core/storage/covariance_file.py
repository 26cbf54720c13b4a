"""Covariance files: C of one pair of text encoders, shared by all concepts trained with it."""

from __future__ import annotations

import json
from pathlib import Path

from ..config import build, parse_json
from ..errors import CheckpointError, ConfigError
from ..text.covariance import Covariance
from .safetensors_io import Header, open_tensors, write_atomic

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
    with open_tensors(path, KIND) as file:
        tokens, ridge = _checked(path, file.header)
        tensors = file.read_all()
    try:
        return Covariance(tensors["matrix"], tokens, ridge, tensors["probe"])
    except ConfigError as error:
        raise CheckpointError(f"{path.name}: {error}") from error


def _checked(path: Path, header: Header) -> tuple[int, float]:
    """Tokens and ridge of the description; the tensors' sizes are checked too."""
    shapes = {name: shape for name, (kind, shape) in header.tensors.items() if kind == "F32"}
    if set(shapes) != {"matrix", "probe"} or len(header.tensors) != 2:
        raise CheckpointError(f"{path.name} is a .safetensors file, but it holds no covariance.")
    matrix, probe = shapes["matrix"], shapes["probe"]
    square = len(matrix) == 2 and matrix[0] == matrix[1] and 0 < matrix[0] <= MAX_DIM
    if not square or len(probe) != 1 or not 0 < probe[0] <= MAX_DIM:
        raise CheckpointError(f"{path.name}: its covariance has impossible sizes.")
    text = header.metadata.get(METADATA_KEY, "{}")
    document = parse_json(text, f"{path.name}: its description", CheckpointError)
    try:
        if document["format"] != FORMAT or document["version"] != FORMAT_VERSION:
            raise CheckpointError(f"{path.name} has another format; update the node pack.")
        tokens, ridge = build(int, document["tokens"], "tokens"), document["ridge"]
        ridge = build(float, ridge, "ridge")
    except (KeyError, TypeError, ConfigError) as error:
        raise CheckpointError(f"{path.name}: its description is damaged ({error}).") from error
    if tokens < 1:
        raise CheckpointError(f"{path.name}: its description is damaged (tokens is {tokens}).")
    return tokens, ridge
