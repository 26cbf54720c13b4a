"""The face reader of large pictures: cut to the face, where it was found; it learns small faces."""

from types import SimpleNamespace

import pytest
import torch

from difflora_core.errors import ConfigError
from difflora_core.models.face_reader import MARGIN, FaceReader, FaceReaderConfig, face_crop
from difflora_core.models.layers import DrawnFrom
from difflora_core.training.difflora import face_reader
from difflora_core.training.loop import LoopConfig
from difflora_core.vision.features import ImageFeatures

PEOPLE, PICTURES, FACE, SIDE, WIDE = 6, 8, 6, 6, 32


def test_the_square_around_a_face_is_read():
    """Latents that hold their own coordinates: bilinear sampling gives coordinates exactly."""
    height, width, side = 20, 30, 5
    y, x = torch.meshgrid(torch.arange(20) + 0.5, torch.arange(30) + 0.5, indexing="ij")
    boxes = torch.tensor([[0.4, 0.3, 0.6, 0.6], [0.5, 0.5, 0.6, 0.6]])
    found = face_crop(torch.stack([x, y])[None].repeat(2, 1, 1, 1), boxes, side)
    steps = (torch.arange(side) + 0.5) / side * 2 - 1  # middles of the pixels of the result
    for own, (x1, y1, x2, y2) in zip(found, boxes.tolist(), strict=True):
        half = MARGIN / 2 * max((x2 - x1) * width, (y2 - y1) * height)
        torch.testing.assert_close(own[0, 2], (x1 + x2) / 2 * width + half * steps)
        torch.testing.assert_close(own[1, :, 1], (y1 + y2) / 2 * height + half * steps)


def test_the_gradient_of_a_likeness_reaches_the_face_and_nothing_else():
    latents = torch.randn(1, 4, 20, 20, generator=torch.Generator().manual_seed(0))
    latents.requires_grad_()
    reader = some_reader(crop=8)
    boxes = torch.tensor([[0.4, 0.4, 0.6, 0.6]])  # 4 of 20, so pixels 7 to 13 with the margin
    face_reader.likeness_error(reader, latents, torch.eye(FACE)[:1], boxes).sum().backward()
    found = latents.grad.abs().sum((0, 1)) > 0
    assert found[7:13, 7:13].all()
    found[6:14, 6:14] = False
    assert not found.any()
    with pytest.raises(ConfigError, match="has to be told where"):
        reader(latents)


def some_reader(crop):
    with DrawnFrom(torch.Generator().manual_seed(1)):
        return FaceReader(FaceReaderConfig(4, FACE, width=8, grid=2, crop=crop))


def small_faces(seed):
    """Large noisy pictures in which the face, a pattern of its person, is small, and where."""
    g, of_people = (torch.Generator().manual_seed(s) for s in (seed, 99))
    faces = torch.randn(PEOPLE, FACE, generator=of_people)
    patterns = 2 * torch.randn(PEOPLE, 4, SIDE, SIDE, generator=of_people)
    count = PEOPLE * PICTURES
    latents, boxes = torch.randn(count, 4, WIDE, WIDE, generator=g), torch.zeros(count, 4)
    for k in range(count):
        left, top = torch.randint(4, WIDE - SIDE - 4, (2,), generator=g).tolist()
        latents[k, :, top : top + SIDE, left : left + SIDE] = patterns[k // PICTURES]
        boxes[k] = torch.tensor([left, top, left + SIDE, top + SIDE]) / WIDE
    seen = faces.repeat_interleave(PICTURES, 0)
    found = torch.ones(count, dtype=torch.bool)
    features = ImageFeatures(seen, found, seen[:, :5], seen[:, None, :4].repeat(1, 2, 1))
    people = torch.arange(count).reshape(PEOPLE, PICTURES)
    return SimpleNamespace(latents=latents, features=features, people=people, boxes=boxes)


def test_small_faces_of_other_pictures_are_read_once_it_is_told_where_they_are(tmp_path):
    data, others = small_faces(0), small_faces(1)
    reader = some_reader(crop=9)
    before = face_reader.mean_likeness(reader, others)
    course = LoopConfig(steps=60, learning_rate=1e-2, warmup=5, log_every=60)
    face_reader.fit(reader, data, course, tmp_path)
    reached = face_reader.mean_likeness(reader, others)
    assert before < 0.4
    assert reached > 0.9
    others.boxes = others.boxes.roll(PICTURES // 2, 0)
    assert face_reader.mean_likeness(reader, others) < 0.6
