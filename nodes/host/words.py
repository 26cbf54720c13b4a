"""Clones of ComfyUI's CLIP that know new words, and where words stand in what they encoded.

Encodings do not tell a new word from the plain word of its kind. So the CLIP writes into every
prompt's options where its words stand, as it does with pooled vectors, and adapters act there and
nowhere else. The same marks say where plain words stand that name a person.
"""

import copy
import hashlib
import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from comfy.sd import CLIP
from torch import Tensor

from ...difflora_core.errors import ConfigError, LayoutError
from ...difflora_core.methods.base import TrainedAdaptation
from ...difflora_core.text.new_words import (
    check_new_word,
    find_words,
    near_misses,
    since_word,
    superclass_token,
)
from .browser import show_here
from .text import ENCODERS, ComfyText, layers_read, layers_set, learned_words, table

MARK = "difflora_words"
"""In the options of a prompt, and on its encoding: word to tokens since it was written."""
Marks = Mapping[str, Sequence[float]]
FIRST = "clip_l"
"""The tokenizer by whose tokens places are counted."""
SECTION = 77  # tokens that SDXL's encoders read at once
_SECTIONS: OrderedDict[bytes, dict[str, list[float]]] = OrderedDict()
"""Marks by the digest of a section's encoding: joined prompts keep their numbers alone."""
KEPT = 10_000  # sections
OTHER_LAYER = (
    "CLIP Set Last Layer stands between Load Concept and this prompt, so {word} is read at another "
    "layer than it was learned at and may not look like itself. Put that node before Load Concept, "
    "or leave it out."
)


@dataclass(frozen=True, eq=False)
class TaughtWord:
    """A word as a CLIP knows it: its vectors in each encoder, and the token of its kind.

    `layers`: that the encoders are read at for it, see `text.layers_set`.
    """

    vectors: tuple[Tensor, ...]
    kind: int
    layers: tuple[Any, ...]

    def since(self, section: Sequence[Any]) -> list[float]:
        """Tokens since the word was written, for each token, number or vector, of a section."""
        places = [torch.is_tensor(t) and _same(t, self.vectors[0]) for t in section]
        return since_word(places, [not torch.is_tensor(t) and t == self.kind for t in section])


@dataclass(frozen=True, eq=False)
class Phrase:
    """Plain words, as the tokens that a CLIP reads them as."""

    tokens: tuple[Any, ...]

    def since(self, section: Sequence[Any]) -> list[float]:
        """0 at the tokens of the phrase, wherever it stands in a section; elsewhere infinity."""
        marks = [math.inf] * len(section)
        count = len(self.tokens)
        for start in range(len(section) - count + 1):
            own = slice(start, start + count)
            if all(_equal(a, b) for a, b in zip(section[own], self.tokens, strict=True)):
                marks[own] = [0.0] * count
        return marks


def teach(clip: CLIP, adaptation: TrainedAdaptation) -> CLIP:
    """A clone of a CLIP whose prompts may hold the adaptation's word; the CLIP where it has none.

    Raises:
        ConfigError: the word is known already.
        LayoutError: the adaptation is for other text encoders.
    """
    word = adaptation.word
    if word is None:
        return clip
    text = ComfyText(clip)
    check_new_word(text, word.word)
    widths = [table(clip, name).weight.shape[1] for name in ENCODERS]
    if [len(e) for e in word.embeddings] != widths:
        raise LayoutError(
            f"{adaptation.title} has word embeddings of {[len(e) for e in word.embeddings]}, but "
            f"this CLIP needs {widths}: it belongs to another base model ({adaptation.base})."
        )
    clone = clip.clone()
    clone.tokenizer = copy.copy(clip.tokenizer)
    clone.tokenizer.difflora_words = (*learned_words(clip), word.word)
    for k, name in enumerate(ENCODERS):
        inner = getattr(clip.tokenizer, name)
        own = WordTokenizer(inner, word.word, word.embeddings[k], tells=k == 0)
        setattr(clone.tokenizer, name, own)
    kind = superclass_token(text, word.superclass)
    taught = TaughtWord(word.embeddings, kind, layers_read(clip))
    clone.cond_stage_model = WordEncoders(clip.cond_stage_model, word.word, taught)
    return clone


