"""LAE recipes: weights alone, and through the base model's loss."""

from dataclasses import replace

import pytest
import torch

from difflora_core.errors import ConfigError
from difflora_core.lora.distance import relative_error
from difflora_core.lora.weights import LoRALayer, LoRAWeights
from difflora_core.models.lae.autoencoder import LoRAAutoencoder
from difflora_core.models.lae.config import LAEConfig
from difflora_core.training.difflora import lae as recipe
from difflora_core.training.difflora.lae_encoder import (
    EncoderExamples,
    adopt_statistics,
    fit_mirror,
)
from difflora_core.training.loop import LoopConfig

LOOP = LoopConfig(steps=40, learning_rate=5e-3, warmup=5, log_every=10, checkpoint_every=60)


def tiny(layout, **settings):
    """A small autoencoder with fixed weights."""
    sizes = {
        "latent_tokens": 2,
        "latent_dim": 4,
        "width": 16,
        "depth": 1,
        "heads": 2,
        "basis_size": 8,
        "decoder_width": 16,
        "conv_channels": 6,
    }
    config = LAEConfig(**(sizes | settings))
    return LoRAAutoencoder(config, layout, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def layout(base):
    """The tiny base's attention projections at rank 2."""
    return base.layout("tiny", 2)


def test_common_down_reproduces_a_corpus_with_one_down(layout, weights_of):
    corpus = weights_of(layout, 5, shared_down=True).to(torch.float64)
    down = recipe.common_down(corpus, 2)
    lae = tiny(layout).double()
    lae.set_shared_down(down)
    back = lae.groups.grid.decode(lae.tokens(corpus), lae.down_factors())
    assert relative_error(back, corpus).max() < 1e-6


def test_common_down_is_the_best_subspace(layout, weights_of):
    corpus = weights_of(layout, 5).to(torch.float64)
    other = {n: torch.cat([v.down, v.down.flip(-1)], 1) for n, v in corpus.layers.items()}
    wide = LoRAWeights(
        {n: LoRALayer(other[n], v.up.repeat(1, 1, 2), 4.0) for n, v in corpus.layers.items()}
    )
    for name, rows in recipe.common_down(wide, 2).items():
        delta = wide[name].delta()
        energy = (delta @ rows.mT).square().sum()
        stacked = torch.linalg.svdvals(delta.flatten(0, 1))
        torch.testing.assert_close(energy, stacked[:2].square().sum())


def test_standard_form_removes_the_turn_between_factors(layout, weights_of):
    corpus = weights_of(layout, 4, directions=1)
    turned = weights_of(layout, 4, directions=1, seed=8)
    same = LoRAWeights(
        {
            n: LoRALayer(
                torch.linalg.solve(m := torch.randn(2, 2) + 2 * torch.eye(2), v.down),
                v.up @ m,
                2.0,
            )
            for n, v in corpus.layers.items()
        }
    )
    form, reference = recipe.standard_form(corpus, 2)
    again, _ = recipe.standard_form(same, 2, reference)
    assert relative_error(form, corpus).max() < 1e-3
    for name in form:
        torch.testing.assert_close(form[name].up, again[name].up, atol=1e-3, rtol=1e-2)
    assert relative_error(turned, corpus).max() > 0.1


@pytest.mark.parametrize("kind", ["structured", "conv1d"])
@pytest.mark.parametrize("parts", [("up",), ("down", "up")])
def test_learns_a_corpus_by_its_weights(layout, weights_of, tmp_path, kind, parts):
    corpus = weights_of(layout, 12, shared_down=parts == ("up",))
    lae = tiny(layout, kind=kind, parts=parts)
    config = recipe.LAETrainConfig(loop=LOOP, batch=12, angular=0.1, relative=0.1)
    steps = []
    result = recipe.fit(
        lae, corpus, config, tmp_path, progress=lambda s, n, m: steps.append(m["reconstruction"])
    )
    if kind == "structured":  # convolutions take minutes
        assert steps[-1] < 0.6 * steps[0]
    assert result["loss"] == pytest.approx(PINNED[kind, len(parts)], rel=0.05)
    start = tiny(layout, kind=kind, parts=parts).encoder.state_dict()
    assert not any(torch.equal(start[n], p) for n, p in lae.encoder.named_parameters())
    assert (tmp_path / "config.json").exists()


def test_parts_of_a_batch_are_normalised_by_the_whole(layout, weights_of, tmp_path):
    """Large weights count more, so parts weigh differently; their sum is the loss of the whole."""
    corpus, found = weights_of(layout, 12), []
    for accumulate in (1, 2):
        lae = tiny(layout, parts=("down", "up"))
        loop = LoopConfig(steps=3, warmup=1, log_every=3, accumulate=accumulate)
        config = recipe.LAETrainConfig(loop=loop, batch=8, preserve=5.0, preserve_power=2.0)
        result = recipe.fit(lae, corpus, config, tmp_path / str(accumulate))
        found.append(torch.cat([p.detach().flatten() for p in lae.encoder.parameters()]))
        found.append(result["loss"])
    torch.testing.assert_close(found[2], found[0], rtol=1e-4, atol=1e-5)
    assert found[3] == pytest.approx(found[1], rel=1e-5)


PINNED = {  # last logged loss, as first measured
    ("structured", 1): 0.5914,
    ("structured", 2): 0.5394,
    ("conv1d", 1): 1.7123,
    ("conv1d", 2): 1.5429,
}


def test_ablations_change_what_is_learnt(layout, weights_of):
    corpus = weights_of(layout, 6)
    lae = tiny(layout, parts=("down", "up"))
    plain = recipe.LAETrainConfig(loop=LOOP, canonical=False, preserve=0.0, kl=0.0)
    tokens, reference = recipe.prepare(lae, corpus, plain)
    assert reference is None
    torch.testing.assert_close(tokens, lae.groups.grid.encode(corpus)[0])
    objective = recipe.LAEObjective(lae, plain)
    batch = {"tokens": tokens, "noise": torch.zeros(6, 2, 4)}
    with torch.no_grad():
        loss = objective(batch)[0]
        mask = lae.groups.grid.mask()
        estimate = lae.normalise(lae.decode(lae.encode(tokens)))
        expected = (estimate - lae.normalise(tokens))[:, mask].square().mean()
    torch.testing.assert_close(loss, expected)
    canonical, reference = recipe.prepare(lae, corpus, recipe.LAETrainConfig(loop=LOOP))
    assert reference is not None
    assert not torch.allclose(canonical, tokens)
    with pytest.raises(ConfigError):
        recipe.LAETrainConfig(preserve=-1.0)


def test_judged_on_other_people(layout, weights_of, tmp_path):
    corpus = weights_of(layout, 48, shared_down=True, directions=1)
    others = weights_of(layout, 8, seed=1, shared_down=True, directions=1)
    lae = tiny(layout)
    config = recipe.LAETrainConfig(loop=replace(LOOP, validate_every=20), batch=24, preserve=0.0)
    recipe.prepare(lae, corpus, config)
    untrained = recipe.reconstruction_error(lae, others)  # of the mean LoRA
    result = recipe.fit(lae, corpus, config, tmp_path, validation=others)
    assert result["validation"] == pytest.approx(recipe.reconstruction_error(lae, others))
    assert result["validation"] < 0.8 * untrained


def functional_lae(layout, **settings):
    """An autoencoder whose decoder is not zero, as after functional training."""
    lae = tiny(layout, **settings)
    g = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, p in lae.decoder.named_parameters():
            if name.startswith(("basis", "offset")):
                p.normal_(0, 0.1, generator=g)
    return lae


def test_new_statistics_leave_the_decoder_as_it_was(layout, weights_of):
    lae = functional_lae(layout)
    z = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(1))
    before = lae.decode(z)
    tokens = lae.tokens(weights_of(layout, 6, shared_down=True))
    adopt_statistics(lae, tokens)
    torch.testing.assert_close(lae.decode(z), before, atol=1e-5, rtol=1e-4)
    unit = lae.normalise(tokens)[:, lae.groups.grid.mask()]
    assert 0.5 < unit.std() < 1.5
    conv = tiny(layout, kind="conv1d")
    adopt_statistics(conv, tokens)
    assert conv.get_buffer(f"scale_{conv.groups.lengths[0]}").eq(1).all()


