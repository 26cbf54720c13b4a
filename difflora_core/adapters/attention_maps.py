"""Where a model looks for words while it draws: maps of its cross-attention. Ours.

A place of the picture spreads its attention over the tokens of the prompt. How much of it goes to
the words of a person, summed over layers and steps, says where that person is drawn (arXiv
2210.04885 for one word; arXiv 2510.23515 to tell people apart).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import LayoutError
from .regions import CROSS, token_grid

SMOOTH = 0.25
"""Standard deviation of the blur of a map, as a share of the picture's shorter side."""


@contextmanager
def watched(module: nn.Module, tokens: Tensor, size: tuple[int, int]) -> Iterator[list[Tensor]]:
    """While the block runs, fills a list with a map (R, J, h, w) of every cross-attention.

    Args:
        module: the UNet.
        tokens: (R, L, J), 1 where a token of a row's prompt belongs to person j, else 0.
        size: height and width of the latents.

    Raises:
        LayoutError: the model has no cross-attention.
    """
    found: list[Tensor] = []
    wanted = CROSS.strip(".")
    layers = [m for name, m in module.named_modules() if name.split(".")[-1] == wanted]
    if not layers:
        raise LayoutError(
            "This model has no cross-attention to find people by (models of SDXL's and SD1.5's "
            "kind have one). Place people by masks with LoRA to Hook."
        )
    handles = []
    for layer in layers:
        watcher = _Watcher(layer.heads, tokens, size, found)
        handles.append(layer.to_q.register_forward_hook(watcher.queries))
        handles.append(layer.to_k.register_forward_hook(watcher.keys))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


class _Watcher:
    """Hooks on one cross-attention."""

    def __init__(
        self, heads: int, tokens: Tensor, size: tuple[int, int], found: list[Tensor]
    ) -> None:
        self.heads, self.tokens, self.size, self.found = heads, tokens, size, found
        self._q: Tensor | None = None

    def queries(self, module: nn.Module, args: Any, q: Tensor) -> None:
        """Keep the queries (R, N, C) until the keys come."""
        del module, args
        self._q = q

    def keys(self, module: nn.Module, args: Any, k: Tensor) -> None:
        """Add the map of queries and keys (R, L, C)."""
        del module, args
        if self._q is None:
            return
        q, self._q = self._q, None
        rows = attention_to(q, k, self.heads, self.tokens)  # R J N
        grid = rows.unflatten(-1, token_grid(rows.shape[-1], self.size))
        self.found.append(F.interpolate(grid, self.size, mode="bilinear"))


def attention_to(q: Tensor, k: Tensor, heads: int, tokens: Tensor) -> Tensor:
    """Attention of every place to marked tokens, mean over heads, float32: (R, J, N).

    Args:
        q: queries (R, N, heads d).
        k: keys (R, L, heads d).
        heads: their number.
        tokens: (R, L, J) marks; tokens beyond them are not marked.
    """
    total = torch.zeros((), device=q.device)
    marks = F.pad(tokens, (0, 0, 0, max(0, k.shape[1] - tokens.shape[1])))[:, : k.shape[1]]
    marks = marks.to(k.device, torch.float32)
    width = q.shape[-1] // heads
    for head in range(heads):  # one after another: all of them would be large at full size
        own = slice(head * width, (head + 1) * width)
        scores = q[..., own].float() @ k[..., own].float().mT / width**0.5
        total = total + (scores.softmax(-1) @ marks).mT
    return total / heads


def assigned(maps: Tensor) -> Tensor:
    """Everybody's region: each place of the picture belongs to one person. (B, J, h, w), 0 or 1.

    What counts of a map is what lies above its mean. It is blurred, since attention lies on parts
    of a person, a face or a shirt, and scaled, so that words that get more attention take no more
    room.

    Args:
        maps: (B, J, h, w) attention of places to each person's words, at least 0.
    """
    above = (maps - maps.mean((2, 3), keepdim=True)).clamp(min=0)
    near = blurred(above, SMOOTH * min(maps.shape[-2:]))
    owner = (near / near.mean((2, 3), keepdim=True).clamp(min=1e-12)).argmax(1)
    return F.one_hot(owner, maps.shape[1]).movedim(-1, 1).to(maps)


def blurred(maps: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of (B, J, h, w) by a standard deviation in places, edges repeated."""
    reach = max(maps.shape[-2:])
    bell = torch.exp(-(torch.arange(-reach, reach + 1).to(maps) ** 2) / (2 * max(sigma, 1e-6) ** 2))
    bell = (bell / bell.sum())[None, None]
    flat = maps.flatten(0, 1)[:, None]
    flat = F.pad(flat, (reach, reach, reach, reach), mode="replicate")
    flat = F.conv2d(F.conv2d(flat, bell[..., None, :]), bell[..., None])
    return flat.view_as(maps)
