"""Adapters in regions of a picture, and where people are found: against written-out formulas."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from difflora_core.adapters.attach import attach
from difflora_core.adapters.attention_maps import assigned, attention_to, blurred, watched
from difflora_core.adapters.base import LayerAdapter
from difflora_core.adapters.lora import lora_adapter_set
from difflora_core.adapters.regions import InRegion, Region, attach_in_regions, token_grid
from difflora_core.errors import LayoutError
from difflora_core.lora.weights import LoRALayer, LoRAWeights

WIDTH, HEADS, SIZE = 8, 2, (4, 6)
LAYERS = tuple(
    f"block.{a}.{p}" for a in ("attn1", "attn2") for p in ("to_q", "to_k", "to_v", "out")
)


class Attention(nn.Module):
    """As those of ComfyUI and diffusers: by names, heads and the call."""

    def __init__(self):
        super().__init__()
        self.heads = HEADS
        for name in ("to_q", "to_k", "to_v", "out"):
            setattr(self, name, nn.Linear(WIDTH, WIDTH))

    def forward(self, x, context=None):
        context = x if context is None else context
        parts = [self.to_q(x), self.to_k(context), self.to_v(context)]
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in parts)
        made = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(made.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Both attentions one after the other, as a transformer block has them."""

    def __init__(self):
        super().__init__()
        self.block = nn.ModuleDict({"attn1": Attention(), "attn2": Attention()})

    def forward(self, x, context):
        x = x + self.block["attn1"](x)
        return x + self.block["attn2"](x, context=context)


@pytest.fixture
def net():
    made = Block().double()
    generator = torch.Generator().manual_seed(0)
    for parameter in made.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return made.requires_grad_(False)


def lora(seed, layers=LAYERS):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *s: torch.randn(*s, generator=generator, dtype=torch.float64)  # noqa: E731
    return LoRAWeights({name: LoRALayer(draw(2, WIDTH), draw(WIDTH, 2), 1.0) for name in layers})


def inputs(batch=2, seed=3):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *s: torch.randn(*s, generator=generator, dtype=torch.float64)  # noqa: E731
    return draw(batch, math.prod(SIZE), WIDTH), draw(batch, 5, WIDTH)


def halves(batch=2):
    """The left and the right of a picture; the second picture is split elsewhere."""
    mask = torch.zeros(batch, *SIZE, dtype=torch.float64)
    mask[:, :, :3] = 1
    mask[1:, :, :5] = 1
    return mask, 1 - mask


