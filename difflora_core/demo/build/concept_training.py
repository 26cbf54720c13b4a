"""The training set of a demo concept: its pictures, masked, each under several wordings."""

from __future__ import annotations

from ...base_model.protocol import BaseModel
from ...methods.base import TrainedAdaptation
from ...text.covariance import Covariance
from ...text.encoders import TextEncoders
from ...text.new_words import SLOT
from ...training.adaptation_run import Objective
from ...training.concept_task import ConceptTask, NewWord, prepare_task
from ...training.perfusion import PerfusionObjective, PerfusionTraining
from ...training.picture_examples import PictureExamples, picture_examples
from ..world.concepts import ConceptPictures, DemoConcept

TRAINING = PerfusionTraining(steps=400, value_rate=0.1, word_rate=0.001, reach=0, guidance=1.5)
"""How the demo's words are taught: chosen on validation concepts for pictures of guidance 2."""


def concept_objective(task: ConceptTask) -> Objective[TrainedAdaptation]:
    """The recipe of the demo's words on a task."""
    return PerfusionObjective(task, TRAINING)


def concept_training_set(
    base: BaseModel,
    text: TextEncoders,
    covariance: Covariance,
    concept: DemoConcept,
    photos: ConceptPictures,
) -> tuple[ConceptTask, PictureExamples]:
    """The task of training one word, and its pictures.

    Args:
        base: the demo base.
        text: its text encoders.
        covariance: C of these.
        concept: what is trained.
        photos: of it; each is seen under all `wordings` of its prompt.
    """
    words = [NewWord(concept.word, concept.kind)]
    prompts = [wordings(prompt) for prompt in photos.prompts]
    contexts = [prompt.replace(concept.word, SLOT) for several in prompts for prompt in several]
    task = prepare_task(base, text, covariance, words, contexts, "demo")
    return task, picture_examples(
        base, photos.images, [concept.word], photos.masks, prompts, flip=False
    )


def wordings(prompt: str) -> list[str]:
    """A prompt with its last phrase, the one with the concept, at every place; then shortened.

    Words that follow the concept's word hear of it, so it has to be taught with some after it; and
    what no prompt leaves out is easily taken for a part of the concept.
    """
    first, *middle, last = prompt.split(", ")
    places = [[*middle[:k], last, *middle[k:]] for k in reversed(range(len(middle) + 1))]
    shorter = [[*middle[:k], *middle[k + 1 :], last] for k in range(len(middle))]
    return [", ".join((first, *phrases)) for phrases in (*places, *shorter)]
