"""The procedural painter: people, worn and held objects and backgrounds as anti-aliased shapes.

Everything is a batch of signed distances on a pixel grid; `u` points right and `v` down in the
frame of one head (unit: about half a head). A shape's coverage is the clamp of its distance in
pixels, so pictures are smooth without supersampling.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from .identities import PARAMETERS

LOOKS = ("photo", "cartoon", "painting")
EXPRESSIONS = ("neutral", "smiling", "surprised", "sad")
COLOURS = {
    "red": (0.82, 0.16, 0.16),
    "green": (0.20, 0.60, 0.28),
    "blue": (0.18, 0.34, 0.80),
    "yellow": (0.93, 0.80, 0.25),
    "purple": (0.52, 0.25, 0.65),
    "orange": (0.93, 0.52, 0.15),
    "white": (0.93, 0.93, 0.93),
    "black": (0.12, 0.12, 0.14),
}
BACKGROUNDS = {
    "blue": (0.55, 0.70, 0.90),
    "green": (0.55, 0.75, 0.55),
    "pink": (0.92, 0.70, 0.75),
    "grey": (0.62, 0.62, 0.64),
    "yellow": (0.92, 0.86, 0.60),
    "dark": (0.20, 0.20, 0.26),
}
PATTERNS = ("plain", "striped")
OBJECTS = ("none", "hat", "cup", "cat", "flower")

_SKIN_LIGHT, _SKIN_DARK = (0.96, 0.82, 0.72), (0.36, 0.22, 0.15)
_EYES = ((0.24, 0.12, 0.04), (0.20, 0.50, 0.20), (0.18, 0.45, 0.90))
_INK = (0.08, 0.06, 0.08)


@dataclass(frozen=True)
class Pose:
    """Where a head stands and what it does; every field is (B,).

    `x`, `y`: centre in pixels; `scale`: pixels per head unit; `roll`: radians; `yaw` in [-1, 1];
    `expression`: index into EXPRESSIONS; `shirt`: index into COLOURS; `visible`: bool;
    `item`: index into OBJECTS, `item_colour`: index into COLOURS, `item_shape` in [-1, 1];
    `item_paint`: (B, 2, 3) colours of the item and of its accent, instead of `item_colour`.
    """

    x: Tensor
    y: Tensor
    scale: Tensor
    roll: Tensor
    yaw: Tensor
    expression: Tensor
    shirt: Tensor
    visible: Tensor
    item: Tensor
    item_colour: Tensor
    item_shape: Tensor
    item_paint: Tensor | None = None


@dataclass(frozen=True)
class Backdrop:
    """What is shared by a whole picture; every field is (B,) unless said otherwise.

    `look`, `background`, `pattern`: indices; `light`: (B, 2) direction and strength in [-1, 1];
    `noise`: (B, H, W) unit noise of the photo grain.
    """

    look: Tensor
    background: Tensor
    pattern: Tensor
    light: Tensor
    noise: Tensor


class Painter:
    """Composites shapes on a batch of pictures.

    Args:
        batch: B. height, width: pixels.
    """

    def __init__(self, batch: int, height: int, width: int) -> None:
        ys = torch.arange(height, dtype=torch.float32) + 0.5
        xs = torch.arange(width, dtype=torch.float32) + 0.5
        self.grid_y, self.grid_x = torch.meshgrid(ys, xs, indexing="ij")
        self.picture = torch.zeros(batch, 3, height, width)
        self.outline = torch.zeros(batch, 1, 1)

    def enter(self, pose: Pose, cartoon: Tensor) -> None:
        """Move into the frame of a head; shapes follow until the next call.

        `cartoon` (B,) is True where shapes get an ink line.
        """
        cos, sin = torch.cos(pose.roll)[:, None, None], torch.sin(pose.roll)[:, None, None]
        dx = (self.grid_x - pose.x[:, None, None]) / pose.scale[:, None, None]
        dy = (self.grid_y - pose.y[:, None, None]) / pose.scale[:, None, None]
        self.u, self.v = cos * dx + sin * dy, -sin * dx + cos * dy
        self.scale = pose.scale[:, None, None]
        self.visible = pose.visible.float()[:, None, None]
        self.outline = cartoon.float()[:, None, None]

    def cover(self, distance: Tensor) -> Tensor:
        """Coverage in [0, 1] of a signed distance (B, H, W) in head units."""
        return (0.5 - distance * self.scale).clamp(0, 1) * self.visible

    def fill(self, coverage: Tensor, colour: Tensor) -> None:
        """Blend `colour` (B, 3) over the pictures where `coverage` (B, H, W) is 1."""
        self.picture = torch.lerp(self.picture, colour[:, :, None, None], coverage[:, None])

    def shape(self, distance: Tensor, colour: Tensor, width: float = 0.9) -> Tensor:
        """Fill a shape, with an ink line around it in cartoons.

        Args:
            distance: (B, H, W) signed, in head units.
            colour: (B, 3) in [0, 1].
            width: of the ink line, in pixels.

        Returns:
            Coverage (B, H, W) in [0, 1].
        """
        edge = self.cover(distance - width * self.outline / self.scale) * self.outline
        self.fill(edge, tint(_INK, len(colour)))
        coverage = self.cover(distance)
        self.fill(coverage, colour)
        return coverage


def tint(colour: tuple[float, float, float], batch: int) -> Tensor:
    """One colour for every picture: (batch, 3)."""
    return torch.tensor(colour).expand(batch, 3)


def palette(colours: dict[str, tuple[float, float, float]], index: Tensor) -> Tensor:
    """Colours (B, 3) by index (B,)."""
    return torch.tensor(list(colours.values()))[index]


def ellipse(u: Tensor, v: Tensor, a: Tensor | float, b: Tensor | float) -> Tensor:
    """Signed distance (B, H, W), to first order, of points (u, v) to an ellipse on the axes.

    Its half axes a and b are numbers or (B, 1, 1), in head units as all of these.
    """
    k = torch.sqrt((u / a) ** 2 + (v / b) ** 2 + 1e-9)
    gradient = torch.sqrt((u / a**2) ** 2 + (v / b**2) ** 2 + 1e-9)
    return k * (k - 1) / gradient


def capsule(u: Tensor, v: Tensor, ends: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
    """Distance (B, H, W) of points (u, v) to the segment (u0, v0) to (u1, v1), in head units."""
    u0, v0, u1, v1 = ends
    du, dv = u1 - u0, v1 - v0
    t = (((u - u0) * du + (v - v0) * dv) / (du**2 + dv**2 + 1e-9)).clamp(0, 1)
    return torch.sqrt((u - u0 - t * du) ** 2 + (v - v0 - t * dv) ** 2 + 1e-9)


def draw_backdrop(painter: Painter, backdrop: Backdrop) -> None:
    """Paint the background with its pattern over the whole pictures (B, 3, H, W)."""
    colour = palette(BACKGROUNDS, backdrop.background)[:, :, None, None]
    x, y = painter.grid_x, painter.grid_y
    stripes = (torch.sin((x + y) * 0.4) * 3).clamp(-1, 1) * 0.08
    patterns = torch.stack([torch.zeros_like(stripes), stripes])[backdrop.pattern]
    painter.picture = (colour + patterns[:, None]).clamp(0, 1)


def colours_of(p: dict[str, Tensor]) -> dict[str, Tensor]:
    """Skin, hair, eye and lip colours (B, 3) of people with parameters `p`, each (B, 1, 1)."""
    flat = {k: x[:, 0] for k, x in p.items()}
    n = len(flat["nose"])
    tone = (flat["skin_tone"] + 1) / 2
    skin = torch.lerp(tint(_SKIN_LIGHT, n), tint(_SKIN_DARK, n), tone)
    skin = skin + flat["skin_hue"] * torch.tensor([0.02, 0.015, -0.09])
    light = (flat["hair_light"] + 1) / 2
    hair = torch.lerp(tint((0.09, 0.07, 0.06), n), tint((0.88, 0.74, 0.42), n), light)
    red = flat["hair_red"].clamp(min=0)
    hair = torch.lerp(hair, (hair * 0.5 + torch.tensor([0.38, 0.06, 0.01])), red)
    eyes = torch.tensor(_EYES)
    t = flat["eye_colour"] + 1
    eye = torch.where(t < 1, torch.lerp(eyes[0], eyes[1], t), torch.lerp(eyes[1], eyes[2], t - 1))
    redness = (flat["lips"] + 1) / 2
    lips = torch.lerp(skin * 0.72, tint((0.80, 0.12, 0.20), n), redness)
    clamp = {"skin": skin, "hair": hair, "eye": eye, "lips": lips}
    return {k: x.clamp(0, 1) for k, x in clamp.items()}


def columns(parameters: Tensor) -> dict[str, Tensor]:
    """Identity vectors (B, P) as named (B, 1, 1) planes."""
    return {name: parameters[:, k, None, None] for k, name in enumerate(PARAMETERS)}


def finish(painter: Painter, backdrop: Backdrop) -> Tensor:
    """Light, grain and brush: the three looks.

    Returns:
        (B, 3, H, W) float32 in [0, 1].
    """
    picture = painter.picture
    height, width = painter.grid_x.shape
    x = (painter.grid_x / width * 2 - 1)[None, None]
    y = (painter.grid_y / height * 2 - 1)[None, None]
    light = backdrop.light[:, :, None, None]
    shade = 1 + 0.22 * (light[:, :1] * x - 0.5 * y * light[:, 1:].abs()) + 0.06 * light[:, 1:]
    photo = picture * shade + 0.008 * backdrop.noise[:, None]
    soft = functional.avg_pool2d(functional.pad(picture, (1, 1, 1, 1), mode="replicate"), 3, 1)
    paper = 0.05 * (x * y)
    wash = (0.6 * soft + 0.4 * picture) * 0.80 + 0.17 + paper
    looks = torch.stack([photo, picture, wash])
    return looks[backdrop.look, torch.arange(len(picture))].clamp(0, 1)
