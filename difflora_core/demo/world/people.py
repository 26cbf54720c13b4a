"""One person, painted from identity parameters and a pose (see renderer.py for the frame)."""

from __future__ import annotations

import torch
from torch import Tensor

from .renderer import COLOURS, Painter, Pose, capsule, colours_of, columns, ellipse, palette, tint

_EYE_HEIGHT, _MOUTH_HEIGHT, _NOSE_HEIGHT = -0.02, 0.60, 0.27


def draw_person(painter: Painter, parameters: Tensor, pose: Pose, cartoon: Tensor) -> None:
    """Paint a person with what they wear or hold.

    Args:
        painter: the pictures.
        parameters: (B, P) identity vectors.
        pose: one per picture.
        cartoon: (B,) bool, ink lines.
    """
    painter.enter(pose, cartoon)
    p, colour = columns(parameters), colours_of(columns(parameters))
    yaw = pose.yaw[:, None, None] * 0.1
    _hair_behind(painter, p, colour["hair"])
    _body(painter, colour["skin"], palette(COLOURS, pose.shirt))
    face = _head(painter, p, colour)
    mood = [(pose.expression == k).float()[:, None, None] for k in range(4)]
    _beard(painter, p, face, colour["hair"])
    _eyes(painter, p, colour, yaw, mood)
    _nose_and_mouth(painter, p, colour, yaw, mood)
    _hair_in_front(painter, p, colour["hair"])
    _glasses(painter, p, yaw)
    draw_item(painter, pose)


def keypoints(parameters: Tensor, pose: Pose) -> Tensor:
    """Left eye, right eye, nose, left and right mouth corner in pixels: (B, 5, 2)."""
    p = {k: x[:, 0, 0] for k, x in columns(parameters).items()}
    yaw, zero = pose.yaw * 0.1, torch.zeros_like(pose.yaw)
    ex, mw = _eye_offset(p), _mouth_half_width(p)
    u = torch.stack([yaw - ex, yaw + ex, yaw * 1.3, yaw - mw, yaw + mw], 1)
    heights = (_EYE_HEIGHT, _EYE_HEIGHT, _NOSE_HEIGHT + 0.08, _MOUTH_HEIGHT, _MOUTH_HEIGHT)
    v = torch.stack([zero + h for h in heights], 1)
    return _to_pixels(u, v, pose)


def face_box(parameters: Tensor, pose: Pose) -> Tensor:
    """Face boxes x0, y0, x1, y1 in pixels: (B, 4); forehead to chin, ear to ear."""
    p = {k: x[:, 0, 0] for k, x in columns(parameters).items()}
    w, h = _face_half_width(p), _chin(p)
    u = torch.stack([-w, w, torch.zeros_like(w), torch.zeros_like(w)], 1)
    v = torch.stack([torch.zeros_like(w), torch.zeros_like(w), -0.8 + 0 * w, h], 1)
    points = _to_pixels(u, v, pose)
    return torch.cat([points.amin(1), points.amax(1)], 1)


def _to_pixels(u: Tensor, v: Tensor, pose: Pose) -> Tensor:
    cos, sin, s = torch.cos(pose.roll)[:, None], torch.sin(pose.roll)[:, None], pose.scale[:, None]
    x = pose.x[:, None] + s * (cos * u - sin * v)
    y = pose.y[:, None] + s * (sin * u + cos * v)
    return torch.stack([x, y], -1)


def _face_half_width(p: dict[str, Tensor]) -> Tensor:
    return 0.74 + 0.14 * p["face_width"]


def _chin(p: dict[str, Tensor]) -> Tensor:
    return 1.0 + 0.14 * p["face_height"]


def _eye_offset(p: dict[str, Tensor]) -> Tensor:
    return 0.35 + 0.07 * p["eye_spacing"]


def _mouth_half_width(p: dict[str, Tensor]) -> Tensor:
    return 0.25 + 0.11 * p["mouth_width"]


def _hair_half_width(p: dict[str, Tensor]) -> Tensor:
    return _face_half_width(p) + 0.13 + 0.13 * p["hair_volume"]


