"""StyleInject against its equations written out in float64, sample by sample and token by token."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from difflora_core.adapters.attach import attach
from difflora_core.adapters.base import AdapterEntry, AdapterSet
from difflora_core.adapters.lora import LoRAAdapter
from difflora_core.adapters.routing import watched_routing
from difflora_core.adapters.styleinject import (
    VARIANCE_FLOOR,
    StyleInjectAdapter,
    StyleInjectConfig,
    StyleInjectPlan,
    StyleLayer,
    new_layer,
)
from difflora_core.errors import LayoutError
from difflora_core.lora.weights import LoRALayer

DOUBLE = {"rtol": 1e-10, "atol": 1e-11}  # of float64 sums in another order


def random_layer(size, styles=3, rank=2, spread=True, seed=0, alpha=5.0, gain=0.3):
    """A layer as after training, in float64."""
    g = torch.Generator().manual_seed(seed)
    plan = StyleInjectPlan(styles=styles, rank=rank, alpha=alpha)
    layer = new_layer(size, plan, spread, g)
    layer.up.normal_(generator=g)
    layer.router.normal_(generator=g)
    if spread:
        layer.spread.normal_(0, gain, generator=g)
        layer.spread_bias.normal_(0, gain, generator=g)
    return StyleLayer(**{name: tensor.double() for name, tensor in layer.tensors().items()})


def softmax(v):
    e = np.exp(v - v.max())
    return e / e.sum()


def reference(layer, config, x, y, text=False):
    """The equations for tokens x (T, in) and plain outputs y (T, out) of one sample."""
    n, r = layer.styles, layer.rank
    downs, up, router = (getattr(layer, k).numpy() for k in ("downs", "up", "router"))
    x, y = x.numpy(), y.numpy()
    pooled = x.sum(0) if config.pooling == "sum" else x.mean(0)
    each = [softmax(router @ (row if config.routing == "token" else pooled)) for row in x]
    change = np.zeros_like(y)
    for t, row in enumerate(x):
        inner = sum(each[t][i] * (downs[i * r : (i + 1) * r] @ row) for i in range(n))
        change[t] = float(layer.alpha) / r * up @ inner
    if layer.spread is None:
        return y + change
    gamma = layer.spread.numpy() @ np.mean(each, 0) + layer.spread_bias.numpy()
    mean, sigma = (0 * y[0], 0 * y[0] + 1) if text else (y.mean(0), y.std(0))
    if config.spread == "mul" or text:
        new = sigma * np.maximum(1 + gamma, 0.05)
    else:
        sigma = np.sqrt(sigma**2 + VARIANCE_FLOOR)
        new = sigma + gamma
    return mean + new * (y - mean) / np.where(sigma > 0, sigma, 1) + change


CONFIGS = [
    StyleInjectConfig(routing, pooling, spread)
    for routing in ("instance", "token")
    for pooling in ("mean", "sum")
    for spread in ("mul", "add")
]


@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: "-".join(c.to_dict().values()))
def test_linear_layers_follow_the_equations(config, text):
    layer = random_layer((6, 4))
    g = torch.Generator().manual_seed(1)
    x = torch.randn(2, 5, 6, generator=g, dtype=torch.float64)
    y = torch.randn(2, 5, 4, generator=g, dtype=torch.float64)
    made = StyleInjectAdapter(layer, config, text).edit(x, y)
    for b in range(2):
        expected = torch.from_numpy(reference(layer, config, x[b], y[b], text))
        torch.testing.assert_close(made[b], expected, **DOUBLE)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: "-".join(c.to_dict().values()))
def test_convolutions_follow_the_equations(config, kernel, stride):
    """A convolution is a linear layer on patches; the router of a place sees its middle."""
    layer = random_layer((3, 4, kernel, kernel))
    g = torch.Generator().manual_seed(2)
    x = torch.randn(2, 3, 5, 7, generator=g, dtype=torch.float64)
    plain = nn.Conv2d(3, 4, kernel, stride, kernel // 2, dtype=torch.float64)
    y = plain(x).detach()
    made = StyleInjectAdapter(layer, config).edit(x, y)
    for b in range(2):
        patches = nn.functional.unfold(x[b : b + 1], kernel, 1, kernel // 2, stride)[0].T
        pixels = x[b].flatten(1).T
        pooled = pixels.sum(0) if config.pooling == "sum" else pixels.mean(0)
        middle = x[b, :, ::stride, ::stride].flatten(1).T
        router = layer.router.numpy()
        every = [softmax(router @ row.numpy()) for row in pixels]
        seen = middle if config.routing == "token" else pooled[None].expand(len(middle), -1)
        weights = [softmax(router @ row.numpy()) for row in seen]
        change = []
        for s, patch in zip(weights, patches, strict=True):
            downs = layer.downs.flatten(1).view(3, 2, -1)
            inner = sum(s[i] * (downs[i] @ patch) for i in range(3))
            change.append(2.5 * layer.up @ inner)
        h = y[b].flatten(1).T
        s = np.mean(every, 0) if config.routing == "token" else weights[0]
        gamma = layer.spread @ torch.from_numpy(np.asarray(s)) + layer.spread_bias
        mean, sigma = h.mean(0), h.std(0, correction=0)
        new = sigma * (1 + gamma).clamp_min(0.05)
        if config.spread == "add":
            sigma = (sigma**2 + VARIANCE_FLOOR).sqrt()
            new = sigma + gamma
        expected = mean + new * (h - mean) / sigma + torch.stack(change)
        torch.testing.assert_close(made[b].flatten(1).T, expected, **DOUBLE)


@pytest.mark.parametrize("size", [(6, 4), (6, 4, 3, 3)])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: "-".join(c.to_dict().values()))
def test_untrained_it_is_the_base_bit_for_bit(config, size):
    layer = new_layer(size, StyleInjectPlan(styles=4, rank=2), spread=True)
    x = torch.randn(2, 6, 5, 5) if len(size) == 4 else torch.randn(2, 5, 6)
    y = torch.randn(2, 4, 5, 5) if len(size) == 4 else torch.randn(2, 5, 4)
    for dtype in (torch.float32, torch.float16):
        made = StyleInjectAdapter(layer, config).edit(x.to(dtype), y.to(dtype))
        assert made.dtype == dtype
        assert torch.equal(made, y.to(dtype))


@given(
    st.integers(1, 4), st.integers(1, 3), st.integers(2, 6), st.integers(0, 2**16), st.booleans()
)
@settings(max_examples=40, deadline=None)
def test_the_mean_of_every_channel_stays_and_its_spread_is_scaled(n, r, tokens, seed, conv):
    """The mean of h_out - dh is that of h, and its spread (1 + gamma) sigma."""
    kernel = (3, 3) if conv else ()
    layer = random_layer((5, 4, *kernel), n, r, seed=seed)
    g = torch.Generator().manual_seed(seed)
    shape = (2, 5, tokens, 3) if conv else (2, tokens, 5)
    x = torch.randn(shape, generator=g, dtype=torch.float64)
    y = 3 + torch.randn(2, 4, *shape[2:], generator=g, dtype=torch.float64)
    y = y if conv else torch.randn(2, tokens, 4, generator=g, dtype=torch.float64) - 2
    without = StyleLayer(layer.downs, layer.up, layer.router, layer.alpha)
    config = StyleInjectConfig()
    adapter = StyleInjectAdapter(layer, config)
    change = StyleInjectAdapter(without, config).edit(x, torch.zeros_like(y))
    h_out = adapter.edit(x, y) - change
    places = (2, 3) if conv else (1,)
    torch.testing.assert_close(h_out.mean(places), y.mean(places), **DOUBLE)
    factor = (1 + layer.gamma(adapter.styles(x))).clamp_min(0.05)
    spread = y.std(places, correction=0)
    torch.testing.assert_close(h_out.std(places, correction=0), factor * spread, **DOUBLE)


def test_one_style_without_another_spread_is_a_lora():
    layer = random_layer((6, 4), styles=1, spread=False)
    g = torch.Generator().manual_seed(1)
    x = torch.randn(2, 5, 6, generator=g, dtype=torch.float64)
    y = torch.randn(2, 5, 4, generator=g, dtype=torch.float64)
    lora = LoRAAdapter(LoRALayer(layer.downs, layer.up, 5.0))
    for config in CONFIGS:
        made = StyleInjectAdapter(layer, config).edit(x, y)
        torch.testing.assert_close(made, lora.edit(x, y), **DOUBLE)


@pytest.mark.parametrize("spread", ["mul", "add"])
def test_constant_channels_stay_finite_and_constant(spread):
    layer = random_layer((6, 4))
    config = StyleInjectConfig(spread=spread)
    x = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    y = torch.full((2, 5, 4), 7.0, dtype=torch.float64, requires_grad=True)
    without = StyleLayer(layer.downs, layer.up, layer.router, layer.alpha)
    made = StyleInjectAdapter(layer, config).edit(x, y)
    torch.testing.assert_close(made, StyleInjectAdapter(without, config).edit(x, y), **DOUBLE)
    made.sum().backward()
    assert torch.isfinite(x.grad).all()
    assert torch.isfinite(y.grad).all()


@pytest.mark.parametrize("size", [(6, 4), (6, 4, 3, 3)])
@pytest.mark.parametrize("routing", ["instance", "token"])
def test_a_batch_is_its_samples_one_by_one(routing, size):
    """Styles and statistics of one sample know nothing of its neighbours."""
    adapter = StyleInjectAdapter(random_layer(size), StyleInjectConfig(routing))
    g = torch.Generator().manual_seed(1)
    shapes = [(3, 6, 6, 5), (3, 4, 6, 5)] if len(size) == 4 else [(3, 5, 6), (3, 5, 4)]
    x, y = (torch.randn(s, generator=g, dtype=torch.float64) for s in shapes)
    x[1] *= 30  # another picture altogether
    together = adapter.edit(x, y)
    for b in range(3):
        alone = adapter.edit(x[b : b + 1], y[b : b + 1])
        torch.testing.assert_close(together[b : b + 1], alone, **DOUBLE)


def test_a_prompt_repeated_to_the_length_of_another_gets_the_same():
    """ComfyUI repeats the shorter of two prompts that share a batch."""
    adapter = StyleInjectAdapter(random_layer((6, 4)), StyleInjectConfig(), text=True)
    x, y = torch.randn(1, 7, 6, dtype=torch.float64), torch.randn(1, 7, 4, dtype=torch.float64)
    twice = adapter.edit(x.repeat(1, 2, 1), y.repeat(1, 2, 1))
    torch.testing.assert_close(twice, adapter.edit(x, y).repeat(1, 2, 1), **DOUBLE)


def test_a_prompt_gets_no_statistics_of_its_tokens():
    """What a token becomes does not depend on the other tokens, but for the router's choice."""
    layer = random_layer((6, 4))
    layer = StyleLayer(**{**layer.tensors(), "router": torch.zeros_like(layer.router)})
    x, y = torch.randn(1, 7, 6, dtype=torch.float64), torch.randn(1, 7, 4, dtype=torch.float64)
    adapter = StyleInjectAdapter(layer, StyleInjectConfig(), text=True)
    torch.testing.assert_close(
        adapter.edit(x, y)[:, :3], adapter.edit(x[:, :3], y[:, :3]), **DOUBLE
    )
    image = StyleInjectAdapter(layer, StyleInjectConfig())
    apart = image.edit(x, y)[:, :3] - image.edit(x[:, :3], y[:, :3])
    assert float(apart.abs().max()) > 0.01


