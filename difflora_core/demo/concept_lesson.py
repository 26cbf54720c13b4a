"""What a demo concept is taught from: its pictures, masked, each under two prompts."""

from __future__ import annotations

from ..adapters.covariance import Covariance
from ..models.concept import SLOT, ConceptText
from ..training.base_model import BaseModel
from ..training.concept_task import (
    ConceptExamples,
    ConceptTask,
    NewWord,
    concept_examples,
    prepare_task,
)
from ..training.perfusion import PerfusionTraining
from .concepts import ConceptPictures, DemoConcept

TRAINING = PerfusionTraining(steps=400, value_rate=0.1, word_rate=0.001, reach=0, guidance=1.5)
"""Of the demo's words, chosen on validation concepts for pictures drawn with guidance 2."""


def concept_lesson(
    base: BaseModel,
    text: ConceptText,
    covariance: Covariance,
    concept: DemoConcept,
    photos: ConceptPictures,
) -> tuple[ConceptTask, ConceptExamples]:
    """The task of teaching one word, and its pictures.

    Args:
        base: the demo base.
        text: its text encoders.
        covariance: C of these.
        concept: what is taught.
        photos: of it; their prompts are also taught with the word early, see `word_early`.
    """
    words = [NewWord(concept.word, concept.kind)]
    prompts = [[prompt, word_early(prompt)] for prompt in photos.prompts]
    contexts = [prompt.replace(concept.word, SLOT) for both in prompts for prompt in both]
    task = prepare_task(base, text, covariance, words, contexts, "demo")
    return task, concept_examples(base, photos.images, words, photos.masks, prompts, flip=False)


def word_early(prompt: str) -> str:
    """A prompt whose last phrase, the one with the concept, comes second.

    Words that follow the concept's word hear of it, so it has to be taught with some after it.
    """
    first, *middle, last = prompt.split(", ")
    return ", ".join((first, last, *middle))
