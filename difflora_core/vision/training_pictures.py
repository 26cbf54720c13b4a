"""Photos as training pictures: cut to a person, and brought to the sizes that a base was made for.

A picture is (H, W, 3) in [0, 1], a mask (H, W) in [0, 1].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor
from torch.nn import functional as F

from ..errors import NoFaceError, counted
from .face_choice import FaceOptions, choose_face, masks_like, missing_note
from .face_encoder import DetectedFace, FaceEncoder
from .preprocess import as_pictures, marks_nothing, square_around

WHOLE, FACE = "whole", "face"
LONGEST = 2.0
"""Longest side over the shorter one of a training picture; the rest of a strip is cut off."""
ALREADY = 0.8
"""A square around the face that is larger than this share of a photo is the photo."""
SIZE_STEPS = 16
"""Steps of a bucket's sides in the base's own side: 64 pixels of 1024."""
SMALLEST_STEP = 16


@dataclass(frozen=True)
class Cut:
    """What a picture was scaled from and cut out of.

    Attributes:
        original: its height and width before.
        scaled_width: of the whole, scaled picture.
        top, left: of the cut, in pixels of the scaled picture.
    """

    original: tuple[int, int]
    scaled_width: int
    top: int
    left: int


@dataclass(frozen=True, eq=False)
class TrainingPicture:
    """A picture to train on.

    Attributes:
        image: (H, W, 3) in [0, 1].
        number: of the photo that it comes from, counted from 0.
        framing: WHOLE, or FACE for the square around the face.
        mask: (H, W), what counts; None counts all.
        cut: how it was brought to its size; None while it is as it came. A square around a face
            is a picture of its own, as if somebody had cut it out by hand.
    """

    image: Tensor
    number: int
    framing: str = WHOLE
    mask: Tensor | None = None
    cut: Cut | None = None

    def time_ids(self, mirrored: bool = False) -> list[float]:
        """What SDXL is told of it, see `base_model.protocol.TextCondition`; as the trainers of
        diffusers and kohya say it: places are counted in the scaled picture, as it is shown."""
        height, width = self.image.shape[:2]
        cut = self.cut or Cut((height, width), width, 0, 0)
        left = cut.scaled_width - width - cut.left if mirrored else cut.left
        return [float(n) for n in (*cut.original, cut.top, left, height, width)]


def training_pictures(
    images: Tensor | Sequence[Tensor], masks: Tensor | Sequence[Tensor] | None = None
) -> list[TrainingPicture]:
    """Whole photos as training pictures.

    Args:
        images: (N, H, W, 3), or a list of pictures of any sizes.
        masks: (N, H, W), a list of (H, W), or one for all, of any sizes; empty ones mark nothing.

    Raises:
        ImageError: a picture cannot be used, there is none, or there are too few masks.
    """
    pictures = as_pictures(images)
    marks = masks_like(masks, pictures)
    return [
        TrainingPicture(picture, k, mask=_marked(mask))
        for k, (picture, mask) in enumerate(zip(pictures, marks, strict=True))
    ]


def _marked(mask: Tensor | None) -> Tensor | None:
    """A mask; None where it marks nothing."""
    return None if mask is None or marks_nothing(mask) else mask


def framed(
    photos: Sequence[TrainingPicture], faces: FaceEncoder, options: FaceOptions | None = None
) -> tuple[list[TrainingPicture], list[str]]:
    """Each photo whole, and beside it the square around the person's face where it is small there.

    A photo of several people without a mask is left to its square: the others are not to be
    learned.

    Args:
        photos: whole photos; a mask says who is meant.
        faces: finds faces.
        options: which face of several, and what becomes of a photo without one (`on_missing`):
            `image_only` keeps it whole.

    Returns:
        The pictures, photo by photo, and sentences about photos that were not taken as they are.

    Raises:
        NoFaceError: a photo has no such face and `on_missing` is `error`, or none is left.
    """
    options = options or FaceOptions(on_missing="skip")
    pictures: list[TrainingPicture] = []
    notes: list[str] = []
    for photo in photos:
        found = faces.detect(photo.image)
        face = choose_face(found, options, photo.mask)
        if face is None:
            note = missing_note(photo.number + 1, len(found), options, photo.mask)
            if options.on_missing == "error":
                raise NoFaceError(f"{note} Take it out, or set on_missing_face to skip.")
            kept = options.on_missing == "image_only"
            notes.append(f"{note} {'Used as it is.' if kept else 'Left out.'}")
            pictures += [photo] if kept else []
            continue
        alone = len(found) == 1 or photo.mask is not None
        square = _square(photo, face, options.region_factor)
        pictures += [photo] if alone or square is None else []
        pictures += [square] if square is not None else []
        if not alone:
            notes.append(
                f"Picture {photo.number + 1} shows {counted(len(found), 'person')}: only the "
                f"face that is {options.order.replace('_', ' ')} number {options.index} counts. "
                "A mask on the person chooses another one and keeps the whole photo."
            )
    if not pictures:
        raise NoFaceError(
            f"{' '.join(notes[:3])} No photo is left. Use photos with a clear face, or disconnect "
            "the face analysis to train on whole photos."
        )
    return pictures, notes


def _square(photo: TrainingPicture, face: DetectedFace, factor: float) -> TrainingPicture | None:
    """The square around a face, moved into the photo; None where it is about all of the photo."""
    height, width = photo.image.shape[:2]
    square = face_square(face.box, height, width, factor)
    if square is None:
        return None
    left, top, side = square
    rows, columns = slice(top, top + side), slice(left, left + side)
    mask = None if photo.mask is None else photo.mask[rows, columns]
    return replace(photo, image=photo.image[rows, columns], framing=FACE, mask=mask)


def face_square(box: Tensor, height: int, width: int, factor: float) -> tuple[int, int, int] | None:
    """The square around a face, moved into its photo.

    Args:
        box: (4,) x1, y1, x2, y2 in pixels.
        height: of the photo.
        width: of the photo.
        factor: its side over the longer side of the box.

    Returns:
        Left, top and side in pixels; None where it would be about all of the photo.
    """
    left, top, side = square_around(box, height, width, factor)
    side = min(side, height, width)
    if side >= ALREADY * max(height, width):
        return None
    return min(max(left, 0), width - side), min(max(top, 0), height - side), side


def bucket_step(resolution: int) -> int:
    """What the sides of buckets are multiples of, for a base of this side in pixels."""
    return max(SMALLEST_STEP, resolution // SIZE_STEPS)


def bucket_size(height: int, width: int, resolution: int, step: int) -> tuple[int, int]:
    """The size (height, width) that a picture is trained at: its shape, and the base's area.

    Sides are multiples of `step`, at most LONGEST apart, and make at most resolution squared, as in
    the buckets of NovelAI and kohya.

    Args:
        height: of the picture.
        width: of the picture.
        resolution: side of the square that the base was made for.
        step: what the sides are multiples of.
    """
    square = max(resolution // step, 1) * step
    sizes = [(square, square)]  # the first of equally good ones counts
    for tall in range(step, int(resolution * LONGEST) + 1, step):
        wide = resolution**2 // tall // step * step
        if wide and max(wide, tall) <= LONGEST * min(wide, tall):
            sizes += [(tall, wide), (wide, tall)]
    wanted = math.log(min(max(width / height, 1 / LONGEST), LONGEST))
    return min(sizes, key=lambda size: round(abs(math.log(size[1] / size[0]) - wanted), 9))


def fitted(picture: TrainingPicture, height: int, width: int) -> TrainingPicture:
    """A picture at exactly this size, with its mask; enlarged where it is smaller.

    Scaled until it covers the size; the overhang is cut off, evenly, or so that most of the mask
    stays; a mask that marks nothing any more is gone. The cut comes first, so that a strip
    thousands of pixels long is never made larger.
    """
    scale = max(height / picture.image.shape[0], width / picture.image.shape[1])
    tall = min(picture.image.shape[0], max(1, round(height / scale)))
    wide = min(picture.image.shape[1], max(1, round(width / scale)))
    mask = picture.mask
    if mask is None:
        mask = picture.image.new_ones(picture.image.shape[:2])
    top, left = _most(mask.sum(1), tall), _most(mask.sum(0), wide)
    own_height, own_width = picture.image.shape[:2]
    cut = Cut(
        (own_height, own_width),
        max(width, round(own_width * scale)),
        min(round(top * scale), max(0, round(own_height * scale) - height)),
        min(round(left * scale), max(0, round(own_width * scale) - width)),
    )
    rows, columns = slice(top, top + tall), slice(left, left + wide)
    pixels = _resized(picture.image[rows, columns].movedim(-1, 0), height, width).movedim(0, -1)
    if picture.mask is None:
        return replace(picture, image=pixels, cut=cut)
    small = _resized(mask[rows, columns][None], height, width)[0]
    return replace(picture, image=pixels, mask=_marked(small), cut=cut)


def _most(weights: Tensor, length: int) -> int:
    """Where a cut of this length through weights (n,) begins that holds the most of them; of
    equally good cuts the one nearest to the middle."""
    sums = F.pad(weights.double().cumsum(0), (1, 0))
    held = sums[length:] - sums[: len(sums) - length]
    best = (held >= held.max() * (1 - 1e-6)).nonzero().flatten()
    return int(best[(best - (len(weights) - length) // 2).abs().argmin()])


def _resized(pixels: Tensor, height: int, width: int) -> Tensor:
    """(C, H, W) to (C, height, width) of about the same shape."""
    cut = pixels[None]
    if cut.shape[2:] == (height, width):
        return cut[0]
    scaled = F.interpolate(cut, size=(height, width), mode="bicubic", antialias=True)
    return scaled[0].clamp(0, 1)
