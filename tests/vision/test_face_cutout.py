"""The face on grey: against PIL's own operations, and what a package without points is told."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFilter

from difflora_core.errors import EncoderError
from difflora_core.vision.face_choice import FaceOptions
from difflora_core.vision.face_cutout import OUTLINE, Square, cut, cut_out, face_square
from difflora_core.vision.features import extract_features

GREY_FACE = FaceOptions(image_region="face_on_grey")


def ring(x=60.0, y=70.0, width=40.0, height=50.0):
    """106 points round an ellipse, in the order in which the outline takes them."""
    angle = torch.arange(106) * 2 * torch.pi / len(OUTLINE)
    on_ellipse = torch.stack([x + width * angle.cos(), y + height * angle.sin()], -1)
    points = torch.tensor([[float(x), float(y)]]).repeat(106, 1)
    points[list(OUTLINE)] = on_ellipse[: len(OUTLINE)]
    return points


def noise(height=150, width=130, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(height, width, 3, generator=g)


def test_the_outline_is_insightfaces():
    """43 points, none twice: the contour of the face, which is 0 to 32, and ten of the brows."""
    assert len(OUTLINE) == len(set(OUTLINE)) == 43
    assert {i for i in OUTLINE if i <= 32} == set(range(33))
    assert OUTLINE[:3] == (1, 9, 10)
    assert OUTLINE[8:10] == (16, 2)
    assert OUTLINE[16:19] == (0, 24, 23)
    assert OUTLINE[32:36] == (17, 101, 105, 104)


@pytest.mark.parametrize("place", [(60, 70, 40, 50), (12, 20, 30, 20), (120, 140, 33, 41)])
def test_it_is_a_mask_of_pil_pasted_over_grey(place):
    """The whole road in 8 bits with PIL alone; ours keeps floats, so it is within one level."""
    picture, points = noise(), ring(*place)
    pixels = (picture * 255).round().byte()
    photo = Image.fromarray(pixels.numpy())
    outline = points[list(OUTLINE)].numpy()
    drawn = Image.new("L", photo.size, 0)
    ImageDraw.Draw(drawn).polygon([tuple(p) for p in outline.tolist()], fill=255)
    (x, y), extent = outline.mean(0), np.ptp(outline, 0).max()
    box = [round(float(v)) for v in
           (x - 0.8 * extent, y - 0.8 * extent, x + 0.8 * extent, y + 0.8 * extent)]  # fmt: skip
    part = drawn.crop(box)
    soft = part.resize((512, 512), Image.Resampling.BICUBIC)
    soft = soft.filter(ImageFilter.GaussianBlur(15)).resize(part.size, Image.Resampling.BICUBIC)
    grey = Image.new("RGB", photo.size, (127, 127, 127))
    grey.paste(photo.crop(box), box[:2], soft)
    low, high = points.numpy().min(0), points.numpy().max(0)
    half = 0.75 * (high - low).max()
    x, y = (low + high) / 2
    y -= half / 8
    seen = [round(float(v)) for v in (x - half, y - half, x + half, y + half)]
    expected = torch.from_numpy(np.asarray(grey.crop(seen)).copy()).float() / 255
    found = cut_out(pixels.float() / 255, points)
    torch.testing.assert_close(found, expected, rtol=0, atol=1.01 / 255)


def test_inside_is_the_photo_and_outside_is_grey():
    picture, points = noise(), ring()
    face, square = cut_out(picture, points), face_square(points)
    left, top, _, _ = square.corners()
    assert torch.allclose(face[70 - top, 60 - left], picture[70, 60])
    assert torch.allclose(face[3 - top, 3 - left], torch.tensor(127 / 255), atol=1e-6)
    assert square.half == pytest.approx(0.75 * 100, rel=1e-2)


@given(st.floats(-300, 400), st.floats(-300, 400), st.floats(0, 300), st.integers(1, 40))
def test_a_square_anywhere_shows_what_is_there(x, y, half, size):
    picture = noise(size, size + 3)
    square = Square(x, y, half)
    left, top, right, bottom = square.corners()
    box = (left, top, right, bottom)
    pixels = Image.fromarray((picture * 255).byte().numpy()).crop(box)
    found = (cut(picture, square) * 255).byte()
    assert np.array_equal(found.numpy(), np.asarray(pixels))


@given(st.floats(-50, 200), st.floats(-50, 200), st.floats(0, 500))
def test_points_anywhere_make_a_picture(x, y, size):
    face = cut_out(noise(20, 30), ring(x, y, size, size / 2))
    assert face.isfinite().all()
    assert face.min() >= 0
    assert face.max() <= 1


def test_features_of_a_face_on_grey(outline_encoder, image_encoder, photo):
    picture = photo((60, 50, 24), height=128, width=150)
    found = outline_encoder.detect(picture)[0]
    assert found.landmarks.shape == (106, 2)
    middle = (found.box[:2] + found.box[2:]) / 2
    torch.testing.assert_close(found.landmarks.mean(0), middle, rtol=0, atol=1.0)
    result = extract_features([picture], outline_encoder, image_encoder, GREY_FACE)
    corners = result.crops[0][[0, 0, -1, -1], [0, -1, 0, -1]]
    assert torch.allclose(corners, torch.tensor(127 / 255), atol=2e-2)
    middle = result.crops[0][16, 16]
    assert middle[1] > 0.8  # the face itself, green
    assert middle[0] < 0.2
    square = face_square(found.landmarks)
    near = outline_encoder.detect(cut(picture, replace(square, half=2 * square.half)))[0]
    unit = torch.nn.functional.normalize(near.embedding, dim=0)
    torch.testing.assert_close(result.features.face[0], unit)


def test_of_several_faces_the_one_that_is_meant_is_looked_at(outline_encoder, image_encoder, photo):
    """Its neighbour lies in the close square too; the left one stays the left one."""
    picture = photo((50, 60, 24), (88, 60, 24), height=160, width=170)
    alone = extract_features(
        [picture], outline_encoder, image_encoder, replace(GREY_FACE, order="left_to_right")
    )
    other = replace(GREY_FACE, order="left_to_right", index=1)
    right = extract_features([picture], outline_encoder, image_encoder, other)
    plain = [
        extract_features([picture], outline_encoder, image_encoder, replace(o, image_region="crop"))
        for o in (replace(other, index=0), other)
    ]
    same = [float(found.features.face[0] @ alone.features.face[0]) for found in plain]
    assert same[0] > same[1]
    same = [float(found.features.face[0] @ right.features.face[0]) for found in plain]
    assert same[1] > same[0]


def test_a_package_without_points_is_told_the_file(face_encoder, image_encoder, photo):
    picture = photo((52, 50, 24))
    with pytest.raises(EncoderError, match=r"put 2d106det\.onnx"):
        extract_features([picture], face_encoder, image_encoder, GREY_FACE)
    plain = extract_features([picture], face_encoder, image_encoder)
    assert plain.features.face_found.all()  # everything else works as before


def test_a_photo_without_a_face_is_shown_whole(outline_encoder, image_encoder, photo):
    options = replace(GREY_FACE, on_missing="image_only")
    picture = photo()
    shown = extract_features([picture], outline_encoder, image_encoder, options)
    whole = replace(options, image_region="picture")
    expected = extract_features([picture], outline_encoder, image_encoder, whole)
    assert torch.equal(shown.crops, expected.crops)