def _hair_behind(painter: Painter, p: dict[str, Tensor], hair: Tensor) -> None:
    u, v = painter.u, painter.v
    half = _hair_half_width(p)
    curl = (p["hair_curl"] + 1) / 2
    angle = torch.atan2(v, u)
    waves = 0.07 * curl * torch.where(v < 0, torch.sin(14 * angle), torch.sin(11 * v))
    top = ellipse(u, v + 0.15, half, 1.0 + 0.14 * p["hair_volume"])
    end = 0.42 + 0.78 * p["hair_length"]
    sides = torch.maximum(torch.maximum(u.abs() - half, -v - 0.15), v - end)
    painter.shape(torch.minimum(top, sides) - waves, hair * 0.86)


def _body(painter: Painter, skin: Tensor, shirt: Tensor) -> None:
    u, v = painter.u, painter.v
    painter.shape(torch.maximum(u.abs() - 0.30, (v - 1.1).abs() - 0.5), skin * 0.86)
    painter.shape(ellipse(u, v - 2.12, 1.45, 0.98), shirt)
    painter.fill(painter.cover(ellipse(u, v - 1.18, 0.36, 0.22)), skin * 0.86)


def _head(painter: Painter, p: dict[str, Tensor], colour: dict[str, Tensor]) -> Tensor:
    u, v, skin = painter.u, painter.v, colour["skin"]
    width, chin = _face_half_width(p), _chin(p)
    for side in (-1, 1):
        painter.shape(ellipse(u - side * width, v - 0.08, 0.13, 0.20), skin * 0.92)
    taper = (v.clamp(min=0) / chin).clamp(max=1.2) ** 2 * (0.26 - 0.22 * p["jaw"])
    narrowed = u / (1 - taper)
    exponent = 2.3 + 0.7 * p["jaw"].clamp(min=0)
    below = ((narrowed.abs() / width) ** exponent + (v.abs() / chin) ** exponent) + 1e-9
    lower = (below ** (1 / exponent) - 1) * width
    distance = torch.where(v > 0, lower, ellipse(u, v, width, 0.98))
    face = painter.shape(distance, skin)
    cheek = painter.cover(ellipse(u.abs() - 0.5 * width / 0.74, v - 0.34, 0.14, 0.10) - 0.02)
    painter.fill(cheek * 0.16, tint((0.9, 0.35, 0.3), len(skin)))
    return face


def _beard(painter: Painter, p: dict[str, Tensor], face: Tensor, hair: Tensor) -> None:
    u, v = painter.u, painter.v
    amount = p["beard"].clamp(0, 1)
    edge = 0.62 - 0.34 * amount - 0.25 * u.abs()
    chin_hair = torch.maximum(edge - v, -ellipse(u, v - _MOUTH_HEIGHT, 0.30, 0.11))
    moustache = torch.maximum(ellipse(u, v - 0.47, 0.30, 0.075), -u.abs() - 1)
    grown = (p["beard"] > 0).float()
    coverage = torch.maximum(painter.cover(chin_hair), painter.cover(moustache)) * face * grown
    painter.fill(coverage * (0.55 + 0.4 * amount), hair * 0.8)


def _eyes(
    painter: Painter,
    p: dict[str, Tensor],
    colour: dict[str, Tensor],
    yaw: Tensor,
    mood: list[Tensor],
) -> None:
    n = len(colour["eye"])
    _, smiling, surprised, sad = mood
    size, thick = p["eye_size"], 0.048 + 0.034 * p["brow_thickness"]
    open_height = (0.125 + 0.035 * size) * (1 - 0.25 * smiling + 0.25 * surprised)
    brow_v = _EYE_HEIGHT - 0.27 - 0.02 * size - 0.09 * surprised
    tilt = 0.10 * p["brow_angle"] + 0.07 * sad
    for side in (-1, 1):
        u, v = (painter.u - yaw) * side - _eye_offset(p), painter.v - _EYE_HEIGHT
        white = painter.shape(
            ellipse(u, v, 0.185 + 0.04 * size, open_height), tint((0.97,) * 3, n), 0.6
        )
        gaze = u - side * yaw * 0.4
        painter.fill(
            painter.cover(ellipse(gaze, v, *(0.108 + 0.02 * size,) * 2)) * white, colour["eye"]
        )
        painter.fill(painter.cover(ellipse(gaze, v, 0.048, 0.048)) * white, tint(_PUPIL, n))
        lid = torch.maximum(ellipse(u, v, 0.20 + 0.04 * size, open_height + 0.035), v + 0.055)
        painter.fill(painter.cover(lid) * 0.75 * (1 - white * 0.6), tint(_PUPIL, n))
        ends = (0 * tilt - 0.19, -tilt * -1, 0 * tilt + 0.19, -tilt)
        brow = capsule(u, painter.v - brow_v, (ends[0], -tilt, ends[2], tilt)) - thick
        painter.fill(painter.cover(brow), colour["hair"] * 0.62)


