"""What looks at photos in the demo world."""

from __future__ import annotations

from ...vision.face_encoder import InsightFaceEncoder
from ...vision.image_encoder import ClipImageEncoder
from .. import paths
from ..networks.clip_vision import load_clip_vision


def demo_encoders() -> tuple[InsightFaceEncoder, ClipImageEncoder]:
    """The shipped face analysis and CLIP vision."""
    return InsightFaceEncoder(paths.FACES), ClipImageEncoder(load_clip_vision(paths.CLIP_VISION)[0])
