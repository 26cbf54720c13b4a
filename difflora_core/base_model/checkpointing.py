"""Gradient checkpointing: layers are computed again in the backward pass instead of remembered.

Adapters on a checkpointed layer must be attached until the backward pass is through; the training
loop takes care of that with `adapters.attach.hold`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from ..errors import ConfigError

_LDM_LISTS = ("input_blocks", "middle_block", "output_blocks")


@contextmanager
def gradient_checkpointing(unet: nn.Module) -> Iterator[None]:
    """Checkpoint the blocks of a UNet while the `with` block runs (arXiv:1604.06174).

    Gradients stay the same to rounding; memory falls and time rises, by about a forward pass.

    Args:
        unet: diffusers' or LDM's, ComfyUI's for example.

    Raises:
        ConfigError: neither; nothing is known of its blocks.
    """
    enable: Callable[[], None] | None = getattr(unet, "enable_gradient_checkpointing", None)
    disable: Callable[[], None] | None = getattr(unet, "disable_gradient_checkpointing", None)
    if enable is not None and disable is not None:
        enable()
        try:
            yield
        finally:
            disable()
        return
    with checkpointed_blocks(ldm_blocks(unet)):
        yield


def ldm_blocks(unet: nn.Module) -> list[nn.Module]:
    """Residual blocks and transformers of an LDM-named UNet; both are called as modules.

    The groups that hold them are not: ComfyUI walks through those itself.

    Raises:
        ConfigError: there are none.
    """
    groups = [getattr(unet, name, None) for name in _LDM_LISTS]
    found = [
        layer
        for group in groups
        if isinstance(group, nn.Module)
        for layer in group.modules()
        if type(layer).__name__ in ("ResBlock", "SpatialTransformer")
    ]
    if not found:
        raise ConfigError(
            f"Gradient checkpointing does not know the layers of {type(unet).__name__}: turn "
            "checkpointing off."
        )
    return found


@contextmanager
def checkpointed_blocks(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Compute the forward pass of these modules again in the backward pass; taken off at the end.

    Args:
        blocks: modules none of which contains another.
    """
    replaced: list[nn.Module] = []
    try:
        for block in blocks:
            # On the instance; the class's own forward shows again when it is deleted.
            block.forward = partial(_again, block.forward)
            replaced.append(block)
        yield
    finally:
        for block in replaced:
            del block.forward


def _again(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)
