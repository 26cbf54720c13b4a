import pytest
import torch

from difflora_core.errors import ConfigError, ImageError, NoFaceError
from difflora_core.evaluation.grid import compare_grid
from difflora_core.evaluation.likeness import compare_people, likeness_picture
from difflora_core.vision.face_encoder import DetectedFace
from difflora_core.vision.grid import LABEL_HEIGHT, GridRow, draw_grid


class ColourFaces:
    """The person is the picture's colour; a black picture shows nobody."""

    embedding_dim = 3

    def detect(self, image):
        if not image.any():
            return []
        box = torch.tensor([0.0, 0.0, *reversed(image.shape[:2])])
        small = DetectedFace(box / 4, 0.9, torch.zeros(5, 2), -image[0, 0])
        return [small, DetectedFace(box, 0.9, torch.zeros(5, 2), image[0, 0] * 7)]


def flat(*colours, size=(8, 8)):
    return torch.tensor(colours)[:, None, None].expand(-1, *size, -1).clone()


RED, GREEN, BLACK = [1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]


def test_largest_face_against_the_mean_of_the_references():
    found = compare_people(
        flat(RED, GREEN, BLACK), flat(RED, [0.5, 0.5, 0.0], BLACK), ColourFaces()
    )
    torch.testing.assert_close(found.similarity, torch.tensor([0.5**0.5, 1.0, 0.0]))
    assert found.face_found.tolist() == [True, True, False]
    assert found.mean == pytest.approx((0.5**0.5 + 1) / 2)
    assert found.captions() == ["0.707", "1.000", "no face"]
    report = found.report().split("\n")
    assert report[0] == "mean similarity 0.854 over 2 of 3 pictures"
    assert report[1:] == [
        "no face in reference 3, left out",
        "picture 1: 0.707",
        "picture 2: 1.000",
        "picture 3: no face",
    ]


def test_copying_is_told_where_other_photos_are_known():
    others = flat(GREEN, BLACK)
    found = compare_people(flat(RED), flat(RED, GREEN, [1.0, 1.0, 0.0]), ColourFaces(), others)
    torch.testing.assert_close(found.copying, torch.tensor([1.0, -1.0, 0.0]), atol=1e-3, rtol=0)
    assert found.report().split("\n")[1].startswith("copy-paste +0.00 ")
    with pytest.raises(NoFaceError, match="1 other pictures"):
        compare_people(flat(RED), flat(RED), ColourFaces(), flat(BLACK))


def test_nobody_to_compare_with():
    with pytest.raises(NoFaceError, match="2 reference pictures"):
        compare_people(flat(BLACK, BLACK), flat(RED), ColourFaces())


def test_finished_pictures_without_a_face_go_on():
    """A back view before Save Image is no reason to lose it."""
    references, pictures = flat(RED), flat(BLACK, BLACK)
    found = compare_people(references, pictures, ColourFaces(), flat(GREEN))
    assert found.mean == 0.0
    assert found.captions() == ["no face", "no face"]
    assert found.report().split("\n") == [
        "no picture shows a face, so nothing was compared",
        "picture 1: no face",
        "picture 2: no face",
    ]
    assert likeness_picture(references, pictures, found).isfinite().all()


def test_likeness_picture_shows_every_picture():
    references, pictures = flat(RED), flat(*[[0.0, 0.1 * k, 0.5] for k in range(1, 6)])
    found = compare_people(references, pictures, ColourFaces())
    sheet = likeness_picture(references, pictures, found)
    for colour in (*references[:, 0, 0], *pictures[:, 0, 0]):
        near = (sheet - colour).abs().amax(-1) < 0.01
        assert near.sum() == 192**2


@pytest.mark.parametrize(("count", "size"), [(500, (8, 8)), (30, (8, 40))])
def test_likeness_picture_of_a_large_batch(count, size):
    pictures = flat(*[RED] * count, size=size)
    found = compare_people(pictures[:1], pictures, ColourFaces())
    assert max(likeness_picture(pictures[:1], pictures, found).shape) <= 4096


def test_places_have_the_widest_shape_and_pictures_keep_theirs():
    wide, tall = flat(RED, size=(10, 20))[0], flat(GREEN, size=(40, 20))[0]
    sheet = draw_grid([GridRow([wide, None, tall], "a label"), GridRow([tall])], side=40)
    assert sheet.shape == (40 + LABEL_HEIGHT + 40, 3 * 80, 3)
    red, green = ((sheet - torch.tensor(c)).abs().amax(-1) < 0.01 for c in (RED, GREEN))
    assert int(red.sum()) == 80 * 40
    assert int(green.sum()) == 2 * 20 * 40
    assert green[LABEL_HEIGHT:, 160:].any(0).nonzero().flatten().tolist() == list(range(30, 50))
    white = sheet[LABEL_HEIGHT : LABEL_HEIGHT + 40, 80:160]
    assert bool((white == 1).all())
    assert float(sheet[:LABEL_HEIGHT].min()) < 0.5  # the label is there


def test_reference_stays_left_and_long_labels_are_cut():
    variants = flat(*[[0.0, 0.1 * k, 0.5] for k in range(1, 6)])
    labels = ["first " * 40, "", "third"]
    sheet = compare_grid(variants, flat(RED, GREEN), labels, columns=2, side=32)
    assert sheet.shape == (3 * (32 + LABEL_HEIGHT), 3 * 32, 3)
    red = (sheet - torch.tensor(RED)).abs().amax(-1) < 0.01
    assert red.nonzero().amax(0).tolist() == [31, 31]
    assert not ((sheet - torch.tensor(GREEN)).abs().amax(-1) < 0.01).any()
    places = [(sheet - v[0, 0]).abs().amax(-1) < 0.01 for v in variants]
    corners = [tuple(place.nonzero()[0].tolist()) for place in places]
    step = 32 + LABEL_HEIGHT
    assert corners == [(0, 32), (0, 64), (step, 32), (step, 64), (2 * step, 32)]
    caption = sheet[32:step, 32:64]
    assert (caption[:, -2:] == 1).all()  # nothing runs into the neighbour
    alone = compare_grid(variants, columns=2, side=32)
    assert alone.shape == (3 * step, 2 * 32, 3)


def test_grid_refusals():
    with pytest.raises(ConfigError, match="no picture"):
        draw_grid([])
    with pytest.raises(ConfigError, match="too large"):
        compare_grid(flat(*[RED] * 40), columns=40, side=192)
    with pytest.raises(ImageError):
        draw_grid([GridRow([torch.full((4, 4, 3), torch.nan)])])
