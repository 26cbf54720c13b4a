"""Which people a batch shows, and which picture of each it draws: all of one size (ours)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class SizedLatents:
    """Latents of M pictures of several sizes; read like a tensor, pictures of one size at once.

    Attributes:
        sizes: (n, C, h, w) of the pictures of each size.
        size: (M,) which of them each picture has.
        place: (M,) its row there.
    """

    sizes: tuple[Tensor, ...]
    size: Tensor
    place: Tensor

    def __getitem__(self, pictures: Tensor) -> Tensor:
        """(n, C, h, w) of pictures (n,), which have the size of the first."""
        return self.sizes[int(self.size[pictures[0]])][self.place[pictures]]


Latents = Tensor | SizedLatents
"""Of M pictures: (M, C, h, w) where all have one size."""


def sized(latents: Sequence[Tensor]) -> Latents:
    """Latents (C, h, w) of M pictures together."""
    shapes = sorted({tuple(latent.shape) for latent in latents})
    if len(shapes) == 1:
        return torch.stack(list(latents))
    size = torch.tensor([shapes.index(tuple(latent.shape)) for latent in latents])
    groups = [torch.nonzero(size == number).flatten() for number in range(len(shapes))]
    place = torch.zeros_like(size)
    for group in groups:
        place[group] = torch.arange(len(group))
    stacks = tuple(torch.stack([latents[k] for k in group.tolist()]) for group in groups)
    return SizedLatents(stacks, size, place)


def of_one_size(latents: Latents, pictures: Tensor, most: int) -> list[Tensor]:
    """Where pictures (n,) of one size each stand among them: up to `most` places (m,) at once."""
    if isinstance(latents, Tensor):
        return list(torch.arange(len(pictures)).split(most))
    size = latents.size[pictures]
    groups = [(size == number).nonzero().flatten() for number in size.unique()]
    return [part for group in groups for part in group.split(most)]


class PersonChoice:
    """Draws people, and an order of the pictures of each of which the first have one size.

    Everybody counts the same, and so does every picture of a person; a size comes as often as the
    pictures that have it.

    Args:
        people: (P, Q) picture numbers of each person; -1 at the end of whoever has fewer.
        latents: of the pictures.
    """

    def __init__(self, people: Tensor, latents: Latents) -> None:
        self.people = people
        size = latents.size[people.clamp(min=0)] if isinstance(latents, SizedLatents) else None
        self._size = None if size is None else size.masked_fill(people < 0, -1)  # P Q

    def __call__(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """People (B,), and pictures (B, Q) of each in random order, none (-1) at the end."""
        if self._size is None:
            people = torch.randint(len(self.people), (count,), generator=generator)
            first = self.people[people] >= 0
        else:
            people, first = self._of_one_size(self._size, count, generator)
        own = self.people[people]  # B Q
        keys = torch.rand(own.shape, generator=generator).masked_fill(own < 0, 2)
        lead = keys.masked_fill(~first, 3).argmin(1, keepdim=True)
        return people, own.gather(1, keys.scatter(1, lead, -1).argsort(1))

    @staticmethod
    def _of_one_size(size: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """People (B,), and which of their pictures (B, Q) have the size of this batch."""
        counts = torch.stack([(size == k).sum(1) for k in range(int(size.max()) + 1)])
        shares = counts / counts.sum(0)  # of a person's pictures, by size: (sizes, P)
        chosen = int(torch.multinomial(shares.sum(1), 1, generator=generator))
        people = torch.multinomial(shares[chosen], count, replacement=True, generator=generator)
        return people, size[people] == chosen
