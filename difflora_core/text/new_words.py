"""New words: what a learned word is, where words stand in a prompt, and what may be learned."""

from __future__ import annotations

import difflib
import math
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConfigError, LayoutError, counted
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
NEAR = 0.8
"""How like a new word something must be to be taken for a slip of the pen, 0 to 1."""
PLAIN_SIGNS = str.maketrans("‹〈›〉‐‑‒–—―−", "<<>>-------")
"""Signs that look like those of a word, and what they look like."""
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
            f"example <{word.strip('<>')}-1>."
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
            f"{counted(len(tokens), 'token')}. Take a plainer word: cat, hat, toy, person."
        )
    return tokens[0]


def find_words(
    prompt: str, words: Sequence[str], tokens: Callable[[str], list[int]] | None = None
) -> list[tuple[int, int, str]]:
    """Where new words stand in a prompt: (start, end, word) in characters, whole words only.

    Args:
        prompt: any text.
        words: to be found.
        tokens: the text encoders' tokenizer. With it a word is also found where it is written in
            another way that they read as the same tokens: in capitals, "< my - hat >", and
            whatever signs they fold.
    """
    if not words:
        return []
    ordered = sorted(words, key=len, reverse=True)
    if tokens is None:
        pattern = "|".join(_whole(word, re.escape(word)) for word in ordered)
        return [(m.start(), m.end(), m.group()) for m in re.finditer(pattern, prompt)]
    folded, places = _folded(prompt)
    pattern = "|".join(f"({_whole(word, _spaced(word))})" for word in ordered)
    found = []
    for match in re.finditer(pattern, folded):
        start, end = places[match.start()], places[match.end() - 1] + 1
        word = ordered[(match.lastindex or 1) - 1]
        if prompt[start:end] == word or tokens(prompt[start:end]) == tokens(word):
            found.append((start, end, word))
    return found


def near_misses(
    prompt: str, words: Sequence[str], tokens: Callable[[str], list[int]]
) -> list[tuple[str, str]]:
    """What a prompt writes that is almost one of the words: (as written, the word)."""
    taken = [range(start, end) for start, end, _ in find_words(prompt, words, tokens)]
    missed = []
    for match in re.finditer(r"[<‹＜〈]?[^\W_](?:[\w\-‐-―−]*[^\W_])?[>›＞〉]?", prompt):
        if any(match.start() in own for own in taken) or len(tokens(match.group())) < 2:
            continue  # found, or a word that the text encoders know
        core, parts = _core(match.group()), re.split(r"[\W_]+", _folded(match.group())[0])
        close = difflib.get_close_matches(core, [_core(word) for word in words], 1, NEAR)
        near = [word for word in words if _core(word) in (*close, *parts)]
        missed += [(match.group(), word) for word in near][:1]
    return missed


def _core(word: str) -> str:
    """A word's letters and digits, in small letters."""
    return re.sub(r"[\W_]", "", _folded(word)[0])


def _folded(text: str) -> tuple[str, list[int]]:
    """A text in small letters and plain signs, and where each of its characters came from."""
    parts = [unicodedata.normalize("NFKC", sign.translate(PLAIN_SIGNS)).casefold() for sign in text]
    places = [place for place, part in enumerate(parts) for _ in part]
    return "".join(parts), places


def _spaced(word: str) -> str:
    """A pattern of a folded word with spaces where they divide no letters and no digits."""
    parts = re.findall(r"[a-z]+|[0-9]|[^a-z0-9]", word.casefold())
    return r"\s*".join(map(re.escape, parts))


def _whole(word: str, pattern: str) -> str:
    """A pattern of a word that has no further letters, digits or signs of words beside it.

    A bracket ends a word by itself, so that <my-hat><my-hat> is two of them.
    """
    before = "<" if word.startswith("<") else r"[\w<\-]"
    after = ">" if word.endswith(">") else r"[\w>\-]"
    return rf"(?<!{before}){pattern}(?!{after})"


def splice(
    prompt: str, words: Sequence[str], tokens: Callable[[str], list[int]]
) -> list[int | str]:
    """Token numbers of a prompt with each new word as itself, one entry a token."""
    pieces: list[int | str] = []
    end = 0
    for start, stop, word in find_words(prompt, words, tokens):
        pieces += [*tokens(prompt[end:start]), word]
        end = stop
    return [*pieces, *tokens(prompt[end:])]


def since_word(places: Sequence[bool], silent: Sequence[bool]) -> list[float]:
    """Tokens since a word was written, for each token of what an encoder reads at once (ours).

    The encoders are causal: what stands before a word knows nothing of it.

    Args:
        places: which tokens are the word.
        silent: which tokens are the plain word of its kind, which speaks for itself.

    Returns:
        0 at the word, 1 at the token after it, and so on; infinity where it is not heard.
    """
    distances, last = [], math.inf
    for here, plain in zip(places, silent, strict=True):
        last = 0.0 if here else last + 1
        distances.append(math.inf if plain and not here else last)
    return distances


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
