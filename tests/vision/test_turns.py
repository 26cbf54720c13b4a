"""Faces that do not stand upright are found by turning the picture, and cut out upright."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from difflora_core.vision.face_choice import FaceOptions
from difflora_core.vision.face_encoder import InsightFaceEncoder
from difflora_core.vision.features import extract_features
from difflora_core.vision.turns import quarter_turns, turn_box, turn_points

POINTS = torch.tensor([[8.0, 6.0], [16.0, 6.0], [12.0, 11.0], [9.0, 16.0], [15.0, 16.0]])
SIDES = st.integers(3, 9)


class UprightOnly:
    """A face analysis that knows one face: a green square of 24 pixels whose top row is red."""

    models = None

    def get(self, bgr):
        image = bgr.astype(int)
        green = np.argwhere((image[..., 1] > 200) & (image[..., 2] < 60))
        if not len(green):
            return []
        (top, left), (bottom, right) = green.min(0), green.max(0)
        if top == 0 or image[top - 1, (left + right) // 2, 2] < 200:
            return []
        box = np.array([left, top - 1, right + 1, bottom + 1], dtype=np.float32)
        points = POINTS.numpy() + box[:2]
        embedding = np.array([0.6, 0.8, 0.0], dtype=np.float32)
        return [SimpleNamespace(bbox=box, kps=points, det_score=0.9, embedding=embedding)]


class Mean:
    """CLIP vision that keeps what it was shown."""

    image_size, projection_dim, hidden_dim = 16, 3, 3

    def __init__(self):
        self.shown = []

    def encode(self, images):
        self.shown.append(images)
        return images.mean((1, 2)), images.flatten(1, 2)[:, :1]


@pytest.fixture
def photo():
    picture = torch.full((60, 80, 3), 0.4)
    picture[20:44, 30:54] = torch.tensor([0.0, 1.0, 0.0])
    picture[20, 30:54] = torch.tensor([1.0, 0.0, 0.0])
    return picture


@given(height=SIDES, width=SIDES, turns=st.integers(-3, 3), data=st.data())
def test_points_move_as_pixels_do(height, width, turns, data):
    x = data.draw(st.integers(0, width - 1))
    y = data.draw(st.integers(0, height - 1))
    picture = torch.zeros(height, width)
    picture[y, x] = 1
    (found,) = torch.rot90(picture, turns).nonzero().tolist()
    moved = turn_points(torch.tensor([x + 0.5, y + 0.5]), turns, height, width)
    assert moved.tolist() == [found[1] + 0.5, found[0] + 0.5]
    box = turn_box(torch.tensor([x, y, x + 1.0, y + 1.0]), turns, height, width)
    assert box.tolist() == [found[1], found[0], found[1] + 1, found[0] + 1]


@pytest.mark.parametrize("turns", range(4))
def test_points_say_how_a_face_lies(turns):
    lying = turn_points(POINTS, -turns, 24, 24)
    assert quarter_turns(lying, 24) == turns
    assert quarter_turns(lying, 1000) == 0, "points so close together say nothing"


@pytest.mark.parametrize("turns", range(4))
def test_a_turned_photo_shows_the_same_person_upright(photo, turns):
    faces, vision = InsightFaceEncoder.wrap(UprightOnly(), 3), Mean()
    turned = torch.rot90(photo, turns)
    (face,) = faces.detect(turned)
    place = (turns, *photo.shape[:2])
    torch.testing.assert_close(
        face.keypoints, turn_points(POINTS + 30 - torch.tensor([0, 10]), *place)
    )
    torch.testing.assert_close(face.box, turn_box(torch.tensor([30.0, 20, 54, 44]), *place))
    extract_features([photo, turned], faces, vision, FaceOptions(region_factor=1.5))
    torch.testing.assert_close(vision.shown[1], vision.shown[0])


class Fooled(UprightOnly):
    """Also takes whatever is small in its picture for an upright face, with a score of its own."""

    def __init__(self, score):
        self.score = score

    def get(self, bgr):
        small = min(bgr.shape[:2]) > 130
        made = SimpleNamespace(
            bbox=np.array([0, 0, 9, 9], dtype=np.float32), kps=POINTS.numpy(), det_score=self.score,
            embedding=np.array([1.0, 0.0, 0.0], dtype=np.float32),
        )  # fmt: skip
        return super().get(bgr) or ([made] if small else [])


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_a_surer_face_of_the_turned_picture_counts(photo, turns):
    """Within a wide border detectors take a small face on its head for one that is upright."""
    turned = torch.rot90(photo, turns)
    (face,) = InsightFaceEncoder.wrap(Fooled(0.6), 3).detect(turned)
    assert face.quarter_turns == -turns % 4
    assert face.embedding.tolist() == pytest.approx([0.6, 0.8, 0.0])
    (face,) = InsightFaceEncoder.wrap(Fooled(0.95), 3).detect(turned)
    assert face.quarter_turns == 0
    assert face.embedding.tolist() == [1.0, 0.0, 0.0]


def test_without_a_face_it_is_told_after_every_turn(photo):
    photo[20, 30:54] = torch.tensor([0.0, 1.0, 0.0])
    assert InsightFaceEncoder.wrap(UprightOnly(), 3).detect(photo) == []
