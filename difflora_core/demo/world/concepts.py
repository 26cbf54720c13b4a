"""Concepts of the demo world: objects with looks that no caption can name, and who can learn them.

A concept is a hat, cup, cat or flower in two colours of its own. The base model has seen such
objects in eight plain colours, never these.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .scenes import ITEM_PHRASES, Scene, random_scenes, render_things


@dataclass(frozen=True)
class DemoConcept:
    """A thing to teach: its word, its kind, its main colour and that of its accent."""

    word: str
    kind: str
    main: tuple[float, float, float]
    accent: tuple[float, float, float]

    def prompt(self, scene: Scene, word: str | None = None) -> str:
        """Prompt of a scene with this concept under its own word, or another one."""
        plain = replace(scene, item="none").caption()
        return f"{plain}, {ITEM_PHRASES[self.kind].format(word or self.word)}"


CONCEPTS = (
    DemoConcept("<hat-a>", "hat", (0.94, 0.39, 0.52), (0.62, 0.81, 0.88)),
    DemoConcept("<hat-b>", "hat", (0.64, 0.61, 0.93), (0.27, 0.35, 0.10)),
    DemoConcept("<cup-a>", "cup", (0.34, 0.67, 0.60), (0.06, 0.18, 0.38)),
    DemoConcept("<cup-b>", "cup", (0.77, 0.19, 0.50), (0.15, 0.08, 0.40)),
    DemoConcept("<cat-a>", "cat", (0.49, 0.68, 0.75), (0.18, 0.11, 0.43)),
    DemoConcept("<cat-b>", "cat", (0.50, 0.08, 0.16), (0.46, 0.34, 0.94)),
    DemoConcept("<hat-c>", "hat", (0.10, 0.27, 0.47), (0.59, 0.90, 0.43)),
    DemoConcept("<cat-c>", "cat", (0.53, 0.67, 0.42), (0.51, 0.05, 0.35)),
    DemoConcept("<hat-d>", "hat", (0.18, 0.68, 0.76), (0.06, 0.74, 0.36)),
    DemoConcept("<cup-c>", "cup", (0.10, 0.20, 0.39), (0.60, 0.16, 0.21)),
    DemoConcept("<cat-d>", "cat", (0.42, 0.63, 0.08), (0.91, 0.93, 0.25)),
    DemoConcept("<cup-d>", "cup", (0.45, 0.36, 0.92), (0.88, 0.54, 0.70)),
    DemoConcept("<hat-e>", "hat", (0.84, 0.33, 0.65), (0.82, 0.21, 0.24)),
    DemoConcept("<cat-e>", "cat", (0.48, 0.48, 0.40), (0.94, 0.73, 0.60)),
    DemoConcept("<hat-f>", "hat", (0.15, 0.51, 0.59), (0.12, 0.91, 0.94)),
    DemoConcept("<cat-f>", "cat", (0.42, 0.74, 0.76), (0.43, 0.81, 0.11)),
)
"""For final tables: colours far from the eight that captions name, and among those that the base's
VAE can show on a few pixels. (Flowers have too few pixels for two colours.)"""
VALIDATION_CONCEPTS = (
    DemoConcept("<hat-v>", "hat", (0.43, 0.55, 0.91), (0.08, 0.22, 0.39)),
    DemoConcept("<cup-v>", "cup", (0.51, 0.66, 0.26), (0.44, 0.05, 0.05)),
    DemoConcept("<cat-v>", "cat", (0.52, 0.62, 0.20), (0.47, 0.63, 0.86)),
    DemoConcept("<hat-w>", "hat", (0.61, 0.90, 0.61), (0.27, 0.40, 0.06)),
)
"""To choose settings on."""
KNOWN = (*CONCEPTS, *VALIDATION_CONCEPTS)


@dataclass(frozen=True, eq=False)
class ConceptPictures:
    """Rendered pictures of one concept.

    `images`: (N, H, W, 3); `masks`: (N, H, W), 1 where the object is; `scenes` and `prompts`: N.
    """

    images: Tensor
    masks: Tensor
    scenes: list[Scene]
    prompts: list[str]


def render_concept(
    concept: DemoConcept, people: Sequence[int], pictures: Sequence[int]
) -> ConceptPictures:
    """Pictures of different people with one concept, and where it is in them.

    Args:
        concept: what they wear or hold.
        people: identity seeds.
        pictures: picture numbers; the same names give the same pictures.
    """
    seeds = [1_000_003 * who + number for who, number in zip(people, pictures, strict=True)]
    draws = [torch.rand(8, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    plain = random_scenes(torch.stack(draws), ("photo", "cartoon"))
    scenes = [replace(scene, item=concept.kind) for scene in plain]
    images, masks = render_things(people, pictures, [_layer(scenes, [concept] * len(scenes))])
    return ConceptPictures(images, masks, scenes, [concept.prompt(scene) for scene in scenes])


def render_items(
    people: Sequence[int],
    pictures: Sequence[int],
    scenes: Sequence[Scene],
    things: Sequence[Sequence[DemoConcept]],
) -> Tensor:
    """People with any number of things that do not cover each other: (N, H, W, 3).

    Args:
        people: identity seeds.
        pictures: picture numbers.
        scenes: what else is shown; their own items do not count.
        things: what each of them has, equally many and in any order.
    """
    layers = [_layer(scenes, things_) for things_ in zip(*things, strict=True)]
    return render_things(people, pictures, layers)[0]


def _layer(scenes: Sequence[Scene], things: Sequence[DemoConcept]) -> tuple[list[Scene], Tensor]:
    """Scenes with one thing each, and its colours."""
    shown = [replace(s, item=thing.kind) for s, thing in zip(scenes, things, strict=True)]
    return shown, torch.tensor([(thing.main, thing.accent) for thing in things])
