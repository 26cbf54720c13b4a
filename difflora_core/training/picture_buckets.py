"""Training pictures of several shapes and framings: every batch is of one of these groups.

Class pictures for prior preservation (arXiv:2208.12242, Eq. 2) are one more group. There a step
holds pictures of both kinds, with the loss L + w L'; here it holds one kind, as often as its weight
says (ours), which costs no time. The mean is (L + w L') / (1 + w): the same direction at another
scale.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..base_model.protocol import BaseModel
from ..errors import ConfigError
from ..vision.training_pictures import TrainingPicture, bucket_size, bucket_step, fitted
from .picture_examples import PictureExamples, picture_examples


@dataclass(frozen=True, eq=False)
class BucketedExamples:
    """Groups of pictures of one shape each.

    Args:
        buckets: the groups.
        shares: how often a batch is of a group, positive numbers of any sum.

    Raises:
        ConfigError: there is no group, or not one share for each.
    """

    buckets: tuple[PictureExamples, ...]
    shares: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.buckets or len(self.buckets) != len(self.shares) or min(self.shares) <= 0:
            raise ConfigError(
                f"{len(self.buckets)} groups of pictures need a positive share each, got "
                f"{self.shares}."
            )

    def __len__(self) -> int:
        return sum(map(len, self.buckets))

    @property
    def first(self) -> tuple[Tensor, str]:
        """A picture (1, C, h, w) and a prompt of it, to draw previews of."""
        return self.buckets[0].first

    @property
    def area(self) -> int:
        """Latent pixels of the largest picture."""
        return max(bucket.area for bucket in self.buckets)

    @property
    def prompts(self) -> list[str]:
        """Every prompt once."""
        found = (p for bucket in self.buckets for options in bucket.prompts for p in options)
        return list(dict.fromkeys(found))

    def draw(self, count: int, steps: int) -> Callable[[torch.Generator], dict[str, object]]:
        """A function that draws a batch from a generator, see `PictureExamples.draw`."""
        draws = [bucket.draw(count, steps) for bucket in self.buckets]
        shares = torch.tensor(self.shares, dtype=torch.float64)

        def batch(generator: torch.Generator) -> dict[str, object]:
            chosen = int(torch.multinomial(shares, 1, generator=generator))
            return draws[chosen](generator)

        return batch

    def beside(self, other: BucketedExamples, weight: float) -> BucketedExamples:
        """These pictures and others, of which a step counts `weight` against 1."""
        scale = weight * sum(self.shares) / sum(other.shares)
        shares = (*self.shares, *(scale * share for share in other.shares))
        return BucketedExamples((*self.buckets, *other.buckets), shares)


def bucketed(
    base: BaseModel,
    pictures: Sequence[TrainingPicture],
    prompts: Mapping[int, Sequence[str]],
    resolution: int,
    flip: bool = True,
) -> BucketedExamples:
    """Training pictures as groups; framings count the same, pictures of one framing too.

    Args:
        base: encodes the pictures.
        pictures: of any sizes.
        prompts: of each photo, by its number.
        resolution: side in pixels of the square that the base was made for.
        flip: also train on mirrored pictures.

    Raises:
        ConfigError: there is no picture, or one has no prompt.
    """
    groups: dict[tuple[str, int, int, bool], list[TrainingPicture]] = {}
    step = bucket_step(resolution)
    for picture in pictures:
        height, width = picture.image.shape[:2]
        size = bucket_size(height, width, resolution, step)
        sized = fitted(picture, *size)
        key = (sized.framing, *size, sized.mask is not None)
        groups.setdefault(key, []).append(sized)
    counts: dict[str, int] = {}
    for picture in pictures:
        counts[picture.framing] = counts.get(picture.framing, 0) + 1
    buckets, shares = [], []
    for (framing, *_), own in groups.items():
        buckets.append(_encoded(base, own, prompts, flip))
        shares.append(len(own) / counts[framing])
    return BucketedExamples(tuple(buckets), tuple(shares))


def _encoded(
    base: BaseModel,
    pictures: Sequence[TrainingPicture],
    prompts: Mapping[int, Sequence[str]],
    flip: bool,
) -> PictureExamples:
    """Pictures of one size as latents."""
    masks = [picture.mask for picture in pictures if picture.mask is not None]
    sizes = [p.time_ids(mirrored) for mirrored in (False, True)[: 1 + flip] for p in pictures]
    return picture_examples(
        base,
        torch.stack([picture.image for picture in pictures]),
        (),
        torch.stack(masks) if masks else None,
        [prompts[picture.number] for picture in pictures],
        flip,
        torch.tensor(sizes),
    )
