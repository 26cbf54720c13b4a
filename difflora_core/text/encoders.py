"""A pair of frozen text encoders: what recipes and nodes need of it, and its fingerprint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..errors import ConfigError

PROBE_PROMPT = "a photo of a person with a cat on a plain background"
PROBE_SIZE = 64
PROBE_TOLERANCE = 0.1

WordEmbedding = tuple[Tensor, ...]
"""Token embedding of one word in each text encoder, (D_k,)."""


@dataclass(frozen=True, eq=False)
class EncodedPrompts:
    """Encoded prompts and where things are in them.

    Args:
        context: (B, L, d) of cross-attention. pooled: (B, P).
        real: (B, L) bool, True at tokens of the text: no start, end or padding.
        positions: new word to its token number in each prompt (B,), -1 where it does not occur.
    """

    context: Tensor
    pooled: Tensor
    real: Tensor
    positions: Mapping[str, Tensor]

    def at(self, word: str) -> Tensor:
        """Encodings (n, d) at a word, of the prompts that have it."""
        place = self.positions[word].to(self.context.device)
        rows = torch.arange(len(place), device=place.device)[place >= 0]
        return self.context[rows, place[rows]]

    def select(self, index: Sequence[int]) -> EncodedPrompts:
        """Prompts by number; repeats are allowed."""
        rows = list(index)
        positions = {word: place[rows] for word, place in self.positions.items()}
        return EncodedPrompts(self.context[rows], self.pooled[rows], self.real[rows], positions)


class TextEncoders(Protocol):
    """A frozen pair of text encoders that can be taught words."""

    def tokens(self, text: str) -> list[int]:
        """Token numbers of a text, without start and end tokens."""

    def knows(self, word: str) -> bool:
        """True when a word has a token of its own already."""

    def embedding(self, token: int) -> WordEmbedding:
        """Token embedding in each encoder."""

    def encode(
        self, prompts: Sequence[str], words: Mapping[str, WordEmbedding], padded: bool = True
    ) -> EncodedPrompts:
        """Encode prompts in which new words stand literally; gradients reach their embeddings.

        Without `padded` the padding that nobody looks at may be left out, to be faster: the
        encoders are causal, so real tokens do not depend on it.
        """


@torch.no_grad()
def text_probe(text: TextEncoders) -> Tensor:
    """Fingerprint (64,) of a pair of text encoders: a few numbers of one fixed encoding."""
    encoded = text.encode([PROBE_PROMPT], {})
    mean = encoded.context[0][encoded.real[0].to(encoded.context.device)].float().mean(0)
    index = torch.linspace(0, len(mean) - 1, PROBE_SIZE).round().long()
    return mean[index.to(mean.device)].cpu()


def check_probe(expected: Tensor, got: Tensor, what: str) -> None:
    """Compare two fingerprints (64,); what differs by rounding, or by a light touch, passes.

    `what` names in the message what the expected one belongs to.

    Raises:
        ConfigError: they come from different text encoders.
    """
    same = expected.shape == got.shape
    if same:
        difference = (expected.double() - got.double()).norm() / expected.double().norm()
        same = float(difference) <= PROBE_TOLERANCE
    if not same:
        raise ConfigError(
            f"{what} was made with other text encoders than the CLIP that is connected. Use the "
            "base model it was made for."
        )
