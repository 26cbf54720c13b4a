"""An existing LoRA to the latent whose LoRA is nearest to it in delta W (ours).

Adam steps through the decoder, as weights2weights (arXiv:2406.09413) inverts by optimising
coefficients. They start twice, from the encoder's answer and from the average person: the decoder
hears some directions of the latent hardly at all, and what a poor encoder puts there would stay.
The prior of the latents, a standard normal one, weighs just enough to decide between equal LoRAs.

Nearest in delta W is the right answer for a LoRA that the decoder can make. In a LoRA that was
trained on pictures most of delta W is a fit to those pictures, and what is nearest to that is
nobody; a mirror encoder, fitted on such LoRAs, reads the person out of it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import ConfigError, LayoutError
from ...lora.distance import cosine_similarity, squared_norm, squared_relative_error
from ...lora.weights import LoRALayer, LoRAWeights
from ...models.difflora import DiffLoRAModel
from ...models.lae.autoencoder import LoRALatent
from ...models.lae.structured import MirrorEncoder
from ..hooks import Progress

LEARNING_RATE = 0.1  # latents have unit spread
NATIVE = 0.8  # agreement from which a LoRA counts as one that the decoder can make
PRIOR_WEIGHT = 1e-5  # of |z|^2 beside the squared relative error of delta W


@dataclass(frozen=True, eq=False)
class FittedLatent:
    """A latent and how well its LoRA agrees with the original.

    Attributes:
        latent: (1, K, Dz).
        agreement: cosine between the two delta W, 1 for the same direction.
    """

    latent: LoRALatent
    agreement: float


def fit_latent(
    model: DiffLoRAModel, weights: LoRAWeights, steps: int = 100, progress: Progress | None = None
) -> FittedLatent:
    """Finds the latent of one LoRA: the nearest in delta W, or what a mirror encoder reads.

    Args:
        model: its autoencoder; it may have been loaded in inference mode.
        weights: one LoRA of the model's layout.
        steps: Adam steps, 0 takes the encoder's answer.
        progress: called as (step, steps, metrics) with the lowest loss; may raise to interrupt.

    Raises:
        LayoutError: the LoRA belongs to another layout, or changes nothing.
        ConfigError: a negative number of steps, or a model that cannot read LoRAs.
    """
    if steps < 0:
        raise ConfigError(f"The number of refinement steps cannot be negative; got {steps}.")
    # Tensors made in inference mode, as a host's may be, cannot take part in autograd: copies can.
    with torch.inference_mode(False), torch.enable_grad():
        lae = copy.deepcopy(model.autoencoder).requires_grad_(False)
        mean, scale = (model.get_buffer(f"latent_{name}").clone() for name in ("mean", "scale"))
        target = _copy(weights, model.device)
        if not bool(squared_norm(target) > 0):
            raise LayoutError("This LoRA changes nothing: there is no identity in it.")

        def loss(z: Tensor) -> Tensor:
            error = squared_relative_error(lae.decode_weights(z * scale + mean), target)
            return error + PRIOR_WEIGHT * z.square().sum((1, 2))

        @torch.no_grad()
        def fitted(z: Tensor) -> FittedLatent:
            again = lae.decode_weights(z * scale + mean).batch_item(0)
            return FittedLatent(model.wrap(z), float(cosine_similarity(again, target)))

        with torch.no_grad():
            read = (lae.encode_weights(target) - mean) / scale
        if not steps:
            return fitted(read)
        ends = _descend(loss, torch.cat([read, torch.zeros_like(read)]), steps, progress)
        nearest = fitted(ends[loss(ends).argmin()][None])
        foreign = isinstance(lae.encoder, MirrorEncoder) and nearest.agreement < NATIVE
        return fitted(read) if foreign else nearest


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
    loss: Callable[[Tensor], Tensor], start: Tensor, steps: int, progress: Progress | None
) -> Tensor:
    """Adam from B starts (B, K, Dz) with a falling rate; `loss` gives (B,)."""
    z = start.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([z], LEARNING_RATE)
    falling = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, steps)
    for step in range(steps):
        optimizer.zero_grad()
        losses = loss(z)
        losses.sum().backward()
        optimizer.step()
        falling.step()
        if progress is not None:
            progress(step + 1, steps, {"loss": float(losses.detach().min())})
    return z.detach()
