"""The sampling loop on a Gaussian whose best denoiser is known in closed form."""

import sys

import pytest
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler
from torch import Tensor

from difflora_core.diffusion.objective import NoiseSchedule, abar_at
from difflora_core.diffusion.sampler import (
    SampleSettings,
    guided,
    initial_noise,
    sample,
    seeded_generators,
)
from difflora_core.errors import ConfigError

MEAN, SPREAD = 1.5, 0.4


def gaussian_denoiser(kind: str, scheduler):
    """Exact posterior mean of x0 ~ N(MEAN, SPREAD^2), expressed as any prediction type."""
    abars = scheduler.alphas_cumprod.double()

    def denoise(z: Tensor, timestep: Tensor, conditional: bool) -> Tensor:
        del conditional
        abar = abar_at(abars, timestep, z)
        gain = abar.sqrt() * SPREAD**2 / (abar * SPREAD**2 + 1 - abar)
        x0 = MEAN + gain * (z - abar.sqrt() * MEAN)
        eps = (z - abar.sqrt() * x0) / (1 - abar).sqrt()
        v = abar.sqrt() * eps - (1 - abar).sqrt() * x0
        return {"sample": x0, "epsilon": eps, "v_prediction": v}[kind]

    return denoise


def run(kind: str, seeds: list[int], steps: int = 50) -> Tensor:
    scheduler = NoiseSchedule(prediction=kind).scheduler()
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    noise = initial_noise(seeded_generators(seeds), (2, 3)).double()
    return sample(gaussian_denoiser(kind, scheduler), noise, scheduler, SampleSettings(steps))


def test_the_three_parameterisations_sample_the_same_latents() -> None:
    # the cosine schedule's last step has abar 2e-9: epsilon loses half its digits there
    x0, v, eps = (run(kind, [1, 2, 3]) for kind in ("sample", "v_prediction", "epsilon"))
    torch.testing.assert_close(x0, v, rtol=0, atol=1e-8)
    torch.testing.assert_close(x0, eps, rtol=0, atol=1e-4)


def test_the_gaussian_is_recovered() -> None:
    z = run("sample", list(range(800)), steps=100)
    assert abs(float(z.mean()) - MEAN) < 0.03
    assert abs(float(z.std()) - SPREAD) < 0.03


def spread_of(solver: str, spread: float, monkeypatch, steps: int = 20) -> float:
    """Deviation of samples over that of the Gaussian, from noise of deviation 1 to rounding."""
    monkeypatch.setattr(sys.modules[__name__], "SPREAD", spread)
    scheduler = NoiseSchedule().solver(solver)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    noise = initial_noise(seeded_generators([0]), (1, 4000)).double()
    noise = (noise - noise.mean()) / noise.std()
    z = sample(gaussian_denoiser("sample", scheduler), noise, scheduler, SampleSettings(steps))
    assert abs(float(z.mean()) - MEAN) < 1e-3
    return float(z.std()) / spread


def test_second_order_samples_spread_as_the_data_do(monkeypatch):
    """The exact flow maps unit noise to MEAN + SPREAD * noise: the ratio of deviations is 1."""
    for spread, lost in ((1.0, 0.005), (0.4, 0.01), (0.2, 0.09)):
        first, second = (spread_of(s, spread, monkeypatch) for s in ("ddim", "second_order"))
        assert 0.8 < first < 0.95  # what old graphs have, and keep
        assert abs(second - 1) < lost


def test_second_order_errors_fall_faster(monkeypatch):
    """Twice the steps: half the error by DDIM, about a quarter by the other."""
    errors = {
        solver: [1 - spread_of(solver, 0.4, monkeypatch, steps) for steps in (25, 50)]
        for solver in ("ddim", "second_order")
    }
    assert errors["ddim"][0] / errors["ddim"][1] < 3
    assert max(map(abs, errors["second_order"])) < min(errors["ddim"]) / 5


def test_second_order_in_any_batch_and_from_latents_that_exist():
    settings = SampleSettings(20, strength=0.4, solver="second_order")

    def once(seeds: list[int]) -> Tensor:
        scheduler = NoiseSchedule().solver(settings.solver)
        noise = initial_noise(seeded_generators(seeds), (2, 3))
        denoise = gaussian_denoiser("sample", scheduler)
        return sample(denoise, noise, scheduler, settings, initial=torch.full((1, 2, 3), MEAN))

    together = once([1, 2, 3])
    torch.testing.assert_close(once([3])[0], together[2])
    assert torch.isfinite(together).all()
    assert 0 < float((together - MEAN).std()) < SPREAD


def test_unknown_solvers_are_refused():
    for refused in (
        lambda: NoiseSchedule().solver("euler"),
        lambda: SampleSettings(solver="euler"),
    ):
        with pytest.raises(ConfigError, match="euler"):
            refused()


