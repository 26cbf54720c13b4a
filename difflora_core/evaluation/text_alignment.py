"""Agreement of pictures with their prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import ConfigError


def clip_text_similarity(image: Tensor, text: Tensor) -> Tensor:
    """CLIP-T: raw cosine of image and prompt embeddings (not mapped to (1 + cos) / 2).

    Args:
        image: (..., E) CLIP image embeddings.
        text: (..., E) of the prompts, trigger word removed.

    Returns:
        (...) in [-1, 1].
    """
    return F.cosine_similarity(image, text, dim=-1)


def clip_score(image: Tensor, text: Tensor) -> Tensor:
    """CLIPScore, Eq. 1 of arXiv:2104.08718: 2.5 max(cos, 0); shapes as `clip_text_similarity`."""
    return 2.5 * clip_text_similarity(image, text).clamp_min(0)


def attribute_agreement(
    read: Mapping[str, Sequence[str]], asked: Sequence[Mapping[str, str]]
) -> Tensor:
    """Share of the attributes named by each prompt that a classifier reads back (ours).

    Args:
        read: attribute name to the classifier's answer for each of N pictures.
        asked: N prompts as attribute name to value; only what a prompt names counts.

    Returns:
        (N,) in [0, 1]; NaN for a prompt that names nothing.

    Raises:
        ConfigError: a prompt names an attribute that was not read, or the counts differ.
    """
    rows = []
    for number, wanted in enumerate(asked):
        missing = [name for name in wanted if name not in read or len(read[name]) != len(asked)]
        if missing:
            raise ConfigError(
                f"The attributes {missing} of picture {number} were not read back; ask a "
                "classifier that knows them for all pictures."
            )
        right = [float(read[name][number] == value) for name, value in wanted.items()]
        rows.append(sum(right) / len(right) if right else float("nan"))
    return torch.tensor(rows)
