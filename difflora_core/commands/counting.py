"""What a training step costs, counted on the real networks with shapes alone (meta device)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from ..adapters.attach import attach
from ..adapters.lora import lora_adapter_set
from ..lora.layout import LoRALayout
from ..lora.weights import LoRALayer, LoRAWeights

BACKWARD = 1.1
"""Products of a backward pass over those of the forward pass, weights frozen (counted: 1.08)."""
UNITS = ("ResnetBlock2D", "BasicTransformerBlock")
"""What gradient checkpointing computes again as one."""


@dataclass(frozen=True)
class StepCount:
    """One forward pass of a frozen UNet under a LoRA that is trained, one picture.

    Attributes:
        parameters: of the UNet.
        forward: floating-point operations of its products, two for a multiplication and addition.
        saved: bytes kept for the backward pass.
        largest: bytes of these in the largest unit of gradient checkpointing.
        ends: bytes kept with gradient checkpointing, beside those of one unit.
    """

    parameters: int
    forward: float
    saved: int
    largest: int
    ends: int

    def operations(self, checkpointing: bool) -> float:
        """Operations of a training step: forward, backward, and forward again if asked."""
        return self.forward * (1 + BACKWARD + checkpointing)

    def activations(self, checkpointing: bool) -> int:
        """Bytes that a training step holds beside weights, for one picture."""
        return self.ends + self.largest if checkpointing else self.saved


def count_step(
    config: Mapping[str, Any],
    layout: LoRALayout,
    height: int,
    width: int,
    device: str = "meta",
    dtype: torch.dtype = torch.bfloat16,
) -> StepCount:
    """Counts a step of the UNet of a configuration.

    Args:
        config: of diffusers' UNet.
        layout: of the LoRA.
        height: of the latent.
        width: of the latent.
        device: "meta" counts with shapes alone.
        dtype: of the UNet.
    """
    from diffusers import UNet2DConditionModel

    with torch.device(device):
        unet = UNet2DConditionModel(**config).requires_grad_(False)
        nn.Module.to(unet, dtype)  # diffusers' own has something to say of every cast
        inputs = _inputs(unet.config, height, width, dtype)
    weights = _lora(layout, device)
    with attach(unet, lora_adapter_set(weights), names=layout.module_names), _Fused():
        with FlopCounterMode(display=False) as products, _saved(unet) as kept:
            unet(*inputs[:3], added_cond_kwargs=inputs[3])
        forward = float(products.get_total_flops())
        unet.train()
        unet.enable_gradient_checkpointing()
        with _saved(unet) as ends:
            unet(*inputs[:3], added_cond_kwargs=inputs[3])
    parameters = sum(p.numel() for p in unet.parameters())
    return StepCount(parameters, forward, kept.total, max(kept.units, default=0), ends.total)


@dataclass
class _Kept:
    """Bytes kept for a backward pass: of all, and of each unit."""

    total: int
    units: list[int]


@contextmanager
def _saved(unet: nn.Module) -> Iterator[_Kept]:
    """Counts what is kept for the backward pass while the block runs; weights do not count."""
    kept, alive = _Kept(0, []), {p.untyped_storage()._cdata: p for p in unet.parameters()}
    held: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in alive and not tensor.is_leaf:
            alive[storage._cdata] = tensor  # type: ignore[assignment]
            held.append(tensor)  # or another tensor would get its place
            kept.total += storage.nbytes()
        return tensor

    starts: list[int] = []
    hooks = []
    for module in unet.modules():
        if type(module).__name__ in UNITS:
            before = module.register_forward_pre_hook(lambda *_: starts.append(kept.total))
            after = module.register_forward_hook(
                lambda *_: kept.units.append(kept.total - starts.pop())
            )
            hooks += [before, after]
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield kept
    finally:
        for hook in hooks:
            hook.remove()


class _FusedAttention(torch.autograd.Function):
    """What a fused kernel computes, and all that it keeps: its inputs and its output."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """(B, H, L, d), (B, H, S, d) and (B, H, S, d) to something of the answer's shape."""
        mixed = (query @ key.mT) @ value
        out = mixed.transpose(1, 2).contiguous().transpose(1, 2)  # laid out as kernels do
        ctx.save_for_backward(query, key, value, out)
        return out


class _Fused(TorchFunctionMode):
    """Attention as GPUs compute it; shapes alone would take the way that keeps whole matrices."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            fused: Any = _FusedAttention.apply
            return fused(*args[:3])
        return func(*args, **(kwargs or {}))


def _inputs(config: Any, height: int, width: int, dtype: torch.dtype) -> tuple[Any, ...]:
    """What the UNet takes for one picture, where the default device is."""
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    added = {"text_embeds": torch.zeros(1, pooled), "time_ids": torch.zeros(1, 6)}
    noisy = torch.zeros(1, config.in_channels, height, width, dtype=dtype)
    context = torch.zeros(1, 77, config.cross_attention_dim, dtype=dtype)
    return noisy, torch.zeros(1), context, {k: v.to(dtype) for k, v in added.items()}


def _lora(layout: LoRALayout, device: str) -> LoRAWeights:
    """A LoRA to be trained, of one person."""
    r, layers = layout.rank, {}
    for shape in layout:
        down = torch.zeros(1, r, shape.in_features, device=device, requires_grad=True)
        up = torch.zeros(1, shape.out_features, r, device=device, requires_grad=True)
        layers[shape.name] = LoRALayer(down, up, float(r))
    return LoRAWeights(layers)
