"""Tokens, statistics, layouts and the weight record: exact inverses and clear refusals."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from difflora_core.errors import LayoutError
from difflora_core.lora.layout import (
    SDXL_UNET_CONFIG,
    LayerShape,
    LoRALayout,
    layout_from_unet_config,
    sdxl_layout,
    unet_name_map,
)
from difflora_core.lora.statistics import WeightStatistics
from difflora_core.lora.tokens import TokenGrid
from difflora_core.lora.weights import LoRALayer, LoRAWeights

LAYOUT = LoRALayout(
    "tiny", 2, (LayerShape("a", 5, 7), LayerShape("b", 3, 4), LayerShape("c", 9, 1))
)


def random_weights(layout, seed, batch=(), alpha=None):
    generator = torch.Generator().manual_seed(seed)
    alpha = float(layout.rank) if alpha is None else alpha
    return LoRAWeights(
        {
            s.name: LoRALayer(
                torch.randn(*batch, layout.rank, s.in_features, generator=generator),
                torch.randn(*batch, s.out_features, layout.rank, generator=generator),
                alpha,
            )
            for s in layout
        }
    )


def same(a, b):
    return list(a) == list(b) and all(
        torch.equal(a[n].down, b[n].down) and torch.equal(a[n].up, b[n].up) for n in a
    )


def test_published_sizes(sd15_config):
    sdxl = sdxl_layout(8)
    assert len(sdxl) == 560
    assert sdxl.numel == 11_612_160
    assert sum("attn2.to_k" in s.name or "attn2.to_v" in s.name for s in sdxl) == 140
    assert {s.in_features for s in sdxl if "attn2.to_k" in s.name} == {2048}
    assert sdxl.layers[0].name == "input_blocks.4.1.transformer_blocks.0.attn1.to_q"
    sd15 = layout_from_unet_config("sd15", sd15_config, 4)
    assert len(sd15) == 128
    assert {s.in_features for s in sd15 if "attn2.to_k" in s.name} == {768}
    assert sd15.layers[0].name == "input_blocks.1.1.transformer_blocks.0.attn1.to_q"


@pytest.mark.parametrize(
    ("diffusers", "ldm"),
    [
        ("down_blocks.2.attentions.0.transformer_blocks.9.attn2.to_k",
         "input_blocks.7.1.transformer_blocks.9.attn2.to_k"),
        ("mid_block.attentions.0.proj_in", "middle_block.1.proj_in"),
        ("mid_block.resnets.1.conv2", "middle_block.2.out_layers.3"),
        ("up_blocks.0.upsamplers.0.conv", "output_blocks.2.2.conv"),
        ("up_blocks.1.attentions.2.transformer_blocks.1.ff.net.0.proj",
         "output_blocks.5.1.transformer_blocks.1.ff.net.0.proj"),
        ("down_blocks.1.downsamplers.0.conv", "input_blocks.6.0.op"),
        ("add_embedding.linear_2", "label_emb.0.2"),
    ],
)  # fmt: skip
def test_known_sdxl_names(diffusers, ldm):
    assert unet_name_map(SDXL_UNET_CONFIG)[diffusers] == ldm


def test_names_are_unique(sd15_config):
    for config in (SDXL_UNET_CONFIG, sd15_config):
        names = unet_name_map(config)
        assert len(set(names.values())) == len(names)


def test_no_matching_layer():
    with pytest.raises(LayoutError, match="no layer that ends in"):
        layout_from_unet_config("sdxl", SDXL_UNET_CONFIG, 4, ("nothing",))


def test_layout_json_hash_and_rank():
    again = LoRALayout.from_json(LAYOUT.to_json())
    assert again == LAYOUT
    assert again.hash == LAYOUT.hash != replace(LAYOUT, rank=3).hash
    assert LAYOUT.numel == 2 * (12 + 7 + 10)
    for text in ("", "[]", "{}", '{"base": "x", "rank": 1, "layers": [{"nom": 1}]}', "null"):
        with pytest.raises(LayoutError):
            LoRALayout.from_json(text)
    with pytest.raises(LayoutError, match="at least 1"):
        replace(LAYOUT, rank=0)


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=5),
    st.integers(1, 3),
    st.integers(1, 3),
)
def test_tokens_are_an_exact_inverse(shapes, rank, batch):
    layout = LoRALayout("x", rank, tuple(LayerShape(f"l{i}", *s) for i, s in enumerate(shapes)))
    weights = random_weights(layout, 0, (batch,))
    grid = TokenGrid(layout)
    tokens, mask = grid.encode(weights)
    assert tokens.shape == (batch, 2 * len(shapes), grid.length)
    assert int(mask.sum()) == layout.numel
    assert not tokens[:, ~mask].any()
    assert same(grid.decode(tokens), weights)
    assert torch.equal(grid.encode(grid.decode(tokens))[0], tokens)
    noisy = tokens + (~mask) * 7.0
    assert same(grid.decode(noisy), weights)


def test_up_only_tokens_share_down():
    grid = TokenGrid(LAYOUT, ("up",))
    weights = random_weights(LAYOUT, 1, (3,))
    shared = {name: layer.down[0] for name, layer in weights.layers.items()}
    tokens, _ = grid.encode(weights)
    decoded = grid.decode(tokens, shared)
    assert all(torch.equal(decoded[n].up, weights[n].up) for n in weights)
    assert all(torch.equal(decoded[n].down[2], shared[n]) for n in weights)
    with pytest.raises(LayoutError, match="shared down factor of a"):
        grid.decode(tokens)
    with pytest.raises(LayoutError, match=r"made of"):
        TokenGrid(LAYOUT, ("down",))


def test_alpha_is_folded_and_gradients_flow():
    grid = TokenGrid(LAYOUT)
    weights = random_weights(LAYOUT, 1, alpha=1.0)
    decoded = grid.decode(grid.encode(weights)[0])
    for name in weights:
        torch.testing.assert_close(decoded[name].delta()[0], weights[name].delta())
    tokens = torch.randn(2, grid.tokens, grid.length, requires_grad=True)
    sum(v.up.sum() + v.down.sum() for v in grid.decode(tokens).layers.values()).backward()
    assert torch.equal(tokens.grad, grid.mask().expand(2, -1, -1).float())


def test_wrong_tokens_and_weights_are_refused():
    grid = TokenGrid(LAYOUT)
    with pytest.raises(LayoutError, match="Expected LoRA tokens"):
        grid.decode(torch.zeros(1, 6, 3))
    with pytest.raises(LayoutError, match="rank"):
        grid.encode(random_weights(replace(LAYOUT, rank=3), 0))
    other = LoRALayout("other", 2, (*LAYOUT.layers[:2], LayerShape("d", 2, 2)))
    with pytest.raises(LayoutError, match="1 missing"):
        grid.encode(random_weights(other, 0))


def test_statistics_give_every_token_mean_zero_and_size_one():
    """Over the places that hold a value, whatever stands in the padding."""
    grid = TokenGrid(LAYOUT)
    tokens, mask = grid.encode(random_weights(LAYOUT, 3, (6,)).to(torch.float64))
    tokens[:, 0] *= 100
    statistics = WeightStatistics.fit(tokens + (~mask) * 7.0, mask)
    normal = (tokens - statistics.mean) / statistics.scale[:, None]
    assert float(normal.mean(0).abs().max()) < 1e-14
    for token, row in zip(normal.unbind(1), mask, strict=True):
        assert float(token[:, row].square().mean()) == pytest.approx(1.0)


def test_statistics_refuse_bad_corpora():
    mask = TokenGrid(LAYOUT).mask()
    zero = WeightStatistics.fit(torch.zeros(2, *mask.shape), mask)
    assert torch.equal(zero.scale, torch.ones_like(zero.scale))
    for bad in (
        torch.zeros(0, *mask.shape),
        torch.zeros(2, 3, 3),
        torch.full((1, *mask.shape), torch.nan),
    ):
        with pytest.raises(LayoutError):
            WeightStatistics.fit(bad, mask)


def test_weights_record():
    weights = random_weights(LAYOUT, 4, alpha=3.0)
    assert weights.numel() == LAYOUT.numel
    torch.testing.assert_close(weights.scaled(0.5)["a"].delta(), 0.5 * weights["a"].delta())
    stacked = LoRAWeights.stack([weights, weights.scaled(2.0)])
    torch.testing.assert_close(stacked.batch_item(1)["b"].delta(), 2 * weights["b"].delta())
    assert same(LoRAWeights.stack([weights, weights]).batch_item(1), weights)
    assert weights.to(torch.bfloat16)["a"].up.dtype == torch.bfloat16
    with pytest.raises(TypeError):
        weights.layers["a"] = None
    with pytest.raises(LayoutError, match="do not fit"):
        LoRALayer(torch.zeros(2, 3), torch.zeros(3, 3), 1.0)
    with pytest.raises(LayoutError, match="no LoRA number"):
        stacked.batch_item(2)
    with pytest.raises(LayoutError, match="empty"):
        LoRAWeights.stack([])
    with pytest.raises(LayoutError, match="other layers"):
        LoRAWeights.stack([weights, LoRAWeights({"a": weights["a"]})])
    mixed = LoRAWeights({"a": weights["a"], "b": stacked["b"]})
    with pytest.raises(LayoutError, match="batch sizes"):
        _ = mixed.batch_shape
