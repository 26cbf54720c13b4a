"""Where the people of a picture are, found by their words while the first steps are drawn."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ...difflora_core.adapters.attention_maps import assigned, watched
from ...difflora_core.adapters.regions import Region
from ...difflora_core.errors import ConfigError, LayoutError, percent

AREA = (
    "A part of the picture is drawn by itself (a prompt with an area, or tiles), so people cannot "
    "be found by their words. Leave the area out, or place people by masks with LoRA to Hook."
)
ALONE = (
    "There is one person to place by words ({words}), who would be everywhere. Add Place LoRA by "
    "Words for the others too (strength 0 for those without a LoRA), or use Load LoRA Model."
)
UNUSED = (
    "no step was left after people were found, so no LoRA acted. Take more steps, or a smaller "
    "find_percent."
)
NOTHING = torch.zeros(0)


class RegionFinder:
    """Finds the regions of the people of one sampling run, and keeps them until it ends.

    Args:
        places: the words of each person.
    """

    def __init__(self, places: Sequence[str]) -> None:
        self.places = tuple(places)
        self._shape: tuple[int, ...] = ()
        self._maps = self._found = NOTHING  # B J h w: sums, and the regions
        self._regions: dict[tuple[str, int], list[Region]] = {}

    def begin(self, shape: Sequence[int]) -> None:
        """A run with latents (B, ..., h, w) starts.

        Raises:
            ConfigError: one person alone, or two by the same words.
        """
        self.end()
        self._shape = tuple(shape)
        if len(self.places) == 1:
            raise ConfigError(ALONE.format(words=self.places[0]))

    def end(self) -> None:
        """Forgets the run."""
        self._shape, self._maps, self._found = (), NOTHING, NOTHING
        self._regions.clear()

    @property
    def looking(self) -> bool:
        """Whether no call has said yet where anybody is."""
        return not len(self._maps)

    @contextmanager
    def watched(self, network: nn.Module, x: Tensor, tokens: Tensor) -> Iterator[None]:
        """While the network runs on x (R, ...), adds what it looks at for everybody's words.

        Args:
            network: the UNet.
            x: its input.
            tokens: (R, L, J), 1 where a token belongs to the words of person j, else 0.

        Raises:
            LayoutError: the network has no cross-attention, or does not see whole pictures.
        """
        self._check(x)
        if not tokens.any():
            yield
            return
        height, width = x.shape[-2:]
        with watched(network, tokens.to(x.device), (height, width)) as found:
            yield
        if found:
            rows = torch.stack(found).sum(0).float().cpu()  # R J h w
            maps = rows.unflatten(0, (-1, self._shape[0])).sum(0)
            self._maps = maps if self.looking else self._maps + maps

    def regions(self, x: Tensor) -> list[Region]:
        """The region of everybody, for latents x (R, ...).

        Raises:
            LayoutError: x does not show whole pictures.
        """
        self._check(x)
        if not len(self._found):
            self._found = assigned(self._maps)
        key = (str(x.device), len(x))
        if key not in self._regions:
            masks = self._found.to(x.device).repeat(len(x) // self._shape[0], 1, 1, 1)
            self._regions[key] = [Region(mask) for mask in masks.unbind(1)]
        return self._regions[key]

    def described(self, number: int) -> str | None:
        """How large a person's region in the first picture is, and on which side; None before."""
        if self.looking:
            return None
        if not len(self._found):
            return f"{self.places[number]}: {UNUSED}"
        mask = self._found[0, number]
        if not mask.any():
            return f"{self.places[number]}: found nowhere."
        ways = [torch.linspace(0, 1, n) for n in mask.shape]
        down = float(mask.sum(1) @ ways[0] / mask.sum())
        right = float(mask.sum(0) @ ways[1] / mask.sum())
        across = "left" if right < 0.45 else "right" if right > 0.55 else ""
        along = "top" if down < 0.4 else "bottom" if down > 0.6 else ""
        where = " ".join(filter(None, (along, across))) or "middle"
        return f"{self.places[number]}: {percent(float(mask.mean()))} of the picture, {where}."

    def _check(self, x: Tensor) -> None:
        """Refuses parts of the picture."""
        if tuple(x.shape[-2:]) != self._shape[-2:] or len(x) % self._shape[0]:
            raise LayoutError(AREA)


def own_tokens(where: Tensor) -> Tensor:
    """Tokens of each person's words alone, 1 or 0, of distances (R, L, J), see `words.heard`.

    Words that several people share, such as "a person with", tell nobody apart, unless somebody has
    no others.
    """
    marks = (where == 0).float()
    alone = marks * (marks.sum(-1, keepdim=True) == 1)
    return torch.where(alone.any(1, keepdim=True), alone, marks)
