"""An existing LoRA to the latent whose LoRA is nearest to it in delta W (ours).

The encoder gives the start; a few Adam steps through the decoder go on from there, as
weights2weights (arXiv:2406.09413) inverts by optimising coefficients. The better of the two ends
is kept, so refining never makes it worse.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConfigError, LayoutError
from ..lora.distance import cosine_similarity, squared_norm, squared_relative_error
from ..lora.weights import LoRALayer, LoRAWeights
from ..methods.difflora import DiffLoRAModel
from ..models.lae import LoRALatent

LEARNING_RATE = 0.1  # latents have unit spread

Progress = Callable[[int, int, Tensor], None]


@dataclass(frozen=True, eq=False)
class FittedLatent:
    """A latent and how well its LoRA agrees with the original.

    Attributes:
        latent: (1, K, Dz).
        kept: cosine between the two delta W, 1 for the same direction.
    """

    latent: LoRALatent
    kept: float


def fit_latent(
    model: DiffLoRAModel, weights: LoRAWeights, steps: int = 100, progress: Progress | None = None
) -> FittedLatent:
    """Finds the latent of one LoRA.

    Args:
        model: its autoencoder; it may have been loaded in inference mode.
        weights: one LoRA of the model's layout.
        steps: Adam steps after the encoder, 0 takes its answer.
        progress: called as `progress(step, total, z)`; may raise to interrupt.

    Raises:
        LayoutError: the LoRA belongs to another layout, or changes nothing.
        ConfigError: a negative number of steps.
    """
    if steps < 0:
        raise ConfigError(f"The number of refinement steps cannot be negative; got {steps}.")
    # Tensors made in inference mode, as a host's may be, cannot take part in autograd: copies can.
    with torch.inference_mode(False), torch.enable_grad():
        lae = copy.deepcopy(model.lae).requires_grad_(False)
        mean, scale = (model.get_buffer(f"latent_{name}").clone() for name in ("mean", "scale"))
        target = _copy(weights, model.device)
        if not bool(squared_norm(target) > 0):
            raise LayoutError("This LoRA changes nothing: there is no identity in it.")

        def decode(z: Tensor) -> LoRAWeights:
            return lae.decode_weights(z * scale + mean).batch_item(0)

        with torch.no_grad():
            start = (lae.encode_weights(target) - mean) / scale
        ends = (start, _descend(decode, start, target, steps, progress))
    with torch.no_grad():
        kept = [float(cosine_similarity(decode(end), target)) for end in ends]
    best = int(kept[1] > kept[0])
    return FittedLatent(model.wrap(ends[best]), kept[best])


def _copy(weights: LoRAWeights, device: torch.device) -> LoRAWeights:
    """The LoRA in float32 and memory of its own."""
    return LoRAWeights(
        {
            name: LoRALayer(
                layer.down.to(device, torch.float32).clone(),
                layer.up.to(device, torch.float32).clone(),
                layer.alpha,
            )
            for name, layer in weights.layers.items()
        }
    )


def _descend(
    decode: Callable[[Tensor], LoRAWeights],
    start: Tensor,
    target: LoRAWeights,
    steps: int,
    progress: Progress | None,
) -> Tensor:
    """Adam on the squared relative error of delta W, with a falling rate."""
    z = start.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([z], LEARNING_RATE)
    falling = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, max(steps, 1))
    for step in range(steps):
        optimizer.zero_grad()
        squared_relative_error(decode(z), target).backward()
        optimizer.step()
        falling.step()
        if progress is not None:
            progress(step + 1, steps, z.detach())
    return z.detach()
