"""The demo's text encoders, English and Chinese, as encoders that can learn words."""

from __future__ import annotations

from pathlib import Path

from ...text.clip_pair import ClipPairText, SpecialTokens
from . import chinese
from .base import load_text
from .text import END, LENGTH, PAD, START, UNKNOWN, word_numbers

SPECIAL = SpecialTokens(START, END, (END, PAD), UNKNOWN, LENGTH)


def demo_concept_text(path: Path) -> ClipPairText:
    """The demo base's text encoders from its file."""
    text = load_text(path)
    return ClipPairText((text.text_l, text.text_g), word_numbers, SPECIAL)


def chinese_text(text: chinese.ChineseText) -> ClipPairText:
    """Text encoders of the demo base that read Chinese."""
    return ClipPairText((text.text_l, text.text_g), chinese.word_numbers, SPECIAL)
