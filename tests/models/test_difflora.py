"""DiffLoRAModel: the road from photos to LoRA weights, seeds, guidance, and a small overfit."""

import copy
from dataclasses import replace

import pytest
import torch

from difflora_core.diffusion.objective import abar_at, add_noise
from difflora_core.diffusion.sampler import SampleSettings
from difflora_core.errors import ConfigError, EncoderError, LayoutError
from difflora_core.lora.weights import LoRALayer, LoRAWeights
from difflora_core.models.difflora import DiffLoRAModel
from difflora_core.models.lae.autoencoder import LoRALatent


def test_people_with_different_numbers_of_photos_share_a_batch(model, person) -> None:
    people = [person(1, 3), person(2, 1), person(3, 2)]
    together = model.condition(people)
    for row, one in enumerate(people):
        alone = model.condition(one)
        torch.testing.assert_close(alone.pooled[0], together.pooled[row])
        torch.testing.assert_close(alone.tokens[0], together.tokens[row])


def test_wrong_encoders_and_empty_requests_are_refused(model, person) -> None:
    one = person(1)
    with pytest.raises(EncoderError, match="face recogniser"):
        model.condition(replace(one, face=one.face[:, :5]))
    with pytest.raises(ConfigError, match="no photo"):
        model.condition([])


def test_untrained_model_changes_nothing(config, layout, person) -> None:
    fresh = DiffLoRAModel(config, layout, generator=torch.Generator().manual_seed(0))
    condition = fresh.condition(person(1))
    for latent in (fresh.mean_latent(condition), fresh.sample_latent(condition, [1])):
        weights = fresh.decode(latent)
        assert all(layer.delta().eq(0).all() for layer in weights.layers.values())


def test_a_seed_gives_one_latent_in_any_batch(model, person) -> None:
    condition = model.condition([person(1), person(2), person(3)])
    settings = SampleSettings(6, 2.0)
    together = model.sample_latent(condition, [7, 8, 9], settings).z
    alone = model.sample_latent(condition.select([1]), [8], settings).z
    torch.testing.assert_close(alone[0], together[1], rtol=0, atol=1e-4)
    variants = model.sample_latent(condition.select([1]), [8, 10], settings).z
    torch.testing.assert_close(variants[0], together[1], rtol=0, atol=1e-4)
    assert not torch.allclose(variants[0], variants[1], atol=1e-2)
    assert model.sample_latent(None, [8], settings).z.shape == (1, 3, 4)
    with pytest.raises(ConfigError, match="identities"):
        model.sample_latent(condition, [1, 2])


@pytest.mark.gpu
def test_a_seed_gives_one_lora_on_any_device(model, person) -> None:
    """Noise is drawn where no device has a say."""
    settings, people = SampleSettings(6, 2.0), [person(1), person(2, 2)]
    here = model.decode(model.sample_latent(model.condition(people), [7, 8], settings))
    other = copy.deepcopy(model).to("cuda")
    there = other.decode(other.sample_latent(other.condition(people), [7, 8], settings))
    for name, layer in here.layers.items():
        delta = there[name].delta().to("cpu", torch.float32)
        assert layer.delta().abs().max() > 1e-3
        torch.testing.assert_close(delta, layer.delta(), rtol=1e-3, atol=1e-4)


class ExactGaussian(torch.nn.Module):
    """What a perfect DiT predicts where latents are normal: mean `mean`, deviation `deviation`."""

    def __init__(self, schedule, mean, deviation):
        super().__init__()
        self.abar, self.mean = schedule.scheduler().alphas_cumprod, mean
        self.variance = deviation**2

    def forward(self, z, timestep, condition, drop=None):
        abar = self.abar[timestep.long()].reshape(-1, 1, 1)
        rest = z - abar.sqrt() * self.mean
        return self.mean + self.variance * abar.sqrt() * rest / (abar * self.variance + 1 - abar)


