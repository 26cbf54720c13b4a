"""Everything frozen around the training of new words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..base_model.protocol import BaseModel, compute_device, compute_dtype
from ..config import Config
from ..errors import ConfigError
from ..text.covariance import Covariance
from ..text.encoders import TextEncoders, WordEmbedding, check_probe, text_probe
from ..text.new_words import (
    MAX_CONTEXTS,
    TEMPLATES,
    LearnedWord,
    check_contexts,
    check_new_word,
    superclass_token,
    word_encoding,
)
from .picture_task import PictureTask


@dataclass(frozen=True)
class NewWord(Config):
    """A word to teach, the one-token word of its kind, and the prompts it is averaged in.

    `contexts`: as those of `prepare_task`, which count when this is empty. Words that share
    pictures need their own: "a photo of a {} and a cat" for one, "a hat and a {}" for the other.
    """

    word: str
    superclass: str
    contexts: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class ConceptTask(PictureTask):
    """Everything frozen around the training of words; made by `prepare_task`.

    Args:
        covariance: of these text encoders.
        words: the words to teach.
        embeddings: of the super-class words, one for each word.
        superclasses: i_super (J, d). layers: value projections, layer name to module path.
        probe: fingerprint of the text encoders. contexts: of each word, prompts in which it is
            averaged.
    """

    covariance: Covariance
    words: tuple[NewWord, ...]
    embeddings: tuple[WordEmbedding, ...]
    superclasses: Tensor
    layers: Mapping[str, str]
    probe: Tensor
    contexts: tuple[tuple[str, ...], ...]

    @cached_property
    def facts(self) -> tuple[object, ...]:
        """Also words, contexts and C."""
        named = (self.words, self.contexts, self.base_name, self.probe)
        return (*named, self.covariance.regularised)

    @torch.no_grad()
    def layer_output(self, path: str, rows: Tensor) -> Tensor:
        """What a projection makes of encodings (J, d): (J, out), by calling the layer itself."""
        layer = self.base.unet.get_submodule(path)
        rows = rows.to(compute_device(self.base), compute_dtype(self.base))
        output: Tensor = layer(rows[:, None])
        return output[:, 0].float().cpu()


def prepare_task(
    base: BaseModel,
    text: TextEncoders,
    covariance: Covariance,
    words: Sequence[NewWord],
    contexts: Sequence[str] = TEMPLATES,
    base_name: str = "sdxl",
) -> ConceptTask:
    """Check words and text encoders, and gather what training needs.

    Args:
        base: frozen base model.
        text: its text encoders.
        covariance: C of these text encoders.
        words: what to teach.
        contexts: prompts like those of the training pictures, `{}` for a word; at most 8 count.
        base_name: family of the base model.

    Raises:
        ConfigError: a word or super-class cannot be used, a word occurs twice, or the covariance
            belongs to other text encoders.
    """
    if not words or len({word.word for word in words}) < len(words):
        raise ConfigError("Teach one word or several different ones.")
    own = tuple(_contexts(word.contexts or contexts) for word in words)
    probe = text_probe(text)
    if covariance.probe is not None:
        check_probe(covariance.probe, probe, "The covariance")
    embeddings = [_superclass_embedding(text, word) for word in words]
    rows = zip(embeddings, own, strict=True)
    encodings = torch.stack([word_encoding(text, e, several).cpu() for e, several in rows])
    if encodings.shape[-1] != covariance.dim:
        raise ConfigError(
            f"The covariance is for encodings of width {covariance.dim}, the text encoders give "
            f"{encodings.shape[-1]}. Build one for this CLIP."
        )
    layers = {
        name: path
        for name, path in base.layout(base_name, 1).module_names.items()
        if name.endswith("attn2.to_v")
    }
    frozen = (base, text, base_name, covariance)
    return ConceptTask(
        *frozen, tuple(words), tuple(embeddings), encodings, layers, probe, contexts=own
    )


def _superclass_embedding(text: TextEncoders, word: NewWord) -> WordEmbedding:
    """Where a new word starts, once it is checked."""
    check_new_word(text, word.word)
    return text.embedding(superclass_token(text, word.superclass))


def learned_words(task: ConceptTask, embeddings: Sequence[WordEmbedding]) -> list[LearnedWord]:
    """The words of a task as what they have become, with these embeddings."""
    rows = zip(task.words, embeddings, task.contexts, strict=True)
    return [
        LearnedWord(
            word.word,
            word.superclass,
            tuple(vector.detach().cpu().clone() for vector in vectors),
            task.probe,
            contexts,
        )
        for word, vectors, contexts in rows
    ]


def _contexts(items: Sequence[str]) -> tuple[str, ...]:
    """At most MAX_CONTEXTS different ones, evenly over the list, checked."""
    different = list(dict.fromkeys(items))
    count = min(len(different), MAX_CONTEXTS)
    chosen = [different[k * len(different) // count] for k in range(count)]
    check_contexts(chosen)
    return tuple(chosen)
