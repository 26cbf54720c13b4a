"""What an artist asks of a training of one person: photos, captions, class pictures."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

from torch import Tensor

from ...difflora_core.base_model.protocol import BaseModel
from ...difflora_core.errors import ConfigError, counted
from ...difflora_core.text.encoders import TextEncoders
from ...difflora_core.training.picture_buckets import BucketedExamples, bucketed
from ...difflora_core.training.picture_examples import held_out_numbers
from ...difflora_core.training.picture_task import PictureTask
from ...difflora_core.vision.face_choice import FaceOptions
from ...difflora_core.vision.training_pictures import TrainingPicture, framed, training_pictures
from .encoders import watched_faces
from .training_request import Parts, small_note

ENOUGH = 8
"""Photos from which on some are held out: of fewer, each is worth more in training."""


@dataclass(frozen=True, eq=False)
class ClassPictures:
    """Pictures of other people, which are to stay what they are (prior preservation).

    `images`: of any sizes; `prompt`: what draws them; `weight`: of a step on them against one on
    the photos.
    """

    images: Sequence[Tensor]
    prompt: str
    weight: float


@dataclass(frozen=True, eq=False)
class PhotoRequest:
    """Photos, what stands for them in prompts, and where to keep what is learned.

    Args:
        images: of any sizes. masks: of the person, one for all, one each, or None.
        captions: one for each photo, where an empty one stands for the trigger alone; or some
            for all.
        trigger: a word that every caption begins with unless it holds it; empty for none.
        file_name: of the LoRA.
        resolution: side in pixels of the square that the base was made for.
        mirror: also train on mirrored photos.
        held_out: percent of the photos that only choose the best state.
        faces: face analysis, or None to train on whole photos.
        options: which face, and what becomes of a photo without one.
        prior: class pictures, or None.
    """

    folder: ClassVar[str] = "loras"
    images: Sequence[Tensor]
    masks: Sequence[Tensor] | None
    captions: tuple[str, ...]
    trigger: str
    file_name: str
    resolution: int
    mirror: bool = True
    held_out: int = 10
    faces: Any = None
    options: FaceOptions = field(default_factory=lambda: FaceOptions(on_missing="skip"))
    prior: ClassPictures | None = None

    @cached_property
    def notes(self) -> list[str]:
        """Sentences about photos that were not taken as they are, filled while they are read."""
        return []

    @property
    def prompts(self) -> list[str]:
        """The captions, each with the trigger word in it."""
        word = self.trigger.strip()
        if not word:
            return list(self.captions)
        there = re.compile(rf"(?<!\w){re.escape(word)}(?!\w)")
        return [c if there.search(c) else f"{word}, {c}" if c else word for c in self.captions]

    def check(self) -> None:
        """Refuses what can be refused before a model is loaded.

        Raises:
            ConfigError: there is no caption, one is empty and no trigger word can stand for it, or
                there is no prompt for class pictures.
        """
        if not self.captions:
            raise ConfigError("Write in captions what the photos show: photo of a person.")
        if "" in self.captions and not self.trigger.strip():
            raise ConfigError(
                f"Caption {self.captions.index('') + 1} of {len(self.captions)} is empty. Write "
                "what that photo shows, or a trigger word, which then stands alone."
            )
        if self.prior is not None and not self.prior.prompt.strip():
            raise ConfigError("Write in prior_prompt what the class pictures show.")

    def task_and_examples(
        self, base: BaseModel, text: TextEncoders, parts: Parts
    ) -> tuple[PictureTask, BucketedExamples]:
        """What a recipe is trained in, and on; all that is encoded once is encoded here."""
        task = PictureTask(base, text, parts.base_name)
        chosen, apart = self._divided
        examples = self._examples(base, chosen, self.mirror)
        if self.prior is not None:
            photos = training_pictures(self.prior.images)
            named = {photo.number: [self.prior.prompt] for photo in photos}
            others = bucketed(base, photos, named, self.resolution, flip=False)
            examples = examples.beside(others, self.prior.weight)
        task.encode([*examples.prompts, *(p for one in apart for p in self._named(one.number))])
        _ = task.facts  # while the text encoders are there
        return task, examples

    def held_out_examples(self, base: BaseModel, parts: Parts) -> BucketedExamples | None:
        """The photos that are not trained on; None where all of them are."""
        del parts
        _, apart = self._divided
        return self._examples(base, apart, False) if apart else None

    def remarks(self, examples: BucketedExamples, parts: Parts) -> list[str]:
        """What the report says of the photos."""
        del parts
        sizes = {tuple(bucket.latents.shape[2:]) for bucket in examples.buckets}
        count = f"{counted(len(examples), 'training picture')} in {counted(len(sizes), 'size')}"
        return [f"{count}, mirrored ones and squares around faces included", *self.notes]

    @cached_property
    def _divided(self) -> tuple[list[TrainingPicture], list[TrainingPicture]]:
        """Pictures to train on, and those of photos that are held out."""
        pictures = self._framed()
        numbers = list(dict.fromkeys(picture.number for picture in pictures))
        enough = self.held_out > 0 and len(numbers) >= ENOUGH
        if self.held_out and not enough:
            self.notes.append(
                f"No photo was held out, all were trained on: from {ENOUGH} on, some only choose "
                "the best state."
            )
        chosen = held_out_numbers(len(numbers), self.held_out if enough else 0)
        apart = {numbers[k] for k in chosen}
        return (
            [picture for picture in pictures if picture.number not in apart],
            [picture for picture in pictures if picture.number in apart],
        )

    def _framed(self) -> list[TrainingPicture]:
        """The photos, cut to the person where a face analysis is connected."""
        photos = training_pictures(self.images, self.masks)
        self._describe(photos)
        if self.faces is None:
            return photos
        pictures, notes = framed(photos, watched_faces(self.faces, len(photos)), self.options)
        self.notes.extend(notes)
        return pictures

    def _describe(self, photos: list[TrainingPicture]) -> None:
        """Notes on what the artist may not have meant."""
        unmarked = [p for p in photos if p.mask is None] if self.masks is not None else []
        if unmarked:
            self.notes.append(
                f"Counted whole, since the mask marks nothing: {len(unmarked)} of "
                f"{counted(len(photos), 'photo')} (first: photo {unmarked[0].number + 1})."
            )
        if 1 < len(self.captions) != len(photos):
            self.notes.append(
                f"{counted(len(self.captions), 'caption')} for {counted(len(photos), 'photo')}: "
                "each was trained with any of them. For one each, give as many as photos, in "
                "their order."
            )
        sizes = [(p.image.shape[0], p.image.shape[1]) for p in photos]
        self.notes.extend(small_note(sizes, self.resolution))

    def _named(self, number: int) -> list[str]:
        """The prompts of a photo."""
        prompts = self.prompts
        return [prompts[number]] if len(prompts) == len(self.images) else prompts

    def _examples(
        self, base: BaseModel, pictures: list[TrainingPicture], mirror: bool
    ) -> BucketedExamples:
        named = {picture.number: self._named(picture.number) for picture in pictures}
        return bucketed(base, pictures, named, self.resolution, mirror)
