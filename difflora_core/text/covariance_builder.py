"""C of a pair of text encoders from captions: the only corpus that Perfusion needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from .covariance import RIDGE, Covariance, SecondMoment
from .new_words import ConceptText, text_probe

BATCH = 64


@torch.no_grad()
def build_covariance(
    text: ConceptText,
    captions: Sequence[str],
    ridge: float = RIDGE,
    progress: Callable[[int, int, dict[str, float]], None] | None = None,
) -> Covariance:
    """Uncentred second moment of the encodings of all real tokens (perfusion.md 6).

    Start, end and padding do not count; the sum is divided by the number of tokens.

    Args:
        text: the frozen text encoders.
        captions: any texts; thousands give a C that can be inverted.
        ridge: see `Covariance`.
        progress: called as (captions done, captions, metrics); it may raise to stop.

    Raises:
        ConfigError: no captions, or C cannot be inverted.
    """
    probe = text_probe(text)
    moment: SecondMoment | None = None
    for start in range(0, len(captions), BATCH):
        encoded = text.encode(captions[start : start + BATCH], {}, padded=False)
        real = encoded.real.to(encoded.context.device)
        moment = moment or SecondMoment(encoded.context.shape[-1])
        moment.add(encoded.context[real])
        if progress is not None:
            done = min(start + BATCH, len(captions))
            progress(done, len(captions), {"tokens": float(moment.count)})
    moment = moment or SecondMoment(1)
    return Covariance(moment.matrix(), moment.count, ridge, probe)
