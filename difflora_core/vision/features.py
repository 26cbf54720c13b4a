"""Reference photos to the features that DiffLoRA is conditioned on."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from ..config import Config, check_range
from ..errors import ConfigError, EncoderError, NoFaceError, counted
from .face_choice import (
    FaceOptions,
    choose_faces,
    masks_like,
    missing_notes,
    missing_reason,
    missing_remedy,
)
from .face_cutout import cut_out, landmarks_of, seen_closely
from .face_encoder import DetectedFace, FaceEncoder
from .image_encoder import ImageEncoder, describe_encoder
from .keypoint_picture import keypoint_picture
from .preprocess import (
    ARCFACE_SIZE,
    align_face,
    as_pictures,
    box_mask,
    crop_square,
    resize_square,
    square_around,
)


@dataclass(frozen=True)
class FeatureSizes(Config):
    """Sizes by which encoders differ; a trained model stores those of its own encoders.

    Attributes:
        face: Df, length of a face embedding.
        image: Di, length of an image embedding.
        tokens: L, tokens per picture.
        token_dim: Dt, width of a token.

    Raises:
        ConfigError: a size is out of range.
    """

    face: int
    image: int
    tokens: int
    token_dim: int

    def __post_init__(self) -> None:
        for field in fields(self):
            check_range("Features", field.name, getattr(self, field.name), 0, 65_536)

    def check(self, found: FeatureSizes) -> None:
        """Refuse features of other encoders than the ones a model was trained with.

        Args:
            found: Sizes of the features at hand; self holds the expected ones.

        Raises:
            EncoderError: Names both encoders.
        """
        if found.face != self.face:
            raise EncoderError(
                f"Wrong face recogniser: it gives {counted(found.face, 'number')} per face, but "
                f"this DiffLoRA model was trained with {self.face}. Load the insightface package "
                "it names."
            )
        if found != self:
            ours = describe_encoder(self.image, self.tokens, self.token_dim)
            theirs = describe_encoder(found.image, found.tokens, found.token_dim)
            raise EncoderError(
                f"Wrong CLIP vision: this is {theirs}, but this DiffLoRA model was trained with "
                f"{ours}. Load that one in Load CLIP Vision."
            )


TENSORS = ("face", "face_found", "image", "image_tokens")
"""Parts of ImageFeatures with a row for each photo."""
SEVERAL = "several regions"


@dataclass(frozen=True)
class ImageFeatures:
    """Features of N photos of one person; pooling over photos is the MIF network's task.

    Attributes:
        face: (N, Df) float32, unit length; zeros where no face was found.
        face_found: (N,) bool.
        image: (N, Di) float32 CLIP embeddings as projected, not normalised.
        image_tokens: (N, L, Dt) float32 penultimate CLIP states, class token first.
        image_region: what CLIP vision saw, one of `face_choice.IMAGE_REGIONS`; SEVERAL where it saw
            different ones, empty where nobody knows.
        recogniser: file name of the face recogniser, empty where nobody knows: packages of equal
            width describe faces in different ways.
    """

    face: Tensor
    face_found: Tensor
    image: Tensor
    image_tokens: Tensor
    image_region: str = ""
    recogniser: str = ""

    def __post_init__(self) -> None:
        shapes = {name: tuple(getattr(self, name).shape) for name in TENSORS}
        dims = tuple(len(shape) for shape in shapes.values())
        if dims != (2, 1, 2, 3) or len({shape[0] for shape in shapes.values()}) != 1:
            raise EncoderError(
                f"The image features do not fit together: {shapes}; expected face (N, Df), "
                "face_found (N,), image (N, Di), image_tokens (N, L, Dt)."
            )
        if self.face_found.dtype != torch.bool:
            raise EncoderError(f"face_found must be true or false, not {self.face_found.dtype}.")

    def __len__(self) -> int:
        return len(self.face)

    @property
    def sizes(self) -> FeatureSizes:
        """Sizes of the encoders that made these features."""
        return FeatureSizes(self.face.shape[1], self.image.shape[1], *self.image_tokens.shape[1:])

    def select(self, photos: int | Sequence[int] | Tensor) -> ImageFeatures:
        """Features of one photo (a number keeps N=1) or of several (n,), in the order asked for."""
        rows = torch.as_tensor([photos] if isinstance(photos, int) else photos)
        return replace(self, **{name: getattr(self, name)[rows] for name in TENSORS})

    def to(
        self, device: str | torch.device | None = None, dtype: torch.dtype | None = None
    ) -> ImageFeatures:
        """Move everything to a device, and the floating parts to a dtype."""
        return ImageFeatures(
            self.face.to(device=device, dtype=dtype),
            self.face_found.to(device=device),
            self.image.to(device=device, dtype=dtype),
            self.image_tokens.to(device=device, dtype=dtype),
            self.image_region,
            self.recogniser,
        )

    @staticmethod
    def cat(parts: Sequence[ImageFeatures]) -> ImageFeatures:
        """Photos of several records as one record.

        Raises:
            EncoderError: The parts come from different encoders, or there are none.
        """
        if not parts:
            raise EncoderError("There are no image features to join.")
        for part in parts[1:]:
            parts[0].sizes.check(part.sizes)
        names = {part.recogniser for part in parts if part.recogniser}
        if len(names) > 1:
            raise EncoderError(
                f"These photos were read by different face recognisers ({', '.join(sorted(names))})"
                ", whose numbers cannot be compared. Connect one face analysis to all of them."
            )
        regions = {part.image_region for part in parts}
        region = regions.pop() if len(regions) == 1 else SEVERAL
        return ImageFeatures(
            torch.cat([part.face for part in parts]),
            torch.cat([part.face_found for part in parts]),
            torch.cat([part.image for part in parts]),
            torch.cat([part.image_tokens for part in parts]),
            region,
            *names,
        )


@dataclass(frozen=True)
class ExtractedFeatures:
    """Features, and what they were made from; N counts the faces (or faceless photos) kept.

    Attributes:
        features: ImageFeatures of the N rows.
        photos: Which of the images given each row comes from, ascending.
        crops: (N, S, S, 3) exactly what CLIP vision saw.
        aligned: (N, 112, 112, 3) the face as the recogniser sees it; black without a face.
        boxes: (N, 4) float32 x1, y1, x2, y2 in pixels of the photo; NaN without a face.
        keypoints: (N, 5, 2) float32 eyes, nose tip, mouth corners; NaN without a face.
        scores: (N,) float32 detector's confidence; 0 without a face.
        face_masks: N masks (H, W), 1 inside the face box.
        notes: What was skipped or done without a face, one sentence for each reason.
        missing: Numbers, from 1, of the photos without the face that is meant.
    """

    features: ImageFeatures
    photos: tuple[int, ...]
    crops: Tensor
    aligned: Tensor
    boxes: Tensor
    keypoints: Tensor
    scores: Tensor
    face_masks: tuple[Tensor, ...]
    notes: tuple[str, ...]
    missing: tuple[int, ...] = ()

    def of_photos(self, values: Sequence[float], count: int) -> list[float]:
        """One value for each row, of one for each of the `count` photos given; none of none.

        Raises:
            ConfigError: there are not as many values as photos.
        """
        if values and len(values) != count:
            raise ConfigError(
                f"There are {len(values)} photo weights for {counted(count, 'photo')}; write one "
                "a photo, with a point for decimals: 1.5."
            )
        return [values[photo] for photo in self.photos] if values else []

    def keypoint_pictures(self) -> list[Tensor]:
        """For each photo kept, its faces' points as face ControlNets expect them: (H, W, 3)."""
        pictures = []
        for photo in dict.fromkeys(self.photos):
            rows = [row for row, owner in enumerate(self.photos) if owner == photo]
            pictures.append(keypoint_picture(self.keypoints[rows], *self.face_masks[rows[0]].shape))
        return pictures


