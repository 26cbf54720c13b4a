"""People with several things: in one colour, in two named ones, or in two that nobody names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .concepts import KNOWN
from .renderer import COLOURS
from .scenes import ITEM_PHRASES, Scene, random_scenes, render_things

NAMED_SPREAD = 0.06
"""Standard deviation of a named colour of two."""
TAUGHT_DISTANCE = 0.3
"""Unnamed looks keep away from those that are to be taught: one colour at least differs so much."""


@dataclass(frozen=True, eq=False)
class Looks:
    """How B things look.

    `paint`: (B, 2, 3) colours of the thing and of its accent, equal when it has none; `plain`:
    name of the first colour; `said`: what the caption says of them; `accented`: B truth values.
    """

    paint: Tensor
    plain: list[str]
    said: list[str]
    accented: list[bool]


def random_looks(count: int, generator: torch.Generator) -> Looks:
    """A third each: one named colour, two named colours, two unnamed ones."""
    names, colours = list(COLOURS), torch.tensor(list(COLOURS.values()))
    modes = torch.randint(3, (count,), generator=generator).tolist()
    pick = torch.randint(len(names), (count, 2), generator=generator)
    spread = NAMED_SPREAD * torch.randn(count, 2, 3, generator=generator)
    paint = (colours[pick] + spread).clamp(0, 1)
    said = []
    for k, mode in enumerate(modes):
        first, second = (names[index] for index in pick[k].tolist())
        said.append((first, f"{first} and {second}", "")[mode])
        if mode == 0:
            paint[k] = colours[pick[k, 0]]
        elif mode == 2:
            paint[k] = _unnamed(generator)
    return Looks(paint, [names[k] for k in pick[:, 0].tolist()], said, [m > 0 for m in modes])


def _unnamed(generator: torch.Generator) -> Tensor:
    """Any two colours (2, 3) but those of the concepts."""
    taught = torch.tensor([(c.main, c.accent) for c in KNOWN])
    while True:
        paint = torch.rand(2, 3, generator=generator)
        if not bool(((taught - paint).norm(dim=-1).amax(-1) < TAUGHT_DISTANCE).any()):
            return paint


@dataclass(frozen=True, eq=False)
class ThingPictures:
    """Rendered pictures of people with things.

    `images`: (B, H, W, 3); `masks`: (B, H, W), 1 where a thing is; `scenes`, `captions`: B;
    `paint`: (B, places, 2, 3) colours of the things.
    """

    images: Tensor
    masks: Tensor
    scenes: list[Scene]
    captions: list[str]
    paint: Tensor


def draw_things(
    people: Sequence[int],
    numbers: Sequence[int],
    kinds: Sequence[Sequence[str]],
    generator: torch.Generator,
) -> ThingPictures:
    """People in random scenes with things of random looks.

    Args:
        people: B identity seeds.
        numbers: B picture numbers.
        kinds: for each place B kinds of things, "none" for nothing; they must not cover each other.
        generator: of scenes and looks.
    """
    count = len(people)
    scenes = random_scenes(torch.rand(count, 8, generator=generator))
    captions: list[str] = [replace(scene, item="none").caption() for scene in scenes]
    layers: list[tuple[Sequence[Scene], Tensor | None]] = []
    paints = []
    for own in kinds:
        looks = random_looks(count, generator)
        paints.append(looks.paint)
        for accented in (True, False):
            shown = [
                replace(s, item=kind if two == accented else "none", item_colour=plain)
                for s, kind, plain, two in zip(
                    scenes, own, looks.plain, looks.accented, strict=True
                )
            ]
            layers.append((shown, looks.paint if accented else None))
        captions = [
            caption + (f", {_phrase(kind, said)}" if kind != "none" else "")
            for caption, kind, said in zip(captions, own, looks.said, strict=True)
        ]
    images, masks = render_things(people, numbers, layers)
    return ThingPictures(images, masks, scenes, captions, torch.stack(paints, 1))


def _phrase(kind: str, said: str) -> str:
    return ITEM_PHRASES[kind].format(f"{said} {kind}".strip())
