"""Perfusion and Infusion as methods: knobs, locks, several concepts, export; on a small network."""

import pytest
import torch
from torch import nn

from difflora_core.adapters.attach import attach, merged_weights
from difflora_core.adapters.lora import lora_adapter_set
from difflora_core.errors import ConfigError, LayoutError
from difflora_core.methods.base import AdaptationRequest
from difflora_core.methods.infusion import Infusion, InfusionConfig
from difflora_core.methods.perfusion import (
    Perfusion,
    PerfusionConfig,
    PreparedConcept,
    concept_lora,
    key_layer,
)
from difflora_core.methods.registry import METHODS
from difflora_core.text.new_words import Concept, check_probe

LAYERS = ("input_blocks.1.attn2.to_v", "middle_block.attn2.to_v")
DIM, OUT = 6, 4


class Cross(nn.Module):
    def __init__(self, seed):
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.attn2 = nn.ModuleDict(
            {n: nn.Linear(DIM, OUT, bias=False, dtype=torch.float64) for n in ("to_k", "to_v")}
        )
        for layer in self.attn2.values():
            layer.weight.data = torch.randn(OUT, DIM, generator=g, dtype=torch.float64)

    def forward(self, e):
        return (e[..., :OUT] @ self.attn2["to_k"](e).mT).softmax(-1) @ self.attn2["to_v"](e)


class Net(nn.Module):
    """Two cross-attention layers under the names of a UNet."""

    def __init__(self):
        super().__init__()
        self.input_blocks = nn.ModuleList([nn.Identity(), Cross(1)])
        self.middle_block = Cross(2)
        self.requires_grad_(False)

    def forward(self, e):
        return self.input_blocks[1](e) + self.middle_block(e)


def concept(seed=0, method="perfusion", word="<a>", **changes):
    g = torch.Generator().manual_seed(seed)
    random = lambda n: torch.randn(n, generator=g, dtype=torch.float64)  # noqa: E731
    direction, dual = random(DIM), random(DIM)
    parts = {
        "method": method, "word": word, "superclass": "hat", "base": "tiny",
        "embeddings": (random(3), random(3)), "direction": direction,
        "covector": dual / (dual @ direction),
        "values": {name: random(OUT) for name in LAYERS}, "probe": random(64),
    }  # fmt: skip
    return Concept(**{**parts, **changes})


def prepared(seed=0, **changes):
    one = concept(seed, **changes)
    g = torch.Generator().manual_seed(100 + seed)
    return PreparedConcept(one, torch.randn(DIM, generator=g, dtype=torch.float64))


