"""What looks at photos: a face analysis and CLIP vision, each from a place on this machine."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from ..errors import ConfigError, EncoderError, shown
from ..models.identity_model import IdentityModel
from ..storage.clip_vision_file import load_clip_vision
from ..storage.file_digest import hashed
from ..vision.face_choice import FaceOptions
from ..vision.face_encoder import FaceEncoder, InsightFaceEncoder
from ..vision.image_encoder import ImageEncoder
from ..vision.no_encoder import NoFaceEncoder, NoImageEncoder


def open_encoders(
    faces: str, clip_vision: str, device: torch.device
) -> tuple[FaceEncoder, ImageEncoder]:
    """Both encoders; one that is not named finds nothing.

    Args:
        faces: folder of an insightface package, or empty.
        clip_vision: folder or file of a CLIP vision, or empty.
        device: where they compute.

    Raises:
        EncoderError: neither is named, or one cannot be loaded.
    """
    if not faces and not clip_vision:
        raise EncoderError("Nothing looks at the photos: name --faces, --clip-vision, or both.")
    face: FaceEncoder = NoFaceEncoder()
    if faces:
        face = InsightFaceEncoder(faces, provider="cuda" if device.type == "cuda" else "cpu")
    image: ImageEncoder = NoImageEncoder()
    if clip_vision:
        image = load_clip_vision(clip_vision, device)
    return face, image


def options_for(model: IdentityModel, given: FaceOptions, faces: bool) -> FaceOptions:
    """Face options as a model saw photos in training, unless something else is asked for.

    Args:
        model: that makes the LoRA.
        given: what is asked for.
        faces: whether anything looks for faces.
    """
    own = given.to_dict()
    if given.image_region == FaceOptions().image_region:
        own["image_region"] = model.image_region
    if not faces:
        own |= {"on_missing": "image_only", "image_region": "crop"}
    return FaceOptions(**own)


def chosen_device(name: str) -> torch.device:
    """Where to compute: "auto" takes a GPU where there is one.

    Raises:
        ConfigError: torch knows no such device, or has none of it.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built for CUDA
        raise ConfigError(f"There is no device {name!r} here: use auto, cpu or cuda.") from error
    return device


def file_digest(path: Path) -> str:
    """SHA-256 of a file, or of the weights of a folder, by which encoders are told apart.

    Raises:
        EncoderError: it cannot be read.
    """
    digest = hashlib.sha256()
    weights = (own for kind in ("safetensors", "onnx") for own in path.glob(f"*.{kind}"))
    files = [path] if path.is_file() else sorted(weights)
    try:
        for file in files:
            digest.update(file.name.encode())
            hashed(file, digest)
    except OSError as error:
        raise EncoderError(f"{shown(str(path), 300)} cannot be read: {error.strerror}.") from error
    return digest.hexdigest()
