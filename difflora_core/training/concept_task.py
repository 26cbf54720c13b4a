"""What the recipes of pictures train on: pictures with prompts, new words, and their setting."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..base_model.protocol import BaseModel, TextCondition, compute_device, compute_dtype
from ..config import Config
from ..diffusion.objective import stratified_timesteps
from ..errors import ConfigError
from ..text.covariance import Covariance
from ..text.encoders import EncodedPrompts, TextEncoders, WordEmbedding, check_probe, text_probe
from ..text.new_words import (
    MAX_CONTEXTS,
    TEMPLATES,
    LearnedWord,
    check_contexts,
    check_new_word,
    find_words,
    superclass_token,
    word_encoding,
)
from ..vision.training_pictures import EMPTY
from .losses import NoisedBatch, under_guidance


@dataclass(frozen=True)
class NewWord(Config):
    """A word to teach, the one-token word of its kind, and the prompts it is averaged in.

    `contexts`: as those of `prepare_task`, which count when this is empty. Words that share
    pictures need their own: "a photo of a {} and a cat" for one, "a hat and a {}" for the other.
    """

    word: str
    superclass: str
    contexts: tuple[str, ...] = ()


class Examples(Protocol):
    """What a run draws its batches from."""

    @property
    def first(self) -> tuple[Tensor, str]:
        """A picture (1, C, h, w) and a prompt of it, to draw previews of."""

    @property
    def area(self) -> int:
        """Latent pixels h * w of the largest picture."""

    def __len__(self) -> int:
        """Number of pictures."""

    def draw(self, count: int, steps: int) -> Callable[[torch.Generator], dict[str, object]]:
        """A function that draws a batch from a generator, see `ConceptExamples.draw`."""


@dataclass(frozen=True, eq=False)
class ConceptExamples:
    """Training pictures.

    Args:
        latents: (N, C, h, w) clean, scaled.
        prompts: for each picture the prompts it may be shown with, new words standing literally.
        masks: (N, h, w) in [0, 1], largest value 1, what counts; None counts whole pictures.

    Raises:
        ConfigError: no pictures, or parts that do not fit each other.
    """

    latents: Tensor
    prompts: Sequence[Sequence[str]]
    masks: Tensor | None = None

    def __post_init__(self) -> None:
        shape = tuple(self.latents.shape)
        if len(shape) != 4 or 0 in shape:
            raise ConfigError(f"Training needs at least one picture; got latents {shape}.")
        if len(self.prompts) != shape[0] or not all(self.prompts):
            raise ConfigError(
                f"{shape[0]} pictures need prompts each, got {len(self.prompts)} lists of them."
            )
        if self.masks is not None and self.masks.shape != (shape[0], *shape[2:]):
            raise ConfigError(
                f"The masks are {tuple(self.masks.shape)}, expected {(shape[0], *shape[2:])}."
            )

    def __len__(self) -> int:
        return len(self.latents)

    @property
    def first(self) -> tuple[Tensor, str]:
        """The first picture (1, C, h, w) and a prompt of it, to draw previews of."""
        return self.latents[:1], self.prompts[0][0]

    @property
    def area(self) -> int:
        """Latent pixels h * w of a picture, which say what a step needs of memory."""
        return self.latents.shape[2] * self.latents.shape[3]

    def draw(self, count: int, steps: int) -> Callable[[torch.Generator], dict[str, object]]:
        """A function that draws a batch of noised pictures from a generator.

        Args:
            count: B, pictures of a batch.
            steps: length of the base's noise schedule.

        Returns:
            From a generator to a batch: clean scaled `latents` and unit `noise` (B, C, h, w),
            `timesteps` (B,) below `steps`, B `prompts`; `whole`, the prompts of the whole batch,
            when this is a part of it; `masks` (B, h, w) in [0, 1] if there are any.
        """

        def batch(generator: torch.Generator) -> dict[str, object]:
            rounds = [
                torch.randperm(len(self), generator=generator)
                for _ in range(-(-count // len(self)))
            ]
            index = torch.cat(rounds)[:count]
            prompts = [self.prompts[k] for k in index.tolist()]
            chosen = [p[int(torch.randint(len(p), (), generator=generator))] for p in prompts]
            latents = self.latents[index].float()
            parts: dict[str, object] = {
                "latents": latents,
                "noise": torch.randn(latents.shape, generator=generator),
                "timesteps": stratified_timesteps(count, generator, steps),
                "prompts": chosen,
                "whole": tuple(chosen),  # shared by all parts of the batch
            }
            return parts if self.masks is None else {**parts, "masks": self.masks[index].float()}

        return batch


def concept_examples(
    base: BaseModel,
    images: Tensor,
    words: Sequence[NewWord] = (),
    masks: Tensor | None = None,
    prompts: Sequence[Sequence[str]] | None = None,
    flip: bool = True,
) -> ConceptExamples:
    """Training pictures from images.

    Args:
        base: encodes the images.
        images: (N, H, W, 3) in [0, 1].
        words: what prompts name, each of them at least one; without words they name what they like.
        masks: (N or 1, any size), also (N or 1, 1, any size), of the concept; None, or
            only empty ones, counts whole pictures.
        prompts: see `ConceptExamples`; the photo templates unless given.
        flip: also train on mirrored pictures; turn it off for what is not symmetric (writing).

    Raises:
        ConfigError: no images, masks for another number of them, an empty mask beside others, or
            prompts without the words.
    """
    if images.ndim != 4 or not len(images) or images.shape[-1] != 3:
        raise ConfigError(f"Training needs pictures (N, H, W, 3), got {tuple(images.shape)}.")
    lists = _prompts(len(images), [word.word for word in words], prompts)
    shaped = None if masks is None else _masks(masks, images)
    if flip:
        images = torch.cat([images, images.flip(2)])
        shaped = None if shaped is None else torch.cat([shaped, shaped.flip(2)])
        lists = [*lists, *lists]
    latents = base.encode_images(images)
    if shaped is not None:
        small = F.interpolate(shaped[:, None], tuple(latents.shape[-2:]), mode="area")[:, 0]
        shaped = small / small.flatten(1).amax(1).clamp_min(1e-6)[:, None, None]
    return ConceptExamples(latents, lists, shaped)


def _masks(masks: Tensor, images: Tensor) -> Tensor | None:
    """One soft mask (N, H, W) for each picture, its largest value 1 over the whole picture.

    None where nothing is marked at all: ComfyUI gives such masks for pictures nobody painted on.
    """
    masks = masks[None] if masks.ndim == 2 else masks
    masks = masks[:, 0] if masks.ndim == 4 and masks.shape[1] == 1 else masks
    if masks.ndim != 3 or len(masks) not in (1, len(images)):
        raise ConfigError(
            f"There are {len(images)} pictures but masks {tuple(masks.shape)}: one mask for all, "
            "or one for each."
        )
    if not bool(torch.isfinite(masks).all()):
        raise ConfigError("A mask holds values that are not finite numbers.")
    resized = F.interpolate(
        masks.float()[:, None], tuple(images.shape[1:3]), mode="bilinear", antialias=True
    )[:, 0]
    resized = resized.clamp(0, 1)
    largest = resized.flatten(1).amax(1)
    empty = (largest < EMPTY).nonzero().flatten().tolist()
    if len(empty) == len(masks):
        return None
    if empty:
        raise ConfigError(
            f"Mask {empty[0] + 1} of {len(masks)} is empty, others are not: it marks no part of "
            "its picture. Mark what is to be learned, or fill the mask where the whole picture "
            "counts; connect no masks, and all whole pictures count."
        )
    return (resized / largest[:, None, None]).expand(len(images), -1, -1)


def _prompts(
    count: int, words: Sequence[str], prompts: Sequence[Sequence[str]] | None
) -> list[Sequence[str]]:
    """The prompts of each of so many pictures; the photo templates unless given."""
    if prompts is None:
        if not words:
            raise ConfigError("Say in a prompt what the pictures show.")
        named = " and a ".join(words)
        return [[template.format(named) for template in TEMPLATES]] * count
    for prompt in (prompt for options in prompts for prompt in options):
        if words and not find_words(prompt, words):
            raise ConfigError(
                f"The prompt {prompt!r} does not name {' or '.join(words)}: every training "
                "prompt must hold a new word."
            )
    return list(prompts)


@dataclass(frozen=True, eq=False)
class PictureTask:
    """Everything frozen around training on pictures with prompts.

    Args:
        base, text: the base model and its text encoders.
        base_name: family.
    """

    base: BaseModel
    text: TextEncoders
    base_name: str

    @cached_property
    def facts(self) -> tuple[object, ...]:
        """What a run depends on beside its settings, its pictures and the base's weights."""
        return (self.base_name, text_probe(self.text))

    @cached_property
    def nothing(self) -> TextCondition:
        """One empty prompt, encoded: what guidance starts from."""
        with torch.no_grad():
            empty = self.text.encode([""], {})
        return TextCondition(empty.context, empty.pooled)

    @cached_property
    def _encoded(self) -> dict[str, EncodedPrompts]:
        return {}

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> EncodedPrompts:
        """Prompts without new words; each is encoded once in a run, and kept on the CPU."""
        for prompt in dict.fromkeys(prompts):
            if prompt not in self._encoded:
                made = self.text.encode([prompt], {})
                parts = (made.context.cpu(), made.pooled.cpu(), made.real.cpu())
                self._encoded[prompt] = EncodedPrompts(*parts, {})
        rows = [self._encoded[prompt] for prompt in prompts]
        context, pooled, real = (
            torch.cat([getattr(row, name) for row in rows])
            for name in ("context", "pooled", "real")
        )
        return EncodedPrompts(context, pooled, real, {})

    def noised(
        self, batch: Mapping[str, Any], encoded: EncodedPrompts, guidance: float = 1.0
    ) -> NoisedBatch:
        """What a step asks of the base, before anything is attached to it.

        Args:
            batch: of `ConceptExamples.draw`.
            encoded: its prompts.
            guidance: see `losses.under_guidance`.
        """
        text = TextCondition(encoded.context, encoded.pooled)
        plain = NoisedBatch(batch["latents"], batch["noise"], batch["timesteps"], text)
        if guidance == 1.0:
            return plain
        return under_guidance(self.base, plain, guidance, self.nothing)


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
    embeddings = []
    for word in words:
        check_new_word(text, word.word)
        embeddings.append(text.embedding(superclass_token(text, word.superclass)))
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
    return ConceptTask(
        base, text, base_name, covariance, tuple(words), tuple(embeddings),
        encodings, layers, probe, own,
    )  # fmt: skip


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
