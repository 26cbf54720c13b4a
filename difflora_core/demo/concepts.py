"""The demo base as something that can be taught words."""

from __future__ import annotations

from pathlib import Path

from ..training.clip_text import ClipPairText, TokenMarks
from .base import load_text
from .text import END, LENGTH, PAD, START, UNKNOWN, word_numbers


def demo_concept_text(path: Path) -> ClipPairText:
    """The demo base's text encoders from its file."""
    text = load_text(path)
    marks = TokenMarks(START, END, (END, PAD), UNKNOWN, LENGTH)
    return ClipPairText((text.text_l, text.text_g), word_numbers, marks)
