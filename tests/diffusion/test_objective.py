"""Conversions and weights against diffusers and against plain float64 formulas."""

import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import given
from hypothesis import strategies as st

from difflora_core.diffusion.objective import (
    NoiseSchedule,
    abar_at,
    add_noise,
    loss_weight,
    stratified_timesteps,
    to_x0,
    training_target,
)
from difflora_core.errors import ConfigError

KINDS = ("epsilon", "sample", "v_prediction")


def scene(seed: int = 0, schedule: str = "squaredcos_cap_v2"):
    """Clean latents, noise and their mixture in float64, away from the two ends."""
    g = torch.Generator().manual_seed(seed)
    clean, noise = (torch.randn(6, 3, 4, generator=g, dtype=torch.float64) for _ in range(2))
    step = torch.randint(20, 950, (6,), generator=g)
    abars = NoiseSchedule(beta_schedule=schedule).scheduler().alphas_cumprod.double()
    abar = abar_at(abars, step, clean)
    return clean, noise, step, abar, add_noise(clean, noise, abar)


@given(st.integers(0, 10_000), st.sampled_from(KINDS))
def test_every_target_gives_back_the_clean_latent(seed: int, kind: str) -> None:
    clean, noise, _, abar, noisy = scene(seed)
    target = training_target(clean, noise, abar, kind)
    torch.testing.assert_close(to_x0(target, noisy, abar, kind), clean, rtol=0, atol=1e-10)


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_forward_process_and_velocity_equal_diffusers(schedule: str) -> None:
    clean, noise, step, abar, noisy = scene(1, schedule)
    reference = DDPMScheduler(beta_schedule=schedule)
    reference.alphas_cumprod = reference.alphas_cumprod.double()
    torch.testing.assert_close(noisy, reference.add_noise(clean, noise, step))
    torch.testing.assert_close(
        training_target(clean, noise, abar, "v_prediction"),
        reference.get_velocity(clean, noise, step),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_x0_and_eps_equal_what_a_diffusers_step_uses(kind: str) -> None:
    _, _, step, abar, noisy = scene(2)
    prediction = torch.randn(noisy.shape, generator=torch.Generator().manual_seed(5)).double()
    scheduler = NoiseSchedule(prediction=kind).scheduler()
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.set_timesteps(1000)
    for row in range(len(step)):
        x0 = scheduler.step(prediction[row], int(step[row]), noisy[row]).pred_original_sample
        ours = to_x0(prediction[row], noisy[row], abar[row], kind)
        torch.testing.assert_close(ours, x0)


@pytest.mark.parametrize("weight", ["min_snr", "high_noise"])
def test_weights_describe_one_loss_in_all_three_spaces(weight: str) -> None:
    clean, noise, _, abar, noisy = scene(3)
    losses = []
    guess_x0 = clean + 0.1
    for kind in KINDS:
        guess_eps = (noisy - abar.sqrt() * guess_x0) / (1 - abar).sqrt()
        prediction = {
            "epsilon": guess_eps,
            "sample": guess_x0,
            "v_prediction": abar.sqrt() * guess_eps - (1 - abar).sqrt() * guess_x0,
        }[kind]
        error = (prediction - training_target(clean, noise, abar, kind)).square()
        losses.append((loss_weight(weight, abar, kind) * error).mean())
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(losses[0], losses[2])


def test_weights_known_values() -> None:
    abar = torch.tensor([0.0, 0.01, 0.5, 0.99], dtype=torch.float64)
    expected = torch.tensor([20, 20, 2, 1 / 0.99], dtype=torch.float64)
    torch.testing.assert_close(loss_weight("high_noise", abar), expected)
    expected = torch.tensor([0, 0.2, 1, 1], dtype=torch.float64)
    torch.testing.assert_close(loss_weight("high_noise", abar, "v_prediction"), expected)
    expected = torch.tensor([0, 1 / 99, 1, 5], dtype=torch.float64)
    torch.testing.assert_close(loss_weight("min_snr", abar, "sample"), expected)
    for kind in KINDS:
        assert loss_weight("uniform", abar, kind).eq(1).all()
        for weight in ("min_snr", "high_noise"):
            assert loss_weight(weight, abar, kind).isfinite().all()


def test_unknown_words_are_refused() -> None:
    one = torch.ones(1)
    for call in (
        lambda: to_x0(one, one, one, "x0"),
        lambda: loss_weight("p2", one),
        lambda: NoiseSchedule(prediction="noise"),
        lambda: NoiseSchedule(beta_schedule="sigmoid"),
        lambda: NoiseSchedule(train_steps=1),
    ):
        with pytest.raises(ConfigError):
            call()


def test_timesteps_lie_one_in_each_stratum_in_no_order():
    drawn = stratified_timesteps(50, torch.Generator().manual_seed(0), 1000).tolist()
    assert [t // 20 for t in sorted(drawn)] == list(range(50))
    assert drawn != sorted(drawn)
    places = {t % 20 for t in drawn}
    assert len(places) > 10  # each is free in its stratum
    few = stratified_timesteps(7, torch.Generator().manual_seed(1), 1000)
    assert [t * 7 // 1000 for t in sorted(few.tolist())] == list(range(7))