def extract_features(
    images: Tensor | Sequence[Tensor],
    face_encoder: FaceEncoder,
    image_encoder: ImageEncoder,
    options: FaceOptions | None = None,
    masks: Tensor | Sequence[Tensor] | None = None,
    spare: Collection[int] = (),
) -> ExtractedFeatures:
    """Find the person in every photo and describe face and look.

    Photos do not influence each other: their order changes nothing but the order of the rows.

    Args:
        images: (N, H, W, 3) in [0, 1], or a list of pictures of different sizes.
        face_encoder: Finds and recognises faces.
        image_encoder: CLIP vision.
        options: Face choice, policy for missing faces, image region.
        masks: (N, H, W) or a list of (H, W), see `choose_face`; other sizes are scaled.
        spare: Numbers of photos, from 0, that may lack a face under the policy "error", since they
            do not count; they are left out.

    Returns:
        ExtractedFeatures.

    Raises:
        ImageError: A picture cannot be used (NaN pixels, wrong shape), or there is none.
        NoFaceError: No face, under the policy "error"; or "skip" left no photo at all.
        EncoderError: the region needs the outline of the face, and the face analysis gives none.
    """
    options = options or FaceOptions()
    pictures = as_pictures(images)
    all_masks = masks_like(masks, pictures)
    rows: list[tuple[int, DetectedFace | None]] = []
    missing: dict[int, str] = {}
    for number, (picture, mask) in enumerate(zip(pictures, all_masks, strict=True)):
        count, chosen = _find(face_encoder, picture, options, mask)
        rows.extend((number, face) for face in chosen or (None,))
        if not chosen:
            missing[number + 1] = missing_reason(count, options, mask)
    notes = missing_notes(missing)
    everywhere = len(missing) == len(pictures)
    needed = {k: why for k, why in missing.items() if everywhere or k - 1 not in spare}
    _check_missing(needed, everywhere, options)
    left = [row for row in rows if row[1] or options.on_missing == "image_only"]
    photos, faces = zip(*left, strict=True)
    own = [pictures[i] for i in photos]
    usable = _UsablePhotos(photos, own, list(faces), notes, tuple(missing))
    return _describe(usable, face_encoder, image_encoder, options)


