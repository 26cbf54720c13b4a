"""The people of a benchmark and their real pictures, each set disjoint from the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from difflora_core.demo.networks.judges import PLAIN_LOOKS
from difflora_core.demo.world.identities import identity_parameters, split_seeds
from difflora_core.demo.world.renderer import LOOKS
from difflora_core.demo.world.scenes import Scene, render_portraits

PHOTOS = 8
"""Reference pictures per person: four photos (the first is "the photo"), then any look."""

_PHOTO_NUMBERS, _MORE_NUMBERS = range(0, 4), range(4, PHOTOS)
_UNSEEN_NUMBERS, _OTHER_NUMBERS = range(20, 28), range(40, 56)
_PROMPTED_NUMBERS, _AGAIN_NUMBERS = range(100, 200), range(200, 300)


@dataclass(frozen=True)
class RealPictures:
    """M rendered pictures of each of I people: `images` (I, M, H, W, 3), `captions` I x M."""

    images: Tensor
    captions: list[list[str]]


@dataclass(frozen=True)
class People:
    """I people.

    `seeds`: identity seeds; `parameters`: (I, P) true renderer parameters; `photos`: reference
    pictures, for conditioning and DreamBooth; `unseen`: for the denoising loss; `others`: what
    the judges know of the person; `prompted`: real pictures of the prompted scenes, the ceiling;
    `again`: more of these in other poses, which sets of pictures are compared with.
    """

    seeds: tuple[int, ...]
    parameters: Tensor
    photos: RealPictures
    unseen: RealPictures
    others: RealPictures
    prompted: RealPictures
    again: RealPictures

    def __len__(self) -> int:
        return len(self.seeds)


def benchmark_people(split: str, count: int, scenes: Sequence[Scene], start: int = 0) -> People:
    """Render what the benchmark needs of `count` people of a split."""
    seeds = split_seeds(split, count, start)
    photos = render_people(seeds, _PHOTO_NUMBERS, ("photo",))
    more = render_people(seeds, _MORE_NUMBERS, LOOKS)
    nothing = RealPictures(photos.images[:, :0], [[] for _ in seeds])

    def prompted(numbers: Sequence[int]) -> RealPictures:
        return render_people(seeds, numbers[: len(scenes)], LOOKS, scenes) if scenes else nothing

    return People(
        seeds=tuple(seeds),
        parameters=identity_parameters(seeds),
        photos=RealPictures(
            torch.cat([photos.images, more.images], 1),
            [a + b for a, b in zip(photos.captions, more.captions, strict=True)],
        ),
        unseen=render_people(seeds, _UNSEEN_NUMBERS, LOOKS),
        others=render_people(seeds, _OTHER_NUMBERS, PLAIN_LOOKS),
        prompted=prompted(_PROMPTED_NUMBERS),
        again=prompted(_AGAIN_NUMBERS),
    )


def render_people(
    seeds: Sequence[int],
    numbers: Sequence[int],
    looks: Sequence[str],
    scenes: Sequence[Scene] | None = None,
) -> RealPictures:
    """The same picture numbers of everybody, person by person."""
    images, captions = [], []
    for seed in seeds:
        made = render_portraits([seed] * len(numbers), list(numbers), scenes, looks)
        images.append(made.images)
        captions.append(made.captions)
    return RealPictures(torch.stack(images), captions)