def trained_loras(lae, count, seed):
    """LoRAs as DreamBooth leaves them: 0.7 of what the decoder draws, plus a fit of its own."""
    g = torch.Generator().manual_seed(seed)
    latents = torch.randn(count, 2, 4, generator=g)
    with torch.no_grad():
        drawn = lae.decode(latents)
    mask = lae.groups.grid.mask()
    noise = torch.randn(drawn.shape, generator=g) * mask * drawn[:, mask].std()
    return 0.7 * drawn + 0.3 * noise, latents


def test_a_mirror_encoder_reads_people_it_was_not_fitted_to(layout):
    lae = functional_lae(layout, encoder="mirror")
    sets = []
    for count, seed in ((48, 1), (16, 2), (32, 3)):
        tokens, own = trained_loras(lae, count, seed)
        weights = lae.groups.grid.decode(tokens, lae.down_factors())
        sets.append(EncoderExamples(weights, own))
    z = sets[2].latents
    drawn = lae.decode(z)
    assert lae.encode_weights(sets[2].weights).abs().max() == 0  # before: nothing
    made = fit_mirror(lae, *sets[:2])
    torch.testing.assert_close(lae.decode(z), drawn, atol=1e-5, rtol=1e-4)
    assert made["unexplained"] < 0.3
    with torch.no_grad():
        missed = (lae.encode_weights(sets[2].weights) - z).square().mean() / z.var()
    assert missed < 0.3
    with pytest.raises(ConfigError, match="different people"):
        EncoderExamples(sets[1].weights, sets[0].latents)
    with pytest.raises(ConfigError, match="mirror encoder"):
        fit_mirror(functional_lae(layout), *sets[:2])
