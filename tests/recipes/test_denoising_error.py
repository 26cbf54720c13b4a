"""The base model's loss, against its definition written out in float64."""

from dataclasses import replace

import pytest
import torch

from difflora_core.training.losses import NoisedBatch, denoising_error, under_guidance

STEPS = torch.tensor([0, 300, 700, 999])


def batch(base, dtype=torch.float64):
    """Four noised samples."""
    g = torch.Generator().manual_seed(1)
    latents, noise = torch.randn(2, 4, 4, 4, 4, generator=g, dtype=torch.float64).to(dtype)
    return NoisedBatch(latents, noise, STEPS, base.encode_prompts(["a", "b", "c", "a"]))


def abar():
    """Share of the signal at STEPS under diffusers' default betas, (4, 1, 1, 1) float64."""
    betas = torch.linspace(0.0001**0.5, 0.02**0.5, 1000, dtype=torch.float64).square()
    return (1 - betas).cumprod(0)[STEPS, None, None, None]


def by_hand(base, b):
    """Noisy latents, the UNet's v in float64, and what v should be; leaves the UNet in float64."""
    base.unet.double()
    signal, noise = abar().sqrt(), (1 - abar()).sqrt()
    noisy = signal * b.latents.double() + noise * b.noise.double()
    text = type(b.text)(b.text.context.double(), b.text.pooled.double())
    target = signal * b.noise.double() - noise * b.latents.double()
    with torch.no_grad():
        return noisy, base.predict(noisy, b.timesteps, text), target


def test_uniform_is_plain_v_mse_and_eps_loss_over_abar(base):
    b = batch(base)
    noisy, v, target = by_hand(base, b)
    error = denoising_error(base, b, "uniform")
    torch.testing.assert_close(error, (v - target).square().mean((1, 2, 3)), rtol=1e-5, atol=0)
    eps = (1 - abar()).sqrt() * noisy + abar().sqrt() * v
    on_eps = (eps - b.noise).square().mean((1, 2, 3)) / abar().flatten()
    torch.testing.assert_close(error, on_eps, rtol=1e-5, atol=0)
    capped = on_eps * abar().flatten() * (1 / abar().flatten()).clamp(max=20)
    high_noise = denoising_error(base, b, "high_noise")
    torch.testing.assert_close(high_noise, capped, rtol=1e-5, atol=0)
    assert not torch.allclose(high_noise, error, rtol=0.1)  # the cap is reached at the noisiest


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_precision_of_the_unet_is_followed(base, dtype, rtol):
    """The answer is float32 whatever the UNet computes in, and right to that precision."""
    base.unet.to(dtype)
    b = batch(base, torch.float32)
    error = denoising_error(base, b, "uniform")
    assert error.dtype == torch.float32
    base.unet.float()  # rounded weights, exact arithmetic
    _, v, target = by_hand(base, b)
    exact = (v - target).square().mean((1, 2, 3))
    torch.testing.assert_close(error.double(), exact, rtol=rtol, atol=0)
    assert (exact[:-1] / exact[1:] - 1).abs().min() > 2 * rtol  # no two samples are alike


def test_under_guidance_the_guided_prediction_has_to_be_right(base):
    """Against the sampler's own sum; what is trained gets the gradient, the null does not."""
    b = batch(base)
    noisy, v, target = by_hand(base, b)
    told, nothing = (
        type(t)(t.context.double(), t.pooled.double()) for t in (b.text, base.encode_prompts([""]))
    )
    with torch.no_grad():
        null = torch.cat(
            [base.predict(noisy[k : k + 1], b.timesteps[k : k + 1], nothing) for k in range(4)]
        )
    expected = (null + 2.5 * (v - null) - target).square().mean((1, 2, 3))
    told.context.requires_grad_()
    guided = under_guidance(base, replace(b, text=told), 2.5, nothing)
    error = denoising_error(base, guided, "uniform")
    torch.testing.assert_close(error, expected, rtol=1e-5, atol=0)
    error.sum().backward()
    assert float(told.context.grad.abs().max()) > 0
    assert not guided.null.requires_grad
    assert under_guidance(base, b, 1.0, nothing) is b
