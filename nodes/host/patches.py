"""ComfyUI's patches of weights, as its reader of LoRA files makes them: their layers and sizes."""

from math import prod
from typing import Any

import comfy.weight_adapter
from torch import Tensor

UNET = "diffusion_model."
_SCALES = {
    comfy.weight_adapter.LoRAAdapter: 4,
    comfy.weight_adapter.GLoRAAdapter: 5,
    comfy.weight_adapter.LoHaAdapter: 7,
    comfy.weight_adapter.LoKrAdapter: 8,
}
"""Where the lengths of a DoRA stand among an adapter's tensors."""


def layer_of(key: Any) -> str:
    """The layer of the network that a patch edits; its key may also name a part of the weight."""
    name: str = key if isinstance(key, str) else key[0]
    return name.removeprefix(UNET).removesuffix(".weight").removesuffix(".bias")


def weight_of(layer: str, kind: str = "weight") -> str:
    """ComfyUI's name of a layer's weight or bias."""
    return f"{UNET}{layer}.{kind}"


def fits(patch: Any, weight: Tensor) -> bool:
    """Whether a patch is made for a weight of this size; ComfyUI only logs it where it is not."""
    if not _scale_fits(patch, weight):
        return False
    return any(
        outputs == len(weight) and numbers in (None, weight.numel())
        for outputs, numbers in _sizes(patch)
    )


def _scale_fits(patch: Any, weight: Tensor) -> bool:
    """Whether the lengths of a DoRA, if there are any, are those of rows or columns of a weight."""
    place = next((k for kind, k in _SCALES.items() if isinstance(patch, kind)), None)
    scale = None if place is None else patch.weights[place]
    if scale is None:
        return True
    rows = scale.ndim > 1 and (len(scale), scale.numel()) == (len(weight), len(weight))
    columns = weight.ndim > 1 and scale.numel() == weight.shape[1]
    return rows or (columns and (scale.ndim == 1 or len(scale) == 1))


def _sizes(patch: Any) -> list[tuple[int, int | None]]:
    """(outputs, numbers) of the weights that a patch may be made for; None is any number."""
    if isinstance(patch, tuple):
        return [(len(patch[1][0]), patch[1][0].numel())]
    weights = patch.weights
    if isinstance(patch, comfy.weight_adapter.LoRAAdapter):
        up, down, _, mid, _, reshape = weights
        if reshape is not None:
            return [(int(reshape[0]), None), (len(up), None)]
        kernel = 1 if mid is None else prod(mid.shape[2:])
        return [(len(up), len(up) * down[0].numel() * kernel)]
    if isinstance(patch, comfy.weight_adapter.LoHaAdapter):
        first, second, _, _, _, core = weights[:6]
        if core is None:
            return [_product(first, second)]
        out = first.shape[1]
        return [(out, out * second.shape[1] * prod(core.shape[2:]))]
    if isinstance(patch, comfy.weight_adapter.LoKrAdapter):
        return [_kron_size(weights)]
    if isinstance(patch, comfy.weight_adapter.GLoRAAdapter):  # LyCORIS turned its factors round
        first, second = weights[2:4]
        return [_product(first, second), _product(second, first)]
    blocks = weights[0]  # OFT and BOFT: rotations of blocks of outputs
    return [(blocks.shape[-3] * blocks.shape[-1], None)]


def _kron_size(weights: Any) -> tuple[int, int]:
    """Size of a Kronecker product whose factors may be products themselves."""
    first, second, _, first_a, first_b, second_a, second_b, core = weights[:8]
    one = (len(first), first.numel()) if first is not None else _product(first_a, first_b)
    if second is not None:
        two = (len(second), second.numel())
    elif core is None:
        two = _product(second_a, second_b)
    else:
        out, width = second_a.shape[1], second_b.shape[1]
        two = (out, out * width * prod(core.shape[2:]))
    return one[0] * two[0], one[1] * two[1]


def _product(first: Any, second: Any) -> tuple[int, int]:
    return len(first), len(first) * second[0].numel()
