"""What an artist asks of a training node: pictures, prompts, and words with their kinds."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP, VAE
from torch import Tensor

from ...difflora_core.base_model.protocol import BaseModel
from ...difflora_core.errors import ConfigError
from ...difflora_core.text.covariance import Covariance
from ...difflora_core.text.encoders import TextEncoders
from ...difflora_core.text.new_words import SLOT, TEMPLATES, find_words
from ...difflora_core.training.concept_task import NewWord, prepare_task
from ...difflora_core.training.picture_examples import PictureExamples, picture_examples
from ...difflora_core.training.picture_task import PictureTask
from .. import model_paths

NO_MASKS = "no masks: the whole pictures counted"


@dataclass(frozen=True, eq=False)
class Parts:
    """What is connected to a training node; words need the covariance."""

    model: ModelPatcher
    clip: CLIP
    vae: VAE
    images: Tensor
    covariance: Covariance | None
    masks: Tensor | None

    @property
    def base_name(self) -> str:
        """The family of the model."""
        return type(self.model.model).__name__.lower()


@dataclass(frozen=True)
class PictureRequest:
    """Prompts of the pictures, one a line, and where to keep what is learned."""

    folder: ClassVar[str] = model_paths.STYLES
    takes_masks: ClassVar[bool] = True
    prompts: str
    file_name: str
    mirror: bool
    small_file: bool

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

    def setting(
        self, base: BaseModel, text: TextEncoders, parts: Parts
    ) -> tuple[PictureTask, PictureExamples]:
        """What a recipe is trained in, and on."""
        return PictureTask(base, text, parts.base_name), self.examples(base, parts)

    def held_out_examples(self, base: BaseModel, parts: Parts) -> PictureExamples | None:
        """Pictures that are not trained on; None where all of them are."""
        del base, parts
        return None

    def remarks(self, examples: PictureExamples) -> list[str]:
        """What the report says of the pictures."""
        return [NO_MASKS] if self.takes_masks and examples.masks is None else []

    def examples(self, base: BaseModel, parts: Parts, words: Sequence[str] = ()) -> PictureExamples:
        """The pictures, each with any of the prompts."""
        images, prompts = parts.images.clone()[..., :3], [self.lines] * len(parts.images)
        masks = None if parts.masks is None else parts.masks.clone()
        return picture_examples(base, images, words, masks, prompts, self.mirror)


@dataclass(frozen=True)
class HeldOutRequest(PictureRequest):
    """Also which share of the pictures, in percent, only chooses the best state.

    As many prompts as pictures are one for each.
    """

    takes_masks: ClassVar[bool] = False
    held_out: int

    def held_out_examples(self, base: BaseModel, parts: Parts) -> PictureExamples | None:
        """Every so many of the pictures; None where that is none, or there is one picture."""
        numbers = self._numbers(len(parts.images))
        return self._chosen(base, parts, numbers) if numbers else None

    def examples(self, base: BaseModel, parts: Parts, words: Sequence[str] = ()) -> PictureExamples:
        """The other pictures."""
        del words
        apart = self._numbers(len(parts.images))
        return self._chosen(base, parts, [k for k in range(len(parts.images)) if k not in apart])

    def _numbers(self, count: int) -> list[int]:
        kept = max(1, round(count * self.held_out / 100)) if self.held_out and count > 1 else 0
        return [k * count // kept for k in range(kept)]

    def _chosen(self, base: BaseModel, parts: Parts, numbers: list[int]) -> PictureExamples:
        lines, images = self.lines, parts.images[numbers].clone()[..., :3]
        each = len(lines) == len(parts.images)
        prompts = [[lines[k]] if each else lines for k in numbers]
        return picture_examples(base, images, (), None, prompts, self.mirror)


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

    def check(self) -> None:
        """Refuses words and prompts before a model is loaded.

        Raises:
            ConfigError: they do not fit each other.
        """
        self.new_words()

    def setting(
        self, base: BaseModel, text: TextEncoders, parts: Parts
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
