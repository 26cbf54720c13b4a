"""TextEncoders over two transformers CLIP text encoders, as SDXL has them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .encoders import EncodedPrompts, WordEmbedding, joined_blocks, token_blocks
from .new_words import splice


@dataclass(frozen=True)
class SpecialTokens:
    """Special token numbers: start, end, the padding of each encoder, and the unknown word's."""

    start: int
    end: int
    padding: tuple[int, ...]
    unknown: int | None = None
    length: int = 77


class ClipPairText:
    """Frozen CLIP text encoders that can be taught words.

    SDXL's conditioning: penultimate states of all encoders side by side, pooled vector of the last.

    Args:
        encoders: CLIPTextModel and CLIPTextModelWithProjection; only their embeddings are hooked,
            and only while encoding.
        tokenize: text to token numbers without special tokens, the same for both encoders.
        special: numbers of the special tokens.
    """

    def __init__(
        self,
        encoders: Sequence[nn.Module],
        tokenize: Callable[[str], list[int]],
        special: SpecialTokens,
    ) -> None:
        self.encoders, self._tokenize, self.special = tuple(encoders), tokenize, special

    def tokens(self, text: str) -> list[int]:
        """Token numbers of a text, without start and end tokens."""
        return self._tokenize(text)

    def knows(self, word: str) -> bool:
        """True when a word has a token of its own already."""
        tokens = self._tokenize(word)
        return len(tokens) == 1 and tokens[0] != self.special.unknown

    def embedding(self, token: int) -> WordEmbedding:
        """Token embedding in each encoder."""
        return tuple(_table(e).weight[token].detach().float().clone() for e in self.encoders)

    def encode(
        self, prompts: Sequence[str], words: Mapping[str, WordEmbedding], padded: bool = True
    ) -> EncodedPrompts:
        """Encode prompts in which new words stand literally; see `TextEncoders`.

        Raises:
            ConfigError: a prompt is too long, see `token_blocks`.
        """
        spliced = [splice(prompt, list(words), self._tokenize) for prompt in prompts]
        blocks = token_blocks(spliced, self.special.length - 2, list(words))
        pieces = [piece for own in blocks for piece in own]
        one_each = len(pieces) == len(prompts)
        shortest = max(map(len, pieces)) + 2
        length = self.special.length if padded or not one_each else shortest
        device = _table(self.encoders[0]).weight.device
        states: list[Tensor] = []
        pooled = torch.zeros(0)
        for number, encoder in enumerate(self.encoders):
            ids = self._ids(pieces, self.special.padding[number], length).to(device)
            own = {word: vectors[number] for word, vectors in words.items()}
            with _taught(encoder, pieces, own):
                output: Any = encoder(ids, output_hidden_states=True)
            states.append(output.hidden_states[-2])
            pooled = getattr(output, "text_embeds", pooled)
        lengths = torch.tensor([len(piece) for piece in pieces], device=device)[:, None]
        index = torch.arange(length, device=device)[None]
        real = (index >= 1) & (index <= lengths)
        context = torch.cat(states, -1)
        if not one_each:
            return joined_blocks(context, pooled, real, [len(own) for own in blocks])
        return EncodedPrompts(context, pooled, real, _positions(pieces, words))

    def _ids(self, pieces: Sequence[Sequence[int | str]], padding: int, length: int) -> Tensor:
        """Token numbers (B, length).

        New words hold the start token until their embedding is put in: CLIP reads its pooled vector
        at the first end token, and some versions at the highest number.
        """
        ids = torch.full((len(pieces), length), padding)
        for row, piece in enumerate(pieces):
            numbers = [self.special.start if isinstance(p, str) else p for p in piece]
            whole = torch.tensor([self.special.start, *numbers, self.special.end])
            ids[row, : len(whole)] = whole
        return ids


@contextmanager
def _taught(
    encoder: nn.Module, pieces: Sequence[Sequence[int | str]], words: Mapping[str, Tensor]
) -> Iterator[None]:
    """Put the embeddings of new words into the encoder's token embeddings while it runs."""

    def replace(module: nn.Module, args: tuple[Any, ...], embedded: Tensor) -> Tensor:
        del module, args
        taught = embedded.clone()
        for row, piece in enumerate(pieces):
            for place, part in enumerate(piece, start=1):
                if isinstance(part, str):
                    taught[row, place] = words[part].to(embedded)
        return taught

    handle = _table(encoder).register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()


def _table(encoder: nn.Module) -> nn.Embedding:
    """Token embedding of a transformers text model."""
    table: nn.Embedding = encoder.get_input_embeddings()  # type: ignore[operator]
    return table


def _positions(
    pieces: Sequence[Sequence[int | str]], words: Mapping[str, WordEmbedding]
) -> dict[str, Tensor]:
    """First place of each word in each prompt, counted with the start token; -1 when absent."""
    places = {}
    for word in words:
        rows = [piece.index(word) + 1 if word in piece else -1 for piece in pieces]
        places[word] = torch.tensor(rows)
    return places
