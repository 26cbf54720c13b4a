"""What the blocks of a UNet put out, recorded while it runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..errors import ConfigError

GROUPS = (
    *("down_blocks", "mid_block", "up_blocks"),
    *("input_blocks", "middle_block", "output_blocks"),
)
"""Where diffusers' UNets keep their blocks, and LDM's."""


def unet_blocks(unet: nn.Module) -> dict[str, nn.Module]:
    """Blocks on the way down, in the middle and on the way up: name to the module to listen to.

    LDM's blocks are sequences that ComfyUI walks through itself, so their last part is heard.

    Raises:
        ConfigError: there are none.
    """
    found: dict[str, nn.Module] = {}
    for name in GROUPS:
        group = getattr(unet, name, None)
        if isinstance(group, nn.ModuleList):
            found |= {f"{name}.{k}": block for k, block in enumerate(group)}
        elif isinstance(group, nn.Module):
            found[name] = group
    if not found:
        raise ConfigError(f"Nothing is known of the blocks of {type(unet).__name__}.")
    return {n: b[-1] if isinstance(b, nn.Sequential) else b for n, b in found.items()}


@contextmanager
def recorded_blocks(unet: nn.Module) -> Iterator[dict[str, Tensor]]:
    """The output (B, C, h, w) of every block of a UNet that runs in the `with` block, by name.

    Adapters that are attached before it count.
    """
    outputs: dict[str, Tensor] = {}
    blocks = unet_blocks(unet).items()
    handles = [part.register_forward_hook(partial(_keep, outputs, name)) for name, part in blocks]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def _keep(outputs: dict[str, Tensor], name: str, module: nn.Module, args: Any, made: Any) -> None:
    """A forward hook: diffusers' blocks on the way down also return what they hand across."""
    del module, args
    outputs[name] = made[0] if isinstance(made, tuple) else made
