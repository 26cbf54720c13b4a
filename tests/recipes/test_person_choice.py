"""Batches of people whose pictures have several sizes: one size each, and nobody preferred."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from difflora_core.training.difflora.face_reader import mean_likeness, reader_batches
from difflora_core.training.difflora.person_choice import PersonChoice, SizedLatents, sized
from difflora_core.vision.features import ImageFeatures

SHAPES = [(4, 8, 8), (4, 6, 10), (4, 8, 8), (4, 10, 6), (4, 6, 10), (4, 8, 8), (4, 8, 8)]
PEOPLE = torch.tensor([[0, 1, 2, 3], [4, 5, -1, -1], [6, 2, 0, -1]])


def latents():
    """Pictures that show their number."""
    return [torch.full(shape, float(number)) for number, shape in enumerate(SHAPES)]


def test_pictures_of_several_sizes_are_read_like_a_tensor():
    found = sized(latents())
    for chosen in ([0, 2, 6], [4, 1], [3]):
        read = found[torch.tensor(chosen)]
        assert read.shape == (len(chosen), *SHAPES[chosen[0]])
        assert read[:, 0, 0, 0].tolist() == chosen
    same = sized([torch.ones(4, 8, 8)] * 3)
    assert isinstance(same, torch.Tensor)
    assert same.shape == (3, 4, 8, 8)


def test_one_size_a_batch_everybody_as_often_and_each_picture_too():
    choose = PersonChoice(PEOPLE, sized(latents()))
    seen, after = torch.zeros(3, 7), torch.zeros(7)
    for seed in range(3000):
        people, pictures = choose(4, torch.Generator().manual_seed(seed))
        assert len({SHAPES[k] for k in pictures[:, 0].tolist()}) == 1
        for person, own in zip(people.tolist(), pictures.tolist(), strict=True):
            assert sorted(own) == sorted(PEOPLE[person].tolist())  # all of them, none twice
            assert own == [k for k in own if k >= 0] + [-1] * own.count(-1)
            seen[person, own[0]] += 1
            if person == 0 and own[0] == 3:
                after[own[1]] += 1
    wanted = torch.zeros(3, 7)
    for person, row in enumerate(PEOPLE.tolist()):
        own = [k for k in row if k >= 0]
        wanted[person, own] = 1 / 3 / len(own)
    assert (seen / 12_000 - wanted).abs().max() < 0.02  # five standard errors of four at once
    assert (after[:3] / after.sum() - 1 / 3).abs().max() < 0.08  # the rest comes in any order
    assert after[3:].sum() == 0


def test_the_same_seed_draws_the_same_and_one_size_as_it_always_was():
    choose = PersonChoice(PEOPLE, sized(latents()))
    one, other, another = (choose(5, torch.Generator().manual_seed(seed)) for seed in (7, 7, 8))
    assert all(map(torch.equal, one, other))
    assert not all(map(torch.equal, one, another))
    plain = PersonChoice(PEOPLE, torch.zeros(7, 4, 8, 8))
    people, pictures = plain(5, torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)  # runs that were stopped before go on as they were
    wanted = torch.randint(3, (5,), generator=generator)
    keys = torch.rand(5, 4, generator=generator).masked_fill(PEOPLE[wanted] < 0, 2)
    assert torch.equal(people, wanted)
    assert torch.equal(pictures, PEOPLE[wanted].gather(1, keys.argsort(1)))


@pytest.mark.parametrize("several", [False, True])
def test_the_face_reader_sees_pictures_with_the_face_of_their_person(several):
    pictures = latents() if several else [torch.full((4, 8, 8), float(k)) for k in range(7)]
    features = SimpleNamespace(face=torch.eye(7), face_found=torch.ones(7, dtype=torch.bool))
    data = SimpleNamespace(latents=sized(pictures), features=features, people=PEOPLE, boxes=None)
    draw = reader_batches(data, 6)
    for seed in range(20):
        batch = draw(torch.Generator().manual_seed(seed))
        shown = batch["latents"].mean((1, 2, 3)).round().int().tolist()
        for picture, face in zip(shown, batch["centroids"], strict=True):
            theirs = set(face.nonzero().flatten().tolist())  # a mean of one picture's each
            assert theirs in [set(row) - {-1} for row in PEOPLE.tolist()]
            assert picture in theirs


@pytest.mark.parametrize("several", [False, True])
def test_likeness_is_the_mean_over_pictures(several):
    """A reader that gives every picture the face of its number: by hand, whatever the sizes."""
    pictures = latents() if several else [torch.full((4, 8, 8), float(k)) for k in range(7)]
    table, eye = torch.tensor([[0, 1], [2, 3], [4, -1]]), torch.eye(7)
    count = torch.ones(7, dtype=torch.bool)
    features = ImageFeatures(eye, count, eye, eye[:, None])

    class Reads(nn.Linear):
        def forward(self, x, boxes=None):
            return torch.eye(7)[x.mean((1, 2, 3)).round().long()]

    data = SimpleNamespace(latents=sized(pictures), features=features, people=table, boxes=None)
    found = mean_likeness(Reads(1, 1), data)
    assert found == pytest.approx((4 / 2**0.5 + 1) / 5)  # of two faces, and of one alone


def test_sizes_that_nobody_here_has_are_never_drawn():
    found = sized(latents())
    assert isinstance(found, SizedLatents)
    choose = PersonChoice(torch.tensor([[0, 2], [6, 5]]), found)
    for seed in range(20):
        _, pictures = choose(3, torch.Generator().manual_seed(seed))
        assert {SHAPES[k] for k in pictures.flatten().tolist()} == {(4, 8, 8)}
