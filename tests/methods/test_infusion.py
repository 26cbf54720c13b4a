"""Infusion as a method: it touches values alone, at the concept's token."""

from dataclasses import replace

import pytest
import torch

from difflora_core.adapters.attach import attach
from difflora_core.errors import ConfigError
from difflora_core.methods.base import AppliedAdaptation, PreparedAdaptation
from difflora_core.methods.infusion import Infusion, InfusionConfig


def test_it_touches_values_alone(net, prepared):
    part, model = prepared(method="infusion"), net()
    g = torch.Generator().manual_seed(9)
    e = torch.randn(2, 5, 6, generator=g, dtype=torch.float64)
    e[:, 1] = part.adaptation.shared["direction"]
    applied = AppliedAdaptation(part, InfusionConfig(threshold=0.99), torch.tensor([1.0, 0.5]))
    adapters = Infusion.adapters([applied])
    assert adapters.layers == tuple(part.adaptation.layers)
    plain = model.middle_block.attn2["to_v"](e)
    keys = model.middle_block.attn2["to_k"](e)
    with attach(model, adapters):
        got = model.middle_block.attn2["to_v"](e)
        assert torch.equal(model.middle_block.attn2["to_k"](e), keys)
    change = (got - plain).abs().amax(-1)
    assert (change > 1e-9).tolist() == 2 * [[False, True, False, False, False]]
    residual = part.adaptation.layers["middle_block.attn2.to_v"]["values"]
    torch.testing.assert_close(got[0, 1] - plain[0, 1], residual)
    torch.testing.assert_close(got[1, 1] - plain[1, 1], residual / 2)


def test_what_it_refuses(prepared):
    part = prepared(method="infusion")
    with pytest.raises(ConfigError, match="no form as a plain LoRA"):
        Infusion.as_lora(part, lambda layer, rows: rows)
    assert not Infusion.exports_lora()
    other = PreparedAdaptation(replace(part.adaptation, method="another"))
    with pytest.raises(ConfigError, match="trained by another, not by infusion"):
        Infusion.adapters([AppliedAdaptation(other, InfusionConfig())])
    with pytest.raises(ConfigError):
        InfusionConfig(threshold=0.0)