def _check_missing(missing: Mapping[int, str], everywhere: bool, options: FaceOptions) -> None:
    """Refuses photos without the face that is meant, for their reasons, if asked to."""
    notes = missing_notes(missing)
    if notes and options.on_missing == "error":
        others = "" if everywhere else "skip or "
        raise NoFaceError(
            f"{' '.join(notes)} {missing_remedy(missing)}, or set on_missing_face to "
            f"{others}image_only."
        )
    if everywhere and options.on_missing == "skip":
        raise NoFaceError(
            f"{' '.join(notes)} No photo is left after skipping. {missing_remedy(missing)}, or set "
            "on_missing_face to image_only."
        )


def _find(
    face_encoder: FaceEncoder, picture: Tensor, options: FaceOptions, mask: Tensor | None
) -> tuple[int, list[DetectedFace]]:
    """How many faces a picture shows, and those that are meant."""
    found = face_encoder.detect(picture)
    chosen = choose_faces(found, options, mask)
    if options.image_region == "face_on_grey":
        chosen = [seen_closely(face_encoder, picture, face) for face in chosen]
    return len(found), chosen


@dataclass(frozen=True)
class _UsablePhotos:
    """The photos that go on, once for each face chosen in them."""

    photos: tuple[int, ...]
    pictures: list[Tensor]
    faces: list[DetectedFace | None]
    notes: tuple[str, ...]
    missing: tuple[int, ...]


def _describe(
    usable: _UsablePhotos,
    face_encoder: FaceEncoder,
    image_encoder: ImageEncoder,
    options: FaceOptions,
) -> ExtractedFeatures:
    """Crop, encode and collect the usable photos."""
    face_dim = face_encoder.embedding_dim
    blank = DetectedFace(
        torch.full((4,), torch.nan), 0.0, torch.full((5, 2), torch.nan), torch.zeros(face_dim)
    )
    shown = [face or blank for face in usable.faces]
    pairs = list(zip(usable.pictures, shown, strict=True))
    crops = [_image_region(*pair, options, image_encoder.image_size) for pair in pairs]
    # One photo at a time: a matrix product may round differently in another batch size.
    encoded = [image_encoder.encode(crop[None]) for crop in crops]
    features = ImageFeatures(
        face=torch.stack([F.normalize(face.embedding, dim=0) for face in shown]),
        face_found=torch.tensor([face is not None for face in usable.faces]),
        image=torch.cat([image for image, _ in encoded]).float(),
        image_tokens=torch.cat([tokens for _, tokens in encoded]).float(),
        image_region=options.image_region,
        recogniser=getattr(face_encoder, "recogniser", ""),
    )
    return ExtractedFeatures(
        features=features,
        photos=usable.photos,
        crops=torch.stack(crops),
        aligned=torch.stack([_aligned(*pair) for pair in pairs]),
        boxes=torch.stack([face.box for face in shown]),
        keypoints=torch.stack([face.keypoints for face in shown]),
        scores=torch.tensor([face.score for face in shown]),
        face_masks=tuple(box_mask(face.box, *picture.shape[:2]) for picture, face in pairs),
        notes=usable.notes,
        missing=usable.missing,
    )


def _image_region(picture: Tensor, face: DetectedFace, options: FaceOptions, size: int) -> Tensor:
    """(size, size, 3): the square around the face, the middle of the picture, or the face alone."""
    if options.image_region == "picture" or _is_blank(face):
        return resize_square(picture, size)
    if options.image_region == "face_on_grey":
        return resize_square(cut_out(picture, landmarks_of(face)), size)
    turns = face.quarter_turns
    face, picture = face.turned(turns, *picture.shape[:2]), picture.rot90(turns)
    height, width = picture.shape[:2]
    square = square_around(face.box, height, width, options.region_factor)
    return resize_square(crop_square(picture, *square), size)


def _aligned(picture: Tensor, face: DetectedFace) -> Tensor:
    """(112, 112, 3) aligned face, black for the blank face."""
    if _is_blank(face):
        return picture.new_zeros(ARCFACE_SIZE, ARCFACE_SIZE, 3)
    return align_face(picture, face.keypoints)


def _is_blank(face: DetectedFace) -> bool:
    """True for the stand-in of a missing face."""
    return bool(torch.isnan(face.box).any())