@pytest.mark.parametrize("strength", [0.1, 0.4, 0.7])
def test_varied_latents_flow_back_along_the_gaussian(strength: float) -> None:
    """The exact flow keeps the number of deviations: z_t = a m + d sqrt(a^2 S^2 + s^2)."""
    scheduler = NoiseSchedule().scheduler()
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    noise = initial_noise(seeded_generators(range(6)), (2, 3)).double()
    clean = MEAN + 2 * SPREAD * torch.linspace(-1, 1, 36).double().view(6, 2, 3)
    settings = SampleSettings(int(1000 * strength), strength=strength)
    z = sample(gaussian_denoiser("sample", scheduler), noise, scheduler, settings, initial=clean)
    abar = scheduler.alphas_cumprod[round(1000 * strength) - 1]
    noisy = abar.sqrt() * clean + (1 - abar).sqrt() * noise
    deviations = (noisy - abar.sqrt() * MEAN) / (abar * SPREAD**2 + 1 - abar).sqrt()
    torch.testing.assert_close(z, MEAN + SPREAD * deviations, rtol=0, atol=0.02)


def test_strength_zero_keeps_and_one_forgets() -> None:
    scheduler = NoiseSchedule().scheduler()
    noise = initial_noise(seeded_generators([1, 2]), (2, 3))
    denoise = gaussian_denoiser("sample", scheduler)
    for steps in (1, 7, 20, 2000):
        kept = SampleSettings(steps, strength=0.0)
        assert torch.equal(sample(denoise, noise, scheduler, kept, initial=noise + 1), noise + 1)
    new = sample(denoise, noise, scheduler, SampleSettings(7), initial=noise + 1)
    assert torch.equal(new, sample(denoise, noise, scheduler, SampleSettings(7)))
    with pytest.raises(ConfigError, match="latent to vary"):
        sample(denoise, noise, scheduler, SampleSettings(7, strength=0.5))


@pytest.mark.parametrize("steps", [1, 3, 20, 100])
@pytest.mark.parametrize("strength", [0.001, 0.05, 0.33, 0.999])
def test_every_strength_takes_the_steps_asked_for(steps: int, strength: float) -> None:
    total, count = SampleSettings(steps, strength=strength).spaced(1000)
    assert 1 <= count <= steps
    assert abs(count / total - strength) <= 0.5 / total + 1e-9 or count == steps
    if steps / strength <= 1000:
        assert count == steps


def test_a_seed_gives_the_same_latent_in_any_batch() -> None:
    together = run("v_prediction", [5, 6, 7, 8])
    for row, seed in enumerate([5, 6, 7, 8]):
        assert torch.equal(run("v_prediction", [seed])[0], together[row])


def test_stochastic_scheduler_is_reproducible_in_any_batch() -> None:
    def once(seeds: list[int]) -> Tensor:
        scheduler = DDPMScheduler(prediction_type="sample", clip_sample=False)
        generators = seeded_generators(seeds)
        noise = initial_noise(generators, (2, 3))
        denoiser = gaussian_denoiser("sample", scheduler)
        return sample(denoiser, noise, scheduler, SampleSettings(8), generators=generators)

    torch.testing.assert_close(once([1, 2, 3])[2], once([3])[0])


def test_other_diffusers_schedulers_fit() -> None:
    scheduler = DPMSolverMultistepScheduler(prediction_type="sample")
    noise = initial_noise(seeded_generators(range(400)), (2, 3))
    z = sample(gaussian_denoiser("sample", scheduler), noise, scheduler, SampleSettings(25))
    assert abs(float(z.mean()) - MEAN) < 0.05


def test_guidance_one_is_no_guidance_and_two_extrapolates() -> None:
    calls = []

    def denoise(z: Tensor, timestep: Tensor, conditional: bool) -> Tensor:
        calls.append(conditional)
        return z + (3.0 if conditional else 1.0)

    z, t = torch.zeros(2, 1, 1), torch.zeros(2)
    assert guided(denoise, z, t, 1.0).eq(3).all()
    assert calls == [True]
    assert guided(denoise, z, t, 0.0).eq(1).all()
    assert guided(denoise, z, t, 2.0).eq(5).all()


def test_callback_counts_and_may_interrupt() -> None:
    seen = []

    class Stop(Exception):
        pass

    def callback(step: int, total: int, z: Tensor) -> None:
        seen.append((step, total, tuple(z.shape)))
        if step == 3:
            raise Stop

    scheduler = NoiseSchedule().scheduler()
    noise = initial_noise(seeded_generators([0]), (2, 3))
    with pytest.raises(Stop):
        sample(
            gaussian_denoiser("sample", scheduler),
            noise,
            scheduler,
            SampleSettings(10),
            callback=callback,
        )
    assert seen == [(1, 10, (1, 2, 3)), (2, 10, (1, 2, 3)), (3, 10, (1, 2, 3))]


def test_sampling_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    run("sample", [3], steps=2)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("seeds", [[], [-1], [2**64]])
def test_bad_seeds(seeds: list[int]) -> None:
    with pytest.raises(ConfigError, match=r"[Ss]eed"):
        seeded_generators(seeds)


@pytest.mark.parametrize("settings", [{"steps": 0}, {"guidance_scale": -1.0}, {"strength": 1.1}])
def test_bad_settings(settings: dict) -> None:
    with pytest.raises(ConfigError):
        SampleSettings(**settings)
    with pytest.raises(ConfigError):
        SampleSettings(guidance_scale=float("nan"))
