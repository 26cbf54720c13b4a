"""Latent diffusion recipe: both presets on a tiny model."""

from dataclasses import replace

import pytest
import torch

from difflora_core.errors import ConfigError
from difflora_core.models.difflora import DiffLoRAConfig, DiffLoRAModel
from difflora_core.models.dit import DiTConfig
from difflora_core.models.lae.config import LAEConfig
from difflora_core.models.mif import MIFConfig
from difflora_core.models.predictor import PredictorConfig
from difflora_core.training.difflora.latent_dit import (
    LatentBatches,
    LatentDiTConfig,
    LatentDiTObjective,
    LatentExamples,
    corpus_latents,
    fit,
    photo_latents,
)
from difflora_core.training.loop import LoopConfig
from difflora_core.vision.features import ImageFeatures

LOOP = LoopConfig(steps=40, learning_rate=3e-3, warmup=5, log_every=10, ema=0.8)
PHOTOS = 3


@pytest.fixture
def model_of(base):
    """A function that makes a tiny model of a preset."""

    def make(preset):
        config = DiffLoRAConfig.build(
            MIFConfig(6, 5, 4, 2, width=8, tokens=2, heads=2),
            PredictorConfig(width=16, depth=1),
            DiTConfig(width=16, depth=1, heads=2),
            LAEConfig(
                latent_tokens=2,
                latent_dim=4,
                width=8,
                depth=1,
                heads=2,
                basis_size=4,
                decoder_width=8,
            ),
            preset=preset,
        )
        layout = base.layout("tiny", 2)
        return DiffLoRAModel(config, layout, generator=torch.Generator().manual_seed(0))

    return make


def photos(people, seed=0):
    """Features of PHOTOS pictures of each person, and what the person is like (people, 6)."""
    g = torch.Generator().manual_seed(seed)
    who = torch.randn(people, 6, generator=g)
    seen = who.repeat_interleave(PHOTOS, 0) + 0.2 * torch.randn(people * PHOTOS, 6, generator=g)
    found = torch.ones(len(seen), dtype=torch.bool)
    tokens = seen[:, None, :4].expand(-1, 2, -1)
    return ImageFeatures(seen, found, seen[:, :5].contiguous(), tokens.contiguous()), who


def latents_of(who):
    """(P, 1, 2, 4) latents that follow from the person."""
    mix = torch.randn(6, 8, generator=torch.Generator().manual_seed(7))
    return 3 + (who @ mix).unflatten(1, (1, 2, 4))


def test_paper_preset_learns_people_it_has_not_seen(model_of, tmp_path):
    model = model_of("paper")
    features, who = photos(64)
    other, others = photos(32, seed=1)
    loop = replace(LOOP, validate_every=20)
    config = LatentDiTConfig(loop=loop, batch=64, weighting="min_snr")
    seen = []
    result = fit(
        model,
        LatentExamples(features, latents_of(who)),
        config,
        tmp_path,
        LatentExamples(other, latents_of(others)),
        lambda s, n, m: seen.append(m["denoising"]),
    )
    assert seen[-1] < 0.8 * seen[0]
    assert result["validation"] == pytest.approx(PINNED, rel=0.05)
    assert model.get_buffer("latent_mean").mean() == pytest.approx(3, abs=0.5)
    assert model.mif.get_buffer("face_scale").ne(1).all()


PINNED = 0.4367  # validation loss, as first measured


def test_functional_preset_leaves_the_path_from_photo_to_latent_alone(model_of, tmp_path):
    model = model_of("functional")
    features, _ = photos(16)
    latents = photo_latents(model, features, 16)
    assert latents.shape == (16, PHOTOS, 2, 4)
    one = model.condition(features.select(4))
    torch.testing.assert_close(latents[1, 1], model.predictor(one)[0].detach())
    frozen = {
        n: v.clone() for n, v in model.state_dict().items() if not n.startswith(("dit", "latent"))
    }
    config = LatentDiTConfig(loop=LOOP, batch=16)
    result = fit(model, LatentExamples(features, latents), config, tmp_path)
    assert all(torch.equal(v, model.state_dict()[n]) for n, v in frozen.items())
    assert result["loss"] < 0.8
    z = (latents - model.get_buffer("latent_mean")).flatten(0, 1)
    assert (z / model.get_buffer("latent_scale")).square().mean() == pytest.approx(1, abs=1e-3)


