"""LAE, every kind: initial state, exact inverses, agreement with TokenGrid, learning, full size."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from difflora_core.errors import ConfigError, LayoutError
from difflora_core.lora.layout import LayerShape, LoRALayout, sdxl_layout
from difflora_core.lora.tokens import TokenGrid
from difflora_core.lora.weights import LoRALayer, LoRAWeights
from difflora_core.models.difflora_config import DiffLoRAConfig
from difflora_core.models.lae import structured
from difflora_core.models.lae.autoencoder import LoRAAutoencoder
from difflora_core.models.lae.config import LAEConfig
from difflora_core.models.lae.conv1d import strides

LAYOUT = LoRALayout(
    "tiny",
    2,
    tuple(
        LayerShape(f"input_blocks.{b}.1.attn{a}.to_{p}", 12 if p in "kv" and a == 2 else w, w)
        for b, w in ((1, 6), (2, 8))
        for a in (1, 2)
        for p in "qkv"
    ),
)
SMALL = LAEConfig(
    latent_tokens=3, latent_dim=4, width=16, heads=2, depth=1, basis_size=6, decoder_width=16,
    conv_channels=4, conv_fold=3,
)  # fmt: skip
CASES = [
    pytest.param(replace(SMALL, kind=kind, parts=parts), id=f"{kind}-{'-'.join(parts)}")
    for kind in ("structured", "conv1d", "linear")
    for parts in (("up",), ("down", "up"))
]
CASES += [pytest.param(replace(SMALL, kind="linear", encoder="mirror"), id="linear-mirror")]


def autoencoder(config: LAEConfig = SMALL) -> LoRAAutoencoder:
    return LoRAAutoencoder(config, LAYOUT, generator=torch.Generator().manual_seed(1))


def awake(config: LAEConfig) -> LoRAAutoencoder:
    """As after training: no zeros, statistics that are not trivial."""
    lae, g = autoencoder(config), torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in lae.decoder.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=g))
    grid = lae.groups.grid
    mean = torch.randn(grid.tokens, grid.length, generator=g) * grid.mask()
    lae.set_statistics(mean, 0.5 + torch.rand(grid.tokens, generator=g))
    return lae


def ratio(lae: LoRAAutoencoder) -> float:
    """Values of the LoRA per latent value; the paper says nearly 300."""
    return lae.layout.numel / (lae.config.latent_tokens * lae.config.latent_dim)


def latent(batch: int = 2, seed: int = 3) -> torch.Tensor:
    return torch.randn(batch, 3, 4, generator=torch.Generator().manual_seed(seed))


def loras(batch: int, seed: int = 4, alpha: float = 2.0) -> LoRAWeights:
    g = torch.Generator().manual_seed(seed)
    layers = {
        s.name: LoRALayer(
            torch.randn(batch, 2, s.in_features, generator=g),
            torch.randn(batch, s.out_features, 2, generator=g),
            alpha,
        )
        for s in LAYOUT
    }
    return LoRAWeights(layers)


@pytest.mark.parametrize("config", CASES)
def test_before_training_delta_is_zero_and_the_decoder_can_learn(config: LAEConfig) -> None:
    lae, z = autoencoder(config), latent().requires_grad_()
    weights = lae.decode_weights(z)
    LAYOUT.check(weights)
    assert all(layer.delta().eq(0).all() for layer in weights.layers.values())
    optimiser = torch.optim.SGD(lae.decoder.parameters(), lr=0.3)
    for _ in range(4):
        optimiser.zero_grad()
        z.grad = None
        out = lae.decode_weights(z)
        loss = sum((layer.delta() - 1).square().mean() for layer in out.layers.values())
        loss.backward()
        optimiser.step()
    assert z.grad is not None
    assert z.grad.abs().sum() > 0, "the latent learns as soon as the decoder has moved"
    silent = [n for n, p in lae.decoder.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []


@pytest.mark.parametrize("config", CASES)
def test_decode_weights_equals_tokens_read_by_the_grid(config: LAEConfig) -> None:
    lae = awake(config)
    tokens, weights = lae.decode(latent()), lae.decode_weights(latent())
    assert tokens.shape == (2, lae.groups.grid.tokens, lae.groups.grid.length)
    assert tokens[:, ~lae.groups.grid.mask()].eq(0).all()
    expected = lae.groups.grid.decode(tokens, lae.down_factors())
    for name in LAYOUT.module_names:
        torch.testing.assert_close(weights[name].up, expected[name].up)
        torch.testing.assert_close(weights[name].down, expected[name].down)
        assert weights[name].scaling == 1.0


@pytest.mark.parametrize("config", CASES)
def test_encoder_shapes_rows_and_gradients(config: LAEConfig) -> None:
    lae = awake(config)
    weights = loras(3)
    z = lae.encode_weights(weights)
    assert z.shape == (3, 3, 4)
    torch.testing.assert_close(lae.encode_weights(weights.batch_item(1))[0], z[1])
    mean, log_variance = lae.posterior(lae.tokens(weights))
    assert mean.shape == log_variance.shape == (3, 3, 4)
    (mean.sum() + log_variance.sum()).backward()
    silent = [n for n, p in lae.encoder.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []


@given(st.integers(0, 10_000), st.sampled_from([("up",), ("down", "up")]))
def test_layouts_of_values_are_exact_inverses(seed: int, parts) -> None:
    lae = awake(replace(SMALL, parts=parts)).double()
    grid = TokenGrid(LAYOUT, parts)
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randn(2, grid.tokens, grid.length, generator=g).double() * grid.mask()
    assert torch.equal(lae.groups.unflatten(lae.groups.flatten(tokens)), tokens)
    assert torch.equal(lae.groups.join(lae.groups.split(tokens)), tokens)
    assert lae.groups.flatten(tokens).shape[1] == lae.groups.numel == int(grid.mask().sum())


def test_fitted_statistics_normalise_a_corpus() -> None:
    lae = autoencoder(replace(SMALL, parts=("down", "up")))
    tokens = lae.tokens(loras(64)) * 3 + 2 * lae.groups.grid.mask()
    mask = lae.groups.grid.mask()
    centred = (tokens - tokens.mean(0)) * mask
    scale = (centred.square().sum((0, 2)) / (64 * mask.sum(1))).sqrt()
    lae.set_statistics(tokens.mean(0), scale)
    values = lae.groups.flatten(lae.normalise(tokens))
    assert abs(float(values.mean())) < 1e-5
    assert abs(float(values.square().mean()) - 1) < 1e-4


def test_a_lora_trained_with_the_shared_down_enters_exactly() -> None:
    lae = autoencoder()
    shared = lae.down_factors()
    ups = loras(2)
    own = LoRAWeights({n: LoRALayer(shared[n].expand(2, -1, -1), ups[n].up, 2.0) for n in shared})
    expected = lae.groups.grid.encode(own)[0]
    torch.testing.assert_close(lae.tokens(own), expected, rtol=1e-4, atol=1e-5)


def test_a_foreign_lora_enters_as_least_squares_with_its_alpha() -> None:
    lae, foreign = autoencoder(), loras(1, alpha=1.0)
    shared = lae.down_factors()
    fitted = lae.groups.grid.decode(lae.tokens(foreign), shared)
    for name, down in shared.items():
        delta = foreign[name].delta()[0].double()
        best = torch.linalg.lstsq(down.double().T, delta.T).solution.T @ down.double()
        torch.testing.assert_close(fitted[name].delta()[0].double(), best, rtol=1e-4, atol=1e-4)


def test_shared_down_can_be_set_read_and_trained() -> None:
    lae = autoencoder()
    for down in lae.down_factors().values():
        torch.testing.assert_close(down @ down.T, torch.eye(2), rtol=0, atol=1e-5)
    wanted = {n: torch.randn_like(d) for n, d in lae.down_factors().items()}
    lae.set_shared_down(wanted)
    decoded = lae.decode_weights(latent())
    assert all(torch.equal(decoded[n].down[0], wanted[n]) for n in wanted)
    assert not any(p.requires_grad for p in lae.shared_down.parameters())
    learned = autoencoder(replace(SMALL, learn_down=True))
    assert all(p.requires_grad for p in learned.shared_down.parameters())
    name = next(iter(wanted))
    with pytest.raises(LayoutError, match="name the layers"):
        lae.set_shared_down({name: wanted[name]})
    with pytest.raises(LayoutError, match="shape"):
        lae.set_shared_down(wanted | {name: torch.zeros(3, 3)})


def test_wrong_input_is_refused() -> None:
    lae = autoencoder()
    with pytest.raises(LayoutError, match="latent has size"):
        lae.decode_weights(torch.zeros(1, 4, 4))
    with pytest.raises(LayoutError):
        lae.encode_weights(LoRAWeights({}))
    with pytest.raises(ConfigError, match="statistics"):
        lae.set_statistics(torch.zeros(2, 2), torch.ones(2))
    grid = lae.groups.grid
    with pytest.raises(ConfigError, match="positive"):
        lae.set_statistics(torch.zeros(grid.tokens, grid.length), torch.zeros(grid.tokens))
    for bad in ({"kind": "pca"}, {"heads": 3}, {"conv_fold": 1}, {"basis_size": 0}):
        with pytest.raises(ConfigError):
            replace(SMALL, **bad)
    with pytest.raises(LayoutError):
        autoencoder(replace(SMALL, parts=("up", "down")))


@given(st.integers(1, 300_000), st.integers(1, 64), st.integers(2, 9))
def test_strides_always_cover_the_vector(values: int, tokens: int, fold: int) -> None:
    levels = strides(values, tokens, fold)
    total = tokens * torch.tensor(levels).prod().item()
    assert total >= values
    assert all(1 <= level <= fold for level in levels)


@pytest.mark.parametrize("kind", ["structured", "conv1d"])
def test_overfits_eight_loras(kind: str) -> None:
    config = replace(SMALL, kind=kind, latent_dim=8, conv_channels=16, conv_fold=4, basis_size=8)
    lae = autoencoder(config)
    ups = loras(8)
    own = LoRAWeights(
        {n: LoRALayer(d.expand(8, -1, -1), ups[n].up, 2.0) for n, d in lae.down_factors().items()}
    )
    tokens = lae.tokens(own).detach()
    optimiser = torch.optim.Adam(lae.parameters(), lr=5e-3)
    for _ in range(300):
        optimiser.zero_grad()
        loss = (lae.decode(lae.encode(tokens)) - tokens).square().mean()
        loss.backward()
        optimiser.step()
    with torch.no_grad():
        again = lae.decode(lae.encode(tokens))
    cosine = torch.cosine_similarity(again.flatten(1), tokens.flatten(1))
    assert cosine.min() > (0.99 if kind == "structured" else 0.6), cosine


def test_full_size_sdxl_on_the_meta_device() -> None:
    layout = sdxl_layout(8)
    config = DiffLoRAConfig.sdxl()
    with torch.device("meta"):
        lae = LoRAAutoencoder(config.lae, layout)
        weights = lae.decode_weights(torch.empty(1, 64, 64, device="meta"))
        conv = LoRAAutoencoder(replace(config.lae, kind="conv1d", parts=("down", "up")), layout)
        assert conv.decode(torch.empty(1, 64, 64, device="meta")).shape[1] == 1120
    assert len(weights) == 560
    layout.check(weights)
    assert ratio(lae) == 11_612_160 / 4096
    numbers = sum(p.numel() for p in lae.parameters())
    assert numbers * 2 < 3e9, "half precision stays below HyperLoRA's 3 GB basis file"


def test_the_papers_ratio_can_be_asked_for() -> None:
    config = LAEConfig(kind="conv1d", latent_tokens=610, latent_dim=64, parts=("down", "up"))
    with torch.device("meta"):
        lae = LoRAAutoencoder(config, sdxl_layout(8))
    assert 290 < ratio(lae) < 305


def test_structured_values_do_not_depend_on_how_many_tokens_are_made_at_once(monkeypatch):
    lae = awake(SMALL)
    with torch.no_grad():
        whole = lae.decode_weights(latent())
        monkeypatch.setattr(structured, "TOKENS_AT_ONCE", 3)
        parts = lae.decode_weights(latent())
    for name in whole:
        assert torch.equal(whole[name].down, parts[name].down)
        assert torch.equal(whole[name].up, parts[name].up)