_PUPIL = (0.05, 0.04, 0.05)


def _nose_and_mouth(
    painter: Painter,
    p: dict[str, Tensor],
    colour: dict[str, Tensor],
    yaw: Tensor,
    mood: list[Tensor],
) -> None:
    _, smiling, surprised, sad = mood
    u, v = painter.u - yaw * 1.3, painter.v
    wide = 0.105 + 0.055 * p["nose"]
    painter.fill(
        painter.cover(ellipse(u, v - _NOSE_HEIGHT - 0.07, wide, 0.055)) * 0.85,
        colour["skin"] * 0.70,
    )
    bridge = torch.maximum(ellipse(u, v - 0.12, wide * 0.55, 0.22), -v - 0.05)
    painter.fill(painter.cover(bridge) * 0.35, (colour["skin"] * 1.15).clamp(0, 1))
    u = painter.u - yaw
    half = _mouth_half_width(p)
    bend = (0.10 * smiling - 0.09 * sad) * (1 - 2 * (u / half) ** 2)
    thick = 0.052 + 0.028 * p["lips"] + 0.015 * smiling
    mouth = ellipse(
        u, v - _MOUTH_HEIGHT - bend, half * (1 - 0.3 * surprised), thick + 0.10 * surprised
    )
    painter.fill(painter.cover(mouth), colour["lips"])
    hole = ellipse(u, v - _MOUTH_HEIGHT, half * 0.5, 0.085)
    painter.fill(painter.cover(hole) * surprised, tint((0.25, 0.05, 0.07), len(colour["lips"])))
    teeth = ellipse(u, v - _MOUTH_HEIGHT - bend, half * 0.72, 0.026)
    painter.fill(painter.cover(teeth) * smiling, tint((0.97,) * 3, len(colour["lips"])))


def _hair_in_front(painter: Painter, p: dict[str, Tensor], hair: Tensor) -> None:
    u, v = painter.u, painter.v
    half = _hair_half_width(p)
    line = -0.66 + 0.24 * p["fringe"] + 0.42 * p["parting"] * u
    line = line + 0.10 * ((p["hair_curl"] + 1) / 2) * torch.sin(13 * u)
    cap = torch.maximum(ellipse(u, v + 0.15, half, 1.0 + 0.14 * p["hair_volume"]), v - line)
    end = 0.42 + 0.78 * p["hair_length"]
    width = _face_half_width(p) - 0.07
    lock = torch.maximum(torch.maximum(width - u.abs(), u.abs() - half), (v - end).clamp(min=-0.02))
    strands = torch.maximum(lock, -v - 0.7)
    painter.shape(torch.minimum(cap, strands), hair, 0.5)


def _glasses(painter: Painter, p: dict[str, Tensor], yaw: Tensor) -> None:
    shown = (p["glasses"] > 0).float()
    amount = p["glasses"].clamp(0, 1)
    width = 0.024 + 0.040 * amount
    u, v = painter.u - yaw, painter.v - _EYE_HEIGHT - 0.02
    ring = (ellipse(u.abs() - _eye_offset(p), v, 0.27, 0.23).abs()) - width
    bridge = torch.maximum(u.abs() - _eye_offset(p) + 0.25, (v + 0.03).abs() - width)
    arms = torch.maximum(
        torch.maximum(_eye_offset(p) + 0.26 - u.abs(), u.abs() - 0.85), v.abs() - width
    )
    frame = torch.minimum(ring, torch.minimum(bridge, arms))
    painter.fill(painter.cover(frame) * shown, tint((0.10, 0.08, 0.12), len(painter.picture)))