def test_a_latent_is_never_shown_its_own_photo(model_of):
    model = model_of("functional")
    features, _ = photos(8)
    number = torch.arange(8 * PHOTOS).float()
    marked = ImageFeatures(
        torch.zeros(8 * PHOTOS, 6).index_fill_(1, torch.tensor([0]), 1.0),
        features.face_found,
        features.image,
        number[:, None, None].expand(-1, 2, 4).contiguous(),
    )
    latents = number.unflatten(0, (8, PHOTOS))[..., None, None].expand(-1, -1, 2, 4)
    draw = LatentBatches(model, LatentExamples(marked, latents), LatentDiTConfig(batch=32))
    sizes = set()
    for seed in range(12):
        batch = draw(torch.Generator().manual_seed(seed))
        own, shown = batch["latents"][:, 0, 0], batch["image_tokens"][:, :, 0, 0]
        assert not (own[:, None] == shown).any()
        assert ((own // PHOTOS)[:, None] == shown // PHOTOS).all()
        sizes.add(shown.shape[1])
    assert sizes == {1, 2}
    again = draw(torch.Generator().manual_seed(11))
    assert all(torch.equal(again[k], batch[k]) for k in batch)


def test_all_noise_counts_the_same(model_of):
    """From pure noise a model without a predictor reads its best guess."""
    model = model_of("paper")
    features, who = photos(8)
    config = LatentDiTConfig(balance=0.0)
    batch = LatentBatches(model, LatentExamples(features, latents_of(who)), config)(
        torch.Generator().manual_seed(0)
    )
    objective = LatentDiTObjective(model, config)
    expected = batch["latents"].square().mean()  # an untrained DiT predicts zero
    for step in (0, 500, 999):
        at = torch.full_like(batch["timesteps"], step)
        loss = objective(batch | {"timesteps": at})[0]
        torch.testing.assert_close(loss.detach(), expected)


def test_dropped_rows_learn_the_null_condition(model_of):
    model = model_of("paper")
    features, who = photos(8)
    objective = LatentDiTObjective(model, LatentDiTConfig())
    with torch.no_grad():
        for p in model.dit.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    draw = LatentBatches(model, LatentExamples(features, latents_of(who)), LatentDiTConfig())
    batch = draw(torch.Generator().manual_seed(0))
    assert 0 < batch["drop"].float().mean() < 0.3
    for drop, learns in ((True, False), (False, True)):
        model.zero_grad()
        objective(batch | {"drop": torch.full_like(batch["drop"], drop)})[0].backward()
        gradient = model.dit.condition_in.weight.grad
        null = model.dit.null_pooled.grad
        assert (null is not None and bool(null.any())) == (not learns)
        assert bool(gradient.any())


def test_targets_of_the_paper_preset_are_encodings(model_of, weights_of):
    model = model_of("paper")
    corpus = weights_of(model.layout, 5, shared_down=True)
    z = corpus_latents(model, corpus)
    assert z.shape == (5, 1, 2, 4)
    torch.testing.assert_close(z[:, 0], model.lae.encode_weights(corpus).detach())


def test_bad_examples(model_of, tmp_path):
    features, who = photos(4)
    with pytest.raises(ConfigError, match="do not fit"):
        LatentExamples(features, torch.zeros(5, 1, 2, 4))
    with pytest.raises(ConfigError, match="do not fit"):
        LatentExamples(features, torch.zeros(4, 2, 2, 4))
    one = LatentExamples(features, latents_of(who))
    with pytest.raises(ConfigError, match="two photos"):
        fit(model_of("functional"), one, LatentDiTConfig(), tmp_path)
    with pytest.raises(ConfigError, match="size"):
        fit(
            model_of("paper"),
            LatentExamples(features, torch.zeros(4, 1, 3, 4)),
            LatentDiTConfig(),
            tmp_path,
        )
    with pytest.raises(ConfigError):
        LatentDiTConfig(condition_dropout=1.0)


def test_mixed_rows_are_two_people(model_of):
    """Against a mixture made by hand; one alone where the weight is 1."""
    model = model_of("paper")
    features, who = photos(8)
    config = LatentDiTConfig(batch=16, mixup=0.5, condition_dropout=0.0)
    with torch.no_grad():
        for p in model.dit.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    examples = LatentExamples(features, latents_of(who))
    batch = LatentBatches(model, examples, config)(torch.Generator().manual_seed(3))
    own = batch["mix"]
    assert 0.2 < own.eq(1).float().mean() < 0.8
    seen = []
    model.dit.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    objective = LatentDiTObjective(model, config)
    objective(batch)
    objective({key: value for key, value in batch.items() if key != "mix"})
    abar = model.config.schedule.scheduler().alphas_cumprod[batch["timesteps"]].view(-1, 1, 1)
    z = batch["latents"]
    moved = abar.sqrt() * (1 - own.view(-1, 1, 1)) * (z.roll(-1, 0) - z)
    torch.testing.assert_close(seen[0] - seen[1], moved)
    conditions = []
    model.dit.register_forward_pre_hook(lambda _, inputs: conditions.append(inputs[2]))
    objective(batch)
    objective(batch | {"mix": torch.ones_like(own)})
    mixed, alone = (condition.pooled for condition in conditions)
    expected = own[:, None] * alone + (1 - own)[:, None] * alone.roll(-1, 0)
    torch.testing.assert_close(mixed, expected)


def test_mixup_draws_nothing_when_it_is_off(model_of):
    model = model_of("paper")
    features, who = photos(8)
    examples = LatentExamples(features, latents_of(who))
    drawn = [
        LatentBatches(model, examples, LatentDiTConfig(mixup=share))(
            torch.Generator().manual_seed(3)
        )
        for share in (0.0, 1.0)
    ]
    assert "mix" not in drawn[0]
    assert drawn[1].pop("mix").lt(1).all()
    assert all(torch.equal(drawn[0][key], drawn[1][key]) for key in drawn[0])
