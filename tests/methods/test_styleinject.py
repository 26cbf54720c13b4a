"""StyleInject as a method: its record, its file, a fixed mixture, and a plain LoRA of it."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from difflora_core.adapters.attach import attach
from difflora_core.adapters.styleinject import StyleInjectConfig, StyleInjectPlan, new_layer
from difflora_core.errors import CheckpointError, LayoutError
from difflora_core.lora.formats.state_dict import to_state_dict
from difflora_core.methods.base import AppliedAdaptation, PreparedAdaptation
from difflora_core.methods.styleinject import (
    StyleInject,
    frozen,
    style_adaptation,
    style_layers,
)
from difflora_core.models.layers import DrawnFrom
from difflora_core.storage.adapter_file import read_adaptation, write_adaptation
from difflora_core.text.new_words import LearnedWord

SIZES = {
    "input_blocks.1.attn1.to_q": (6, 4),
    "input_blocks.1.attn2.to_v": (5, 4),
    "input_blocks.1.in_layers.2": (3, 4, 3, 3),
}


def style(spread=True, styles=3, config=StyleInjectConfig(), seed=0):  # noqa: B008
    """A random trained style of two linear layers and a convolution, exact in float16."""
    g = torch.Generator().manual_seed(seed)
    layers = {}
    for name, size in SIZES.items():
        layer = new_layer(size, StyleInjectPlan(styles, 2, alpha=3.0), spread, g)
        for key, tensor in layer.tensors().items():
            if key != "alpha":
                tensor.copy_(torch.randn(tensor.shape, generator=g).half())
        layers[name] = layer
    return style_adaptation(layers, config, "tiny")


def applied(adaptation, **changes):
    part = PreparedAdaptation(adaptation.to(torch.float64))
    return AppliedAdaptation(part, adaptation.settings, **changes)


def inputs(name, g):
    size = SIZES[name]
    shape = (2, size[0], 6, 6) if len(size) == 4 else (2, 5, size[0])
    return torch.randn(shape, generator=g, dtype=torch.float64)


def test_a_file_gives_back_the_style(tmp_path):
    config = StyleInjectConfig("token", "sum", "add")
    one = replace(style(config=config), facts={"steps": 7})
    written = write_adaptation(tmp_path / "a.safetensors", one)
    again = read_adaptation(written.path)
    assert written.error == 0
    assert (again.method, again.base, again.settings) == ("styleinject", "tiny", config)
    assert (again.word, again.facts) == (None, {"steps": 7})
    assert {n: set(t) for n, t in again.layers.items()} == {
        n: set(t) for n, t in one.layers.items()
    }
    for name, tensors in one.layers.items():
        for key, tensor in tensors.items():
            assert torch.equal(again.layers[name][key], tensor), (name, key)


def test_a_file_of_eight_bit_numbers_is_close(tmp_path):
    one = style()
    small = write_adaptation(tmp_path / "b.safetensors", one, int8=True)
    assert 0 < small.error < 0.01
    again = read_adaptation(small.path)
    assert all(torch.equal(t["alpha"], torch.tensor([3.0])) for t in again.layers.values())


def test_layers_without_another_spread_may_stand_beside_others(tmp_path):
    one, plain = style(), style(spread=False)
    name = "input_blocks.1.attn2.to_v"
    mixed = replace(one, layers={**one.layers, name: plain.layers[name]})
    again = read_adaptation(write_adaptation(tmp_path / "a.safetensors", mixed).path)
    assert style_layers(again)[name].spread is None
    assert style_layers(again)["input_blocks.1.attn1.to_q"].spread is not None


def test_what_is_no_style_is_refused(tmp_path):
    one = style()
    name, tensors = next(iter(one.layers.items()))
    cases = {
        "does not hold the parts": replace(one, shared={"more": torch.ones(1)}),
        "does not hold": replace(one, layers={name: {"downs": tensors["downs"]}}),
        f"layer {name}: .*do not fit": replace(
            one, layers={name: {**tensors, "up": torch.ones(4, 3)}}
        ),
        "teaches none": replace(
            one, word=LearnedWord("<a>", "hat", (torch.ones(3),), torch.ones(64))
        ),
    }
    for message, wrong in cases.items():
        with pytest.raises(LayoutError, match=message):
            StyleInject.check(wrong)
        with pytest.raises(CheckpointError, match="was not saved"):
            write_adaptation(tmp_path / "bad.safetensors", wrong)


def test_styles_follow_one_another_at_their_strengths():
    parts = [applied(style(seed=k), strength=s) for k, s in ((1, 1.0), (2, 0.5))]
    entries = StyleInject.adapters(parts).entries
    assert [entry.layer for entry in entries] == [*SIZES, *SIZES]
    assert [entry.strength for entry in entries] == [1.0] * 3 + [0.5] * 3


@pytest.mark.parametrize("given", [False, True])
def test_a_fixed_mixture_is_the_style_where_its_router_chooses_so(given):
    """With a router that always gives these weights, the frozen style does what the style did."""
    one = style()
    weights = torch.tensor([0.5, 0.3, 0.2]) if given else torch.full((3,), 1 / 3)
    routing = dict.fromkeys(SIZES, weights) if given else None
    fixed = frozen(one, routing)
    StyleInject.check(fixed)
    assert StyleInject.layer_sizes(fixed) == StyleInject.layer_sizes(one)
    g = torch.Generator().manual_seed(5)
    for name in SIZES:
        x = inputs(name, g)
        out = SIZES[name][1]
        y = torch.randn((2, out, 6, 6) if x.ndim == 4 else (2, 5, out), generator=g).double()
        # the logits of the wanted weights, whatever the input is: the first feature is constant
        pooled = torch.ones(2, SIZES[name][0]).double()
        x = x - x.mean((2, 3) if x.ndim == 4 else 1, keepdim=True)
        x = x + (pooled[:, :, None, None] if x.ndim == 4 else pooled[:, None])
        layer = style_layers(one)[name]
        router = torch.zeros_like(layer.router)
        router[:, 0] = weights.log()
        steered = replace(one, layers={name: {**one.layers[name], "router": router}})
        (before,) = StyleInject.adapters([applied(steered)])
        after = next(e for e in StyleInject.adapters([applied(fixed)]) if e.layer == name)
        made, expected = after.adapter.edit(x, y), before.adapter.edit(x, y)
        torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-5)  # weights are float32


def test_a_mixture_names_the_layer_it_lacks():
    one = style()
    with pytest.raises(LayoutError, match=r"3 weights for its styles on input_blocks.1.attn1.to_q"):
        frozen(one, {})
    with pytest.raises(LayoutError, match="3 weights"):
        frozen(one, dict.fromkeys(SIZES, torch.ones(2)))
    with pytest.raises(LayoutError, match="3 weights"):
        frozen(one, dict.fromkeys(SIZES, torch.full((3,), torch.nan)))


class Block(nn.Module):
    """The layers of the style under their names."""

    def __init__(self):
        super().__init__()
        with DrawnFrom(torch.Generator().manual_seed(0)):
            attn1 = nn.ModuleDict({"to_q": nn.Linear(6, 4, bias=False)})
            attn2 = nn.ModuleDict({"to_v": nn.Linear(5, 4, bias=False)})
            conv = nn.ModuleList([nn.Identity(), nn.Identity(), nn.Conv2d(3, 4, 3, padding=1)])
        block = nn.ModuleDict({"attn1": attn1, "attn2": attn2, "in_layers": conv})
        self.input_blocks = nn.ModuleList([nn.Identity(), block])
        self.double().requires_grad_(False)


def test_its_lora_adds_to_the_weights_what_the_fixed_low_rank_change_does():
    """As ComfyUI reads the file: up times down, of a convolution reshaped to its weight."""
    one = style()
    prepared = PreparedAdaptation(one)
    state = to_state_dict(StyleInject.as_lora(prepared, lambda name, rows: rows), "generic")
    plain = frozen(one)
    plain = replace(
        plain,
        layers={
            n: {k: v for k, v in t.items() if not k.startswith("spread")}
            for n, t in plain.layers.items()
        },
    )
    net, patched, g = Block(), Block(), torch.Generator().manual_seed(1)
    for name, size in SIZES.items():
        stem = f"diffusion_model.{name}"
        up, down = state[f"{stem}.lora_up.weight"], state[f"{stem}.lora_down.weight"]
        assert tuple(down.shape) == (2, size[0], *size[2:])
        assert tuple(up.shape) == (4, 2, *[1] * (len(size) - 2))
        weight = patched.get_submodule(name).weight
        scale = float(state[f"{stem}.alpha"]) / len(down)
        weight += scale * (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
        x = inputs(name, g)
        with attach(net, StyleInject.adapters([applied(plain)])):
            made = net.get_submodule(name)(x)
        expected = patched.get_submodule(name)(x)
        torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-5)  # factors are float32


def test_it_says_what_a_lora_of_it_loses():
    assert StyleInject.exports_lora()
    assert StyleInject.lost_as_lora(style()) == (
        "its 3 styles are mixed evenly, whatever the picture",
        "the spread of the base model stays in 3 layers",
    )
    assert StyleInject.lost_as_lora(style(spread=False, styles=1)) == ()
