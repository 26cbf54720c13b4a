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
MAIN_PIXELS, MARK_PIXELS = 60, 24
COLOUR_DISTANCE = 0.16


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
    masks = ((shown - hidden).abs().amax(-1) > 0.04).float()
    return ConceptPictures(shown, masks, scenes, [concept.prompt(scene) for scene in scenes])


def colour_presence(images: Tensor, concept: DemoConcept) -> Tensor:
    """How much of a concept's two colours pictures hold: (N,) in [0, 1] (ours, needs no network).

    Each colour counts by its nearest pixels, by exp(-(distance / COLOUR_DISTANCE)^2 / 2) in RGB;
    the two are multiplied, so one colour alone is little.

    Args:
        images: (N, H, W, 3) in [0, 1].
        concept: whose colours.
    """
    parts = []
    for colour, count in ((concept.main, MAIN_PIXELS), (concept.mark, MARK_PIXELS)):
        distance = (images - torch.tensor(colour)).norm(dim=-1).flatten(1)
        nearest = distance.topk(count, largest=False).values
        parts.append(torch.exp(-((nearest / COLOUR_DISTANCE) ** 2) / 2).mean(1))
    return parts[0] * parts[1]


def demo_concept_text(path: Path) -> ClipPairText:
    """The demo base's text encoders from its file."""
    text = load_text(path)
    marks = TokenMarks(START, END, (END, PAD), UNKNOWN, LENGTH)
    return ClipPairText((text.text_l, text.text_g), word_numbers, marks)
