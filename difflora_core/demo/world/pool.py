"""Pools of rendered pictures: drawn once, kept on disk, read by every training stage."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...config import parse_json
from ...storage.safetensors_io import read_file, write_atomic
from .identities import identity_parameters, split_seeds
from .renderer import LOOKS
from .scenes import Pictures, Scene, render_pairs, render_portraits

_CHUNK = 256


@dataclass(frozen=True)
class PicturePool:
    """Pictures of many people.

    `images`: (M, H, W, 3) uint8; `identities`: (M,) seeds (left person in wide pictures);
    `captions`, `scenes`: M entries; `keypoints`: (M, people, 5, 2); `boxes`: (M, people, 4).
    """

    images: Tensor
    identities: Tensor
    captions: list[str]
    scenes: list[Scene]
    keypoints: Tensor
    boxes: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def head(self, count: int) -> PicturePool:
        """The first `count` pictures."""
        return self._some(slice(count))

    def _some(self, rows: slice) -> PicturePool:
        return PicturePool(
            self.images[rows],
            self.identities[rows],
            self.captions[rows],
            self.scenes[rows],
            self.keypoints[rows],
            self.boxes[rows],
        )

    def tail(self, count: int) -> PicturePool:
        """The last `count` pictures."""
        return self._some(slice(len(self) - count, len(self)))

    def parameters(self) -> Tensor:
        """Identity parameters of each picture's (left) person: (M, P)."""
        seeds, inverse = torch.unique(self.identities, return_inverse=True)
        return identity_parameters(seeds.tolist())[inverse]


def portrait_pool(
    split: str,
    identities: int,
    pictures: int,
    start: int = 0,
    looks: Sequence[str] = LOOKS,
    describe: float = 0.0,
    progress: Callable[[int, int], None] | None = None,
) -> PicturePool:
    """Render `pictures` portraits of each of `identities` people of a split, person by person."""
    seeds = split_seeds(split, identities, start)
    names = [(seed, k) for seed in seeds for k in range(pictures)]
    chunks = []
    for i in range(0, len(names), _CHUNK):
        part = names[i : i + _CHUNK]
        who, which = [s for s, _ in part], [k for _, k in part]
        chunks.append(render_portraits(who, which, looks=looks, describe=describe))
        if progress is not None:
            progress(i + len(part), len(names))
    return _pool(chunks, [s for s, _ in names])


def pair_pool(split: str, count: int, identities: int, start: int = 0) -> PicturePool:
    """Render `count` wide pictures of two different people among `identities` of a split."""
    seeds = split_seeds(split, identities, start)
    left = [seeds[k % identities] for k in range(count)]
    right = [seeds[(k * 7 + 1 + k // identities) % identities] for k in range(count)]
    chunks = [
        render_pairs(left[i : i + _CHUNK], right[i : i + _CHUNK], range(i, min(i + _CHUNK, count)))
        for i in range(0, count, _CHUNK)
    ]
    return _pool(chunks, left)


def cached_pool(path: Path, render: Callable[[], PicturePool]) -> PicturePool:
    """Read the pool at `path`, or render it and write it there (temporary file, then rename)."""
    if not path.exists():
        pool = render()
        words = {"captions": pool.captions, "scenes": [vars(s) for s in pool.scenes]}
        tensors = {
            "images": pool.images,
            "identities": pool.identities,
            "keypoints": pool.keypoints,
            "boxes": pool.boxes,
        }
        write_atomic(tensors, {"words": json.dumps(words)}, path)
        return pool
    tensors, facts = read_file(path, "pool of pictures", finite=False)  # NaN: no face
    words = parse_json(facts["words"], "the words of the pool")
    return PicturePool(
        captions=words["captions"], scenes=[Scene(**s) for s in words["scenes"]], **tensors
    )


def _pool(chunks: list[Pictures], identities: list[int]) -> PicturePool:
    return PicturePool(
        images=torch.cat([(c.images * 255).round().to(torch.uint8) for c in chunks]),
        identities=torch.tensor(identities),
        captions=[caption for c in chunks for caption in c.captions],
        scenes=[scene for c in chunks for scene in c.scenes],
        keypoints=torch.cat([c.keypoints for c in chunks]),
        boxes=torch.cat([c.boxes for c in chunks]),
    )
