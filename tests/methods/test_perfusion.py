"""Perfusion as a method: settings, locks, several concepts, export; on a small network."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from difflora_core.adapters.attach import attach
from difflora_core.adapters.lora import lora_adapter_set
from difflora_core.errors import ConfigError, LayoutError
from difflora_core.methods.base import AppliedAdaptation, PreparedAdaptation, unit_covector
from difflora_core.methods.lora import LoRASettings
from difflora_core.methods.perfusion import Perfusion, PerfusionConfig, key_layer

LAYER, DIM = "middle_block.attn2.to_v", 6


@pytest.fixture
def prepared(prepared):
    """Makes a random concept of this method."""
    return partial(prepared, method=Perfusion.name)


def applied(part, strength=1.0, prompt=None, **settings):
    return AppliedAdaptation(part, PerfusionConfig(**settings), strength, prompt)


def encodings(*parts):
    """Random encodings in which each concept stands once."""
    e = torch.randn(2, 5, DIM, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    for k, part in enumerate(parts):
        e[:, k + 1] = part.adaptation.shared["direction"]
    return e


def run(net, parts, e):
    with attach(net, Perfusion.adapters(parts)):
        return net(e)


def test_layers_and_locks(net, prepared):
    part = prepared()
    e, base = encodings(part), net()(encodings(part))
    results = {}
    for lock in ("none", "local", "global"):
        parts = [applied(part, lock=lock, prompt=e[:1] * 0.5)]
        adapters = Perfusion.adapters(parts)
        keys = [name for name in adapters.layers if name.endswith("to_k")]
        assert len(keys) == (0 if lock == "none" else 2)
        assert set(part.adaptation.layers) <= set(adapters.layers)
        results[lock] = run(net(), parts, e)
    assert all(not torch.allclose(result, base) for result in results.values())
    assert not torch.allclose(results["local"], results["none"])
    assert not torch.allclose(results["local"], results["global"])


@pytest.mark.parametrize("lock", ["none", "local", "global"])
def test_strength_0_leaves_the_model_alone_and_samples_have_their_own(net, prepared, lock):
    part = prepared()
    e, base = encodings(part), net()(encodings(part))
    prompt = e[:1] * 0.5
    full = run(net(), [applied(part, 1.0, prompt, lock=lock)], e)
    off = run(net(), [applied(part, 0.0, prompt, lock=lock)], e)
    torch.testing.assert_close(off, base, rtol=1e-12, atol=1e-12)
    rows = torch.tensor([1.0, 0.0])
    mixed = run(net(), [applied(part, rows, prompt, lock=lock)], e)
    torch.testing.assert_close(mixed[0], full[0])
    torch.testing.assert_close(mixed[1], base[1])
    assert float((full - base).abs().max()) > 0.05


def test_bias_turns_the_concept_down(net, prepared):
    """The value at the concept's token moves from o* to nothing as the bias rises."""
    part = prepared()
    e, model = encodings(part), net()
    target = part.adaptation.layers[LAYER]["values"]
    shares = []
    for bias in (0.0, 0.5, 1.0, 1.5, 2.0):
        with attach(model, Perfusion.adapters([applied(part, bias=bias)])):
            value = model.middle_block.attn2["to_v"](e)[0, 1]
        shares.append(float(value @ target / (target @ target)))
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > 0.99
    assert abs(shares[-1]) < 0.01


def test_some_locked_some_not(net, prepared):
    first, second = prepared(0), prepared(1, word="<b>")
    e, model = encodings(first, second), net()
    with attach(model, Perfusion.adapters([applied(first), applied(second, lock="none")])):
        key = model.middle_block.attn2["to_k"](e)
    plain = model.middle_block.attn2["to_k"](e)
    with attach(model, Perfusion.adapters([applied(first)])):
        torch.testing.assert_close(key, model.middle_block.attn2["to_k"](e))
    assert float((key - plain).abs().max()) > 0.05


