"""DreamBooth in groups: equal to training alone, to a plain implementation, and resumable."""

from dataclasses import replace

import pytest
import torch

from difflora_core.errors import CheckpointError, ConfigError, InterruptedTraining, LayoutError
from difflora_core.lora.layout import TARGETS
from difflora_core.lora.weights import LoRALayer, LoRAWeights
from difflora_core.training.lora.dreambooth import (
    DreamBoothConfig,
    DreamBoothExamples,
    train_dreambooth,
)

PEOPLE, PICTURES = 3, 5


def difference(a, b):
    """Largest difference between two LoRAs."""
    pairs = [(a[n], b[n]) for n in a]
    return max(
        float(torch.maximum((x.down - y.down).abs().max(), (x.up - y.up).abs().max()))
        for x, y in pairs
    )


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-9), (torch.float32, 2e-4)])
@pytest.mark.parametrize("rule", [{}, {"normalise_gradient": False, "clip": 0.01}])
@pytest.mark.parametrize("train_down", [True, False])
def test_a_group_equals_one_at_a_time(base, people, dtype, limit, rule, train_down):
    base.unet.to(dtype)
    config = DreamBoothConfig(rank=2, steps=10, train_down=train_down, **rule)
    together = train_dreambooth(base, people(dtype=dtype), config)[10]
    start = train_dreambooth(base, people(dtype=dtype), DreamBoothConfig(rank=2, steps=1))[1]
    for person in range(PEOPLE):
        alone = train_dreambooth(base, people(dtype=dtype).select([person]), config)[10]
        assert difference(together.batch_item(person), alone.batch_item(0)) < limit
    assert difference(together, start) > 0.01
    assert difference(together.batch_item(0), together.batch_item(1)) > 0.01


def test_equals_a_plain_implementation(base, people):
    """One person, merged weights instead of hooks, Adam written out, all in float64."""
    base.unet.double()
    examples = people(dtype=torch.float64).select([1])
    config = DreamBoothConfig(
        rank=2, steps=3, samples_per_step=2, normalise_gradient=False, clip=0.0, decay="linear"
    )
    seen = []
    predict = base.predict
    base.predict = lambda noisy, times, text: (
        seen.append((noisy.detach().clone(), times.clone(), text)) or predict(noisy, times, text)
    )
    layout = base.layout("base", 2)
    first = DreamBoothConfig(rank=2, steps=1, learning_rate=1e-9)
    start = train_dreambooth(base, examples, first)[1].batch_item(0)
    seen.clear()
    result = train_dreambooth(base, examples, config)[3].batch_item(0)
    base.predict = predict
    down = {n: start[n].down.clone().requires_grad_() for n in start}
    up = {n: torch.zeros_like(start[n].up).requires_grad_() for n in start}
    factors = [*down.values(), *up.values()]
    moments = [(torch.zeros_like(f), torch.zeros_like(f)) for f in factors]
    plain = {n: base.unet.get_submodule(m).weight for n, m in layout.module_names.items()}
    for step, (noisy, times, text) in enumerate(seen):
        abar = base.alphas_cumprod[times].double()[:, None, None, None]
        # each row's clean picture: the one whose implied noise reproduces the noisy latent best
        clean = torch.stack([examples.latents[0, k] for k in pictures(examples, config, step)])
        noise = (noisy - abar.sqrt() * clean) / (1 - abar).sqrt()
        target = abar.sqrt() * noise - (1 - abar).sqrt() * clean
        for n, m in layout.module_names.items():
            module = base.unet.get_submodule(m)
            del module.weight
            module.weight = plain[n] + up[n] @ down[n]
        error = (predict(noisy, times, text) - target).square().mean((1, 2, 3))
        weight = torch.clamp(1 / abar.flatten(), max=20) * abar.flatten()
        gradients = torch.autograd.grad((weight * error).mean(), factors)
        with torch.no_grad():
            for f, g, (m1, m2) in zip(factors, gradients, moments, strict=True):
                m1.mul_(0.9).add_(0.1 * g)
                m2.mul_(0.99).add_(0.01 * g * g)
                a, b = m1 / (1 - 0.9 ** (step + 1)), m2 / (1 - 0.99 ** (step + 1))
                f.sub_(0.01 * (1 - step / 3) * a / (b.sqrt() + 1e-8))
    expected = LoRAWeights({n: LoRALayer(down[n].detach(), up[n].detach(), 2.0) for n in start})
    assert difference(result, expected) < 1e-6


def pictures(examples, config, step):
    """Which pictures the trainer draws at a step."""
    from difflora_core.training.lora.dreambooth_start import mixed_generator

    g = mixed_generator(config.seed, examples.seeds[0], step + 1)
    return torch.randperm(PICTURES, generator=g)[: config.samples_per_step].tolist()


