"""Concepts of the demo world: objects with looks that no caption can name, and who can learn them.

A concept is a hat, cup, cat or flower in two colours of its own. The base model has seen such
objects in eight plain colours, never these.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..training.clip_text import ClipPairText, TokenMarks
from .base import load_text
from .scenes import Scene, random_scenes, render_portraits
from .text import END, LENGTH, PAD, START, UNKNOWN, word_numbers

ITEM_PHRASES = {
    "hat": "wearing a {}",
    "cup": "holding a {}",
    "cat": "with a {}",
    "flower": "holding a {}",
}
SEEN = 0.04
"""By how much a pixel changes where a thing is drawn."""


@dataclass(frozen=True)
class DemoConcept:
    """A thing to teach: its word, its kind, and its two colours."""

    word: str
    kind: str
    main: tuple[float, float, float]
    mark: tuple[float, float, float]

    def prompt(self, scene: Scene, word: str | None = None) -> str:
        """Prompt of a scene with this concept under its own word, or another one."""
        plain = replace(scene, item="none").caption()
        return f"{plain}, {ITEM_PHRASES[self.kind].format(word or self.word)}"


CONCEPTS = (
    DemoConcept("<hat-a>", "hat", (0.95, 0.45, 0.70), (0.10, 0.75, 0.75)),
    DemoConcept("<hat-b>", "hat", (0.38, 0.40, 0.02), (0.98, 0.70, 0.98)),
    DemoConcept("<cup-a>", "cup", (0.10, 0.75, 0.75), (0.98, 0.30, 0.10)),
    DemoConcept("<cup-b>", "cup", (0.60, 0.95, 0.20), (0.30, 0.05, 0.35)),
    DemoConcept("<cat-a>", "cat", (0.30, 0.85, 0.90), (0.98, 0.85, 0.95)),
    DemoConcept("<cat-b>", "cat", (0.85, 0.30, 0.95), (0.12, 0.08, 0.45)),
    DemoConcept("<flower-a>", "flower", (0.10, 0.85, 0.70), (0.95, 0.10, 0.55)),
    DemoConcept("<flower-b>", "flower", (0.05, 0.28, 0.32), (0.70, 0.98, 0.95)),
)
"""Two of each kind; their colours are far from the eight that captions name."""


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
    paint = torch.tensor([concept.main, concept.mark]).expand(len(scenes), 2, 3)
    shown = render_portraits(people, pictures, scenes, item_paint=paint).images
    bare = [replace(scene, item="none") for scene in scenes]
    hidden = render_portraits(people, pictures, bare).images
    masks = ((shown - hidden).abs().amax(-1) > SEEN).float()
    return ConceptPictures(shown, masks, scenes, [concept.prompt(scene) for scene in scenes])


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
        things: what each of them has, in any order.
    """
    bare = render_portraits(people, pictures, [replace(s, item="none") for s in scenes]).images
    images = bare.clone()
    for number in range(max(map(len, things), default=0)):
        own = [several[number] if number < len(several) else None for several in things]
        shown = [
            replace(scene, item="none" if one is None else one.kind)
            for scene, one in zip(scenes, own, strict=True)
        ]
        black = (0.0, 0.0, 0.0)
        paint = torch.tensor(
            [(black, black) if one is None else (one.main, one.mark) for one in own]
        )
        drawn = render_portraits(people, pictures, shown, item_paint=paint).images
        there = (drawn - bare).abs().amax(-1, keepdim=True) > SEEN
        images = torch.where(there, drawn, images)
    return images


def demo_concept_text(path: Path) -> ClipPairText:
    """The demo base's text encoders from its file."""
    text = load_text(path)
    marks = TokenMarks(START, END, (END, PAD), UNKNOWN, LENGTH)
    return ClipPairText((text.text_l, text.text_g), word_numbers, marks)