def by_hand(net, x, context, people, masks):
    """The same numbers place by place: every place computes with the weights of its owner."""

    def projected(name, own, rows):
        layer = net.get_submodule(name)
        plain = rows @ layer.weight.T + layer.bias
        return plain if own is None else plain + rows @ own[name].delta().T

    def attention(name, picture, rows, prompt):
        owners = masks[:, picture].flatten(1).argmax(0)
        made = torch.zeros_like(rows)
        if prompt is None:  # keys and values of each place by its own owner
            k, v = (
                torch.stack(
                    [projected(f"{name}.{p}", people[owners[n]], rows[n]) for n in range(len(rows))]
                )
                for p in ("to_k", "to_v")
            )
        for n in range(len(rows)):
            own = people[owners[n]]
            if prompt is not None:
                k, v = (projected(f"{name}.{p}", own, prompt) for p in ("to_k", "to_v"))
            q = projected(f"{name}.to_q", own, rows[n])
            heads = []
            for h in range(HEADS):
                part = slice(h * WIDTH // HEADS, (h + 1) * WIDTH // HEADS)
                weights = (k[:, part] @ q[part] / math.sqrt(WIDTH / HEADS)).softmax(0)
                heads.append(weights @ v[:, part])
            made[n] = projected(f"{name}.out", own, torch.cat(heads))
        return made

    result = []
    for picture in range(len(x)):
        rows = x[picture] + attention("block.attn1", picture, x[picture], None)
        result.append(rows + attention("block.attn2", picture, rows, context[picture]))
    return torch.stack(result)


def hooks(module):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


def test_every_place_has_the_weights_of_its_owner(net):
    people, masks = [lora(1), lora(2)], torch.stack(halves())
    x, context = inputs()
    wanted = by_hand(net, x, context, people, masks)
    parts = [(lora_adapter_set(p), Region(m)) for p, m in zip(people, masks, strict=True)]
    with attach_in_regions(net, parts):
        got = net(x, context)
    torch.testing.assert_close(got, wanted)
    assert float((got - net(x, context)).abs().max()) > 0.1
    assert hooks(net) == 0


def test_the_whole_picture_is_a_plain_attachment(net):
    x, context = inputs()
    own = lora_adapter_set(lora(1)).scaled(0.7)
    other = lora_adapter_set(lora(2))
    whole, nothing = torch.ones(2, *SIZE).double(), torch.zeros(2, *SIZE).double()
    with attach(net, own):
        wanted = net(x, context)
    with attach_in_regions(net, [(own, Region(whole)), (other, Region(nothing))]):
        torch.testing.assert_close(net(x, context), wanted)
    with attach_in_regions(net, [(own.scaled(0.0), Region(whole)), (other, Region(nothing))]):
        got = net(x, context)
    assert torch.equal(got, net(x, context))
    with attach_in_regions(net, [(other, Region(nothing))]):
        got = net(x, context)
    assert torch.equal(got, net(x, context))


def test_strengths_by_sample(net):
    """Where the positive prompt alone is meant, the other samples are the base's."""
    x, context = inputs()
    flags = torch.tensor([0.0, 1.0], dtype=torch.float64)
    masks = halves()
    parts = [(lora_adapter_set(lora(k + 1)), Region(m)) for k, m in enumerate(masks)]
    with attach_in_regions(net, parts):
        both = net(x, context)
    with attach_in_regions(net, [(a.scaled(flags), r) for a, r in parts]):
        got = net(x, context)
    torch.testing.assert_close(got[0], net(x, context)[0])
    torch.testing.assert_close(got[1], both[1])


def test_masks_in_the_sizes_of_layers():
    g = torch.Generator().manual_seed(1)
    mask = torch.rand(2, 6, 8, generator=g)
    region = Region(mask)
    coarse = mask.numpy().reshape(2, 3, 2, 4, 2).mean((2, 4))
    tokens = region.at(torch.zeros(2, 12, 5))
    np.testing.assert_allclose(tokens[..., 0], coarse.reshape(2, 12), rtol=1e-6)
    np.testing.assert_allclose(region.at(torch.zeros(2, 7, 3, 4))[:, 0], coarse, rtol=1e-6)
    assert torch.equal(region.at(torch.zeros(2, 48, 1))[..., 0], mask.flatten(1))
    np.testing.assert_allclose(region.at(torch.zeros(2, 5))[:, 0], mask.mean((1, 2)), rtol=1e-6)
    assert region.at(torch.zeros(2, 12, 1, dtype=torch.float16)).dtype == torch.float16


@pytest.mark.parametrize(
    ("size", "tokens", "grid"),
    [
        ((16, 32), 512, (16, 32)),
        ((16, 32), 128, (8, 16)),
        ((15, 9), 40, (8, 5)),
        ((3, 1), 1, (1, 1)),
    ],
)
def test_grids(size, tokens, grid):
    assert token_grid(tokens, size) == grid


@pytest.mark.parametrize("tokens", [64, 100, 1000])
def test_cut_pictures_are_refused(tokens):
    with pytest.raises(LayoutError, match=r"HyperTile.*masks with LoRA to Hook"):
        token_grid(tokens, (15, 32))


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_tiles_as_pictures_are_refused(rows):
    """Tiles may have as many places as a coarser layer has; there are more of them."""
    with pytest.raises(LayoutError, match=f"sees {rows} pictures? for 2: .*HyperTile"):
        Region(torch.zeros(2, 8, 8)).at(torch.zeros(rows, 16, 5))


def test_attention_that_is_replaced_is_told(net):
    """IP-Adapters call the projections, and never the attention."""
    x, _ = inputs()
    parts = [(lora_adapter_set(lora(1)), Region(halves()[0]))]
    with pytest.raises(LayoutError, match="takes the place of its cross-attention"):
        with attach_in_regions(net, parts):
            net.block["attn2"].to_q(net.block["attn1"](x))
    assert hooks(net) == 0


def test_an_error_inside_leaves_nothing_behind(net):
    parts = [(lora_adapter_set(lora(1)), Region(halves()[0]))]
    with pytest.raises(ZeroDivisionError):
        with attach_in_regions(net, parts):
            raise ZeroDivisionError
    assert hooks(net) == 0


def test_unchanged_stays_the_very_tensor():
    class Inert(LayerAdapter):
        """Changes nothing."""

    inert = InRegion(Inert(), Region(torch.ones(1, 2, 2)))
    x, y = torch.zeros(1, 4, 3), torch.zeros(1, 4, 3)
    assert inert.substitute(x) is x
    assert inert.edit(x, y) is y


def test_maps_are_the_attention(net):
    """Against softmax written out; every cross-attention and no self-attention is watched."""
    x, context = inputs()
    tokens = torch.zeros(2, 5, 2)
    tokens[0, 1, 0] = tokens[0, 3, 1] = tokens[1, 2, 0] = tokens[1, 4, 0] = 1
    with watched(net, tokens, SIZE) as found:
        net(x, context)
    (got,) = found
    inner = x + net.block["attn1"](x)
    attention = net.block["attn2"]
    q, k = attention.to_q(inner), attention.to_k(context)
    wanted = torch.zeros(2, 2, math.prod(SIZE))
    for row in range(2):
        for n in range(math.prod(SIZE)):
            for h in range(HEADS):
                part = slice(h * WIDTH // HEADS, (h + 1) * WIDTH // HEADS)
                scores = k[row, :, part] @ q[row, n, part] / math.sqrt(WIDTH / HEADS)
                share = torch.exp(scores) / torch.exp(scores).sum()
                wanted[row, :, n] += (share.float() @ tokens[row]) / HEADS
    torch.testing.assert_close(got, wanted.unflatten(-1, SIZE), rtol=1e-4, atol=1e-6)
    everything = attention_to(q, k, HEADS, torch.ones(2, 5, 1))
    torch.testing.assert_close(everything, torch.ones_like(everything))
    assert hooks(net) == 0


def test_tokens_appended_by_others_belong_to_nobody(net):
    x, context = inputs()
    q, k = net.block["attn2"].to_q(x), net.block["attn2"].to_k(context)
    marks = torch.zeros(2, 3, 1)
    marks[:, 2] = 1
    longer = torch.cat([marks, torch.zeros(2, 2, 1)], 1)
    assert torch.equal(attention_to(q, k, HEADS, marks), attention_to(q, k, HEADS, longer))


def test_a_model_without_cross_attention_is_refused():
    with pytest.raises(LayoutError, match="no cross-attention"):
        with watched(nn.Sequential(nn.Linear(2, 2)), torch.zeros(1, 5, 2), (4, 4)):
            pass


def bell(row, column, size=(16, 32), spread=3.0):
    rows, columns = torch.meshgrid(*(torch.arange(n).float() for n in size), indexing="ij")
    return torch.exp(-((rows - row) ** 2 + (columns - column) ** 2) / (2 * spread**2))


def test_every_place_goes_to_the_nearest_person():
    """Whatever the level of attention to their words: one is a shirt, one a faint haze."""
    maps = torch.stack([0.01 * bell(13, 8) + 0.002, 5.0 * bell(12, 24, spread=2)])[None]
    found = assigned(maps)[0]
    assert torch.equal(found.sum(0), torch.ones(16, 32))
    assert found[0, :, :12].mean() > 0.95
    assert found[1, :, 20:].mean() > 0.95
    assert torch.equal(assigned(maps * torch.tensor([7.0, 0.3])[:, None, None]), found[None])
    assert torch.equal(assigned(maps.flip(1)), found[None].flip(1))
    assert torch.equal(assigned(maps.flip(-1)), found[None].flip(-1))


def test_three_people_and_a_batch():
    trio = torch.stack([bell(8, 4), bell(8, 16), bell(8, 28)])
    found = assigned(torch.stack([trio, trio[[2, 0, 1]]]))
    assert [int(found[0, :, 8, c].argmax()) for c in (3, 16, 29)] == [0, 1, 2]
    assert [int(found[1, :, 8, c].argmax()) for c in (3, 16, 29)] == [1, 2, 0]


def test_blur_keeps_the_sum_and_is_a_gaussian():
    point = torch.zeros(1, 1, 41, 41)
    point[..., 20, 20] = 1
    made = blurred(point, 3.0)[0, 0]
    assert float(made.sum()) == pytest.approx(1, abs=1e-5)
    wanted = bell(20, 20, (41, 41))
    torch.testing.assert_close(made, wanted / wanted.sum(), rtol=0.02, atol=1e-5)
    torch.testing.assert_close(blurred(torch.ones(1, 2, 5, 4), 2.0), torch.ones(1, 2, 5, 4))