def draw_item(painter: Painter, pose: Pose) -> None:
    """Paint what the person wears or holds: hat, cup, cat or flower (index in `pose.item`)."""
    paint = pose.item_paint
    colour = palette(COLOURS, pose.item_colour) if paint is None else paint[:, 0]
    shape = pose.item_shape[:, None, None]
    for index, draw in enumerate((_hat, _cup, _cat, _flower), start=1):
        before = painter.visible
        painter.visible = before * (pose.item == index).float()[:, None, None]
        if bool(painter.visible.any()):
            draw(painter, colour, shape)
            if paint is not None:
                painter.fill(painter.cover(_accent(painter, index)), paint[:, 1])
        painter.visible = before


def _accent(painter: Painter, index: int) -> Tensor:
    """Distance to the accent of an item: hat band, cup stripe, cat's bib, heart of a flower."""
    u, v = painter.u, painter.v
    if index == 1:
        return torch.maximum(u.abs() - 0.8, (v + 0.86).abs() - 0.11)
    if index == 2:
        return torch.maximum((u - 1.02).abs() - 0.26, (v - 1.14).abs() - 0.11)
    if index == 3:
        return ellipse(u + 1.02, v - 1.52, 0.26, 0.30)
    return torch.sqrt((u - 1.12) ** 2 + (v - 0.86) ** 2 + 1e-9) - 0.16


def _hat(painter: Painter, colour: Tensor, shape: Tensor) -> None:
    u, v = painter.u, painter.v
    tall = 0.34 + 0.16 * shape
    crown = torch.maximum(ellipse(u, v + 0.72, 0.84, tall + 0.25), v + 0.70)
    painter.shape(crown, colour)
    painter.shape(ellipse(u, v + 0.70, 1.0 + 0.18 * shape, 0.10), colour * 0.8)
    painter.fill(
        painter.cover(torch.maximum(u.abs() - 0.8, (v + 0.82).abs() - 0.05)), colour * 0.55 + 0.3
    )


def _cup(painter: Painter, colour: Tensor, shape: Tensor) -> None:
    u, v = painter.u - 1.02, painter.v - 1.12
    wide = 0.27 + 0.07 * shape
    painter.shape((ellipse(u - wide - 0.06, v, 0.15, 0.17).abs()) - 0.035, colour)
    painter.shape(torch.maximum(u.abs() - wide + 0.05 * v, v.abs() - 0.32), colour)
    painter.fill(painter.cover(ellipse(u, v + 0.30, wide, 0.06)), colour * 0.5)


def _cat(painter: Painter, colour: Tensor, shape: Tensor) -> None:
    u, v = painter.u + 1.02, painter.v - 1.10
    apart = 0.25 + 0.05 * shape
    for side in (-1, 1):
        across = (u - side * apart).abs()
        painter.shape(torch.maximum(across - 0.42 * (v + 0.52), v + 0.1), colour * 0.9)
    painter.shape(ellipse(u, v - 0.45, 0.46, 0.50), colour * 0.92)
    painter.shape(ellipse(u, v, 0.40, 0.34), colour)
    dark = (colour.mean(1, keepdim=True) < 0.4).float()
    eye = torch.lerp(
        tint((0.06, 0.05, 0.05), len(colour)), tint((0.9, 0.85, 0.3), len(colour)), dark
    )
    painter.fill(painter.cover(ellipse(u.abs() - 0.16, v + 0.03, 0.065, 0.085)), eye)
    painter.fill(
        painter.cover(ellipse(u, v - 0.11, 0.06, 0.04)), tint((0.85, 0.5, 0.5), len(colour))
    )


def _flower(painter: Painter, colour: Tensor, shape: Tensor) -> None:
    u, v = painter.u - 1.12, painter.v - 0.86
    stem = torch.maximum(u.abs() - 0.04, (v - 0.45).abs() - 0.42)
    painter.shape(stem, tint((0.15, 0.45, 0.18), len(colour)))
    radius, angle = torch.sqrt(u**2 + v**2 + 1e-9), torch.atan2(v, u)
    petals = radius - 0.24 - 0.09 * torch.cos((5 + 0 * shape) * angle + shape)
    painter.shape(petals, colour)
    painter.fill(painter.cover(radius - 0.10), tint((0.95, 0.8, 0.2), len(colour)))
