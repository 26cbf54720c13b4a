"""The covariance of a CLIP: read from its file, or built with progress and written."""

from dataclasses import dataclass
from pathlib import Path

import torch
from comfy.sd import CLIP
from torch import Tensor

from ...difflora_core.storage.covariance_file import read_covariance, write_covariance
from ...difflora_core.text.captions import WORLDS, captions
from ...difflora_core.text.covariance import Covariance, build_covariance
from ...difflora_core.text.encoders import check_probe, text_probe
from .models import progress
from .text import ComfyText

CAPTION_WORLDS = tuple(WORLDS)


@dataclass(frozen=True)
class CovarianceRequest:
    """Which captions, how many, and whether a file that is there is built again."""

    captions: str
    count: int
    ridge: float
    rebuild: bool


def covariance_for(clip: CLIP, path: Path, request: CovarianceRequest) -> Covariance:
    """C of a CLIP: read from its file, or built with progress and written.

    Raises:
        ConfigError: the file there belongs to another CLIP, or C cannot be inverted.
    """
    text = ComfyText(clip)
    with torch.no_grad():
        if path.exists() and not request.rebuild:
            found = read_covariance(path)
            check_probe(
                Tensor() if found.probe is None else found.probe,
                text_probe(text),
                f"The covariance file {path.name}",
            )
            return found
        covariance = build_covariance(
            text, captions(request.count, request.captions), request.ridge, progress(request.count)
        )
    write_covariance(path, covariance)
    return read_covariance(path)  # as the next run will find it, to the last digit
