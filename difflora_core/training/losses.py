"""Losses of the recipes; each one reduces to a known one in a test."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..base_model.protocol import BaseModel, TextCondition, compute_dtype, predict
from ..diffusion.objective import abar_at, add_noise, loss_weight, to_x0, training_target
from ..errors import ConfigError
from ..lora.distance import cosine_similarity, squared_relative_error
from ..lora.weights import LoRAWeights


@dataclass(frozen=True, eq=False)
class NoisedBatch:
    """What one denoising step of the base model is asked.

    Args:
        latents: (B, C, h, w) clean, scaled.
        noise: like `latents`.
        timesteps: (B,) integers.
        text: B encoded prompts.
        null: (B, C, h, w) what the base predicts without a prompt; with it the answer is a guided
            one, see `under_guidance`.
        guidance: its scale.
    """

    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    text: TextCondition
    null: Tensor | None = None
    guidance: float = 1.0


@dataclass(frozen=True, eq=False)
class Denoised:
    """What the base model made of a NoisedBatch.

    Args:
        error: (B,) squared error in the space that the base model predicts, weight 1.
        estimate: (B, C, h, w) its estimate of the clean latents.
        abar: (B,) of the timesteps.
    """

    error: Tensor
    estimate: Tensor
    abar: Tensor


def denoise(base: BaseModel, batch: NoisedBatch, mask: Tensor | None = None) -> Denoised:
    """One denoising step of the base model, with the adapters that are attached to its UNet.

    Args:
        base: the base model.
        batch: B noised samples. Schedule and noising are computed in float32 or better, whatever
            the UNet computes in: bfloat16 has no noise level between 0 and .06.
        mask: (B, h, w) in [0, 1], multiplies the error before it is squared; None counts all.

    Returns:
        float32 or better.
    """
    fine = torch.promote_types(compute_dtype(base), torch.float32)
    clean, noise = batch.latents.to(fine), batch.noise.to(fine)
    abar = abar_at(base.alphas_cumprod, batch.timesteps, clean)
    noisy = add_noise(clean, noise, abar)
    prediction = predict(base, noisy, batch.timesteps, batch.text)
    if batch.null is not None:
        prediction = torch.lerp(batch.null.to(fine), prediction, batch.guidance)
    difference = prediction - training_target(clean, noise, abar, base.prediction_type)
    if mask is not None:
        difference = difference * mask.to(difference)[:, None]
    estimate = to_x0(prediction, noisy, abar, base.prediction_type)
    return Denoised(difference.square().flatten(1).mean(1), estimate, abar.flatten())


def check_guidance(scale: float) -> None:
    """Raises ConfigError unless a guidance to train under lies in 1 to 20."""
    if not 1 <= scale <= 20:
        raise ConfigError(f"The guidance while training is 1 (off) to 20, got {scale}.")


@torch.no_grad()
def under_guidance(
    base: BaseModel, batch: NoisedBatch, scale: float, nothing: TextCondition
) -> NoisedBatch:
    """The same batch as a sampler with classifier-free guidance sees it (ours).

    What is learned from plain predictions is exaggerated when it is drawn under guidance (Eq. 6 of
    arXiv:2207.12598). So the loss may be that of null + scale (prediction - null), null being
    what the base predicts without a prompt: fixed, without what is being trained.

    Args:
        base: the base model, nothing attached to it.
        batch: B noised samples.
        scale: of the guidance; 1 leaves the batch as it is.
        nothing: one empty prompt, encoded.
    """
    if scale == 1.0:
        return batch
    empty = nothing.select(torch.zeros(len(batch.latents), dtype=torch.long))
    rows = replace(empty, time_ids=batch.text.time_ids)
    fine = torch.promote_types(compute_dtype(base), torch.float32)
    clean, noise = batch.latents.to(fine), batch.noise.to(fine)
    noisy = add_noise(clean, noise, abar_at(base.alphas_cumprod, batch.timesteps, clean))
    null = predict(base, noisy, batch.timesteps, rows)
    return replace(batch, null=null, guidance=scale)


def denoising_error(
    base: BaseModel, batch: NoisedBatch, weighting: str = "high_noise", mask: Tensor | None = None
) -> Tensor:
    """Weighted squared error of the base model's prediction, one number per sample.

    Eq. 14 of arXiv:2006.11239 in the space the base model predicts. With a v-predicting base
    `uniform` is plain v MSE, which is the epsilon loss weighted by 1/abar.

    Args:
        base: the base model.
        batch: B noised samples.
        weighting: a kind of `diffusion.objective.loss_weight`.
        mask: as in `denoise`.

    Returns:
        (B,) float32 or better.
    """
    made = denoise(base, batch, mask)
    return made.error * loss_weight(weighting, made.abar, base.prediction_type)


def weight_preserved_loss(
    estimate: Tensor,
    target: Tensor,
    mask: Tensor,
    scale: Tensor | None = None,
    strength: float = 1.0,
    power: float = 1.0,
    cap: float = 10.0,
) -> Tensor:
    """Squared error in which large weights count more (difflora.md 3; the paper's form is unknown).

    With w the target and m the mean of its absolute values in one token (one LoRA matrix):

        sum(omega * (estimate - w)^2) / sum(omega)      omega = 1 + strength * min(|w| / m, cap)^p

    Args:
        estimate: (B, T, L) tokens.
        target: (B, T, L) tokens, not centred: a large weight is large against zero.
        mask: (T, L) bool, True where a token holds a value.
        scale: (T, 1), unit of the error of each token; 1 unless given.
        strength: 0 or more; 0 is plain MSE over the values.
        power: exponent p.
        cap: largest |w| / m that counts.

    Returns:
        Scalar.
    """
    omega = preservation_weight(target, mask, strength, power, cap)
    error = estimate - target if scale is None else (estimate - target) / scale
    return (omega * error.square()).sum() / omega.sum()


def preservation_weight(
    target: Tensor, mask: Tensor, strength: float = 1.0, power: float = 1.0, cap: float = 10.0
) -> Tensor:
    """omega of `weight_preserved_loss`, (B, T, L); arguments as there."""
    size = target.detach().abs() * mask
    mean = size.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp_min(1)  # B T 1
    relative = size / mean.clamp_min(torch.finfo(size.dtype).tiny)
    return (1 + strength * relative.clamp_max(cap).pow(power)) * mask


def angular_loss(estimate: LoRAWeights, target: LoRAWeights) -> Tensor:
    """1 - cosine between the delta W of two batches, mean over the batch (LoRAGen, ICLR 2026)."""
    return 1 - cosine_similarity(estimate, target).mean()


def relative_delta_loss(estimate: LoRAWeights, target: LoRAWeights) -> Tensor:
    """|delta_estimate - delta_target|_F^2 / |delta_target|_F^2, mean over the batch (ours)."""
    return squared_relative_error(estimate, target).mean()


def kl_loss(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL divergence from N(0, 1) per latent number (Eq. 10 of arXiv:1312.6114), scalar."""
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
