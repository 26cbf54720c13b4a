"""Pure tensor functions on pictures: clean, crop, align, resize, value range.

A picture is (H, W, 3) float32 in [0, 1], as in ComfyUI's IMAGE. Boxes are (x1, y1, x2, y2) and
points (x, y), both in pixels of that picture.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import ImageError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# Where the eyes, the nose tip and the mouth corners lie in the 112 px crop that ArcFace-like
# recognisers were trained on (published with ArcFace, arXiv 1801.07698).
ARCFACE_POINTS = (
    (38.2946, 51.6963),
    (73.5318, 51.5014),
    (56.0252, 71.7366),
    (41.5493, 92.3655),
    (70.7299, 92.2041),
)
ARCFACE_SIZE = 112

# Resizing the short side of a 1 x 8000 strip to 224 would need a picture 1.8 million pixels long.
LONGEST_RATIO = 16

EMPTY_MASK = 1e-3


def as_picture(image: Tensor, label: str = "The picture") -> Tensor:
    """Bring any usual image tensor to (H, W, 3) float32 in [0, 1].

    Args:
        image: (H, W), (H, W, 1), (H, W, 3) or (H, W, 4); uint8, bool or floating in [0, 1].
            Transparent pixels are laid over white, since their hidden colour is arbitrary.
        label: How an error names the picture, e.g. "Picture 2".

    Returns:
        (H, W, 3) float32 in [0, 1]; small overshoots of a float image are clipped.

    Raises:
        ImageError: Wrong shape, no pixels, NaN or infinite values, or values far outside [0, 1].
    """
    if image.ndim == 2:
        image = image.unsqueeze(-1)
    if image.ndim != 3 or image.shape[-1] not in (1, 3, 4):
        raise ImageError(
            f"{label} has the shape {tuple(image.shape)}; expected height x width x 3 "
            "(grey and alpha work too). Pass ComfyUI images as they come from Load Image."
        )
    if image.numel() == 0:
        raise ImageError(f"{label} has no pixels ({tuple(image.shape)}). Load it again.")
    if image.dtype == torch.uint8:
        picture = image.float() / 255
    elif image.is_floating_point() or image.dtype == torch.bool:
        picture = image.float()
    else:
        raise ImageError(
            f"{label} holds {image.dtype} numbers; expected 8-bit values or floats from 0 to 1."
        )
    low, high = (float(value) for value in torch.aminmax(picture))
    if not (low > -torch.inf and high < torch.inf):  # also false for NaN
        raise ImageError(
            f"{label} contains values that are not numbers (NaN or infinite). The step that made "
            "it failed, often a VAE in half precision; make or load the picture again."
        )
    if low < -1 or high > 2:
        raise ImageError(
            f"{label} has values from {low:.3g} to {high:.3g}; expected 0 to 1. "
            "Divide 8-bit values by 255 first."
        )
    if low < 0 or high > 1:
        picture = picture.clamp(0, 1)
    if picture.shape[-1] == 4:
        alpha = picture[..., 3:]
        picture = picture[..., :3] * alpha + (1 - alpha)
    return picture.expand(-1, -1, 3)


def as_pictures(images: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """Clean a batch (N, H, W[, C]) or a list of pictures of different sizes, see `as_picture`.

    Raises:
        ImageError: No picture at all, or a picture that `as_picture` refuses, by its number.
    """
    if isinstance(images, Tensor):
        if images.ndim not in (3, 4):
            raise ImageError(
                f"The images have the shape {tuple(images.shape)}; expected a batch "
                "number x height x width x 3, as ComfyUI's IMAGE."
            )
        images = list(images)
    if not images:
        raise ImageError("There is no reference picture. Connect at least one photo.")
    return [as_picture(image, f"Picture {i + 1}") for i, image in enumerate(images)]


def shrink(image: Tensor, longest: int) -> tuple[Tensor, float]:
    """Scale a picture down so that its longer side is at most `longest`; never up.

    Returns:
        The picture (h, w, 3) and the factor from old to new coordinates.
    """
    height, width = image.shape[:2]
    scale = longest / max(height, width)
    if scale >= 1:
        return image, 1.0
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    small = F.interpolate(image.movedim(-1, 0)[None], size=size, mode="area")
    return small[0].movedim(0, -1), scale


def pad_border(image: Tensor, fraction: float) -> tuple[Tensor, int]:
    """Add a black border of `fraction` times the longer side; returns the picture and the width.

    Black, because detectors and the aligned crop fill with black themselves. (H, W, C) to
    (H + 2 * width, W + 2 * width, C).
    """
    width = round(max(image.shape[:2]) * fraction)
    return F.pad(image, (0, 0, width, width, width, width)), width


def resize_square(image: Tensor, size: int) -> Tensor:
    """Resize the shorter side to `size` and keep the central square, exactly as CLIP sees it.

    Bicubic with antialiasing; rounding of the size and of the crop follow ComfyUI's CLIP vision.

    Returns:
        (size, size, 3) in [0, 1].
    """
    height, width = image.shape[:2]
    longest = LONGEST_RATIO * min(height, width)
    if max(height, width) > longest:
        top, left = max(0, (height - longest) // 2), max(0, (width - longest) // 2)
        image = image[top : top + longest, left : left + longest]
        height, width = image.shape[:2]
    if (height, width) == (size, size):
        return image
    scale = size / min(height, width)
    scaled = (round(scale * height), round(scale * width))
    pixels = image.movedim(-1, 0)[None]
    pixels = F.interpolate(pixels, size=scaled, mode="bicubic", antialias=True)
    top, left = (scaled[0] - size) // 2, (scaled[1] - size) // 2
    return pixels[0, :, top : top + size, left : left + size].clamp(0, 1).movedim(0, -1)


def clip_pixels(
    images: Tensor,
    size: int,
    mean: Sequence[float] = CLIP_MEAN,
    std: Sequence[float] = CLIP_STD,
) -> Tensor:
    """Pictures to the input of a CLIP vision network, equal to ComfyUI's preprocessing.

    Args:
        images: (N, H, W, 3) in [0, 1].
        size: Side of the network's square input in pixels.
        mean: Channel means of the network's training data (CLIP's by default).
        std: Channel deviations of the same.

    Returns:
        (N, 3, size, size), rounded to 8-bit steps, then normalised.
    """
    squares = torch.stack([resize_square(image, size) for image in images]).movedim(-1, 1)
    squares = (255 * squares).clamp(0, 255).round() / 255
    centre, spread = squares.new_tensor(mean), squares.new_tensor(std)
    return (squares - centre.view(3, 1, 1)) / spread.view(3, 1, 1)


def square_around(box: Tensor, height: int, width: int, factor: float) -> tuple[int, int, int]:
    """The square of `factor` times the box's longer side around its centre.

    Args:
        box: (4,) x1, y1, x2, y2.
        height: Height of the picture; the side never exceeds the picture's longer side.
        width: Width of the picture.
        factor: Enlargement; 2.2 holds hair and neck.

    Returns:
        Left, top and side in pixels; the square may reach over the picture's border.
    """
    x1, y1, x2, y2 = (float(value) for value in box)
    side = factor * max(x2 - x1, y2 - y1)
    side_px = max(1, min(round(side), max(height, width)))
    return round((x1 + x2 - side_px) / 2), round((y1 + y2 - side_px) / 2), side_px


def crop_square(image: Tensor, left: int, top: int, side: int) -> Tensor:
    """Cut a square that may reach over the border; the picture's edge pixels continue there.

    Returns:
        (side, side, 3).
    """
    height, width = image.shape[:2]
    rows = torch.arange(top, top + side, device=image.device).clamp(0, height - 1)
    columns = torch.arange(left, left + side, device=image.device).clamp(0, width - 1)
    return image.index_select(0, rows).index_select(1, columns)


def similarity_transform(points: Tensor, target: Tensor) -> Tensor:
    """Rotation, one scale and shift that bring `points` closest to `target` (least squares).

    Closed form of Umeyama (1991) in the plane: a complex linear regression.

    Args:
        points: (P, 2).
        target: (P, 2).

    Returns:
        (2, 3) float64, applied to column vectors (x, y, 1).

    Raises:
        ImageError: All points coincide.
    """
    source = torch.view_as_complex(points.double().contiguous())
    goal = torch.view_as_complex(target.double().contiguous())
    centred = source - source.mean()
    energy = (centred.abs() ** 2).sum()
    if not energy > 0:
        raise ImageError("The face points coincide, so the face cannot be aligned.")
    turn = (centred.conj() * (goal - goal.mean())).sum() / energy
    shift = goal.mean() - turn * source.mean()
    first = torch.stack([turn.real, -turn.imag, shift.real])
    return torch.stack([first, torch.stack([turn.imag, turn.real, shift.imag])])


def align_face(image: Tensor, keypoints: Tensor, size: int = ARCFACE_SIZE) -> Tensor:
    """Rotate, scale and cut the face so that its five points lie where recognisers expect them.

    Args:
        image: (H, W, 3) in [0, 1].
        keypoints: (5, 2) eyes, nose tip, mouth corners.
        size: Side of the result; the template is that of `ARCFACE_POINTS`.

    Returns:
        (size, size, 3) in [0, 1]; black where the picture ends.
    """
    template = torch.tensor(ARCFACE_POINTS, dtype=torch.float64) * (size / ARCFACE_SIZE)
    # The map from the crop back to the picture, since every pixel of the crop asks for its source.
    matrix = similarity_transform(keypoints.cpu(), template)
    turn, shift = matrix[:, :2], matrix[:, 2:]
    inverse = torch.linalg.inv(turn)
    axis = torch.arange(size, dtype=torch.float64)
    crop_points = torch.stack(torch.meshgrid(axis, axis, indexing="xy")).reshape(2, -1)
    source = inverse @ (crop_points - shift)
    height, width = image.shape[:2]
    extent = torch.tensor([[width], [height]], dtype=torch.float64)
    grid = ((2 * source + 1) / extent - 1).T.reshape(1, size, size, 2)
    pixels = image.movedim(-1, 0)[None]
    grid = grid.to(pixels)
    aligned = F.grid_sample(pixels, grid, mode="bilinear", align_corners=False)
    return aligned[0].movedim(0, -1)


def marks_nothing(mask: Tensor) -> bool:
    """True where no number of a mask (of any shape, in [0, 1]) reaches EMPTY_MASK.

    ComfyUI gives such masks for pictures nobody painted on, resized ones not quite black.
    """
    return float(mask.max()) < EMPTY_MASK


def box_mask(box: Tensor, height: int, width: int) -> Tensor:
    """(H, W) float32, 1 inside the box and 0 elsewhere; parts outside the picture are dropped."""
    x1, y1, x2, y2 = (float(value) for value in box)
    rows = torch.arange(height) + 0.5
    columns = torch.arange(width) + 0.5
    inside_rows = (rows >= y1) & (rows < y2)
    inside_columns = (columns >= x1) & (columns < x2)
    return (inside_rows[:, None] & inside_columns).float()
