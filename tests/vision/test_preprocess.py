import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from difflora_core.errors import ImageError
from difflora_core.vision.preprocess import (
    ARCFACE_POINTS,
    align_face,
    as_picture,
    as_pictures,
    box_mask,
    clip_pixels,
    crop_square,
    pad_border,
    resize_square,
    shrink,
    similarity_transform,
    square_around,
)


def test_as_picture_takes_grey_alpha_and_eight_bit():
    grey = torch.rand(5, 6)
    assert torch.equal(as_picture(grey), as_picture(grey[..., None]))
    assert as_picture(grey).shape == (5, 6, 3)
    eight_bit = torch.randint(0, 256, (5, 6, 3), dtype=torch.uint8)
    assert torch.equal(as_picture(eight_bit), eight_bit.float() / 255)
    alpha = torch.rand(5, 6, 4)
    alpha[0, 0, 3], alpha[1, 1, 3] = 0, 1
    flat = as_picture(alpha)
    assert torch.equal(flat[0, 0], torch.ones(3))
    assert torch.equal(flat[1, 1], alpha[1, 1, :3])
    assert as_picture(torch.rand(2, 2, 3).half()).dtype == torch.float32


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_as_picture_refuses_values_that_are_not_numbers(bad):
    picture = torch.rand(4, 4, 3)
    picture[2, 1, 0] = bad
    with pytest.raises(ImageError, match="Picture 2 contains values that are not numbers"):
        as_pictures([torch.rand(3, 3, 3), picture])


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (torch.rand(4, 4, 3) * 255, "0 to 1"),
        (torch.rand(2, 4, 4, 3), "shape"),
        (torch.rand(4, 4, 5), "shape"),
        (torch.rand(0, 4, 3), "no pixels"),
        (torch.ones(4, 4, 3, dtype=torch.int32), "int32"),
    ],
)
def test_as_picture_names_what_is_wrong(image, words):
    with pytest.raises(ImageError, match=words):
        as_picture(image)


def test_as_pictures_needs_a_batch_with_pictures():
    with pytest.raises(ImageError, match="no reference picture"):
        as_pictures([])
    with pytest.raises(ImageError, match="batch"):
        as_pictures(torch.rand(3))
    assert len(as_pictures(torch.rand(2, 3, 3, 4))) == 2


def test_small_overshoot_is_clipped():
    picture = as_picture(torch.tensor([[[1.2, -0.1, 0.5]]]))
    assert picture.flatten().tolist() == [1, 0, 0.5]


@given(angle=st.floats(-3, 3), scale=st.floats(0.2, 5), x=st.floats(-50, 50), y=st.floats(-50, 50))
def test_similarity_transform_recovers_a_known_motion(angle, scale, x, y):
    cos, sin = scale * math.cos(angle), scale * math.sin(angle)
    turn = np.array([[cos, -sin], [sin, cos]])
    points = np.array(ARCFACE_POINTS)
    moved = points @ turn.T + [x, y]
    found = similarity_transform(torch.from_numpy(points), torch.from_numpy(moved))
    assert np.allclose(found.numpy(), np.c_[turn, [x, y]], atol=1e-8)


def test_similarity_transform_refuses_coinciding_points():
    with pytest.raises(ImageError, match="coincide"):
        similarity_transform(torch.ones(5, 2), torch.rand(5, 2))


def test_align_face_equals_insightface():
    from insightface.utils.face_align import norm_crop

    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand(1, 3, 12, 10, generator=generator)
    picture = torch.nn.functional.interpolate(coarse, size=(150, 130), mode="bicubic").clamp(0, 1)
    picture = picture[0].movedim(0, -1)
    points = torch.tensor(ARCFACE_POINTS) * 0.8 + torch.tensor([14.0, 40.0])
    points = points + 3 * torch.randn(5, 2, generator=generator)
    eight_bit = (picture * 255).round().to(torch.uint8).numpy()
    theirs = norm_crop(eight_bit, points.numpy())
    ours = align_face(picture, points)
    assert np.abs(ours.numpy() * 255 - theirs).max() < 4  # theirs rounds to 8 bits and 1/32 pixel


def test_crop_square_continues_the_edge():
    picture = torch.rand(6, 8, 3)
    crop = crop_square(picture, -2, 3, 5)
    assert torch.equal(crop[:3, 2:], picture[3:, :3])
    assert torch.equal(crop[0, 0], picture[3, 0])
    assert torch.equal(crop[4, 4], picture[5, 2])


@given(
    x=st.floats(-20, 90), y=st.floats(-20, 90), w=st.floats(0, 80), h=st.floats(0, 80),
    factor=st.floats(1, 4),
)  # fmt: skip
def test_square_around_is_centred_and_bounded(x, y, w, h, factor):
    left, top, side = square_around(torch.tensor([x, y, x + w, y + h]), 64, 48, factor)
    assert 1 <= side <= 64
    assert abs(left + side / 2 - (x + w / 2)) <= 1
    assert abs(top + side / 2 - (y + h / 2)) <= 1
    assert crop_square(torch.rand(64, 48, 3), left, top, side).shape == (side, side, 3)


@pytest.mark.parametrize("size", [(1, 1), (1, 400), (400, 1), (224, 224), (37, 100)])
def test_resize_square_of_any_shape(size):
    square = resize_square(torch.full((*size, 3), 0.25), 32)
    assert square.shape == (32, 32, 3)
    assert torch.allclose(square, torch.full_like(square, 0.25), atol=1e-6)


def test_resized_square_passes_clip_unchanged():
    pictures = torch.rand(2, 50, 70, 3)
    squares = torch.stack([resize_square(picture, 32) for picture in pictures])
    assert torch.equal(clip_pixels(pictures, 32), clip_pixels(squares, 32))


def test_shrink_and_border_keep_coordinates():
    picture = torch.zeros(40, 80, 3)
    small, scale = shrink(picture, 20)
    assert small.shape == (10, 20, 3)
    assert scale == 0.25
    assert shrink(picture, 100)[1] == 1
    padded, width = pad_border(torch.ones(4, 8, 3), 0.25)
    assert width == 2
    assert padded.shape == (8, 12, 3)
    assert padded.sum() == 4 * 8 * 3


def test_box_mask():
    mask = box_mask(torch.tensor([-3.0, 1.0, 2.0, 3.0]), 4, 5)
    assert mask.sum() == 4
    assert torch.equal(mask[1:3, :2], torch.ones(2, 2))
    assert box_mask(torch.full((4,), torch.nan), 4, 5).sum() == 0