def test_without_a_predictor_the_best_guess_is_the_mean_of_samples(config, layout, person) -> None:
    model = DiffLoRAModel(replace(config, preset="paper"), layout)
    assert model.config.schedule.prediction == "sample"
    mean = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(3))
    model.dit = ExactGaussian(model.config.schedule, mean, deviation=0.7)
    condition = model.condition([person(1), person(2)])
    with torch.no_grad():
        guess = model.mean_latent(condition).z
        samples = torch.stack([model.sample_latent(condition, [k] * 2).z for k in range(64)])
    torch.testing.assert_close(guess, mean, atol=0.02, rtol=0)
    assert (samples.std(0) > 0.4).all()  # none of them is it
    torch.testing.assert_close(samples.mean(0), mean, atol=0.35, rtol=0)
    assert torch.equal(guess, model.mean_latent(condition).z)


def test_guidance_one_ignores_the_null_condition(model, person) -> None:
    condition = model.condition(person(1))
    before = model.sample_latent(condition, [3], SampleSettings(5, 1.0)).z
    with torch.no_grad():
        model.dit.null_pooled.add_(1.0)
    assert torch.equal(before, model.sample_latent(condition, [3], SampleSettings(5, 1.0)).z)
    guided = model.sample_latent(condition, [3], SampleSettings(5, 2.0)).z
    assert not torch.allclose(before, guided, atol=1e-3)


def test_latent_scales_are_inverses(model) -> None:
    z = torch.randn(5, 3, 4)
    torch.testing.assert_close(model.raw_latent(model.latent(z)), z)
    many = torch.randn(500, 3, 4) * torch.linspace(0.1, 4, 4) + 2
    model.fit_latent_statistics(many)
    normal = model.latent(many).z
    torch.testing.assert_close(normal.mean(0), torch.zeros(3, 4), rtol=0, atol=1e-4)
    assert abs(float(normal.var(0, unbiased=False).mean()) - 1) < 1e-4
    assert model.latent_scale.unique().numel() == 1
    model.fit_latent_statistics(many, whiten=True)
    assert model.latent(many).z.std(0, unbiased=False).sub(1).abs().max() < 1e-4


def test_latent_of_another_layout_is_refused(model) -> None:
    with pytest.raises(LayoutError, match="another base model"):
        model.decode(LoRALatent(torch.zeros(1, 3, 4), "0" * 32))


def test_latent_of_another_model_of_this_layout_is_refused(model, person) -> None:
    latent = model.mean_latent(model.condition(person(1)))
    own = model.latent_space
    half = copy.deepcopy(model).half()
    for name in ("latent_mean", "latent_scale"):  # storage keeps them exact
        setattr(half, name, getattr(model, name))
    assert half.latent_space == own
    model.fit_latent_statistics(torch.randn(20, 3, 4))
    assert model.latent_space != own
    for use in (model.decode, lambda x: model.sample_latent(None, [1], initial=x)):
        with pytest.raises(LayoutError, match="another identity model"):
            use(latent)
    model.decode(replace(latent, space=""))  # from before the digest: taken on trust


def test_variations_from_the_person_to_nobody_left(model, person) -> None:
    start = model.mean_latent(model.condition(person(1)))
    seeds = list(range(8))

    def vary(strength: float) -> torch.Tensor:
        settings = SampleSettings(5, strength=strength)
        return model.sample_latent(None, seeds, settings, initial=start).z

    assert torch.equal(vary(0.0), start.z.expand(8, -1, -1))
    torch.testing.assert_close(vary(1.0), model.sample_latent(None, seeds, SampleSettings(5)).z)
    one = SampleSettings(5, strength=0.2)
    alone = model.sample_latent(None, [seeds[3]], one, initial=start).z
    torch.testing.assert_close(alone[0], vary(0.2)[3], rtol=0, atol=1e-5)


def test_encode_gives_a_latent_that_decodes(model, person) -> None:
    weights = model.decode(model.mean_latent(model.condition([person(1), person(2)])))
    latent = model.encode(weights)
    assert latent.z.shape == (2, 3, 4)
    model.layout.check(model.decode(latent).batch_item(0))


