"""Adaptations in one picture, each in a region of its own.

Where a layer sees places of the picture, what an adapter changes is multiplied by its region's
mask, as FreeFuse does (arXiv 2510.23515). Cross-attention also reads the prompt, whose tokens lie
nowhere in the picture. So it runs once more for every region, with that region's adapters alone,
and its outputs are put together by the masks (ours).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import LayoutError, counted
from .attach import AttachHandle, attach
from .base import AdapterSet, LayerAdapter

CROSS = ".attn2."
"""Part of the names of the layers of a cross-attention, in ComfyUI's and in diffusers' UNets."""

CUT = (
    "A layer sees {}: something on the model cuts or merges the picture (HyperTile or Token "
    "Merging), so nobody can say where people are. Take that off, or place people by masks with "
    "LoRA to Hook."
)


class Region:
    """Where in the picture something acts.

    Args:
        mask: (R, h, w) in [0, 1] for each row of a call of the network, as large as the latents.
    """

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask
        self._fitted: dict[tuple[int, ...], Tensor] = {}

    def at(self, x: Tensor) -> Tensor:
        """The mask shaped to multiply a layer's x.

        Args:
            x: (R, h' w', C) tokens, (R, C, h', w') a map, or (R, C) what has no place, which gets
                the region's share of the picture.

        Raises:
            LayoutError: x does not show whole pictures.
        """
        places = tuple(x.shape[2:]) if x.ndim == 4 else tuple(x.shape[1:-1])
        key = (x.ndim, *places)
        if key not in self._fitted:
            self._fitted[key] = self._shaped(x)
        if len(x) != len(self.mask):
            raise LayoutError(CUT.format(f"{counted(len(x), 'picture')} for {len(self.mask)}"))
        return self._fitted[key].to(x)

    def _shaped(self, x: Tensor) -> Tensor:
        """The mask with as many dimensions as x."""
        if x.ndim == 2:
            return self.mask.mean((1, 2))[:, None]
        grid = tuple(x.shape[2:]) if x.ndim == 4 else token_grid(x.shape[1], self.mask.shape[1:])
        fitted = F.interpolate(self.mask[:, None], grid, mode="area")  # B 1 h' w'
        return fitted if x.ndim == 4 else fitted.flatten(1)[..., None]


def token_grid(tokens: int, size: Sequence[int]) -> tuple[int, int]:
    """Height and width of a picture in tokens, of latents of this size, halved some times.

    Raises:
        LayoutError: no halving gives so many tokens.
    """
    height, width = size
    while height * width > tokens and (height > 1 or width > 1):
        height, width = -(-height // 2), -(-width // 2)
    if height * width != tokens:
        raise LayoutError(CUT.format(f"{counted(tokens, 'place')} of {size[0]} x {size[1]}"))
    return height, width


class InRegion(LayerAdapter):
    """Another adapter, whose changes count in a region alone."""

    def __init__(self, adapter: LayerAdapter, region: Region) -> None:
        self.adapter, self.region = adapter, region

    def on(self, layer: nn.Module) -> LayerAdapter:
        """As it acts on a live layer."""
        return InRegion(self.adapter.on(layer), self.region)

    def substitute(self, x: Tensor) -> Tensor:
        """x + mask * (substitute(x) - x)."""
        other = self.adapter.substitute(x)
        return x if other is x else x + self.region.at(x) * (other - x)

    def edit(self, x: Tensor, y: Tensor) -> Tensor:
        """y + mask * (edit(x, y) - y)."""
        edited = self.adapter.edit(x, y)
        return y if edited is y else y + self.region.at(y) * (edited - y)


class _ByRegion:
    """Hook of a cross-attention: its output with the adapters of each region, put together."""

    def __init__(self, parts: Sequence[tuple[AttachHandle, Region]]) -> None:
        self.parts, self.calls = tuple(parts), 0

    def after(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor
    ) -> Tensor:
        """y + sum of mask * (what a region's adapters make of the same inputs - y)."""
        self.calls += 1
        changed = y
        for handle, region in self.parts:
            handle.paused = False
            try:
                own = module.forward(*args, **kwargs)
            finally:
                handle.paused = True
            changed = changed + region.at(y) * (own - y)
        return changed


@contextmanager
def attach_in_regions(
    module: nn.Module,
    parts: Sequence[tuple[AdapterSet, Region]],
    names: Mapping[str, str] | None = None,
) -> Iterator[None]:
    """Hook adapters onto their layers while the block runs, each in its region.

    Args:
        module: the UNet that holds the layers.
        parts: adapters, their strengths included, and where they act.
        names: layer name to module path, as for `attach`.

    Raises:
        LayoutError: a layer is not in the module, or something took a cross-attention's place.
    """
    with ExitStack() as stack:
        inside: dict[str, list[tuple[AttachHandle, Region]]] = {}
        for adapters, region in parts:
            plain = [
                replace(entry, adapter=InRegion(entry.adapter, region))
                for entry in adapters
                if CROSS not in entry.layer
            ]
            cross = AdapterSet(tuple(entry for entry in adapters if CROSS in entry.layer))
            stack.enter_context(attach(module, AdapterSet(tuple(plain)), names=names))
            handle = stack.enter_context(attach(module, cross, names=names))
            handle.paused = True
            for layer in cross.layers:
                path = layer if names is None else names[layer]
                own = inside.setdefault(path.partition(CROSS)[0] + CROSS.rstrip("."), [])
                if not own or own[-1][0] is not handle:
                    own.append((handle, region))
        hooks = [(module.get_submodule(path), _ByRegion(own)) for path, own in inside.items()]
        for attention, hook in hooks:
            taken = attention.register_forward_hook(hook.after, with_kwargs=True)
            stack.callback(taken.remove)
        yield
        if any(hook.calls == 0 for _, hook in hooks):
            raise LayoutError(
                "Something on the model takes the place of its cross-attention (an IP-Adapter, for "
                "example), so people cannot be kept in their regions there. Take it off, or place "
                "people by masks with LoRA to Hook."
            )
