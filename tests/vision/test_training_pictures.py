"""Photos as training pictures: sizes of buckets, squares around faces, and notes."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms import Resize

from difflora_core.errors import ImageError, NoFaceError
from difflora_core.vision.face_choice import FaceOptions
from difflora_core.vision.face_encoder import DetectedFace
from difflora_core.vision.training_pictures import (
    FACE,
    WHOLE,
    TrainingPicture,
    bucket_size,
    fitted,
    framed,
    training_pictures,
)

SIDES = st.integers(1, 5000)


class Marks:
    """Finds a face in every white rectangle of three channels' own brightness."""

    embedding_dim = 4

    def detect(self, image):
        faces = []
        for channel in range(3):
            rows, columns = (image[..., channel] > 0.9).nonzero(as_tuple=True)
            if len(rows):
                box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
                corners = torch.tensor([float(v) for v in box])
                points = torch.zeros(5, 2)
                faces.append(DetectedFace(corners, 1.0, points, torch.ones(4)))
        return faces


def photo(height, width, *boxes):
    """Grey, with a coloured rectangle (top, left, bottom, right) for each face."""
    picture = torch.full((height, width, 3), 0.4)
    for channel, (top, left, bottom, right) in enumerate(boxes):
        picture[top:bottom, left:right, channel] = 1.0
    return picture


@given(SIDES, SIDES, st.sampled_from([(1024, 64), (512, 32), (64, 16)]))
@settings(max_examples=200, deadline=None)
def test_a_bucket_has_the_bases_area_and_about_the_shape(height, width, base):
    resolution, step = base
    tall, wide = bucket_size(height, width, resolution, step)
    assert tall % step == wide % step == 0
    assert 0 < tall * wide <= resolution**2
    assert max(tall, wide) <= 2 * min(tall, wide)
    assert bucket_size(width, height, resolution, step) in ((wide, tall), (tall, wide))
    if resolution == 1024:
        assert tall * wide > 0.85 * resolution**2
        ratio = min(max(width / height, 0.5), 2.0)
        assert 0.85 < wide / tall / ratio < 1.18


def test_known_buckets():
    sizes = {(1024, 1024): (1024, 1024), (3000, 2000): (1216, 832), (2000, 3000): (832, 1216)}
    for size, wanted in sizes.items():
        assert bucket_size(*size, 1024, 64) == wanted
    assert bucket_size(1, 8000, 1024, 64) == (704, 1408)


@pytest.mark.parametrize("size", [(3, 5), (64, 64), (900, 1100), (1, 4000), (4000, 3)])
def test_every_picture_is_brought_to_its_size_with_its_mask(size):
    picture = torch.rand(*size, 3, generator=torch.Generator().manual_seed(1))
    mask = torch.zeros(7, 9)  # of another size than the picture
    mask[:, 4:] = 1.0
    (one,) = training_pictures([picture], [mask])
    made = fitted(one, 64, 96)
    assert made.image.shape == (64, 96, 3)
    assert made.mask.shape == (64, 96)
    assert 0 <= float(made.image.min()) <= float(made.image.max()) <= 1
    if min(size) > 3:
        assert float(made.mask[:, -8:].mean()) > 0.95 > 0.05 > float(made.mask[:, :8].mean())


def test_the_middle_is_kept_and_nothing_is_squeezed():
    picture = torch.zeros(100, 300, 3)
    picture[40:60, 140:160] = 1.0  # a square in the middle
    made = fitted(training_pictures([picture])[0], 50, 50).image[..., 0]
    rows, columns = (made > 0.5).nonzero(as_tuple=True)
    assert (len(rows.unique()), len(columns.unique())) == (10, 10)
    assert abs(float(rows.float().mean()) - 24.5) < 1
    assert abs(float(columns.float().mean()) - 24.5) < 1


@pytest.mark.parametrize("left", [0, 100, 300, 480])
def test_a_long_photo_is_cut_where_its_mask_is(left):
    image, mask = torch.zeros(150, 600, 3), torch.zeros(150, 600)
    image[:, left : left + 120], mask[40:110, left : left + 120] = 1.0, 1.0
    made = fitted(TrainingPicture(image, 0, mask=mask), 96, 160)
    whole = mask.sum() / 150**2 * 96**2  # nothing of the mask is lost
    assert float(made.mask.sum()) == pytest.approx(float(whole), rel=0.02)
    assert float(made.image[made.mask > 0.9].min()) > 0.9


def diffusers_time_ids(original, corner, target):
    """The formula of diffusers' own SDXL pipeline."""
    config = SimpleNamespace(addition_time_embed_dim=256)
    embedding = SimpleNamespace(linear_1=SimpleNamespace(in_features=6 * 256 + 1280))
    pipeline = SimpleNamespace(unet=SimpleNamespace(config=config, add_embedding=embedding))
    made = StableDiffusionXLPipeline._get_add_time_ids(
        pipeline, original, corner, target, torch.float32, text_encoder_projection_dim=1280
    )
    return made[0].tolist()


