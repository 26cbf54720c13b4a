"""What the recipes of pictures train on: pictures with prompts, and the batches drawn of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..base_model.protocol import BaseModel, told_sizes
from ..diffusion.objective import stratified_timesteps
from ..errors import ConfigError, counted
from ..text.new_words import TEMPLATES, find_words
from ..vision.preprocess import marks_nothing


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
        """A function that draws a batch from a generator, see `PictureExamples.draw`."""


@dataclass(frozen=True, eq=False)
class PictureExamples:
    """Training pictures.

    Args:
        latents: (N, C, h, w) clean, scaled.
        prompts: for each picture the prompts it may be shown with, new words standing literally.
        masks: (N, h, w) in [0, 1], largest value 1, what counts; None counts whole pictures.
        time_ids: (N, 6) see `TextCondition`; None where pictures are as they were.

    Raises:
        ConfigError: no pictures, or parts that do not fit each other.
    """

    latents: Tensor
    prompts: Sequence[Sequence[str]]
    masks: Tensor | None = None
    time_ids: Tensor | None = None

    def __post_init__(self) -> None:
        shape = tuple(self.latents.shape)
        if len(shape) != 4 or 0 in shape:
            raise ConfigError(f"Training needs at least one picture; got latents {shape}.")
        if len(self.prompts) != shape[0] or not all(self.prompts):
            raise ConfigError(
                f"{counted(shape[0], 'picture')} need prompts each, got {len(self.prompts)} "
                "lists of them."
            )
        if self.masks is not None and self.masks.shape != (shape[0], *shape[2:]):
            raise ConfigError(
                f"The masks are {tuple(self.masks.shape)}, expected {(shape[0], *shape[2:])}."
            )
        if self.time_ids is not None and self.time_ids.shape != (shape[0], 6):
            raise ConfigError(
                f"The sizes of the pictures are {tuple(self.time_ids.shape)}, expected "
                f"{(shape[0], 6)}."
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
            when this is a part of it; `masks` (B, h, w) in [0, 1] and `time_ids` (B, 6) if there
            are any.
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
            for name in ("masks", "time_ids"):
                own: Tensor | None = getattr(self, name)
                if own is not None:
                    parts[name] = own[index].float()
            return parts

        return batch


def picture_examples(
    base: BaseModel,
    images: Tensor,
    words: Sequence[str] = (),
    masks: Tensor | None = None,
    prompts: Sequence[Sequence[str]] | None = None,
    flip: bool = True,
    time_ids: Tensor | None = None,
) -> PictureExamples:
    """Training pictures from images.

    Args:
        base: encodes the images.
        images: (N, H, W, 3) in [0, 1].
        words: new words, of which each prompt names one or more; without words they name what
            they like.
        masks: (N or 1, any size), also (N or 1, 1, any size), of the concept; None, or
            only empty ones, counts whole pictures.
        prompts: see `PictureExamples`; the photo templates unless given.
        flip: also train on mirrored pictures; turn it off for what is not symmetric (writing).
        time_ids: in pixels of the images, see `PictureExamples`; with `flip` those of the mirrored
            pictures follow.

    Raises:
        ConfigError: no images, masks for another number of them, an empty mask beside others, or
            prompts without the words.
    """
    if images.ndim != 4 or not len(images) or images.shape[-1] != 3:
        raise ConfigError(f"Training needs pictures (N, H, W, 3), got {tuple(images.shape)}.")
    lists = _prompts(len(images), words, prompts)
    shaped = None if masks is None else _masks(masks, images)
    if flip:
        images = torch.cat([images, images.flip(2)])
        shaped = None if shaped is None else torch.cat([shaped, shaped.flip(2)])
        lists = [*lists, *lists]
    latents = base.encode_images(images)
    if shaped is not None:
        small = F.interpolate(shaped[:, None], tuple(latents.shape[-2:]), mode="area")[:, 0]
        shaped = small / small.flatten(1).amax(1).clamp_min(1e-6)[:, None, None]
    if time_ids is not None:
        time_ids = told_sizes(time_ids, images.shape[1], latents.shape[2])
    return PictureExamples(latents, lists, shaped, time_ids)


def held_out_numbers(count: int, percent: int) -> list[int]:
    """Which of so many pictures or prompts, evenly over the list, only choose the best state.

    A single one is for training, and `percent` 0 holds none out.
    """
    kept = max(1, round(count * percent / 100)) if percent and count > 1 else 0
    return [k * count // kept for k in range(kept)]


def _masks(masks: Tensor, images: Tensor) -> Tensor | None:
    """One soft mask (N, H, W) for each picture, its largest value 1 over the whole picture.

    None where nothing is marked at all: ComfyUI gives such masks for pictures nobody painted on.
    """
    masks = masks[None] if masks.ndim == 2 else masks
    masks = masks[:, 0] if masks.ndim == 4 and masks.shape[1] == 1 else masks
    if masks.ndim != 3 or len(masks) not in (1, len(images)):
        raise ConfigError(
            f"There are {counted(len(images), 'picture')} but masks {tuple(masks.shape)}: one "
            "mask for all, or one for each."
        )
    if not bool(torch.isfinite(masks).all()):
        raise ConfigError("A mask holds values that are not finite numbers.")
    resized = F.interpolate(
        masks.float()[:, None], tuple(images.shape[1:3]), mode="bilinear", antialias=True
    )[:, 0]
    resized = resized.clamp(0, 1)
    largest = resized.flatten(1).amax(1)
    empty = [k for k, mask in enumerate(resized) if marks_nothing(mask)]
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