def marking(clip: CLIP, phrase: str) -> CLIP:
    """A clone of a CLIP that marks where plain words stand in what it encodes, see `mark_of`.

    Raises:
        ConfigError: there are no words, or the CLIP is of another kind.
    """
    if not hasattr(clip.tokenizer, FIRST):
        raise ConfigError("Words are found in the prompts of SDXL's or SD1.5's CLIP; connect one.")
    end = getattr(clip.tokenizer, FIRST).end_token
    section = [entry[0] for entry in clip.tokenize(phrase)["l"][0]][1:]
    ends = [k for k, token in enumerate(section) if not torch.is_tensor(token) and token == end]
    tokens = tuple(section[: ends[0]] if ends else section)
    if not tokens:
        raise ConfigError(
            "There are no words. Write those of your prompt that name this person, for example "
            "woman in a red dress."
        )
    clone = clip.clone()
    encoders = WordEncoders(clip.cond_stage_model, mark_of(phrase), Phrase(tokens))
    clone.cond_stage_model = encoders
    return clone


def mark_of(phrase: str) -> str:
    """The name of a phrase among the marks; with its space it is no taught word's."""
    return f"where {phrase}"


class WordTokenizer:
    """A tokenizer of ComfyUI that knows one more word; everything else is left to it.

    With `tells` a slip of the pen is said on the node that runs.
    """

    def __init__(self, inner: Any, word: str, vector: Tensor, tells: bool = False) -> None:
        self.inner, self.words = inner, {**getattr(inner, "words", {}), word: vector}
        self.plain, self.tells = getattr(inner, "plain", inner), tells

    def __getattr__(self, name: str) -> Any:
        if name in ("inner", "plain", "words", "tells"):  # not there yet while being copied
            raise AttributeError(name)
        return getattr(self.plain, name)

    def tokenize_with_weights(self, text: str, *args: Any, **kwargs: Any) -> Any:
        """Tokens and weights of a prompt; ComfyUI's own embeddings and weights go on working."""
        names = {f"difflora{k}": vector for k, vector in enumerate(self.words.values())}
        numbers = {word: f"difflora{k}" for k, word in enumerate(self.words)}
        pieces, end = [], 0
        for start, stop, word in find_words(text, list(self.words), self._tokens):
            embedding = f" {self.plain.embedding_identifier}{numbers[word]} "
            pieces += [text[end:start], embedding]
            end = stop
        if self.tells:
            for written, word in near_misses(text, list(self.words), self._tokens):
                show_here(f"{written} is no word that this CLIP was taught. Did you mean {word}?")
        reader = copy.copy(self.plain)
        reader.embedding_directory = self.plain.embedding_directory or []
        usual = reader._try_get_embedding

        def find(name: str) -> tuple[Any, ...]:
            first, _, rest = name.partition(" ")
            found = usual(name)
            if first not in names:
                return found
            named = (first,) if len(found) == 3 else ()  # ComfyUI before 0.27 leaves it out
            return (names[first], *named, rest.strip())

        reader._try_get_embedding = find
        return reader.tokenize_with_weights("".join(pieces) + text[end:], *args, **kwargs)

    def _tokens(self, text: str) -> list[int]:
        return list(self.plain.tokenizer(text)["input_ids"][1:-1])