def test_exact_keeps_concepts_apart_that_resemble_each_other(net, prepared):
    """The inner product of what is left with every covector is zero; approximately it is not."""
    first, second = prepared(0), prepared(1, word="<b>")
    e, left = encodings(first, second), {}
    covectors = torch.stack([unit_covector(p.adaptation) for p in (first, second)])
    directions = torch.stack([p.adaptation.shared["direction"] for p in (first, second)])
    for combine in ("exact", "approximate"):
        shut = {"bias": 3.0, "temperature": 0.001}
        parts = [applied(part, combine=combine, **shut) for part in (first, second)]
        seen, model = [], net()
        with attach(model, Perfusion.adapters(parts)):
            layer = model.middle_block.attn2["to_v"]
            layer.register_forward_hook(lambda m, args, y, seen=seen: seen.append(args[0]))
            layer(e)
        left[combine] = seen[0]
    share = torch.linalg.solve(covectors @ directions.mT, covectors @ e.mT)
    torch.testing.assert_close(left["exact"], e - share.mT @ directions)
    assert float((left["exact"] - left["approximate"]).abs().max()) > 0.05


def test_export_is_the_linear_edit(net, prepared, merged_weights):
    """As a LoRA at strength 1 the layers map i* to o*, and to the super-class key."""
    part, model = prepared(), net()
    one = part.adaptation
    direction, covector = one.shared["direction"], one.shared["covector"]

    def project(layer, rows):
        return model.get_submodule(layer)(rows)

    lora = Perfusion.as_lora(part, project)
    assert len(lora) == 4
    weights = merged_weights(model, lora_adapter_set(lora))
    for layer in one.layers:
        torch.testing.assert_close(weights[layer] @ direction, one.layers[layer]["values"])
        key = key_layer(layer)
        wanted = model.get_submodule(key).weight @ part.superclass
        torch.testing.assert_close(weights[key] @ direction, wanted)
        dual = covector / (covector @ direction)
        change = weights[layer] - model.get_submodule(layer).weight
        other = torch.eye(DIM, dtype=torch.float64) - torch.outer(direction, dual)
        assert float((change @ other).abs().max()) < 1e-12  # nothing else moves
    assert len(Perfusion.as_lora(part, project, lock_keys=False)) == 2
    with pytest.raises(LayoutError, match="does not fit"):
        Perfusion.as_lora(part, lambda layer, rows: torch.zeros(2, 9))


def test_concepts_that_cannot_share_a_model(prepared):
    first = prepared()
    with pytest.raises(ConfigError, match="share the word"):
        Perfusion.adapters([applied(first), applied(prepared(1))])
    with pytest.raises(ConfigError, match="no concept"):
        Perfusion.adapters([])
    with pytest.raises(ConfigError, match="superclass_prompt"):
        Perfusion.adapters([applied(first, lock="global")])
    with pytest.raises(ConfigError, match="LoRASettings"):
        Perfusion.adapters([AppliedAdaptation(first, LoRASettings())])
    with pytest.raises(ConfigError, match="needs its super-class word encoded"):
        Perfusion.adapters([applied(PreparedAdaptation(first.adaptation))])
    wide = prepared(1, word="<b>", out=9)
    with pytest.raises(LayoutError, match="different base models"):
        Perfusion.adapters([applied(first), applied(wide)])
    lora = PreparedAdaptation(replace(first.adaptation, method="lora"))
    with pytest.raises(ConfigError, match="trained by lora, not by perfusion"):
        Perfusion.adapters([applied(lora)])


def test_what_is_no_concept(prepared):
    one = prepared().adaptation
    flat = {name: {"values": torch.ones(2, 2)} for name in one.layers}
    cases = {
        "has no word": replace(one, word=None),
        "not hold the tensors": replace(one, shared={"direction": torch.ones(6)}),
        "not vectors": replace(one, layers=flat),
        "differ": replace(one, shared={**one.shared, "covector": torch.ones(5)}),
        "belong together": replace(one, shared={**one.shared, "covector": torch.zeros(6)}),
    }
    for message, bad in cases.items():
        with pytest.raises(LayoutError, match=message):
            Perfusion.check(bad)
    Perfusion.check(one)


def test_settings_out_of_range():
    for bad in (
        {"bias": 9.0}, {"bias": float("nan")}, {"temperature": 0.0}, {"lock": "half"},
        {"reach": -2}, {"combine": "perhaps"},
    ):  # fmt: skip
        with pytest.raises(ConfigError):
            PerfusionConfig(**bad)
    with pytest.raises(ConfigError, match="unknown"):
        PerfusionConfig.from_dict({"bias": 0.5, "biass": 0.5})