def test_gradients_reach_every_network_through_the_lora(model, person) -> None:
    weights = model.decode(model.mean_latent(model.condition([person(1), person(2)])))
    sum(layer.delta().square().sum() for layer in weights.layers.values()).backward()
    for part in (model.mif, model.predictor, model.lae.decoder):
        silent = [n for n, p in part.named_parameters() if p.grad is None or not p.grad.any()]
        assert silent == []


def fit_lae(model, layout, g):
    """The first stage: the LAE on eight random LoRAs; they, and their latents (8, K, C)."""
    down = model.lae.down_factors()
    ups = {s.name: torch.randn(8, s.out_features, 2, generator=g) for s in layout}
    corpus = LoRAWeights(
        {n: LoRALayer(down[n].expand(8, -1, -1), ups[n], 2.0) for n in down}
    ).detach()
    tokens = model.lae.tokens(corpus)
    optimiser = torch.optim.Adam(model.lae.parameters(), lr=1e-2)
    for _ in range(150):
        optimiser.zero_grad()
        (model.lae.decode(model.lae.encode(tokens)) - tokens).square().mean().backward()
        optimiser.step()
    return corpus, model.lae.encode(tokens).detach()


def fit_predictor(model, clean, people, g):
    """The second stage: MIF and DiT on latents (8, K, C) of eight people."""
    abars = model.config.schedule.scheduler().alphas_cumprod
    optimiser = torch.optim.Adam([*model.mif.parameters(), *model.dit.parameters()], lr=3e-3)
    rows = torch.arange(8).repeat(4)
    for _ in range(200):
        step = torch.randint(0, 1000, (32,), generator=g)
        noise = torch.randn(32, 3, 4, generator=g)
        noisy = add_noise(clean[rows], noise, abar_at(abars, step, noise))
        drop = torch.rand(32, generator=g) < 0.1
        condition = model.condition(people).select(rows)
        optimiser.zero_grad()
        (model.dit(noisy, step, condition, drop) - clean[rows]).square().mean().backward()
        optimiser.step()
    model.eval()


def test_overfits_eight_people_and_retrieves_each_from_its_photo(config, layout, person) -> None:
    """Two stages, as in the paper: LAE on eight LoRAs, then MIF and DiT on its latents."""
    g = torch.Generator().manual_seed(1)
    model = DiffLoRAModel(config, layout, generator=g)
    corpus, z = fit_lae(model, layout, g)
    model.fit_latent_statistics(z)
    clean = model.latent(z).z
    people = [person(seed) for seed in range(8)]
    fit_predictor(model, clean, people, g)
    with torch.no_grad():
        sampled = model.sample_latent(model.condition(people), list(range(8)))
        found = model.decode(sampled)
    a, b = (
        torch.cat([layer.delta().flatten(1) for layer in weights.layers.values()], 1)
        for weights in (found, corpus)
    )
    cosine = torch.cosine_similarity(a[:, None], b[None], dim=-1)
    assert cosine.argmax(1).tolist() == list(range(8))
    assert cosine.diagonal().min() > 0.95, cosine.diagonal()
    # a little noise is still the person, a lot is not
    cosines = []
    for strength in (0.1, 0.4, 0.9):
        settings = SampleSettings(10, strength=strength)
        varied = model.sample_latent(None, list(range(8)), settings, initial=model.latent(z))
        cosines.append(torch.cosine_similarity(varied.z.flatten(1), clean.flatten(1)).mean())
    assert cosines[0] > 0.7
    assert cosines == sorted(cosines, reverse=True)
    # the DiT alone knows whose latent it is: every photo agrees best with its own person's
    own = torch.stack([model.agreement(model.latent(z), model.condition(p)) for p in people])
    assert own.argmax(1).tolist() == list(range(8))
    assert own.diagonal().min() > 0
    # and of one latent it says the same as among others
    alone = model.agreement(model.latent(z[3:4]), model.condition(people[2]))
    torch.testing.assert_close(alone[0], own[2, 3])
