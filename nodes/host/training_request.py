"""What an artist asks of a training node: pictures, prompts, and words with their kinds."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

import comfy.utils
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP, VAE
from torch import Tensor

from ...difflora_core.base_model.protocol import BaseModel
from ...difflora_core.errors import ConfigError, counted
from ...difflora_core.text.covariance import Covariance
from ...difflora_core.text.encoders import TextEncoders
from ...difflora_core.text.new_words import SLOT, TEMPLATES, find_words
from ...difflora_core.training.concept_task import NewWord, prepare_task
from ...difflora_core.training.picture_examples import (
    Examples,
    PictureExamples,
    held_out_numbers,
    picture_examples,
)
from ...difflora_core.training.picture_folder import folder_examples, joined
from ...difflora_core.training.picture_task import PictureTask
from .. import model_paths
from .base import picture_size

SMALL = 0.5
"""Of what a model draws: a picture whose shorter side is less is said to be small."""
NO_MASKS = "no masks: the whole pictures counted"


@dataclass(frozen=True, eq=False)
class Parts:
    """The base model that is connected to a training node."""

    model: ModelPatcher
    clip: CLIP
    vae: VAE

    @property
    def base_name(self) -> str:
        """The family of the model."""
        return type(self.model.model).__name__.lower()


@dataclass(frozen=True, eq=False)
class PictureParts(Parts):
    """Also pictures (N, H, W, 3) and masks; words need the covariance."""

    images: Tensor
    covariance: Covariance | None
    masks: Tensor | None


class Request(Protocol):
    """What an artist asks of a training: the file, and what is trained on."""

    folder: ClassVar[str]

    @property
    def file_name(self) -> str:
        """Of what is learned."""

    def check(self) -> None:
        """Refuses what can be refused before a model is loaded."""

    def task_and_examples(
        self, base: BaseModel, text: TextEncoders, parts: Any
    ) -> tuple[PictureTask, Examples]:
        """What a recipe is trained in, and on."""

    def held_out_examples(self, base: BaseModel, parts: Any) -> Examples | None:
        """Pictures that are not trained on; None where all of them are."""

    def remarks(self, examples: Any, parts: Any) -> list[str]:
        """What the report says of the pictures."""


def small_note(sizes: Sequence[tuple[int, int]], resolution: int) -> list[str]:
    """A sentence about pictures (height, width) that are small for a square of this side."""
    small = [(k, size) for k, size in enumerate(sizes) if min(size) < SMALL * resolution]
    if not small:
        return []
    first, (height, width) = small[0]
    return [
        f"Small for a model that draws {resolution}: {len(small)} of "
        f"{counted(len(sizes), 'photo')} (photo {first + 1} has {width} x {height} pixels). What "
        "they lack in detail is learned as blur."
    ]


def any_note(prompts: int, pictures: int) -> str:
    """That pictures have no prompt each."""
    return (
        f"{counted(prompts, 'prompt')} for {counted(pictures, 'picture')}: each picture was "
        "trained with any of them."
    )


@dataclass(frozen=True)
class PictureRequest:
    """Prompts of the pictures, one a line, and where to keep what is learned.

    `more`: files of further pictures, which are read one by one and brought to the size of those
    that are connected.
    """

    folder: ClassVar[str] = model_paths.STYLES
    takes_masks: ClassVar[bool] = True
    prompts: str
    file_name: str
    mirror: bool
    small_file: bool
    more: tuple[Path, ...] = field(default=(), kw_only=True)

    @property
    def lines(self) -> list[str]:
        """Prompts to train in."""
        return [line.strip() for line in self.prompts.split("\n") if line.strip()]

    def check(self) -> None:
        """Refuses what can be refused before a model is loaded.

        Raises:
            ConfigError: there is no prompt.
        """
        if not self.lines:
            raise ConfigError("Write in prompts what the pictures show: a photo of a sks dog.")

    def task_and_examples(
        self, base: BaseModel, text: TextEncoders, parts: PictureParts
    ) -> tuple[PictureTask, PictureExamples]:
        """What a recipe is trained in, and on."""
        return PictureTask(base, text, parts.base_name), self.examples(base, parts)

    def held_out_examples(self, base: BaseModel, parts: PictureParts) -> PictureExamples | None:
        """Pictures that are not trained on; None where all of them are."""
        numbers = self.apart(parts)
        return self._chosen(base, parts, numbers) if numbers else None

    def examples(
        self, base: BaseModel, parts: PictureParts, words: Sequence[str] = ()
    ) -> PictureExamples:
        """The pictures that are trained on."""
        apart = set(self.apart(parts))
        everything = range(len(parts.images) + len(self.more))
        return self._chosen(base, parts, [k for k in everything if k not in apart], words)

    def apart(self, parts: PictureParts) -> list[int]:
        """Numbers of the pictures that are not trained on."""
        del parts
        return []

    def prompts_of(self, number: int, count: int) -> list[str]:
        """What one of so many connected pictures is trained with: any of the prompts."""
        del number, count
        return self.lines

    def remarks(self, examples: PictureExamples, parts: PictureParts) -> list[str]:
        """What the report says of the pictures."""
        notes = [NO_MASKS] if self.takes_masks and examples.masks is None else []
        count, height, width = parts.images.shape[:3]
        if self.shares_prompts(count):
            notes.append(any_note(len(self.lines), count))
        notes += small_note([(height, width)] * count, picture_size(parts.model))
        if self.more:
            notes.append(f"{counted(len(self.more), 'picture')} of the folder")
        return notes

    def shares_prompts(self, count: int) -> bool:
        """True where an artist may think that so many pictures had a prompt each."""
        return len(self.lines) == count > 1

    def _chosen(
        self, base: BaseModel, parts: PictureParts, numbers: list[int], words: Sequence[str] = ()
    ) -> PictureExamples:
        """Pictures by number, those of files after those that are connected; masks are of all."""
        count = len(parts.images)
        connected = [k for k in numbers if k < count]
        filed = [self.more[k - count] for k in numbers if k >= count]
        made = []
        if connected:
            images = parts.images[connected].clone()[..., :3]
            prompts = [self.prompts_of(k, count) for k in connected]
            masks = None if parts.masks is None else parts.masks.clone()
            made.append(picture_examples(base, images, words, masks, prompts, self.mirror))
        if filed:
            height, width = parts.images.shape[1:3]
            read = comfy.utils.ProgressBar(len(filed)).update_absolute
            size = (height, width)
            made.append(folder_examples(base, filed, size, self.lines, self.mirror, read))
        return joined(made) if len(made) > 1 else made[0]


@dataclass(frozen=True)
class HeldOutRequest(PictureRequest):
    """Also which share of the pictures, in percent, only chooses the best state.

    As many prompts as pictures that are connected are one for each.
    """

    takes_masks: ClassVar[bool] = False
    held_out: int

    def apart(self, parts: PictureParts) -> list[int]:
        """Every so many of the pictures; none where there is one picture."""
        return held_out_numbers(len(parts.images) + len(self.more), self.held_out)

    def prompts_of(self, number: int, count: int) -> list[str]:
        """Its own prompt, where there are as many as pictures, or any of them."""
        return [self.lines[number]] if len(self.lines) == count else self.lines

    def shares_prompts(self, count: int) -> bool:
        """True where prompts are several, and not one for each picture."""
        return 1 < len(self.lines) != count


@dataclass(frozen=True)
class TrainingRequest(PictureRequest):
    """Also words to teach, which the prompts hold."""

    folder: ClassVar[str] = model_paths.CONCEPTS
    word: str
    superclass: str
    second_word: str = ""
    second_superclass: str = ""

    @property
    def kinds(self) -> dict[str, str]:
        """Each new word and the word of its kind.

        Raises:
            ConfigError: both words are the same.
        """
        kinds = {self.word.strip(): self.superclass.strip()}
        if second := self.second_word.strip():
            if second in kinds:
                raise ConfigError(f"The two words are both {second}; choose different ones.")
            kinds[second] = self.second_superclass.strip()
        return kinds

    @property
    def lines(self) -> list[str]:
        """Prompts to train in, with the new words.

        Raises:
            ConfigError: one holds no new word, or one several times.
        """
        words = list(self.kinds)
        lines = [line.strip() for line in self.prompts.split("\n") if line.strip()]
        for line in lines:
            found = [word for _, _, word in find_words(line, words)]
            if not found or len(set(found)) < len(found):
                raise ConfigError(
                    f"The training prompt {line!r} must hold the new word {' or '.join(words)} "
                    "once."
                )
        return lines or [template.replace(SLOT, " and a ".join(words)) for template in TEMPLATES]

    def new_words(self) -> list[NewWord]:
        """The words, each with its prompts, in which other new words stand as their kinds.

        Raises:
            ConfigError: no prompt holds one of them.
        """
        kinds, words = self.kinds, []
        for word, kind in kinds.items():
            rest = {other: k for other, k in kinds.items() if other != word}
            named = {**rest, word: SLOT}
            contexts = []
            for line in self.lines:
                found = find_words(line, list(kinds))
                if word in (w for _, _, w in found):
                    for start, end, w in reversed(found):
                        line = line[:start] + named[w] + line[end:]
                    contexts.append(line)
            if not contexts:
                raise ConfigError(f"No training prompt holds the new word {word}.")
            words.append(NewWord(word, kind, tuple(contexts)))
        return words

    def shares_prompts(self, count: int) -> bool:
        """Never: prompts of a word are meant for all pictures."""
        del count
        return False

    def check(self) -> None:
        """Refuses words and prompts before a model is loaded.

        Raises:
            ConfigError: they do not fit each other.
        """
        self.new_words()

    def task_and_examples(
        self, base: BaseModel, text: TextEncoders, parts: PictureParts
    ) -> tuple[PictureTask, PictureExamples]:
        """What a recipe of words is trained in, and on.

        Raises:
            ConfigError: nothing is connected as covariance.
        """
        words = self.new_words()
        if parts.covariance is None:
            raise ConfigError("A new word needs a covariance: connect Build Covariance.")
        task = prepare_task(base, text, parts.covariance, words, base_name=parts.base_name)
        return task, self.examples(base, parts, [word.word for word in words])
