"""Attaching LoRA: base untouched at 0, reference at 1, merged = hooked, nothing left behind."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from difflora_core.adapters.attach import attach, hold
from difflora_core.adapters.base import AdapterEntry, AdapterSet, LayerAdapter
from difflora_core.adapters.lora import LoRAAdapter, lora_adapter_set
from difflora_core.errors import LayoutError
from difflora_core.lora.weights import LoRALayer, LoRAWeights

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
ROUNDINGS = 4  # of the largest number; two layers of six to eight sums cost less than two


class Net(nn.Module):
    """Two linear layers, one of them used with extra dimensions."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.block = nn.ModuleDict(
            {"first": nn.Linear(6, 8), "second": nn.Linear(8, 5, bias=False)}
        )
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)

    def forward(self, x):
        return self.block["second"](torch.tanh(self.block["first"](x)))


def hooks(module):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


def weights(seed=1, batch=(), alpha=1.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for name, out, width in (("block.first", 8, 6), ("block.second", 5, 8)):
        down = torch.randn(*batch, 2, width, generator=generator, dtype=dtype)
        up = torch.randn(*batch, out, 2, generator=generator, dtype=dtype)
        layers[name] = LoRALayer(down, up, alpha)
    return LoRAWeights(layers)


def reference(net, x, lora, strength):
    """The same network with explicitly changed weights."""
    first, second = net.block["first"], net.block["second"]
    w1 = first.weight + strength * lora["block.first"].delta().to(x.dtype)
    w2 = second.weight + strength * lora["block.second"].delta().to(x.dtype)
    return torch.tanh(x @ w1.T + first.bias) @ w2.T


def inputs(*shape, dtype=torch.float64, seed=2):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 6), (3, 4, 6), (2, 3, 4, 6)])
def test_strengths(dtype, shape):
    net, x, lora = Net().to(dtype), inputs(*shape, dtype=dtype), weights()
    base = net(x)
    with attach(net, lora_adapter_set(lora), 0.0):
        assert torch.equal(net(x), base)
    for strength in (1.0, 0.5, -1.3):
        with attach(net, lora_adapter_set(lora), strength) as handle:
            got = net(x)
            assert handle.layers == ("block.first", "block.second")
        wanted = reference(net.double(), x.double(), lora, strength)
        net.to(dtype)
        bound = ROUNDINGS * torch.finfo(dtype).eps * float(wanted.detach().abs().max())
        assert float((got.double() - wanted).detach().abs().max()) <= bound
        assert float((base.double() - wanted).detach().abs().max()) > 5 * bound
    assert hooks(net) == 0
    assert torch.equal(net(x), base)


