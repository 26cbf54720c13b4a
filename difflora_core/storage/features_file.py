"""Feature files: what the encoders saw in photos of a person, to be used again without the photos.

They hold face embeddings, which identify a person: they are written only where somebody asks for
it, and name no photo.
"""

from __future__ import annotations

import json
from pathlib import Path

from ..config import build, parse_json
from ..errors import CheckpointError, ConfigError, EncoderError
from ..vision.features import TENSORS, ImageFeatures
from .safetensors_io import Header, open_tensors, write_atomic

FORMAT = "difflora-features"
FORMAT_VERSION = 1
METADATA_KEY = "difflora_features"
KIND = "feature file"
KINDS = {"face": "F32", "face_found": "BOOL", "image": "F32", "image_tokens": "F16"}
MAX_PHOTOS = 10_000


def write_features(path: str | Path, features: ImageFeatures) -> Path:
    """Write features atomically; the tokens in half precision.

    Raises:
        CheckpointError: the ending is wrong, or the file cannot be written.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise CheckpointError(f"A feature file must end in .safetensors, got {path.name}.")
    document = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "recogniser": features.recogniser,
        "image_region": features.image_region,
    }
    tensors = {name: getattr(features, name).detach().cpu() for name in TENSORS}
    tensors["image_tokens"] = tensors["image_tokens"].clamp(-65504, 65504).half()
    stored = {
        name: (tensor.float() if KINDS[name] == "F32" else tensor).contiguous()
        for name, tensor in tensors.items()
    }
    return write_atomic(stored, {METADATA_KEY: json.dumps(document)}, path)


def read_features(path: str | Path) -> ImageFeatures:
    """Read features; strict.

    Raises:
        CheckpointError: the file is missing, damaged, or holds no features.
    """
    path = Path(path)
    with open_tensors(path, KIND) as file:
        about = _checked(path, file.header)
        tensors = file.read_all()
    try:
        return ImageFeatures(
            tensors["face"],
            tensors["face_found"],
            tensors["image"],
            tensors["image_tokens"].float(),
            *about,
        )
    except EncoderError as error:
        raise CheckpointError(f"{path.name}: {error}") from error


def _checked(path: Path, header: Header) -> tuple[str, str]:
    """Image region and recogniser; names, kinds and the number of photos are checked too."""
    kinds = {name: kind for name, (kind, _) in header.tensors.items()}
    if kinds != KINDS:
        raise CheckpointError(
            f"{path.name} is a .safetensors file, but it holds no identity features."
        )
    shapes = [shape for _, shape in header.tensors.values()]
    if not all(shape and 1 <= shape[0] <= MAX_PHOTOS for shape in shapes):
        raise CheckpointError(f"{path.name}: it holds no photo, or more than {MAX_PHOTOS}.")
    text = header.metadata.get(METADATA_KEY, "{}")
    document = parse_json(text, f"{path.name}: its description", CheckpointError)
    try:
        if document["format"] != FORMAT or document["version"] != FORMAT_VERSION:
            raise CheckpointError(f"{path.name} has another format; update the node pack.")
        region = build(str, document["image_region"], "image_region")
        return region, build(str, document["recogniser"], "recogniser")
    except (KeyError, TypeError, ConfigError) as error:
        raise CheckpointError(f"{path.name}: its description is damaged ({error}).") from error
