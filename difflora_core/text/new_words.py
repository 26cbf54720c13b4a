"""New words: what a learned word is, where words stand in a prompt, and what may be learned."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConfigError, LayoutError
from .encoders import TextEncoders, WordEmbedding

WORD = re.compile(r"[A-Za-z0-9_<>\-]{1,64}")
TEMPLATES = (
    "a photo of a {}",
    "a picture of a {}",
    "photo of a {}",
    "picture of the {}",
    "a painting of a {}",
    "a {} in a photo",
    "a photo with the {}",
    "portrait of a person with a {}",
)
"""Prompts in which a word's encoding is averaged, unless there are better ones; ours."""
MAX_CONTEXTS = 8
SLOT = "{}"


@dataclass(frozen=True, eq=False)
class LearnedWord:
    """A word that a pair of text encoders has learned; the encoders themselves stay as they are.

    Args:
        word: as prompts write it. superclass: one-token word of its kind.
        embeddings: its token embedding in each text encoder, (D_k,).
        probe: fingerprint of these text encoders, see `encoders.text_probe`.
        contexts: prompts it was trained in, `{}` standing for the word: an encoding depends on
            what stands before it, so the super-class word is encoded in the same ones.

    Raises:
        LayoutError: parts that are not vectors, or values that are not finite.
        ConfigError: words that cannot be used.
    """

    word: str
    superclass: str
    embeddings: WordEmbedding
    probe: Tensor
    contexts: tuple[str, ...] = TEMPLATES

    def __post_init__(self) -> None:
        check_word(self.word)
        check_contexts(self.contexts)
        if not self.superclass.strip():
            raise ConfigError(f"The concept {self.word} names no super-class.")
        vectors = [*self.embeddings, self.probe]
        if not self.embeddings or any(v.ndim != 1 or not len(v) for v in vectors):
            raise LayoutError(f"The concept {self.word} has parts that are not vectors.")
        if not all(bool(torch.isfinite(vector).all()) for vector in vectors):
            raise LayoutError(f"The concept {self.word} holds values that are not finite.")


def check_word(word: str) -> None:
    """Refuse a new word that a prompt could not hold.

    Raises:
        ConfigError: empty, too long, or other characters than letters, digits and _ - < >.
    """
    if not WORD.fullmatch(word):
        raise ConfigError(
            f"The word {word!r} cannot be taught: use 1 to 64 letters, digits, and the signs "
            "_ - < >, for example <my-hat>."
        )


def check_contexts(contexts: Sequence[str]) -> None:
    """Refuse contexts that cannot be used.

    Raises:
        ConfigError: none or too many, or one without exactly one `{}`.
    """
    if not 1 <= len(contexts) <= MAX_CONTEXTS:
        raise ConfigError(f"A word needs 1 to {MAX_CONTEXTS} contexts, got {len(contexts)}.")
    for context in contexts:
        if context.count(SLOT) != 1 or len(context) > 500:
            raise ConfigError(
                f"The context {context[:80]!r} must hold {SLOT} once, where the word stands."
            )


def check_new_word(text: TextEncoders, word: str) -> None:
    """Refuse a word that the text encoders know.

    Raises:
        ConfigError: it has a token of its own, or cannot be a word.
    """
    check_word(word)
    if text.knows(word):
        raise ConfigError(
            f"The word {word!r} already means something to the model. Choose a new one, for "
            f"example <{word}-1>."
        )


def superclass_token(text: TextEncoders, superclass: str) -> int:
    """The token of a super-class word.

    Raises:
        ConfigError: it is unknown, or has several tokens.
    """
    tokens = text.tokens(superclass)
    if len(tokens) != 1 or not text.knows(superclass.strip()):
        raise ConfigError(
            f"The super-class {superclass!r} must be one word that the model knows, but it has "
            f"{len(tokens)} tokens. Take a plainer word: cat, hat, toy, person."
        )
    return tokens[0]


def find_words(prompt: str, words: Sequence[str]) -> list[tuple[int, int, str]]:
    """Where new words stand in a prompt: (start, end, word) in characters, whole words only."""
    if not words:
        return []
    ordered = sorted(words, key=len, reverse=True)
    pattern = rf"(?<![\w<>\-])(?:{'|'.join(map(re.escape, ordered))})(?![\w<>\-])"
    return [(m.start(), m.end(), m.group()) for m in re.finditer(pattern, prompt)]


def splice(
    prompt: str, words: Sequence[str], tokens: Callable[[str], list[int]]
) -> list[int | str]:
    """Token numbers of a prompt with each new word as itself, one entry a token."""
    pieces: list[int | str] = []
    end = 0
    for start, stop, word in find_words(prompt, words):
        pieces += [*tokens(prompt[end:start]), word]
        end = stop
    return [*pieces, *tokens(prompt[end:])]


@torch.no_grad()
def word_encoding(
    text: TextEncoders, embedding: WordEmbedding, contexts: Sequence[str] = TEMPLATES
) -> Tensor:
    """Mean encoding (d,) of a word over contexts; float32 or better.

    With the super-class word's embedding this is i_super; it is what the moving average of
    arXiv 2305.01644 tends to, because the text encoders stay frozen.
    """
    marker = "<word>"
    prompts = [context.replace(SLOT, marker) for context in contexts]
    encodings = text.encode(prompts, {marker: embedding}, padded=False).at(marker)
    return encodings.to(torch.promote_types(encodings.dtype, torch.float32)).mean(0)
