"""What every registered method promises, whatever it does inside."""

from pathlib import Path
from runpy import run_path

import pytest
import torch
from torch import nn

from difflora_core.adapters.attach import attach
from difflora_core.config import Config
from difflora_core.errors import ConfigError, LayoutError
from difflora_core.lora.layout import module_size
from difflora_core.methods.base import (
    AppliedAdaptation,
    TrainedAdaptation,
    layout_hash,
    with_settings,
)
from difflora_core.methods.registry import METHODS, method

EXAMPLES = Path(__file__).parent / "examples"


@pytest.fixture(params=list(METHODS))
def example(request, prepared, encodings):
    """A registered method, what it could have trained on the small network, and encodings.

    A method's example is `example` of the file with its name in examples/.
    """
    made = run_path(str(EXAMPLES / f"{request.param}.py"))["example"]
    return METHODS[request.param], *made(prepared, encodings)


def run(net, kind, part, e, strength):
    applied = AppliedAdaptation(part, part.adaptation.settings, strength)
    with attach(net, kind.adapters([applied])):
        return net(e)


def test_sizes_are_those_of_the_layers_it_changes(example, net):
    kind, part, _ = example
    kind.check(part.adaptation)
    sizes = kind.layer_sizes(part.adaptation)
    assert set(sizes) == set(part.adaptation.layers)
    for name, size in sizes.items():
        layer = net().get_submodule(name)
        assert size == module_size(layer) == (layer.in_features, layer.out_features)


def test_it_acts_by_its_strength_and_sample(example, net):
    """0 is the base, 1 something else, and every sample has a strength of its own."""
    kind, part, e = example
    base, full = net()(e), run(net(), kind, part, e, 1.0)
    assert torch.equal(run(net(), kind, part, e, 0.0), base)
    assert float((full - base).abs().max()) > 0.01
    mixed = run(net(), kind, part, e, torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert torch.equal(mixed[0], base[0])
    torch.testing.assert_close(mixed[1], full[1])


def test_settings_are_strict_and_travel(example):
    kind, part, _ = example
    settings = part.adaptation.settings
    assert isinstance(settings, kind.Config)
    assert issubclass(kind.Config, Config)
    assert kind.Config.from_json(settings.to_json()) == settings
    with pytest.raises(ConfigError, match="unknown"):
        kind.Config.from_dict({"no such setting": 1})
    assert with_settings(part.adaptation, {"no such setting": 1}) == settings


def test_tensors_of_another_kind_are_refused(example):
    kind, part, _ = example
    one = part.adaptation
    layers = {name: {**tensors, "more": torch.ones(2)} for name, tensors in one.layers.items()}
    with pytest.raises(LayoutError, match="does not hold"):
        kind.check(
            TrainedAdaptation(one.method, "tiny", one.settings, one.shared, layers, one.word)
        )


def test_unknown_method_says_what_is_known():
    with pytest.raises(ConfigError, match="'magic' is not known here; known are lora, "):
        method("magic")


def test_the_layout_hash_tells_layers_and_sizes_apart():
    one = {"a": (3, 4), "b": (3, 5)}
    assert layout_hash(one) == layout_hash({"b": (3, 5), "a": (3, 4)})
    others = ({"a": (3, 4)}, {"a": (3, 4), "c": (3, 5)}, {"a": (3, 4), "b": (3, 6)})
    assert len({layout_hash(one), *map(layout_hash, others)}) == 4


def test_the_size_of_a_convolution_has_its_kernel():
    """Another kernel, or a linear layer of the same features, is another layer."""
    sizes = {
        module_size(layer)
        for layer in (nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, (3, 5)), nn.Linear(3, 4))
    }
    assert sizes == {(3, 4, 1, 1), (3, 4, 3, 5), (3, 4)}
    assert module_size(nn.LayerNorm(3)) == module_size(None) == ()
    assert len({layout_hash({"a": size}) for size in sizes}) == 3


def test_an_adaptation_without_layers_is_none():
    settings = METHODS["lora"].Config()
    for layers in ({}, {"a": {}}):
        with pytest.raises(LayoutError, match="changes no layer"):
            TrainedAdaptation("lora", "tiny", settings, {}, layers)
    with pytest.raises(LayoutError, match="not finite"):
        TrainedAdaptation("lora", "tiny", settings, {}, {"a": {"down": torch.tensor([torch.nan])}})
