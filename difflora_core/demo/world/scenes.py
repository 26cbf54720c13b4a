"""Scenes: what a picture shows besides who is on it, and the caption that says so.

A picture is named by (identity seed, picture number); the same name always gives the same picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .identities import PARAMETERS, identity_parameters
from .people import draw_person, face_box, keypoints
from .renderer import (
    BACKGROUNDS,
    COLOURS,
    EXPRESSIONS,
    LOOKS,
    OBJECTS,
    PATTERNS,
    Backdrop,
    Painter,
    Pose,
    draw_backdrop,
    finish,
)

PICTURE_SIZE = 64
"""Height of every picture and width of a portrait, in pixels; wide pictures are twice as wide."""

ITEM_PHRASES = {
    "hat": "wearing a {}",
    "cup": "holding a {}",
    "cat": "with a {}",
    "flower": "holding a {}",
}
SEEN = 0.04
"""By how much a pixel changes where a thing is drawn."""

_DRAWS = 28


@dataclass(frozen=True)
class Scene:
    """Attributes of one portrait, all named by the caption.

    `look`, `expression`, `background`, `pattern`, `shirt`, `item`, `item_colour`: names.
    """

    look: str
    expression: str
    background: str
    pattern: str
    shirt: str
    item: str = "none"
    item_colour: str = "red"

    def caption(self, who: str = "a person") -> str:
        """The prompt that asks for this scene."""
        words = [f"{self.look} of {who}", self.expression]
        if self.pattern == "plain":
            words.append(f"{self.background} background")
        else:
            words.append(f"{self.pattern} {self.background} background")
        words.append(f"{self.shirt} shirt")
        if self.item != "none":
            words.append(ITEM_PHRASES[self.item].format(f"{self.item_colour} {self.item}"))
        return ", ".join(words)


@dataclass(frozen=True)
class Pictures:
    """A batch of rendered pictures.

    `images`: (B, H, W, 3) float32 in [0, 1]; `scenes`: one per picture (of the left person);
    `captions`: full prompts; `keypoints`: (B, people, 5, 2) and `boxes`: (B, people, 4) in pixels.
    """

    images: Tensor
    scenes: list[Scene]
    captions: list[str]
    keypoints: Tensor
    boxes: Tensor


def random_scenes(draws: Tensor, looks: Sequence[str] = LOOKS) -> list[Scene]:
    """Scenes from uniform draws (B, >= 8), by column, so equal draws give equal scenes."""
    scenes = []
    for d in draws.tolist():
        item = OBJECTS[1 + int(d[5] * 4)] if d[6] < 0.4 else "none"
        scenes.append(
            Scene(
                look=looks[int(d[0] * len(looks))],
                expression=EXPRESSIONS[int(d[1] * len(EXPRESSIONS))],
                background=list(BACKGROUNDS)[int(d[2] * len(BACKGROUNDS))],
                pattern=PATTERNS[int(d[3] > 0.7)],
                shirt=list(COLOURS)[int(d[4] * len(COLOURS))],
                item=item,
                item_colour=list(COLOURS)[int(d[7] * len(COLOURS))],
            )
        )
    return scenes


def render_portraits(
    identities: Sequence[int],
    pictures: Sequence[int],
    scenes: Sequence[Scene] | None = None,
    looks: Sequence[str] = LOOKS,
    describe: float = 0.0,
    spread: float = 1.0,
    item_paint: Tensor | None = None,
) -> Pictures:
    """Render one portrait for each (identity seed, picture number).

    Args:
        identities: B seeds.
        pictures: B picture numbers.
        scenes: what to show; drawn from the name of the picture when None.
        looks: looks to draw from.
        describe: share of captions that also describe the person.
        spread: how much more place, size and roll of the head vary than in a usual portrait.
        item_paint: (B, 2, 3) own colours of the items, see `Pose`.
    """
    draws = _draws(identities, pictures)
    scenes = random_scenes(draws, looks) if scenes is None else list(scenes)
    parameters = identity_parameters(identities)
    pose = _pose(draws[:, 8:], scenes, PICTURE_SIZE / 2, 20.0, spread)
    pose = replace(pose, item_paint=item_paint)
    images = _paint([(parameters, pose)], scenes, draws, PICTURE_SIZE)
    captions = []
    for k, scene in enumerate(scenes):
        described = float(draws[k, 27]) < describe
        who = describe_person(parameters[k], float(draws[k, 26])) if described else "a person"
        captions.append(scene.caption(who))
    points, boxes = keypoints(parameters, pose), face_box(parameters, pose)
    return Pictures(images, scenes, captions, points[:, None], boxes[:, None])


def render_things(
    identities: Sequence[int],
    pictures: Sequence[int],
    layers: Sequence[tuple[Sequence[Scene], Tensor | None]],
) -> tuple[Tensor, Tensor]:
    """Portraits with several things that do not cover each other.

    Args:
        identities: B seeds.
        pictures: B picture numbers.
        layers: for each thing the B scenes with it as item, and its `item_paint`.

    Returns:
        pictures (B, H, W, 3), and where any of the things is (B, H, W), 0 or 1.
    """
    plain = [replace(scene, item="none") for scene in layers[0][0]]
    bare = render_portraits(identities, pictures, plain).images
    images, masks = bare.clone(), torch.zeros(bare.shape[:-1])
    for scenes, paint in layers:
        drawn = render_portraits(identities, pictures, scenes, item_paint=paint).images
        there = (drawn - bare).abs().amax(-1) > SEEN
        images = torch.where(there[..., None], drawn, images)
        masks = torch.maximum(masks, there.float())
    return images, masks


def render_pairs(left: Sequence[int], right: Sequence[int], pictures: Sequence[int]) -> Pictures:
    """Render wide pictures (64 x 128) with two people side by side."""
    mixed = [1_000_003 * a + b for a, b in zip(left, right, strict=True)]
    draws, other = _draws(mixed, pictures), _draws(mixed, [p + 500_000 for p in pictures])
    scenes, others = random_scenes(draws), random_scenes(other)
    people = [identity_parameters(left), identity_parameters(right)]
    poses = [
        _pose(draws[:, 8:], scenes, PICTURE_SIZE * 0.5, 18.5),
        _pose(other[:, 8:], others, PICTURE_SIZE * 1.5, 18.5),
    ]
    images = _paint(list(zip(people, poses, strict=True)), scenes, draws, 2 * PICTURE_SIZE)
    captions = []
    for a, b in zip(scenes, others, strict=True):
        background = f"{a.background} background"
        captions.append(f"{a.look} of two people, {background}, {a.shirt} shirt, {b.shirt} shirt")
    points = torch.stack([keypoints(x, y) for x, y in zip(people, poses, strict=True)], 1)
    boxes = torch.stack([face_box(x, y) for x, y in zip(people, poses, strict=True)], 1)
    return Pictures(images, scenes, captions, points, boxes)


def describe_person(parameters: Tensor, draw: float) -> str:
    """A person in words, as a caption writer would put it; `draw` in [0, 1) varies what it says."""
    p = dict(zip(PARAMETERS, parameters.tolist(), strict=True))
    length = "long" if p["hair_length"] > 0.25 else "short" if p["hair_length"] < -0.25 else ""
    shade = "red" if p["hair_red"] > 0.4 else "blonde" if p["hair_light"] > 0.3 else "dark"
    words = f"a person with {length} {shade} hair".replace("  ", " ")
    if draw < 0.5:
        tone = "dark" if p["skin_tone"] > 0.25 else "light" if p["skin_tone"] < -0.25 else "brown"
        words += f", {tone} skin"
    if draw > 0.25:
        words += ", glasses" if p["glasses"] > 0 else ""
        words += ", beard" if p["beard"] > 0 else ""
    if 0.3 < draw < 0.7:
        eyes = "blue" if p["eye_colour"] > 0.4 else "brown" if p["eye_colour"] < -0.4 else "green"
        words += f", {eyes} eyes"
    return words


def _draws(identities: Sequence[int], pictures: Sequence[int]) -> Tensor:
    rows = []
    for identity, picture in zip(identities, pictures, strict=True):
        seed = (identity * 1_000_033 + picture * 7_777_777 + 12_345) % (2**62)
        rows.append(torch.rand(_DRAWS, generator=torch.Generator().manual_seed(seed)))
    return torch.stack(rows)


def _pose(
    draws: Tensor, scenes: Sequence[Scene], centre: float, scale: float, spread: float = 1.0
) -> Pose:
    d = draws * 2 - 1
    colours, looks = list(COLOURS), list(OBJECTS)
    return Pose(
        x=centre + 2.5 * spread * d[:, 0],
        y=PICTURE_SIZE * 0.48 + 1.5 * spread * d[:, 1],
        scale=scale * (1 + 0.09 * spread * d[:, 2]),
        roll=0.14 * spread * d[:, 3],
        yaw=d[:, 4],
        expression=torch.tensor([EXPRESSIONS.index(s.expression) for s in scenes]),
        shirt=torch.tensor([colours.index(s.shirt) for s in scenes]),
        visible=torch.ones(len(scenes), dtype=torch.bool),
        item=torch.tensor([looks.index(s.item) for s in scenes]),
        item_colour=torch.tensor([colours.index(s.item_colour) for s in scenes]),
        item_shape=d[:, 5],
    )


def _paint(
    people: Sequence[tuple[Tensor, Pose]], scenes: Sequence[Scene], draws: Tensor, width: int
) -> Tensor:
    count = len(scenes)
    generator = torch.Generator().manual_seed(int(draws[0, 14] * 2**30))
    backdrop = Backdrop(
        look=torch.tensor([LOOKS.index(s.look) for s in scenes]),
        background=torch.tensor([list(BACKGROUNDS).index(s.background) for s in scenes]),
        pattern=torch.tensor([PATTERNS.index(s.pattern) for s in scenes]),
        light=draws[:, 16:18] * 2 - 1,
        noise=torch.randn(count, PICTURE_SIZE, width, generator=generator),
    )
    painter = Painter(count, PICTURE_SIZE, width)
    draw_backdrop(painter, backdrop)
    cartoon = backdrop.look == LOOKS.index("cartoon")
    for parameters, pose in people:
        draw_person(painter, parameters, pose, cartoon)
    return finish(painter, backdrop).permute(0, 2, 3, 1)
