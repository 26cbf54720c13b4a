"""Which face of a photo is meant, and what happens when it is missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..config import Config
from ..errors import ConfigError, ImageError, counted
from .face_encoder import DetectedFace
from .preprocess import box_mask, marks_nothing

ORDERS = ("largest", "left_to_right")
MISSING_POLICIES = ("error", "skip", "image_only")
IMAGE_REGIONS = ("crop", "picture", "face_on_grey")
_UNMARKED = "under the mask"


@dataclass(frozen=True)
class FaceOptions(Config):
    """How faces are chosen and what CLIP vision sees.

    Attributes:
        order: "largest" or "left_to_right": how the faces of a photo are numbered.
        index: Which of them, from 0.
        on_missing: "error" stops, "skip" drops the photo, "image_only" keeps it without a face.
        image_region: "crop" shows CLIP vision the square around the face, "picture" the middle
            square of the photo, "face_on_grey" the face alone, see `face_cutout`, which also looks
            at it closely for its embedding. A photo without a face always uses the picture.
        region_factor: Side of that square over the longer side of the face box; 2.2 holds hair
            and neck.
        every: All faces of a photo, each in a row of its own, instead of the one at `index`; a
            mask then chooses the faces that it meets.
    """

    order: str = "largest"
    index: int = 0
    on_missing: str = "error"
    image_region: str = "crop"
    region_factor: float = 2.2
    every: bool = False

    def __post_init__(self) -> None:
        choices = {"order": ORDERS, "on_missing": MISSING_POLICIES, "image_region": IMAGE_REGIONS}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(
                    f"{name} is '{getattr(self, name)}'; choose one of {', '.join(allowed)}."
                )
        if self.index < 0:
            raise ConfigError(f"The face index {self.index} is negative; the first face is 0.")
        if not 1 <= self.region_factor <= 10:
            raise ConfigError(f"region_factor is {self.region_factor}; choose 1 to 10.")


def choose_face(
    faces: Sequence[DetectedFace], options: FaceOptions, mask: Tensor | None = None
) -> DetectedFace | None:
    """Pick one face of a photo.

    Args:
        faces: All faces found.
        options: Order and index.
        mask: (H, W) marks the wanted person. The face with the largest marked share of its box
            wins, whatever the order; an empty mask is no mask.

    Returns:
        The face, or None when there are not enough faces or the mask meets none.
    """
    if mask is not None and not marks_nothing(mask):
        shares = [_marked_share(face, mask) for face in faces]
        best = max(shares, default=0.0)
        return faces[shares.index(best)] if best > 0 else None
    ordered = _ordered(faces, options.order)
    return ordered[options.index] if options.index < len(ordered) else None


def choose_faces(
    faces: Sequence[DetectedFace], options: FaceOptions, mask: Tensor | None = None
) -> list[DetectedFace]:
    """The faces of a photo that are meant: the one of `choose_face`, or every one in order.

    A mask (H, W), unless it is empty, says under which pixels they lie.
    """
    if not options.every:
        face = choose_face(faces, options, mask)
        return [] if face is None else [face]
    if mask is not None and not marks_nothing(mask):
        faces = [face for face in faces if _marked_share(face, mask) > 0]
    return _ordered(faces, options.order)


def _ordered(faces: Sequence[DetectedFace], order: str) -> list[DetectedFace]:
    """Faces by size or from left to right."""
    if order == "largest":
        return sorted(faces, key=lambda face: -face.area)
    return sorted(faces, key=lambda face: float(face.box[0] + face.box[2]))


def _marked_share(face: DetectedFace, mask: Tensor) -> float:
    """Mean of the mask over the part of the face box inside the picture."""
    inside = box_mask(face.box, *mask.shape).to(mask.device)
    return float((inside * mask).sum() / inside.sum().clamp(min=1))


def masks_like(
    masks: Tensor | Sequence[Tensor] | None, pictures: list[Tensor]
) -> list[Tensor | None]:
    """One mask of its picture's size per picture; a single mask serves all pictures.

    Args:
        masks: (H, W), (M, H, W) or M masks of any sizes; M is 1 or the number of pictures.
        pictures: (H, W, C) each.

    Returns:
        (H, W) of its picture each; None for every picture where there are no masks.

    Raises:
        ImageError: there are more or fewer masks, or one is not (H, W) or holds no numbers.
    """
    if masks is None:
        return [None] * len(pictures)
    if isinstance(masks, Tensor) and masks.ndim == 2:
        masks = masks[None]
    given = list(masks)
    if len(given) == 1:
        given = given * len(pictures)
    if len(given) != len(pictures) or any(mask.ndim != 2 for mask in given):
        raise ImageError(
            f"There are {len(given)} face masks for {counted(len(pictures), 'picture')}; give "
            "one for all, or one (height x width) per picture."
        )
    for number, mask in enumerate(given, 1):
        if not mask.numel() or not bool(torch.isfinite(mask).all()):
            raise ImageError(
                f"Mask {number} has no pixels, or values that are no numbers (NaN or infinite). "
                "Make or load it again."
            )
    return [
        F.interpolate(mask.float()[None, None], size=picture.shape[:2], mode="nearest")[0, 0]
        for mask, picture in zip(given, pictures, strict=True)
    ]


def missing_note(number: int, count: int, options: FaceOptions, mask: Tensor | None) -> str:
    """Why photo `number`, with `count` faces and a mask (H, W) or none, has no chosen face."""
    (note,) = missing_notes({number: missing_reason(count, options, mask)})
    return note


def missing_reason(count: int, options: FaceOptions, mask: Tensor | None) -> str:
    """Why photos with `count` faces and a mask (H, W) or none have no chosen face, as a predicate.

    `{s}` stands for the ending of a verb of one photo.
    """
    if count == 0:
        return "show{s} no face that could be found"
    faces = "one face" if count == 1 else f"{counted(count, 'face')}"
    if mask is not None and not marks_nothing(mask):
        return "show{s} " + faces + f", none of them {_UNMARKED}"
    return (
        "show{s} "
        + f"{faces}, so there is no face number {options.index} (face_index counts from 0)"
    )


def missing_remedy(reasons: Mapping[int, str]) -> str:
    """What to do about photos without the chosen face, for the reasons of `missing_reason`."""
    if any(_UNMARKED in reason for reason in reasons.values()):
        return "Paint the mask over the face that is meant"
    if any("face_index" in reason for reason in reasons.values()):
        return "Choose a smaller face_index (Find Faces shows the numbers)"
    return "Use photos with one clear face"


def missing_notes(reasons: Mapping[int, str]) -> tuple[str, ...]:
    """A sentence for each reason, with the numbers of its photos."""
    notes = []
    for reason in dict.fromkeys(reasons.values()):
        numbers = [number for number, own in reasons.items() if own == reason]
        who = f"Picture{'s' if len(numbers) > 1 else ''} {listed(numbers)}"
        notes.append(f"{who} {reason.format(s='' if len(numbers) > 1 else 's')}.")
    return tuple(notes)


def listed(numbers: Sequence[int]) -> str:
    """Ascending numbers in words: "1 to 3, 5 and 7"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    parts = [f"{run[0]} to {run[-1]}" if len(run) > 2 else str(run[0]) for run in runs]
    for place in reversed(range(len(runs))):
        if len(runs[place]) == 2:
            parts.insert(place + 1, str(runs[place][1]))
    return " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))