def encodings(*concepts):
    """Random encodings in which each concept stands once."""
    e = torch.randn(2, 5, DIM, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    for k, one in enumerate(concepts):
        e[:, k + 1] = one.direction
    return e


def run(method, e, request=None):
    net = Net()
    with attach(net, method.adapters(request or AdaptationRequest())):
        return net(e)


def test_methods_are_registered():
    assert METHODS["perfusion"] is Perfusion
    assert METHODS["infusion"] is Infusion


def test_layers_and_locks():
    part = prepared()
    e, net = encodings(part.concept), Net()
    base = net(e)
    results = {}
    for lock in ("none", "local", "global"):
        method = Perfusion([(part, PerfusionConfig(lock=lock))], superclass_context=e[:1] * 0.5)
        adapters = method.adapters(AdaptationRequest())
        keys = [name for name in adapters.layers if name.endswith("to_k")]
        assert len(keys) == (0 if lock == "none" else 2)
        assert set(LAYERS) <= set(adapters.layers)
        results[lock] = run(method, e)
    assert all(not torch.allclose(result, base) for result in results.values())
    assert not torch.allclose(results["local"], results["none"])
    assert not torch.allclose(results["local"], results["global"])


def test_a_request_scales_everything():
    part = prepared()
    e, net = encodings(part.concept), Net()
    method = Perfusion([(part, PerfusionConfig())])
    assert torch.equal(run(method, e, AdaptationRequest(strength=0.0)), net(e))
    assert not torch.allclose(run(method, e, AdaptationRequest(strength=0.5)), net(e))


def test_bias_turns_the_concept_down():
    """The value at the concept's token moves from o* to nothing as the bias rises."""
    part = prepared()
    e, net = encodings(part.concept), Net()
    target = part.concept.values[LAYERS[1]]
    shares = []
    for bias in (0.0, 0.5, 1.0, 1.5, 2.0):
        method = Perfusion([(part, PerfusionConfig(bias=bias))])
        with attach(net, method.adapters(AdaptationRequest())):
            value = net.middle_block.attn2["to_v"](e)[0, 1]
        shares.append(float(value @ target / (target @ target)))
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > 0.99
    assert abs(shares[-1]) < 0.01


def test_some_locked_some_not():
    first, second = prepared(0), prepared(1, word="<b>")
    e = encodings(first.concept, second.concept)
    mixed = Perfusion([(first, PerfusionConfig()), (second, PerfusionConfig(lock="none"))])
    net = Net()
    with attach(net, mixed.adapters(AdaptationRequest())):
        key = net.middle_block.attn2["to_k"](e)
    only = Perfusion([(first, PerfusionConfig())])
    with attach(net, only.adapters(AdaptationRequest())):
        torch.testing.assert_close(key, net.middle_block.attn2["to_k"](e))


def test_export_is_the_linear_edit():
    """As a LoRA at strength 1 the layers map i* to o*, and to the super-class key."""
    part, net = prepared(), Net()
    one = part.concept

    def project(layer, rows):
        return net.get_submodule(layer)(rows)

    lora = concept_lora(part, project)
    assert len(lora) == 4
    weights = merged_weights(net, lora_adapter_set(lora))
    for layer in LAYERS:
        torch.testing.assert_close(weights[layer] @ one.direction, one.values[layer])
        key = key_layer(layer)
        wanted = net.get_submodule(key).weight @ part.superclass
        torch.testing.assert_close(weights[key] @ one.direction, wanted)
        dual = one.covector / (one.covector @ one.direction)
        change = weights[layer] - net.get_submodule(layer).weight
        other = torch.eye(DIM, dtype=torch.float64) - torch.outer(one.direction, dual)
        assert float((change @ other).abs().max()) < 1e-12  # nothing else moves
    assert len(concept_lora(part, project, lock_keys=False)) == 2
    with pytest.raises(LayoutError, match="does not fit"):
        concept_lora(part, lambda layer, rows: torch.zeros(2, 9))
    with pytest.raises(ConfigError, match="by infusion"):
        concept_lora(PreparedConcept(concept(method="infusion"), part.superclass), project)


def test_infusion_touches_values_alone():
    one = concept(method="infusion")
    e, net = encodings(one), Net()
    method = Infusion([(one, InfusionConfig(threshold=0.99))])
    adapters = method.adapters(AdaptationRequest())
    assert adapters.layers == LAYERS
    plain = net.middle_block.attn2["to_v"](e)
    with attach(net, adapters):
        got = net.middle_block.attn2["to_v"](e)
        torch.testing.assert_close(
            net.middle_block.attn2["to_k"](e), Net().middle_block.attn2["to_k"](e)
        )
    change = (got - plain).abs().amax(-1)
    assert (change > 1e-9).tolist() == 2 * [[False, True, False, False, False]]


def test_concepts_that_cannot_share_a_model():
    first = prepared()
    config = PerfusionConfig()
    with pytest.raises(ConfigError, match="share the word"):
        Perfusion([(first, config), (prepared(1), config)])
    with pytest.raises(ConfigError, match="trained by infusion"):
        Perfusion([(PreparedConcept(concept(method="infusion"), first.superclass), config)])
    with pytest.raises(ConfigError, match="trained by perfusion"):
        Infusion([(first.concept, InfusionConfig())])
    with pytest.raises(ConfigError, match="no concept"):
        Perfusion([])
    with pytest.raises(ConfigError, match="superclass_prompt"):
        Perfusion([(first, PerfusionConfig(lock="global"))])
    wide = concept(1, word="<b>", values={name: torch.zeros(9) for name in LAYERS})
    with pytest.raises(LayoutError, match="different base models"):
        Perfusion([(first, config), (PreparedConcept(wide, first.superclass), config)])


def test_knobs_out_of_range():
    for bad in (
        {"bias": 9.0}, {"bias": float("nan")}, {"temperature": 0.0}, {"strength": -0.1},
        {"strength": 3.0}, {"lock": "half"}, {"reach": -2},
    ):  # fmt: skip
        with pytest.raises(ConfigError):
            PerfusionConfig(**bad)
    for bad in ({"strength": 5.0}, {"threshold": 0.0}):
        with pytest.raises(ConfigError):
            InfusionConfig(**bad)


def test_fingerprints_pass_rounding_and_nothing_else():
    own, noise = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    check_probe(own, own.half().float(), "It")
    check_probe(own, own + 0.01 * noise, "It")
    for other in (-own, noise, own[:32], 1.5 * own):
        with pytest.raises(ConfigError, match="other text encoders"):
            check_probe(own, other, "It")
