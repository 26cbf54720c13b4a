"""The demo base's text encoders as encoders that can learn words."""

from __future__ import annotations

from pathlib import Path

from ...text.clip_pair import ClipPairText, SpecialTokens
from .base import load_text
from .text import END, LENGTH, PAD, START, UNKNOWN, word_numbers


def demo_concept_text(path: Path, words: Path | None = None) -> ClipPairText:
    """The demo base's text encoders from its file; `words` as for `base.load_base`."""
    text = load_text(path, words)
    special = SpecialTokens(START, END, (END, PAD), UNKNOWN, LENGTH)
    return ClipPairText((text.text_l, text.text_g), word_numbers, special)
