"""Infusion's edit: a residual at the concept's token, and nowhere else."""

import pytest
import torch
from torch import nn

from difflora_core.adapters.attach import attach
from difflora_core.adapters.base import AdapterEntry, AdapterSet
from difflora_core.adapters.infusion import InfusionValueAdapter, token_concept
from difflora_core.adapters.token_gate import ConceptMatcher
from difflora_core.errors import LayoutError

DIM, OUT, LENGTH = 7, 5, 4


def concept(threshold=0.9):
    """A random direction whose covector is its dual, and the gate behind it."""
    i = torch.randn(DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return i, ConceptMatcher([token_concept(i, i / (i @ i), threshold)])


def test_it_adds_at_one_token():
    g = torch.Generator().manual_seed(2)
    e = 0.1 * torch.randn(2, LENGTH, DIM, generator=g, dtype=torch.float64)
    residual = torch.randn(1, OUT, generator=g, dtype=torch.float64)
    net = nn.ModuleDict({"to_v": nn.Linear(DIM, OUT, bias=False, dtype=torch.float64)})
    direction, matcher = concept()
    e[0, 2] = direction
    plain = net["to_v"](e)
    entry = AdapterEntry("to_v", InfusionValueAdapter(matcher, residual))
    with attach(net, AdapterSet((entry,))):
        got = net["to_v"](e)
    wanted = plain.clone()
    wanted[0, 2] += residual[0]
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    nothing = AdapterEntry("to_v", InfusionValueAdapter(matcher, torch.zeros_like(residual)))
    with attach(net, AdapterSet((nothing,))):
        assert torch.equal(net["to_v"](e), plain)


def test_wrong_sizes():
    _, matcher = concept()
    with pytest.raises(LayoutError, match="as many residuals"):
        InfusionValueAdapter(matcher, torch.zeros(2, OUT))
    adapter = InfusionValueAdapter(matcher, torch.zeros(1, OUT))
    with pytest.raises(LayoutError, match="gives 4"):
        adapter.edit(torch.zeros(1, LENGTH, DIM), torch.zeros(1, LENGTH, 4))
