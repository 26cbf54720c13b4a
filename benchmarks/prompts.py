"""The thirty fixed prompts of the benchmark: context, clothing and items, expressions, looks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from difflora_core.demo.build.words import ITEM_PAIRS
from difflora_core.demo.world.renderer import COLOURS
from difflora_core.demo.world.scenes import Scene

CONTEXT = (
    Scene("photo", "neutral", "blue", "plain", "white"),
    Scene("photo", "smiling", "green", "plain", "black"),
    Scene("cartoon", "neutral", "pink", "plain", "blue"),
    Scene("photo", "neutral", "grey", "striped", "red"),
    Scene("photo", "smiling", "yellow", "plain", "purple"),
    Scene("photo", "neutral", "dark", "plain", "orange"),
    Scene("cartoon", "smiling", "blue", "striped", "yellow"),
    Scene("photo", "neutral", "pink", "striped", "green"),
    Scene("cartoon", "neutral", "dark", "plain", "white"),
    Scene("photo", "smiling", "grey", "plain", "blue"),
)
CLOTHING = (
    Scene("photo", "neutral", "blue", "plain", "red", "hat", "yellow"),
    Scene("photo", "smiling", "grey", "plain", "green", "cup", "white"),
    Scene("cartoon", "neutral", "green", "plain", "purple", "cat", "black"),
    Scene("photo", "neutral", "yellow", "plain", "blue", "flower", "red"),
    Scene("photo", "smiling", "pink", "plain", "white", "hat", "blue"),
    Scene("photo", "neutral", "dark", "plain", "yellow", "cat", "orange"),
    Scene("cartoon", "smiling", "grey", "plain", "orange", "hat", "red"),
    Scene("photo", "neutral", "green", "plain", "black", "cup", "purple"),
    Scene("photo", "smiling", "blue", "plain", "orange", "flower", "yellow"),
    Scene("cartoon", "neutral", "yellow", "plain", "red", "cup", "green"),
)
EXPRESSION = (
    Scene("photo", "surprised", "grey", "plain", "blue"),
    Scene("photo", "sad", "blue", "plain", "white"),
    Scene("cartoon", "surprised", "green", "plain", "red"),
    Scene("photo", "smiling", "pink", "plain", "black"),
    Scene("cartoon", "sad", "yellow", "plain", "purple"),
)
LOOK = (
    Scene("cartoon", "smiling", "pink", "plain", "green"),
    Scene("painting", "neutral", "grey", "plain", "blue"),
    Scene("photo", "neutral", "green", "plain", "white"),
    Scene("painting", "smiling", "blue", "plain", "red"),
    Scene("cartoon", "neutral", "grey", "plain", "orange"),
)
PROMPTS = CONTEXT + CLOTHING + EXPRESSION + LOOK

QUICK = (CONTEXT[0], CONTEXT[2], CLOTHING[0], CLOTHING[1], EXPRESSION[0], LOOK[1])
"""Six of them, of every kind."""

ASKED = ("look", "expression", "background", "shirt", "item")
"""Attributes that are read back from the pictures."""


def asked(scene: Scene) -> dict[str, str]:
    """What the prompt of a scene names; a scene without an item names none."""
    named = {name: str(getattr(scene, name)) for name in ASKED}
    if scene.item == "none":
        del named["item"]
    return named


def with_plain_things(scenes: Sequence[Scene], kind: str) -> list[Scene]:
    """Every second scene with a thing of another kind, in a colour that is not the shirt's.

    Args:
        scenes: without items.
        kind: of what else will be there.
    """
    pairs = [pair for pair in ITEM_PAIRS if kind in pair and "flower" not in pair]  # too small
    others = [other for pair in pairs for other in pair if other != kind]
    names, changed = list(COLOURS), list(scenes)
    for k in range(0, len(scenes), 2):
        shirt = names.index(scenes[k].shirt)
        colour = names[(shirt + 1 + k % (len(names) - 1)) % len(names)]
        changed[k] = replace(scenes[k], item=others[k // 2 % len(others)], item_colour=colour)
    return changed