class WordEncoders:
    """ComfyUI's text encoders of a CLIP, which also say where its new words stand."""

    def __init__(self, inner: Any, word: str, taught: TaughtWord | Phrase) -> None:
        self.inner = getattr(inner, "inner", inner)
        self.words = {**getattr(inner, "words", {}), word: taught}

    def __getattr__(self, name: str) -> Any:
        if name in ("inner", "words"):  # not there yet while being copied
            raise AttributeError(name)
        return getattr(self.inner, name)

    def encode_token_weights(self, tokens: Mapping[str, Any]) -> Any:
        """Encodings as ComfyUI's own, and the marks beside and on them.

        On them, too, since not every caller keeps what stands beside.
        """
        context, pooled, *rest = self.inner.encode_token_weights(tokens)
        sections = [[entry[0] for entry in section] for section in tokens["l"]]
        marks: dict[str, list[float]] = {word: [] for word in self.words}
        for number, section in enumerate(sections):
            own = {word: taught.since(section) for word, taught in self.words.items()}
            _remember(_section(context, number), own)
            for word, distances in own.items():
                marks[word] += distances
        for word, taught in self.words.items():
            if isinstance(taught, TaughtWord) and 0 in marks[word]:
                if taught.layers != layers_set(self.inner):
                    show_here(OTHER_LAYER.format(word=word))
        setattr(context, MARK, marks)
        return context, pooled, {**(rest[0] if rest else {}), MARK: marks}


def heard(cond: Mapping[str, Any], words: Sequence[str]) -> Tensor:
    """Tokens since each word was written in a prompt of a sampler: (1, L, J), see `since_word`.

    What a node has set to zero, such as ConditioningZeroOut, says nothing.
    """
    context = cond.get("cross_attn")
    if context is None:
        return torch.full((1, SECTION, len(words)), math.inf)
    rows = _marked(cond, context, words)
    rows[:, ~(context[0] != 0).any(-1).cpu()] = math.inf
    return rows


def _marked(cond: Mapping[str, Any], context: Tensor, words: Sequence[str]) -> Tensor:
    """The marks of a prompt with the encoding (1, L, d), from beside it, on it, or its parts."""
    marks: Marks | None = cond.get(MARK, getattr(context, MARK, None))
    length = context.shape[1]
    rows = torch.full((1, length, len(words)), math.inf)
    told = 0
    for number, word in enumerate(words):
        own = torch.tensor(list(marks.get(word, ()))[:length] if marks else [])
        rows[0, : len(own), number] = own
    if marks is not None:
        told = max(map(len, marks.values()), default=0)
    elif length <= SECTION:  # of a CLIP that was taught nothing
        return rows
    for number in range(-(-told // SECTION), length // SECTION):
        found = _SECTIONS.get(_digest(_section(context, number)), {})
        for column, word in enumerate(words):
            if word in found:
                place = slice(number * SECTION, (number + 1) * SECTION)
                rows[0, place, column] = torch.tensor(found[word])
    return rows


def _section(context: Tensor, number: int) -> Tensor:
    """What an encoder made of one section (77, d) of a prompt (1, L, d)."""
    return context[0, number * SECTION : (number + 1) * SECTION]


def _remember(section: Tensor, marks: dict[str, list[float]]) -> None:
    """Keeps the marks of a section that holds a word, for prompts that are joined from several."""
    if any(math.isfinite(d) for distances in marks.values() for d in distances):
        _SECTIONS[_digest(section)] = marks
        while len(_SECTIONS) > KEPT:
            _SECTIONS.popitem(last=False)


def _digest(section: Tensor) -> bytes:
    """Digest of numbers, whatever their kind."""
    data = section.detach().cpu().contiguous().view(torch.uint8).numpy()
    return hashlib.blake2b(data.tobytes(), digest_size=16).digest()


def _equal(token: Any, own: Any) -> bool:
    """Whether two tokens, numbers or vectors, are the same."""
    if torch.is_tensor(token) and torch.is_tensor(own):
        return _same(token, own)
    return not torch.is_tensor(token) and not torch.is_tensor(own) and bool(token == own)


def _same(vector: Tensor, own: Tensor) -> bool:
    """Whether a token is a word's own vector."""
    return vector is own or (vector.shape == own.shape and torch.equal(vector.cpu(), own.cpu()))