@given(st.integers(0, 99), st.floats(-2, 2))
def test_merged_equals_hooked(merged_weights, seed, strength):
    net, x, lora = Net().double(), inputs(3, 6), weights(seed)
    adapters = lora_adapter_set(lora)
    with attach(net, adapters, strength):
        hooked = net(x)
    for path, weight in merged_weights(net, adapters, strength).items():
        net.get_submodule(path).weight.data = weight
    torch.testing.assert_close(net(x), hooked, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("repeats", [1, 2])
@pytest.mark.parametrize("middle", [(), (4,), (2, 3)])
def test_each_sample_its_own_lora(repeats, middle):
    net, lora = Net().double(), weights(batch=(3,))
    x = inputs(3 * repeats, *middle, 6)
    with attach(net, lora_adapter_set(lora)):
        together = net(x)
    for index in range(3 * repeats):
        with attach(net, lora_adapter_set(lora.batch_item(index % 3))):
            alone = net(x[index : index + 1])
        torch.testing.assert_close(together[index : index + 1], alone, rtol=1e-12, atol=1e-12)


def test_gradients_of_a_batch_equal_those_of_single_loras():
    net = Net().double().requires_grad_(False)
    lora, x = weights(batch=(3,)), inputs(3, 4, 6)
    factors = [t.requires_grad_() for v in lora.layers.values() for t in (v.down, v.up)]
    with attach(net, lora_adapter_set(lora)):
        net(x).square().sum().backward()
    for index in range(3):
        single = lora.detach().batch_item(index)
        alone = [t.requires_grad_() for v in single.layers.values() for t in (v.down, v.up)]
        with attach(net, lora_adapter_set(single)):
            net(x[index : index + 1]).square().sum().backward()
        for together, one in zip(factors, alone, strict=True):
            torch.testing.assert_close(together.grad[index], one.grad)


def test_strengths_of_tiles_follow_their_sample():
    """HyperTile cuts every sample into tiles, one after another."""
    net, lora = Net().double(), weights()
    x = inputs(2, 3, 4, 6)  # 2 samples of 3 tiles
    with attach(net, lora_adapter_set(lora), torch.tensor([0.0, 1.0])):
        got = net(x.flatten(0, 1)).unflatten(0, (2, 3))
    assert torch.equal(got[0], net(x[0]))
    torch.testing.assert_close(got[1], reference(net, x[1], lora, 1.0), rtol=1e-12, atol=1e-12)


def test_strengths_0_and_1_are_exact_beside_others():
    net, lora, x = Net(), weights(dtype=torch.float32), inputs(3, 4, 6, dtype=torch.float32)
    with attach(net, lora_adapter_set(lora), torch.tensor([0.0, 1.0, 0.3])):
        got = net(x)
    with attach(net, lora_adapter_set(lora), 1.0):
        assert torch.equal(got[1], net(x)[1])
    assert torch.equal(got[0], net(x)[0])


def test_held_attachments_act_again_in_the_backward_pass():
    """A checkpointed layer is computed twice; without `hold` the second time lacks the adapter."""
    net, x = Net().double().requires_grad_(False), inputs(3, 6)

    def factors():
        lora = weights()
        return lora, [t.requires_grad_() for v in lora.layers.values() for t in (v.down, v.up)]

    plain, wanted = factors()
    with attach(net, lora_adapter_set(plain)):
        net(x).square().sum().backward()
    lora, got = factors()
    with hold() as held:
        with attach(net, lora_adapter_set(lora)):
            y = torch.utils.checkpoint.checkpoint(net, x, use_reentrant=False)
        assert torch.equal(net(x), Net().double()(x))  # paused: the plain network again
        held.resume()
        y.square().sum().backward()
    assert hooks(net) == 0
    for one, other in zip(wanted, got, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-12, atol=1e-12)


def test_a_layer_is_held_once():
    net = Net().double()
    with hold():
        with attach(net, lora_adapter_set(weights(1))):
            pass
        again = attach(net, lora_adapter_set(weights(2)))
        with pytest.raises(LayoutError, match="twice"):
            again.__exit__(None, None, None)
    assert hooks(net) == 0


def test_gradient_checkpointing_gives_the_same_gradients():
    net, lora, x = Net().double(), weights(batch=(3,)), inputs(3, 6)
    grads = []
    for checkpointed in (False, True):
        own = LoRAWeights(
            {
                k: LoRALayer(v.down.clone().requires_grad_(), v.up.clone().requires_grad_(), 1.0)
                for k, v in lora.layers.items()
            }
        )
        with attach(net, lora_adapter_set(own)):
            if checkpointed:
                y = torch.utils.checkpoint.checkpoint(net, x, use_reentrant=False)
            else:
                y = net(x)
            y.square().sum().backward()
        grads.append(own["block.first"].down.grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize("shape", [(3, 6), (3, 4, 6)])
def test_each_sample_its_own_strength(shape):
    net, lora, x = Net().double(), weights(), inputs(*shape)
    strengths = torch.tensor([0.0, 1.0, -0.5])
    with attach(net, lora_adapter_set(lora), strengths):
        found = net(x)
    for row, strength in enumerate(strengths.tolist()):
        wanted = reference(net, x[row : row + 1], lora, strength)
        torch.testing.assert_close(found[row : row + 1], wanted, rtol=0, atol=1e-12)
    torch.testing.assert_close(found[0], net(x)[0], rtol=0, atol=0)
    with (
        attach(net, lora_adapter_set(lora), strengths),
        pytest.raises(LayoutError, match="strengths for"),
    ):
        net(x[:2])


def test_wrong_batches_and_widths():
    net = Net().double()
    with (
        attach(net, lora_adapter_set(weights(batch=(3,)))),
        pytest.raises(LayoutError, match="4 samples cannot be shared by 3 LoRAs"),
    ):
        net(inputs(4, 6))
    wrong = LoRAWeights({"block.second": weights()["block.first"]})
    with (
        attach(net, lora_adapter_set(wrong)),
        pytest.raises(LayoutError, match="layer of 6 to 8 features"),
    ):
        net(inputs(4, 6))
    with pytest.raises(LayoutError, match="one batch dimension"):
        lora_adapter_set(weights(batch=(2, 3)))
    assert hooks(net) == 0


def test_missing_layers_are_named_and_nothing_is_attached():
    net, lora = Net(), weights()
    strange = LoRAWeights({**lora.layers, "block.third": lora["block.first"]})
    with pytest.raises(LayoutError, match=r"1 of 3 adapted layers.*block\.third"):
        attach(net, lora_adapter_set(strange))
    with pytest.raises(LayoutError, match="2 of 2"):
        attach(net, lora_adapter_set(lora), names={})
    assert hooks(net) == 0


def test_names_map_layers_to_modules():
    net, x, lora = Net().double(), inputs(3, 6), weights()
    renamed = LoRAWeights({"a": lora["block.first"], "b": lora["block.second"]})
    with attach(net, lora_adapter_set(renamed), names={"a": "block.first", "b": "block.second"}):
        got = net(x)
    torch.testing.assert_close(got, reference(net, x, lora, 1.0))


def test_two_attachments_in_every_order_of_removal():
    net, x = Net().double(), inputs(3, 6)
    base, sets = net(x), [lora_adapter_set(weights(seed)) for seed in (1, 2)]
    for put, take in itertools.product(itertools.permutations(range(2)), repeat=2):
        handles = {index: attach(net, sets[index], 0.6) for index in put}
        torch.testing.assert_close(
            net(x),
            reference(net, x, LoRAWeights(
                {
                    name: LoRALayer(
                        torch.cat([weights(1)[name].down, weights(2)[name].down]),
                        torch.cat([weights(1)[name].up, weights(2)[name].up], -1),
                        2.0,
                    )
                    for name in weights()
                }
            ), 0.6),
        )  # fmt: skip
        for index in take:
            handles[index].remove()
            handles[index].remove()
        assert hooks(net) == 0
        assert torch.equal(net(x), base)


def test_strength_can_change_while_attached_and_errors_leave_no_state():
    net, x = Net().double(), inputs(3, 6)
    base = net(x)
    with attach(net, lora_adapter_set(weights())) as handle:
        full = net(x)
        with pytest.raises(RuntimeError):
            net(inputs(3, 7))
        assert torch.equal(net(x), full)
        handle.strength = 0.0
        assert torch.equal(net(x), base)
    assert hooks(net) == 0


class Recorder(LayerAdapter):
    """Changes input and output, and remembers what it saw."""

    def __init__(self):
        self.seen = None

    def substitute(self, x):
        return 2 * x

    def edit(self, x, y):
        self.seen = x
        return y + 1


def test_the_contract_of_substitute_and_edit():
    net, x = Net().double(), inputs(3, 6)
    layer, adapter = net.block["first"], Recorder()
    adapters = AdapterSet((AdapterEntry("block.first", adapter, 0.5),))
    base = layer(x)
    with attach(net, adapters, 0.5):
        got = layer(x)
    wanted = torch.nn.functional.linear(x + 0.25 * x, layer.weight, layer.bias) + 0.25
    torch.testing.assert_close(got, wanted)
    assert adapter.seen is x
    with attach(net, adapters, 0.0):
        assert torch.equal(layer(x), base)
    with attach(net, AdapterSet((AdapterEntry("block.first", LayerAdapter.__new__(Plain)),))):
        assert torch.equal(layer(x), base)


class Plain(LayerAdapter):
    """Only defaults: changes nothing."""


def test_adapter_sets_add_up():
    lora = weights(alpha=0.7)
    adapters = lora_adapter_set(lora)
    both = adapters + adapters.scaled(0.5)
    assert len(both) == 4
    assert both.layers == ("block.first", "block.second")
    assert [entry.strength for entry in both] == [1, 1, 0.5, 0.5]
    net, x = Net().double(), inputs(3, 6)
    with attach(net, both):
        got = net(x)
    torch.testing.assert_close(got, reference(net, x, lora, 1.5))
    fresh = LoRALayer(torch.ones(2, 6), torch.zeros(8, 2), 2.0)
    y = inputs(3, 8)
    assert torch.equal(LoRAAdapter(fresh).edit(x, y), y)
