"""MIF: photo order, missing faces, the gate and its override, ablations, wrong encoders."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from difflora_core.errors import ConfigError
from difflora_core.models.mif import MIFConfig, MixedImageFeatures, balance_loss

CONFIG = MIFConfig(
    face_dim=12, image_dim=10, token_dim=8, image_token_count=5, width=16, tokens=3, heads=2
)


def network(config: MIFConfig = CONFIG) -> MixedImageFeatures:
    return MixedImageFeatures(config, generator=torch.Generator().manual_seed(1)).eval()


def photos(batch: int, count: int, seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        "face": torch.randn(batch, count, 12, generator=g),
        "face_found": torch.ones(batch, count, dtype=torch.bool),
        "image": torch.randn(batch, count, 10, generator=g),
        "image_tokens": torch.randn(batch, count, 5, 8, generator=g),
    }


@given(st.permutations(range(4)), st.integers(0, 15), st.integers(0, 1000))
def test_photo_order_never_matters(order: list[int], found: int, seed: int) -> None:
    mif, p = network(), photos(2, 4, seed)
    p["face_found"] = torch.tensor([[bool(found >> i & 1) for i in range(4)]] * 2)
    a, b = mif(**p), mif(**{k: v[:, order] for k, v in p.items()})
    torch.testing.assert_close(a.pooled, b.pooled, rtol=0, atol=2e-6)
    torch.testing.assert_close(a.tokens, b.tokens, rtol=0, atol=5e-6)
    torch.testing.assert_close(a.gate, b.gate, rtol=0, atol=2e-6)


def test_shapes_and_gate() -> None:
    out = network()(**photos(3, 2))
    assert out.pooled.shape == (3, 16)
    assert out.tokens.shape == (3, 3, 16)
    torch.testing.assert_close(out.gate.sum(1), torch.ones(3))


def test_a_repeated_photo_counts_as_one() -> None:
    p = photos(1, 1)
    once, thrice = network()(**p), network()(**{k: torch.cat([v] * 3, 1) for k, v in p.items()})
    torch.testing.assert_close(once.pooled, thrice.pooled)
    # not the tokens: the two experts weigh less among the tokens of three photos
    assert thrice.tokens.shape == once.tokens.shape


def test_padding_photos_change_nothing() -> None:
    p = photos(1, 2)
    padded = {k: torch.cat([v, torch.full_like(v, 1)], 1) for k, v in p.items()}
    padded["image"][:, 2:] = torch.nan
    padded["image_tokens"][:, 2:] = torch.nan
    mask = torch.tensor([[True, True, False, False]])
    a, b = network()(**p), network()(**padded, photo_mask=mask)
    torch.testing.assert_close(a.pooled, b.pooled)
    torch.testing.assert_close(a.tokens, b.tokens)


def test_missing_face_leaves_the_image_alone() -> None:
    p = photos(2, 2)
    p["face_found"][0] = False
    out = network()(**p)
    assert out.gate[0].tolist() == [0.0, 1.0]
    assert out.gate[1].min() > 0
    changed = network()(**(p | {"face": p["face"] * torch.tensor([5.0, 1.0])[:, None, None]}))
    assert torch.equal(out.pooled[0], changed.pooled[0])
    assert torch.equal(out.tokens[0], changed.tokens[0])
    nan = p["face"].clone()
    nan[0] = torch.nan
    assert network()(**(p | {"face": nan})).pooled.isfinite().all()


def test_a_photo_without_face_still_counts_as_image() -> None:
    p = photos(1, 2)
    p["face_found"][0, 1] = False
    single = {k: v[:, :1] for k, v in p.items()}
    both, first = network()(**p), network()(**single)
    assert not torch.allclose(both.pooled, first.pooled)


def test_gate_override() -> None:
    mif, p = network(), photos(2, 1)
    learned = mif(**p)
    only_face = mif(**p, gate_override=torch.tensor([1.0, 0.0]))
    assert only_face.gate.tolist() == [[1.0, 0.0]] * 2
    same = mif(**p, gate_override=torch.tensor([torch.nan, torch.nan]))
    assert torch.equal(same.pooled, learned.pooled)
    half = mif(**p, gate_override=torch.tensor([torch.nan, 0.25]))
    assert torch.equal(half.gate[:, 0], learned.gate[:, 0])
    assert half.gate[:, 1].eq(0.25).all()
    p["face_found"][:] = False
    assert mif(**p, gate_override=torch.tensor([1.0, 1.0])).gate.tolist() == [[0.0, 1.0]] * 2
    for bad in (-0.1, float("inf")):
        with pytest.raises(ConfigError, match="Gate"):
            mif(**p, gate_override=torch.tensor([bad, 0.0]))


@pytest.mark.parametrize(
    ("sources", "gate", "tokens"),
    [
        (("face",), [1.0, 0.0], 0),
        (("image",), [0.0, 1.0], 0),
        (("tokens",), [0.0, 0.0], 3),
        (("face", "tokens"), [1.0, 0.0], 3),
    ],
)
def test_ablations_use_only_their_sources(sources, gate, tokens) -> None:
    config = replace(CONFIG, sources=sources)
    assert config.condition_tokens == tokens
    mif, p = network(config), photos(2, 2)
    out = mif(**p)
    assert out.tokens.shape == (2, tokens, 16)
    assert out.gate.tolist() == [gate] * 2
    other = photos(2, 2, seed=9)
    keys = {"face": "face", "image": "image", "tokens": "image_tokens"}
    for source, key in keys.items():
        changed = mif(**(p | {key: other[key]}))
        differs = not torch.allclose(changed.pooled, out.pooled, atol=1e-5) or (
            tokens > 0 and not torch.allclose(changed.tokens, out.tokens, atol=1e-5)
        )
        assert differs is (source in sources), source


def test_only_face_without_face_is_zero_and_finite() -> None:
    mif, p = network(replace(CONFIG, sources=("face",))), photos(1, 1)
    p["face_found"][:] = False
    assert mif(**p).pooled.eq(0).all()


def test_statistics_centre_the_inputs() -> None:
    mif, p = network(), photos(50, 1, seed=3)
    for key in ("face", "image", "image_tokens"):
        p[key] = p[key] + 4.0
    mif.fit_statistics(p["face"][:, 0], p["face_found"][:, 0], p["image"][:, 0],
                       p["image_tokens"][:, 0])  # fmt: skip
    shared = torch.nn.functional.normalize(p["image"][:, 0], dim=-1)
    normal = mif._standardise("image", shared)
    torch.testing.assert_close(normal.mean(0), torch.zeros(10), rtol=0, atol=1e-4)
    assert abs(float(normal.square().mean()) - 1) < 1e-3


@pytest.mark.parametrize("key", ["face", "image", "image_tokens"])
def test_wrong_encoder_is_named(key: str) -> None:
    p = photos(1, 1)
    p[key] = p[key][..., :-1]
    with pytest.raises(ConfigError, match="load the encoder"):
        network()(**p)


@pytest.mark.parametrize(
    "change",
    [{"heads": 3}, {"sources": ()}, {"sources": ("face", "voice")}, {"width": 0}, {"tokens": 0}],
)
def test_bad_config(change: dict) -> None:
    with pytest.raises(ConfigError):
        replace(CONFIG, **change)


def test_balance_loss_known_values() -> None:
    assert float(balance_loss(torch.full((4, 2), 0.5))) == 0.0
    assert float(balance_loss(torch.tensor([[1.0, 0.0]] * 3))) == pytest.approx(1.0)
    mixed = balance_loss(torch.tensor([[0.9, 0.1], [0.5, 0.5]]))  # means 0.7 and 0.3
    assert float(mixed) == pytest.approx((0.2 / 0.5) ** 2)


def test_every_weight_gets_a_gradient() -> None:
    mif = network()
    out = mif(**photos(4, 2))
    (out.pooled.square().sum() + out.tokens.square().sum()).backward()
    silent = [n for n, q in mif.named_parameters() if q.grad is None or not q.grad.any()]
    # LayerNorm of the last output: the sum of squares is fixed, its own weight still learns
    assert silent == []


def test_initial_weights_come_from_the_generator() -> None:
    """Whatever torch's global random state is: it moves between the two."""
    first = network()
    torch.rand(7)
    second = network()
    other = MixedImageFeatures(CONFIG, generator=torch.Generator().manual_seed(2))
    for x, y in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(x, y)
    assert not torch.equal(other.queries, first.queries)
    assert not torch.equal(other.gate.weight, first.gate.weight)
