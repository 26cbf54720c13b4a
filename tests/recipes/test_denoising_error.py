"""The base model's loss under its own definition."""

from dataclasses import replace

import pytest
import torch

from difflora_core.training.losses import NoisedBatch, denoising_error, under_guidance


def batch(base, dtype=torch.float64):
    """Four noised samples."""
    g = torch.Generator().manual_seed(1)
    latents, noise = torch.randn(2, 4, 4, 4, 4, generator=g, dtype=dtype)
    return NoisedBatch(
        latents, noise, torch.tensor([0, 300, 700, 999]), base.encode_prompts(["a", "b", "c", "a"])
    )


def test_uniform_is_plain_v_mse_and_eps_loss_over_abar(base):
    base.unet.double()
    b = batch(base)
    abar = base.alphas_cumprod[b.timesteps].double()[:, None, None, None]
    noisy = abar.sqrt() * b.latents + (1 - abar).sqrt() * b.noise
    text = type(b.text)(b.text.context.double(), b.text.pooled.double())
    v = base.predict(noisy, b.timesteps, text)
    expected = (v - (abar.sqrt() * b.noise - (1 - abar).sqrt() * b.latents)).square()
    error = denoising_error(base, b, "uniform")
    torch.testing.assert_close(error, expected.mean((1, 2, 3)))
    eps = (1 - abar).sqrt() * noisy + abar.sqrt() * v
    on_eps = (eps - b.noise).square().mean((1, 2, 3)) / abar.flatten()
    torch.testing.assert_close(error, on_eps)
    capped = on_eps * abar.flatten() * (1 / abar.flatten()).clamp(max=20)
    torch.testing.assert_close(denoising_error(base, b, "high_noise"), capped)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_precision_of_the_unet_is_followed(base, dtype):
    exact = denoising_error(base, batch(base, torch.float32))
    base.unet.to(dtype)
    error = denoising_error(base, batch(base, torch.float32))
    assert error.dtype == torch.float32
    torch.testing.assert_close(error, exact, rtol=0.1, atol=0.05)


def test_under_guidance_the_guided_prediction_has_to_be_right(base):
    """Against the sampler's own sum; what is trained gets the gradient, the null does not."""
    base.unet.double()
    b = batch(base)
    told, nothing = (
        type(t)(t.context.double(), t.pooled.double()) for t in (b.text, base.encode_prompts([""]))
    )
    abar = base.alphas_cumprod[b.timesteps].double()[:, None, None, None]
    noisy = abar.sqrt() * b.latents + (1 - abar).sqrt() * b.noise
    with torch.no_grad():
        v = base.predict(noisy, b.timesteps, told)
        null = torch.cat(
            [base.predict(noisy[k : k + 1], b.timesteps[k : k + 1], nothing) for k in range(4)]
        )
    target = abar.sqrt() * b.noise - (1 - abar).sqrt() * b.latents
    expected = (null + 2.5 * (v - null) - target).square().mean((1, 2, 3))
    told.context.requires_grad_()
    guided = under_guidance(base, replace(b, text=told), 2.5, nothing)
    error = denoising_error(base, guided, "uniform")
    torch.testing.assert_close(error, expected)
    error.sum().backward()
    assert float(told.context.grad.abs().max()) > 0
    assert not guided.null.requires_grad
    assert under_guidance(base, b, 1.0, nothing) is b
