"""A trained concept as a record, and what a pair of text encoders must do to know a new word."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from ..errors import ConfigError, LayoutError

METHODS = ("perfusion", "infusion")
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


class ConceptText(Protocol):
    """A frozen pair of text encoders that can be taught words."""

    def tokens(self, text: str) -> list[int]:
        """Token numbers of a text, without start and end marks."""

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


@dataclass(frozen=True, eq=False)
class Concept:
    """One trained concept; what a file holds.

    Args:
        method: "perfusion" (`values` are targets o*) or "infusion" (`values` are residuals).
        word: the new word of prompts. superclass: one-token word of its kind.
        base: name of the base model family.
        embeddings: of the new word, one vector for each text encoder.
        direction: i* (d,). covector: (d,), its product with the direction is 1.
        values: layer of a value projection to its vector (out,).
        probe: fingerprint of the text encoders it was trained with.
        contexts: prompts it was trained in, `{}` standing for the word: an encoding depends on
            what stands before it, so the super-class word is encoded in the same ones.
        facts: free facts about its making, texts and numbers.

    Raises:
        LayoutError: shapes do not fit each other, or values are not finite.
        ConfigError: an unknown method, or words that cannot be used.
    """

    method: str
    word: str
    superclass: str
    base: str
    embeddings: WordEmbedding
    direction: Tensor
    covector: Tensor
    values: Mapping[str, Tensor]
    probe: Tensor
    contexts: tuple[str, ...] = TEMPLATES
    facts: Mapping[str, str | int | float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ConfigError(f"Unknown concept method {self.method!r}; {' or '.join(METHODS)}.")
        check_word(self.word)
        check_contexts(self.contexts)
        if not self.superclass.strip():
            raise ConfigError(f"The concept {self.word} names no super-class.")
        tensors = [*self.embeddings, self.direction, self.covector, self.probe]
        tensors += list(self.values.values())
        if not self.values or any(t.ndim != 1 or not len(t) for t in tensors):
            raise LayoutError(f"The concept {self.word} has parts that are not vectors.")
        if not all(bool(torch.isfinite(t).all()) for t in tensors):
            raise LayoutError(f"The concept {self.word} holds values that are not finite.")
        if self.covector.shape != self.direction.shape:
            raise LayoutError(f"The concept {self.word} has a direction and covector that differ.")

    def to(self, *target: torch.dtype | torch.device | str) -> Concept:
        """Same concept with its tensors on another device or of another dtype."""
        return Concept(
            self.method, self.word, self.superclass, self.base,
            tuple(_moved(e, target) for e in self.embeddings),
            _moved(self.direction, target), _moved(self.covector, target),
            {name: _moved(value, target) for name, value in self.values.items()},
            _moved(self.probe, target), self.contexts, self.facts,
        )  # fmt: skip


def _moved(tensor: Tensor, targets: Sequence[torch.dtype | torch.device | str]) -> Tensor:
    for target in targets:
        tensor = tensor.to(target)
    return tensor


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


def check_new_word(text: ConceptText, word: str) -> None:
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


def superclass_token(text: ConceptText, superclass: str) -> int:
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
    text: ConceptText, embedding: WordEmbedding, contexts: Sequence[str] = TEMPLATES
) -> Tensor:
    """Mean encoding (d,) of a word over contexts; float32 or better.

    With the super-class word's embedding this is i_super; it is what the moving average of
    arXiv 2305.01644 tends to, because the text encoders stay frozen.
    """
    marker = "<word>"
    prompts = [context.replace(SLOT, marker) for context in contexts]
    encodings = text.encode(prompts, {marker: embedding}, padded=False).at(marker)
    return encodings.to(torch.promote_types(encodings.dtype, torch.float32)).mean(0)


@torch.no_grad()
def text_probe(text: ConceptText) -> Tensor:
    """Fingerprint (64,) of a pair of text encoders: a few numbers of one fixed encoding."""
    encoded = text.encode([PROBE_PROMPT], {})
    mean = encoded.context[0][encoded.real[0].to(encoded.context.device)].float().mean(0)
    index = torch.linspace(0, len(mean) - 1, PROBE_SIZE).round().long()
    return mean[index.to(mean.device)].cpu()


def check_probe(expected: Tensor, got: Tensor, what: str) -> None:
    """Compare two fingerprints; what differs by rounding, or by a light touch, passes.

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
