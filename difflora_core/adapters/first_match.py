"""Where in a prompt a taught word stands, told from its encodings alone."""

from __future__ import annotations

import torch
from torch import Tensor

SHARE_OF_BEST = 0.7
"""Of the largest similarity in a prompt: from here on a token matches well."""


def first_match(encodings: Tensor, similarity: Tensor) -> Tensor:
    """The token at which the word of each concept stands (ours).

    A causal text encoder hands a word on to the tokens after it, which may match better than the
    word itself; the tokens before it know nothing of it. So it is the first that matches well. The
    start mark, always the first token, is no word; longer prompts have it again in every part.

    Args:
        encodings: (B, L, in) of whole prompts, start marks first.
        similarity: (B, L, J) of each concept.

    Returns:
        Indices (B, 1, J).
    """
    start = (encodings == encodings[..., :1, :]).all(-1)[..., None]  # B L 1
    words = similarity.masked_fill(start, -torch.inf)
    best = words.amax(-2, keepdim=True)
    enough = torch.where(best > 0, SHARE_OF_BEST * best, best)
    return (words >= enough).int().argmax(-2, keepdim=True)
