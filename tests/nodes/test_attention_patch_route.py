"""Hooks on projections and ComfyUI's attention patches are two routes to the same edit."""

import pytest
import torch

from difflora_core.adapters.attach import attach
from difflora_core.adapters.base import AdapterEntry, AdapterSet
from difflora_core.adapters.perfusion import PerfusionKeyAdapter, PerfusionValueAdapter
from difflora_core.adapters.token_gate import ConceptMatcher, GatedConcept, SigmoidGate

DIM, CONTEXT, HEADS = 16, 12, 2


@pytest.fixture
def block(comfyui):
    """ComfyUI's own transformer block with random weights."""
    import comfy.ops
    from comfy.ldm.modules.attention import BasicTransformerBlock

    built = BasicTransformerBlock(
        DIM, HEADS, DIM // HEADS, context_dim=CONTEXT, operations=comfy.ops.disable_weight_init
    )
    generator = torch.Generator().manual_seed(0)
    for parameter in built.parameters():
        parameter.data = 0.4 * torch.randn(parameter.shape, generator=generator)
    return built.requires_grad_(False)


def concepts(count, generator):
    """Random concepts and their value targets."""
    made = []
    for k in range(count):
        i, dual, anchor = (torch.randn(CONTEXT, generator=generator) for _ in range(3))
        made.append(GatedConcept(i, dual / (dual @ i), anchor, SigmoidGate(0.2 + 0.3 * k, 0.3)))
    return made, torch.randn(count, DIM, generator=generator)


def patches(made, targets):
    """The route of perfusion.md 6: contexts before the projections, o* after them."""
    seen = {}

    def context(n, key, value, options):
        rest, locked, gates = value, key, []
        for one in made:
            similarity = value @ one.covector
            gate = torch.sigmoid((similarity - one.gate.bias) / one.gate.temperature)
            gates.append(gate)
            removed = similarity[..., None] * one.direction
            rest = rest - removed
            locked = locked - removed + gate[..., None] * one.superclass
        seen["gates"] = torch.stack(gates, -1)
        return n, locked, rest

    def replace(q, k, v, options):
        from comfy.ldm.modules.attention import optimized_attention

        return optimized_attention(q, k, v + seen["gates"] @ targets, options["n_heads"])

    return context, replace


@pytest.mark.parametrize("count", [1, 2])
def test_both_routes_agree(block, count):
    generator = torch.Generator().manual_seed(count)
    made, targets = concepts(count, generator)
    x = torch.randn(2, 9, DIM, generator=generator)
    context = torch.randn(2, 5, CONTEXT, generator=generator)
    context[:, 2] = made[0].direction
    before, after = patches(made, targets)
    options = {
        "patches": {"attn2_patch": [before]},
        "patches_replace": {"attn2": {("middle", 0, 0): after}},
        "block": ("middle", 0),
        "block_index": 0,
    }
    plain = block(x.clone(), context=context, transformer_options={})
    patched = block(x.clone(), context=context, transformer_options=options)
    matcher = ConceptMatcher(made)
    adapters = AdapterSet(
        (
            AdapterEntry("attn2.to_k", PerfusionKeyAdapter(matcher)),
            AdapterEntry("attn2.to_v", PerfusionValueAdapter(matcher, targets)),
        )
    )
    with attach(block, adapters):
        hooked = block(x.clone(), context=context, transformer_options={})
    torch.testing.assert_close(hooked, patched, rtol=1e-5, atol=1e-5)
    assert float((hooked - plain).abs().max()) > 0.05
    again = block(x.clone(), context=context, transformer_options={})
    assert torch.equal(again, plain)


def test_hooks_compose_with_an_occupied_patch_slot(block):
    """IPAdapter and others own the replace slot: it gets our keys and values, and runs as ever."""
    generator = torch.Generator().manual_seed(5)
    made, targets = concepts(1, generator)
    x = torch.randn(1, 9, DIM, generator=generator)
    context = torch.randn(1, 5, CONTEXT, generator=generator)
    context[:, 1] = made[0].direction
    values = []

    def foreign(q, k, v, options):
        from comfy.ldm.modules.attention import optimized_attention

        values.append(v)
        return 0.5 * optimized_attention(q, k, v, options["n_heads"])

    options = {
        "patches": {},
        "patches_replace": {"attn2": {("middle", 0, 0): foreign}},
        "block": ("middle", 0),
        "block_index": 0,
    }
    block(x.clone(), context=context, transformer_options=options)
    matcher = ConceptMatcher(made)
    entry = AdapterEntry("attn2.to_v", PerfusionValueAdapter(matcher, targets))
    with attach(block, AdapterSet((entry,))):
        block(x.clone(), context=context, transformer_options=options)
    match = matcher(context)
    wanted = match.rest @ block.attn2.to_v.weight.mT + match.gate @ targets
    torch.testing.assert_close(values[1], wanted, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(values[0], values[1])
