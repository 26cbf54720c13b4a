"""A pair of frozen text encoders: what recipes and nodes need of it, and its fingerprint."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..errors import ConfigError, counted

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

    def since(self, word: str) -> Tensor:
        """Tokens since a word was written (B, L): 0 at the word; infinity where it is not heard."""
        place = self.positions[word].to(self.context.device)[:, None]
        distance = torch.arange(self.context.shape[1], device=place.device)[None] - place
        heard = (place >= 0) & (distance >= 0)
        return distance.float().masked_fill(~heard, torch.inf)

    def select(self, index: Sequence[int]) -> EncodedPrompts:
        """Prompts by number; repeats are allowed."""
        rows = list(index)
        positions = {word: place[rows] for word, place in self.positions.items()}
        return EncodedPrompts(self.context[rows], self.pooled[rows], self.real[rows], positions)


BLOCKS = 4
"""Blocks of tokens of the longest prompt."""


def token_blocks(
    pieces: Sequence[Sequence[int | str]], size: int, words: Sequence[str] = ()
) -> list[list[Sequence[int | str]]]:
    """The tokens of each prompt in blocks of at most `size`, as hosts read long prompts.

    Args:
        pieces: tokens of each prompt, without start and end.
        size: tokens of a block, without start and end.
        words: new words, which must stand in a prompt of one block.

    Raises:
        ConfigError: a prompt is longer than BLOCKS blocks, or than one where words are taught.
    """
    longest, most = max(map(len, pieces)), 1 if words else BLOCKS
    if longest > most * size:
        why = " of a taught word" if words else ""
        raise ConfigError(
            f"A prompt has {counted(longest, 'token')}; the text encoders read up to "
            f"{most * size}{why}. Shorten it."
        )
    starts = (range(0, max(len(piece), 1), size) for piece in pieces)
    rows = zip(pieces, starts, strict=True)
    return [[piece[start : start + size] for start in own] for piece, own in rows]


def joined_blocks(
    context: Tensor, pooled: Tensor, real: Tensor, counts: Sequence[int]
) -> EncodedPrompts:
    """Encoded blocks as prompts: contexts one behind the other, pooled vectors of first blocks.

    Args:
        context: (n, L, d) of all blocks.
        pooled: (n, P).
        real: (n, L), see `EncodedPrompts`.
        counts: blocks of each prompt; their sum is n.
    """
    parts = [part.split(list(counts)) for part in (context, pooled, real)]
    rows = [
        EncodedPrompts(own.flatten(0, 1)[None], first[:1], marks.flatten()[None], {})
        for own, first, marks in zip(*parts, strict=True)
    ]
    return together(rows)


def together(rows: Sequence[EncodedPrompts]) -> EncodedPrompts:
    """Prompts of any lengths as one batch, without the places of words.

    Shorter contexts are repeated, which cross-attention does not notice: softmax over n copies of
    the same keys gives each 1 / n of the weight. So hosts put prompts of other lengths together.
    """
    length = math.lcm(*(row.context.shape[1] for row in rows))
    times = [length // row.context.shape[1] for row in rows]
    pairs = list(zip(rows, times, strict=True))
    return EncodedPrompts(
        torch.cat([row.context.repeat(1, n, 1) for row, n in pairs]),
        torch.cat([row.pooled for row in rows]),
        torch.cat([row.real.repeat(1, n) for row, n in pairs]),
        {},
    )


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

        Prompts without new words may be longer than the encoders read at once, see `token_blocks`.

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