@pytest.mark.parametrize("size", [(1024, 1024), (900, 1600), (3000, 1700), (300, 200)])
@pytest.mark.parametrize("mirrored", [False, True])
def test_sizes_and_cuts_are_told_as_diffusers_trainer_tells_them(size, mirrored):
    """train_text_to_image_sdxl.py: scale the shorter side, mirror, cut the middle out."""
    side = 512
    height, width = size
    picture = fitted(training_pictures([torch.zeros(height, width, 3)])[0], side, side)
    scaled = Resize(side, antialias=True)(torch.zeros(1, height, width))
    top = max(0, round((scaled.shape[1] - side) / 2.0))
    left = max(0, round((scaled.shape[2] - side) / 2.0))
    wanted = diffusers_time_ids(size, (top, left), (side, side))
    found = picture.time_ids(mirrored)
    assert found[:2] == wanted[:2] == [height, width]
    assert found[4:] == wanted[4:] == [side, side]
    near = 2 * side / min(size)  # the cut begins at a whole pixel of the photo
    assert all(abs(a - b) <= near for a, b in zip(found[2:4], wanted[2:4], strict=True))
    assert picture.time_ids(True)[:3] == picture.time_ids(False)[:3]


def test_a_mirrored_cut_begins_at_its_other_edge():
    image, mask = torch.zeros(100, 400, 3), torch.zeros(100, 400)
    mask[:, 300:] = 1.0
    picture = fitted(TrainingPicture(image, 0, mask=mask), 200, 200)
    assert picture.time_ids() == [100, 400, 0, 600, 200, 200]
    assert picture.time_ids(mirrored=True) == [100, 400, 0, 0, 200, 200]


def test_a_picture_of_its_own_size_is_whole():
    whole = training_pictures([torch.zeros(64, 96, 3)])[0]
    assert whole.time_ids() == fitted(whole, 64, 96).time_ids() == [64, 96, 0, 0, 64, 96]


def test_masks_that_mark_nothing_are_none():
    faint = torch.full((8, 8), 0.0005)  # what a resized black picture may hold
    made = training_pictures(torch.zeros(2, 8, 8, 3), [faint, faint * 3])
    assert [picture.mask is None for picture in made] == [True, False]


def test_a_broken_mask_is_not_an_empty_one():
    with pytest.raises(ImageError, match="Mask 1 has no pixels, or values that are no numbers"):
        training_pictures(torch.zeros(1, 8, 8, 3), [torch.full((8, 8), torch.nan)])


def test_a_small_face_gives_a_square_inside_the_photo():
    photos = training_pictures([photo(400, 300, (10, 5, 50, 45)), photo(100, 90, (10, 10, 80, 80))])
    pictures, notes = framed(photos, Marks())
    assert [(p.number, p.framing) for p in pictures] == [(0, WHOLE), (0, FACE), (1, WHOLE)]
    square = pictures[1].image
    assert square.shape == (88, 88, 3)  # 2.2 times the face
    assert float((square[..., 0] > 0.9).float().sum()) == 1600  # all of the face is on it
    assert not notes


def test_half_of_them_without_a_face():
    faces, plain = photo(400, 300, (100, 100, 140, 140)), photo(400, 300)
    photos = training_pictures([faces, plain, faces, plain])
    pictures, notes = framed(photos, Marks())
    assert {p.number for p in pictures} == {0, 2}
    assert [n.endswith("Left out.") for n in notes] == [True, True]
    assert "Picture 2 shows no face" in notes[0]
    kept, notes = framed(photos, Marks(), FaceOptions(on_missing="image_only"))
    assert {p.number for p in kept} == {0, 1, 2, 3}
    assert notes[0].endswith("Used as it is.")
    with pytest.raises(NoFaceError, match=r"Picture 2 shows no face.*set on_missing_face to skip"):
        framed(photos, Marks(), FaceOptions(on_missing="error"))
    with pytest.raises(NoFaceError, match="No photo is left"):
        framed(training_pictures([plain]), Marks())


def test_two_people_in_a_photo():
    boxes = (50, 50, 90, 90), (60, 200, 90, 230)
    (one,) = training_pictures([photo(400, 300, *boxes)])
    (square,), (note,) = framed([one], Marks())
    assert square.framing == FACE
    assert float((square.image[..., 0] > 0.9).float().sum()) == 1600  # the larger face
    assert "Picture 1 shows 2 people" in note
    mask = torch.zeros(400, 300)
    mask[40:120, 180:250] = 1.0
    (marked,) = training_pictures([photo(400, 300, *boxes)], [mask])
    pictures, notes = framed([marked], Marks())
    assert [p.framing for p in pictures] == [WHOLE, FACE]
    assert float((pictures[1].image[..., 1] > 0.9).float().sum()) == 900  # the marked face
    assert not notes


def test_masks_that_cannot_be():
    with pytest.raises(ImageError, match="3 face masks for 2 pictures"):
        training_pictures([photo(9, 9)] * 2, [torch.ones(9, 9)] * 3)
    (one,) = training_pictures([photo(9, 9)], [torch.zeros(4, 4)])
    assert one.mask is None  # an empty one marks nothing
    with pytest.raises(ImageError, match=r"Picture 1 contains values that are not numbers"):
        training_pictures([torch.full((9, 9, 3), torch.nan)])
