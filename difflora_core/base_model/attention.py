"""Attention of a diffusers UNet that trains fast on a CPU in bfloat16."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .protocol import BaseModel, compute_device, compute_dtype

_SMALL = 2**18
"""Scores of a head, such as 512 x 512, that may be kept for the backward pass."""


@contextmanager
def training_attention(base: BaseModel | None, precision: str) -> Iterator[None]:
    """Compute small attentions without torch's fused kernel where its backward pass is slow.

    On a CPU in bfloat16 it takes three to ten times as long as that of plain products; in float32
    it takes the same. The gradients are as precise.

    Args:
        base: the base model that a loss runs through, if there is one. Attention that somebody
            else put into its UNet stays.
        precision: of autocast.
    """
    own: dict[str, Any] = {} if base is None else getattr(base.unet, "attn_processors", {})
    if base is None or not own or not _is_slow(base, precision):
        yield
        return
    # slow to import, and ComfyUI imports us at its start
    from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0  # noqa: PLC0415

    unet: Any = base.unet
    by_size = {
        n: _BySize(AttnProcessor(), p) for n, p in own.items() if type(p) is AttnProcessor2_0
    }
    unet.set_attn_processor({**own, **by_size})
    try:
        yield
    finally:
        unet.set_attn_processor(own)


def _is_slow(base: BaseModel, precision: str) -> bool:
    half = precision == "bf16" or compute_dtype(base) == torch.bfloat16
    return half and compute_device(base).type == "cpu"


class _BySize:
    """A processor for diffusers' attention: `small` where few places meet, else `large`."""

    def __init__(self, small: Any, large: Any) -> None:
        self.small, self.large = small, large

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Features (B, N, C) that look at (B, M, D), or at themselves; diffusers calls it so."""
        seen = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        few = hidden_states.shape[1] * seen.shape[1] <= _SMALL
        chosen = self.small if few else self.large
        new: Tensor = chosen(attn, hidden_states, encoder_hidden_states, attention_mask)
        return new
