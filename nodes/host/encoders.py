"""The host's encoders as the library's: CLIP vision, face analysis, both on somebody's photos."""

from collections.abc import Sequence
from typing import Any

from comfy.clip_vision import ClipVisionModel
from torch import Tensor

from ...difflora_core.errors import EncoderError, counted
from ...difflora_core.vision.face_choice import FaceOptions
from ...difflora_core.vision.face_encoder import DetectedFace, FaceEncoder, InsightFaceEncoder
from ...difflora_core.vision.features import ExtractedFeatures, extract_features
from ...difflora_core.vision.image_encoder import ImageEncoder
from ...difflora_core.vision.no_encoder import NoFaceEncoder, NoImageEncoder
from . import models

WHAT_THEN = {"image_only": "Used by the look alone."}
LEFT_OUT = "Left out."
"""What becomes of a photo without a face, by policy."""
NO_FACES = "No face analysis is connected: only CLIP vision looks at the photos."
NO_LOOK = "No CLIP vision is connected: only the face counts."


class ComfyImageEncoder:
    """ImageEncoder over ComfyUI's CLIP_VISION."""

    def __init__(self, clip_vision: ClipVisionModel) -> None:
        if not callable(getattr(clip_vision, "encode_image", None)):
            raise EncoderError(
                f"A {type(clip_vision).__name__} is not a CLIP vision. Connect Load CLIP Vision."
            )
        self.clip_vision = clip_vision

    @property
    def image_size(self) -> int:
        """Side in pixels of the square that the network sees."""
        return int(self.clip_vision.image_size)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures (N, H, W, 3) in [0, 1] to embeddings (N, Di) and token states (N, L, Dt)."""
        output = self.clip_vision.encode_image(images)
        return output.image_embeds.float().cpu(), output.penultimate_hidden_states.float().cpu()


class _Watched:
    """Encoders that move ComfyUI's progress bar with every picture, and stop when the user asks."""

    def __init__(self, faces: FaceEncoder, pictures: ImageEncoder, total: int) -> None:
        self.faces, self.pictures = faces, pictures
        self.done, self.total, self.step = 0, total, models.progress(total)

    @property
    def embedding_dim(self) -> int:
        """Of the face features."""
        return self.faces.embedding_dim

    @property
    def recogniser(self) -> str:
        """File name of the face recogniser."""
        return str(getattr(self.faces, "recogniser", ""))

    @property
    def image_size(self) -> int:
        """Of CLIP vision."""
        return self.pictures.image_size

    def detect(self, image: Tensor) -> list[DetectedFace]:
        """The faces of a picture."""
        self._count()
        return self.faces.detect(image)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """What CLIP vision sees in a picture."""
        self._count()
        return self.pictures.encode(images)

    def _count(self) -> None:
        self.done += 1
        self.step(self.done, self.total)


def watched_faces(face_analysis: Any, count: int) -> FaceEncoder:
    """A face analysis that shows its progress over so many pictures."""
    return _Watched(InsightFaceEncoder.wrap(face_analysis), NoImageEncoder(), count)


def read_photos(
    node: Any,
    images: Tensor,
    clip_vision: ClipVisionModel,
    face_analysis: Any,
    mask: Tensor | None,
    options: FaceOptions,
    shares: Sequence[float] = (),
) -> ExtractedFeatures:
    """Features of photos with whichever encoders are connected; the node shows what it found.

    Args:
        node: the running node.
        images: (N, H, W, 3) in [0, 1].
        clip_vision: of ComfyUI, or None.
        face_analysis: of insightface, or None.
        mask: (N, H, W), whom to take; None leaves it to the options.
        options: which faces count.
        shares: how much each photo counts, if not all the same; one of 0 may lack a face.

    Raises:
        EncoderError: neither is connected, or one of them is something else.
        NoFaceError, ImageError: see extract_features.
    """
    if clip_vision is None and face_analysis is None:
        raise EncoderError(
            "Nothing looks at the photos: connect a CLIP vision, a face analysis, or both."
        )
    faces: FaceEncoder = NoFaceEncoder()
    pictures: ImageEncoder = NoImageEncoder()
    if face_analysis is not None:
        faces = InsightFaceEncoder.wrap(face_analysis)
    else:
        options = FaceOptions(on_missing="image_only", image_region=options.image_region)
    if clip_vision is not None:
        pictures = ComfyImageEncoder(clip_vision)
    watched = _Watched(faces, pictures, 2 * len(images))
    spare = [number for number, share in enumerate(shares) if share == 0]
    found = extract_features(images, watched, watched, options, mask, spare)
    what_then = WHAT_THEN.get(options.on_missing, LEFT_OUT)
    then = [*found.notes, what_then] if found.notes else []
    if face_analysis is not None:
        with_face = len(images) - len(found.missing)
        then = [f"A face in {with_face} of {counted(len(images), 'photo')}.", *then]
    else:
        then = [NO_FACES]
    models.show_text(node, " ".join([*then, *([] if clip_vision is not None else [NO_LOOK])]))
    return found