def test_stopped_and_resumed_equals_straight(base, people, tmp_path):
    config = DreamBoothConfig(rank=2, steps=8, snapshots=(3,), decay="cosine")
    straight = train_dreambooth(base, people(), config)

    def stop(step, steps, metrics):
        assert steps == 8
        assert metrics["loss"] > 0
        if step == 5:
            raise InterruptedTraining("enough")

    with pytest.raises(InterruptedTraining):
        train_dreambooth(base, people(), config, stop, folder=tmp_path)
    with pytest.raises(CheckpointError, match="steps 8 there and 9 here"):
        train_dreambooth(base, people(), DreamBoothConfig(rank=2, steps=9), folder=tmp_path)
    resumed, steps = train_dreambooth(base, people(), config, folder=tmp_path), []
    assert set(straight) == set(resumed) == {3, 8}
    assert difference(straight[3], resumed[3]) == 0
    assert difference(straight[8], resumed[8]) == 0
    again = train_dreambooth(base, people(), config, steps.append, folder=tmp_path)
    assert not steps
    assert difference(straight[3], again[3]) == difference(straight[8], again[8]) == 0


def losses_of(base, examples, **settings):
    """Loss of every step."""
    losses = []
    config = DreamBoothConfig(rank=4, steps=20, seed=1, **settings)
    train_dreambooth(base, examples, config, lambda s, n, metrics: losses.append(metrics["loss"]))
    return losses


def test_learns_the_person_and_leaves_the_base_alone(base, people):
    before = {k: v.clone() for k, v in base.unet.state_dict().items()}
    still = losses_of(base, people(), learning_rate=1e-9)
    learnt = losses_of(base, people(), learning_rate=3e-2)
    assert learnt[0] == pytest.approx(still[0])
    assert sum(learnt[-5:]) < 0.96 * sum(still[-5:])
    assert sum(learnt[-5:]) == pytest.approx(LAST_FIVE, rel=2e-2)
    assert all(torch.equal(v, before[k]) for k, v in base.unet.state_dict().items())
    assert not any(m._forward_hooks for m in base.unet.modules())


LAST_FIVE = 4.0427  # sum of the last five losses, as first measured


def test_shared_down_stays_and_start_is_kept(base, people):
    layout = base.layout("base", 2)
    shared = {s.name: torch.randn(2, s.in_features) for s in layout}
    config = DreamBoothConfig(rank=2, steps=2, train_down=False)
    result = train_dreambooth(base, people(), config, shared_down=shared)[2]
    assert all(torch.equal(result[n].down[1], shared[n]) for n in shared)
    still = DreamBoothConfig(rank=3, steps=1, learning_rate=1e-9)
    grown = train_dreambooth(base, people(), still, initial=result.scaled(1.5))[1]
    for name in shared:
        torch.testing.assert_close(grown[name].delta(), 1.5 * result[name].delta())
    with pytest.raises(LayoutError, match="rank"):
        train_dreambooth(base, people(), DreamBoothConfig(rank=1, steps=1), initial=result)
    with pytest.raises(LayoutError, match="shared down"):
        train_dreambooth(base, people(), config, shared_down={})
    with pytest.raises(ConfigError, match="not from both"):
        train_dreambooth(base, people(), config, initial=result, shared_down=shared)


def test_a_start_on_more_layers_than_attention_trains_on_all_of_them(base, people):
    layout = base.layout("base", 2, TARGETS["transformer"])
    g = torch.Generator().manual_seed(5)
    start = LoRAWeights(
        {
            s.name: LoRALayer(
                torch.randn(2, s.in_features, generator=g),
                0.01 * torch.randn(s.out_features, 2, generator=g),
                2.0,
            )
            for s in layout
        }
    )
    config = DreamBoothConfig(rank=2, steps=1, learning_rate=1e-2)
    asked = train_dreambooth(base, people(), replace(config, targets="transformer"))[1]
    made = train_dreambooth(base, people(), config, initial=start)[1]
    assert len(asked) == len(made) == len(layout) > len(base.layout("base", 2))
    assert all(bool(layer.up[0].any()) for layer in asked.layers.values())
    assert all(not torch.equal(made[s.name].up[0], start[s.name].up) for s in layout)
    feed_forward = LoRAWeights({n: start[n] for n in start if ".ff." in n})
    with pytest.raises(LayoutError):
        train_dreambooth(base, people(), config, initial=feed_forward)


def test_bad_pictures_and_settings(base, people):
    with pytest.raises(ConfigError, match="captions"):
        DreamBoothExamples(torch.zeros(2, 3, 4, 4, 4), [["a"] * 3])
    broken = people()
    broken.latents[1, 2] = torch.nan
    with pytest.raises(ConfigError, match="no longer a number"):
        train_dreambooth(base, broken, DreamBoothConfig(rank=1, steps=5))
    for bad in ({"steps": 0}, {"decay": "up"}, {"snapshots": (301,)}, {"learning_rate": -1.0}):
        with pytest.raises(ConfigError):
            DreamBoothConfig(**bad)
    config = DreamBoothConfig(snapshots=(100, 300), betas=(0.9, 0.999))
    assert DreamBoothConfig.from_json(config.to_json()) == config


def test_bf16_stays_close(base, people):
    fine = train_dreambooth(base, people(), DreamBoothConfig(rank=2, steps=3))[3]
    coarse = train_dreambooth(base, people(), DreamBoothConfig(rank=2, steps=3, precision="bf16"))
    assert 0 < difference(fine, coarse[3]) < 0.1
