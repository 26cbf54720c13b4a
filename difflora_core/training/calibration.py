"""DisenDiff's attention calibration (arXiv 2403.18551): keep several new words apart.

Cross-attention maps of words are averaged over heads and layers, stretched to [0, 1] and smoothed.
`binding_loss` draws a new word's map to that of its class word, `separation_loss` pushes the maps
of different classes apart.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ConfigError

MAP_SIZE = 16
_BLUR = torch.tensor([math.exp(-(k**2) / (2 * 0.5**2)) for k in (-1, 0, 1)])


def intersection_over_union(first: Tensor, second: Tensor) -> Tensor:
    """(sum PQ + 1) / (sum (P + Q) - sum PQ + 1) of maps (B, S, S) in [0, 1]; (B,)."""
    overlap = (first * second).flatten(1).sum(1)
    total = (first + second).flatten(1).sum(1)
    return (overlap + 1) / (total - overlap + 1)


def smoothed(maps: Tensor) -> Tensor:
    """Maps (B, S, S) stretched to [0, 1] each, then a 3 x 3 Gaussian of sigma 0.5."""
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    stretched = (maps - low) / (high - low).clamp_min(1e-8)
    kernel = (_BLUR / _BLUR.sum()).to(maps)
    padded = F.pad(stretched[:, None], (1, 1, 1, 1), mode="reflect")
    return F.conv2d(padded, (kernel[:, None] * kernel[None])[None, None])[:, 0]


def binding_loss(modifiers: Sequence[Tensor], classes: Sequence[Tensor]) -> Tensor:
    """L_bind: sum over concepts of 1 - IoU(stop-gradient of the class map, modifier map).

    Args:
        modifiers: smoothed maps (B, S, S) of the new words.
        classes: smoothed maps of their class words; squared here, as the paper's filter does.

    Returns:
        (B,).
    """
    parts = [
        1 - intersection_over_union(own.detach().square(), modifier)
        for modifier, own in zip(modifiers, classes, strict=True)
    ]
    return torch.stack(parts).sum(0)


def separation_loss(classes: Sequence[Tensor]) -> Tensor:
    """L_s&s: mean pairwise IoU of the squared class maps (B, S, S); (B,).

    Raises:
        ConfigError: fewer than two classes.
    """
    if len(classes) < 2:
        raise ConfigError("Attention maps can be kept apart for two concepts or more.")
    squared = [one.square() for one in classes]
    pairs = [(a, b) for k, a in enumerate(squared) for b in squared[k + 1 :]]
    return torch.stack([intersection_over_union(a, b) for a, b in pairs]).mean(0)


class AttentionRecord:
    """Queries and keys of cross-attention layers, filled while a model runs."""

    def __init__(self, heads: Mapping[str, int]) -> None:
        self.heads = dict(heads)
        self.queries: dict[str, Tensor] = {}
        self.keys: dict[str, Tensor] = {}

    def maps(self, positions: Tensor, shape: tuple[int, int]) -> Tensor:
        """Mean attention (B, MAP_SIZE, MAP_SIZE) to one token of each row, smoothed.

        Args:
            positions: (B,) token numbers.
            shape: height and width of the latents, which tells how layers are laid out.

        Raises:
            ConfigError: nothing was recorded.
        """
        rows = torch.arange(len(positions), device=positions.device)
        found = []
        for name, size in self._chosen(shape).items():
            q, k, heads = self.queries[name], self.keys[name], self.heads[name]
            q, k = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k))  # B h N c
            scores = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)  # B h N L
            own = scores[rows, :, :, positions].mean(1)  # B N
            picture = own.unflatten(-1, size)[:, None]
            found.append(F.interpolate(picture, (MAP_SIZE, MAP_SIZE), mode="bilinear")[:, 0])
        if not found:
            raise ConfigError("No cross-attention layer was recorded.")
        return smoothed(torch.stack(found).mean(0))

    def _chosen(self, shape: tuple[int, int]) -> dict[str, tuple[int, int]]:
        """Layers at the resolution nearest to MAP_SIZE: name to height and width."""
        sizes = {}
        for name, queries in self.queries.items():
            scale = math.sqrt(shape[0] * shape[1] / queries.shape[1])
            sizes[name] = (round(shape[0] / scale), round(shape[1] / scale))
        far = {name: abs(math.log2(h * w / MAP_SIZE**2)) for name, (h, w) in sizes.items()}
        return {name: sizes[name] for name in sizes if far[name] - min(far.values()) < 1e-6}


@contextmanager
def record_attention(module: nn.Module, key_paths: Sequence[str]) -> Iterator[AttentionRecord]:
    """Record queries and keys while the ``with`` block runs; put it inside adapters' hooks.

    Args:
        module: the UNet.
        key_paths: module paths of the key projections, `....attn2.to_k`; their siblings `to_q`
            are found, and the number of heads is read from the attention module.
    """
    parents = {path: module.get_submodule(path.removesuffix(".to_k")) for path in key_paths}
    record = AttentionRecord({path: int(parent.heads) for path, parent in parents.items()})  # type: ignore[arg-type]

    def storing(store: dict[str, Tensor], path: str) -> Any:
        def hook(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            del layer, args
            store[path] = output

        return hook

    handles = []
    for path, parent in parents.items():
        for store, leaf in ((record.queries, "to_q"), (record.keys, "to_k")):
            projection = parent.get_submodule(leaf)
            handles.append(projection.register_forward_hook(storing(store, path)))
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()