def test_every_style_learns_and_the_router_does_not_collapse():
    """Gradients reach every A_i in the second step, and 100 steps leave most of the entropy."""
    g = torch.Generator().manual_seed(0)
    layer = new_layer((8, 6), StyleInjectPlan(styles=4, rank=2), True, g)
    names = ("downs", "up", "router", "spread", "spread_bias")
    tensors = {k: nn.Parameter(getattr(layer, k)) for k in names}
    live = StyleLayer(**tensors, alpha=layer.alpha)
    adapter = StyleInjectAdapter(live, StyleInjectConfig())
    truth = {k: v.float() for k, v in random_layer((8, 6), 4, 2).tensors().items()}
    truth["router"] *= 0.2  # the styles to be found overlap
    target = StyleInjectAdapter(StyleLayer(**truth), StyleInjectConfig())
    optimizer = torch.optim.Adam(tensors.values(), 0.005)
    x = torch.randn(32, 9, 8, generator=g) + torch.randn(32, 1, 8, generator=g)
    y = x @ torch.randn(8, 6, generator=g)
    losses = []
    for step in range(100):
        loss = (adapter.edit(x, y) - target.edit(x, y)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        if step == 1:
            of_styles = tensors["downs"].grad.unflatten(0, (4, 2)).abs().amax((1, 2))
            assert bool((of_styles > 0).all())
            assert len(set(of_styles.tolist())) == 4  # each its own
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    s = adapter.styles(x).detach()
    entropy = -(s * s.log()).sum(-1).mean()
    assert float(entropy) > 0.5 * math.log(4)


def test_it_learns_a_spread_that_no_lora_of_its_size_can():
    """The target scales every channel about its mean; a LoRA of as many numbers stays far off."""
    g = torch.Generator().manual_seed(0)
    width = 16
    x = torch.randn(64, 12, width, generator=g) + 2 * torch.randn(64, 1, width, generator=g)
    y = x @ torch.randn(width, width, generator=g)
    factors = 1 + torch.linspace(-0.8, 0.8, width)
    wanted = y.mean(1, keepdim=True) + factors * (y - y.mean(1, keepdim=True))

    def fit(adapter, parameters):
        optimizer = torch.optim.Adam(parameters, 0.03)
        course = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, 400)
        for _ in range(400):
            loss = (adapter.edit(x, y) - wanted).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            course.step()
        return float(loss.detach() / (y - wanted).square().mean())

    layer = new_layer((width, width), StyleInjectPlan(styles=1, rank=1), True, g)
    names = ("downs", "up", "router", "spread", "spread_bias")
    parts = {k: nn.Parameter(getattr(layer, k)) for k in names}
    live = StyleLayer(**parts, alpha=layer.alpha)
    style = fit(StyleInjectAdapter(live, StyleInjectConfig()), list(parts.values()))
    rank = -(-live.numel() // (2 * width))
    down = nn.Parameter(torch.randn(rank, width, generator=g) / 4)
    up = nn.Parameter(torch.zeros(width, rank))
    lora = fit(LoRAAdapter(LoRALayer(down, up, float(rank))), [down, up])
    assert rank * 2 * width >= live.numel()
    assert style < 1e-3
    assert lora > 0.1


def test_strength_interpolates_and_goes_below_zero():
    net = nn.Sequential(nn.Linear(6, 4, bias=False)).double().requires_grad_(False)
    adapter = StyleInjectAdapter(random_layer((6, 4)), StyleInjectConfig())
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    plain = net(x)
    full = adapter.edit(x, plain)
    for strength in (0.0, 0.3, 1.0, -1.0, 2.0):
        with attach(net, AdapterSet((AdapterEntry("0", adapter, strength),))):
            made = net(x)
        torch.testing.assert_close(made, plain + strength * (full - plain), **DOUBLE)
        if strength == 0.0:
            assert torch.equal(made, plain)


def test_two_styles_act_in_their_order():
    net = nn.Sequential(nn.Linear(6, 4, bias=False)).double().requires_grad_(False)
    one, two = (
        StyleInjectAdapter(random_layer((6, 4), seed=k), StyleInjectConfig()) for k in (1, 2)
    )
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    made = []
    for order in ((one, two), (two, one)):
        with attach(net, AdapterSet(tuple(AdapterEntry("0", a) for a in order))):
            made.append(net(x))
        torch.testing.assert_close(made[-1], order[1].edit(x, order[0].edit(x, net(x))), **DOUBLE)
    assert float((made[0] - made[1]).abs().max()) > 0.01


def test_routing_is_shown_while_it_is_watched():
    adapter = StyleInjectAdapter(random_layer((6, 4)), StyleInjectConfig("token"), name="a")
    x, y = torch.randn(2, 5, 6, dtype=torch.float64), torch.randn(2, 5, 4, dtype=torch.float64)
    seen = []
    adapter.edit(x, y)
    with watched_routing(lambda name, styles: seen.append((name, styles))):
        adapter.edit(x, y)
    adapter.edit(x, y)
    ((name, styles),) = seen
    assert name == "a"
    torch.testing.assert_close(styles, adapter.styles(x).mean(1))


def test_a_layer_of_another_size_or_kind_is_refused():
    linear = StyleInjectAdapter(random_layer((6, 4)), StyleInjectConfig(), name="attn")
    conv = StyleInjectAdapter(random_layer((6, 4, 3, 3)), StyleInjectConfig())
    tokens, places = torch.randn(2, 5, 7), torch.randn(2, 6, 8, 8)
    with pytest.raises(LayoutError, match=r"layer attn of 6 to 4 features, but .* of 7 to 4"):
        linear.edit(tokens, torch.randn(2, 5, 4))
    with pytest.raises(LayoutError, match="6 to 4"):
        conv.edit(tokens, torch.randn(2, 5, 4))
    with pytest.raises(LayoutError, match=r"\(6, 6\) of \(8, 8\) places"):  # no padding
        conv.edit(places.double(), torch.randn(2, 4, 6, 6, dtype=torch.float64))


def test_parts_that_do_not_fit_are_refused():
    good = random_layer((6, 4)).tensors()
    wrong = {
        "downs": torch.ones(5, 6), "up": torch.ones(4, 3), "router": torch.ones(3, 5),
        "alpha": torch.ones(2), "spread": torch.ones(4, 2), "spread_bias": torch.ones(3),
    }  # fmt: skip
    for name, tensor in wrong.items():
        with pytest.raises(LayoutError, match="do not fit each other"):
            StyleLayer(**{**good, name: tensor})
    with pytest.raises(LayoutError, match="do not fit each other"):
        StyleLayer(**{**good, "spread": None})
    with pytest.raises(LayoutError, match="do not fit each other"):  # an even kernel has no middle
        StyleLayer(**{**random_layer((6, 4, 3, 3)).tensors(), "downs": torch.ones(6, 6, 2, 2)})
