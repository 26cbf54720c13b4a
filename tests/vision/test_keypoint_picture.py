import math

import pytest
import torch

from difflora_core.errors import ImageError
from difflora_core.vision.keypoint_picture import POINT_COLOURS, keypoint_picture

FACE = torch.tensor([[40.0, 50.0], [80.0, 52.0], [60.0, 70.0], [45.0, 90.0], [75.0, 92.0]])


@pytest.mark.parametrize("side", [64, 128, 1024])
def test_every_point_has_its_colour_and_the_rest_is_black(side):
    face = FACE * side / 128
    picture = keypoint_picture(face[None], side, side)
    assert picture.shape == (side, side, 3)
    assert picture.min() == 0
    assert picture.max() == 1
    for (x, y), colour in zip(face.tolist(), POINT_COLOURS, strict=True):
        assert torch.allclose(picture[int(y), int(x)], torch.tensor(colour).float(), atol=1e-4)
    assert not picture[: side // 8].any()
    assert not picture[:, : side // 8].any()
    x, y = ((face[0] + face[2]) / 2).tolist()  # halfway between an eye and the nose
    assert torch.allclose(picture[int(y), int(x)], torch.tensor([0.6, 0.0, 0.0]), atol=1e-3)


def test_marks_have_their_size_at_full_resolution():
    picture = keypoint_picture(FACE[None] * 8, 1024, 1024)
    red = (picture[..., 0] > 0.8) & (picture[..., 1:].sum(-1) == 0)
    assert abs(int(red.sum()) - math.pi * 10**2) < 25


def test_moving_the_face_moves_the_picture():
    one = keypoint_picture(FACE[None], 128, 160)
    moved = keypoint_picture(FACE[None] + torch.tensor([7.0, -3.0]), 128, 160)
    assert torch.allclose(moved[:-3, 7:], one[3:, :-7], atol=1e-4)


def test_several_faces_missing_faces_and_points_outside():
    nobody = torch.full((1, 5, 2), torch.nan)
    assert not keypoint_picture(nobody, 32, 48).any()
    assert not keypoint_picture(torch.zeros(0, 5, 2), 32, 48).any()
    assert not keypoint_picture(FACE[None] + 500, 128, 128).any()
    two = torch.stack([FACE, FACE + torch.tensor([128.0, 0.0])])
    wide = keypoint_picture(torch.cat([two, nobody]), 128, 256)
    single = keypoint_picture(FACE[None], 128, 128)
    assert torch.allclose(wide, torch.cat([single, single], 1), atol=1e-4)


@pytest.mark.parametrize("shape", [(5, 2), (1, 4, 2), (1, 5, 3)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(ImageError, match="five points"):
        keypoint_picture(torch.zeros(shape), 64, 64)
    with pytest.raises(ImageError, match="cannot hold"):
        keypoint_picture(FACE[None], 0, 64)
