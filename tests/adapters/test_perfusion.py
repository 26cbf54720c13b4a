"""Perfusion's edits against an independent float64 derivation written from the paper."""

import gc

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from difflora_core.adapters.attach import attach
from difflora_core.adapters.base import AdapterEntry, AdapterSet
from difflora_core.adapters.perfusion import (
    GlobalKeyAdapter,
    PerfusionKeyAdapter,
    PerfusionValueAdapter,
)
from difflora_core.adapters.token_gate import ConceptMatcher, GatedConcept, SigmoidGate, first_match
from difflora_core.errors import ConfigError, LayoutError

DIM, OUT, LENGTH = 7, 5, 4


class Attention(nn.Module):
    """Keys and values of one cross-attention layer, and its output for fixed queries."""

    def __init__(self, seed=0):
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.to_k = nn.Linear(DIM, OUT, bias=False, dtype=torch.float64)
        self.to_v = nn.Linear(DIM, OUT, bias=False, dtype=torch.float64)
        self.query = torch.randn(3, OUT, generator=g, dtype=torch.float64)
        for layer in (self.to_k, self.to_v):
            layer.weight.data = torch.randn(OUT, DIM, generator=g, dtype=torch.float64)
        self.requires_grad_(False)

    def forward(self, e):
        return (self.query @ self.to_k(e).mT).softmax(-1) @ self.to_v(e)


class World:
    """Random encodings, C^-1 and concepts, in float64."""

    def __init__(self, seed=0, concepts=1, orthogonal=False):
        g = torch.Generator().manual_seed(seed)
        random = lambda *s: torch.randn(*s, generator=g, dtype=torch.float64)  # noqa: E731
        rows = random(60, DIM)
        self.inverse = torch.linalg.inv(rows.mT @ rows / 60 + 0.01 * torch.eye(DIM))
        self.directions = random(concepts, DIM)
        if orthogonal:  # Gram-Schmidt in the inner product of C^-1
            for j in range(concepts):
                for k in range(j):
                    i, u = self.directions[j].clone(), self.directions[k]
                    scale = (i @ self.inverse @ u) / (u @ self.inverse @ u)
                    self.directions[j] = i - scale * u
        self.superclasses = random(concepts, DIM)
        self.targets = random(concepts, OUT)
        self.e = random(2, LENGTH, DIM)

    def concept(self, j=0, gate=None, strength=1.0, reach=None):
        i = self.directions[j]
        dual = self.inverse @ i
        gate = gate or SigmoidGate(0.6, 0.15)
        covector = dual / (dual @ i)
        return GatedConcept(i, covector, self.superclasses[j], gate, strength, reach)

    def matcher(self, gate=None, exact=False, **options):
        count = range(len(self.directions))
        return ConceptMatcher([self.concept(j, gate, **options) for j in count], exact)

    def similarity(self, e, j=0):
        i = self.directions[j]
        return (e @ self.inverse @ i) / (i @ self.inverse @ i)


def edited(layer, world, matcher, kind):
    """A projection with its adapter, through the hooks."""
    adapter = (
        PerfusionKeyAdapter(matcher)
        if kind == "k"
        else PerfusionValueAdapter(matcher, world.targets)
    )
    with attach(layer, AdapterSet((AdapterEntry(f"to_{kind}", adapter),))):
        return layer.get_submodule(f"to_{kind}")(world.e)


@given(st.integers(0, 30))
def test_linear_gate_is_the_explicit_rank_one_edit(seed):
    """W' = W + (o* - W i*) (C^-1 i*)' / energy, with o* = W_K i_super for keys."""
    world, layer = World(seed), Attention(seed)
    i, matcher = world.directions[0], world.matcher(gate=lambda a: a)
    dual = world.inverse @ i
    for kind, weight in (("k", layer.to_k.weight), ("v", layer.to_v.weight)):
        target = weight @ world.superclasses[0] if kind == "k" else world.targets[0]
        explicit = weight + torch.outer(target - weight @ i, dual) / (i @ dual)
        got = edited(layer, world, matcher, kind)
        torch.testing.assert_close(got, world.e @ explicit.mT, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(explicit @ i, target, rtol=1e-10, atol=1e-10)


@given(st.integers(0, 30), st.floats(-1, 2), st.floats(0.01, 2))
def test_gated_edit_equals_the_paper(seed, bias, temperature):
    """h = W e_perp + sigmoid((a - beta) / tau) o*, token by token."""
    world, layer = World(seed), Attention(seed)
    matcher = world.matcher(gate=SigmoidGate(bias, temperature))
    for kind, weight in (("k", layer.to_k.weight), ("v", layer.to_v.weight)):
        target = weight @ world.superclasses[0] if kind == "k" else world.targets[0]
        got = edited(layer, world, matcher, kind)
        for b in range(2):
            for m in range(LENGTH):
                e = world.e[b, m]
                a = world.similarity(e)
                perp = e - a * world.directions[0]
                gate = 1 / (1 + torch.exp(-(a - bias) / temperature))
                wanted = weight @ perp + gate * target
                torch.testing.assert_close(got[b, m], wanted, rtol=1e-9, atol=1e-9)


def test_off_switches():
    """A shut gate takes the concept out; strength 0 gives the base back, bit by bit."""
    world, layer = World(3), Attention(3)
    shut = edited(layer, world, world.matcher(gate=SigmoidGate(3.0, 0.001)), "v")
    a = world.similarity(world.e)
    closed = a < 2.9
    wanted = (world.e - a[..., None] * world.directions[0]) @ layer.to_v.weight.mT
    assert bool(closed.any())
    torch.testing.assert_close(shut[closed], wanted[closed])
    base = layer(world.e)
    adapters = both_adapters(world, world.matcher())
    with attach(layer, adapters, 0.0):
        assert torch.equal(layer(world.e), base)
    own = both_adapters(world, world.matcher(strength=0.0))
    with attach(layer, own):
        torch.testing.assert_close(layer(world.e), base, rtol=1e-12, atol=1e-12)


def both_adapters(world, matcher):
    return AdapterSet(
        (
            AdapterEntry("to_k", PerfusionKeyAdapter(matcher)),
            AdapterEntry("to_v", PerfusionValueAdapter(matcher, world.targets)),
        )
    )


@pytest.mark.parametrize("strength", [0.3, 1.0, 1.7])
def test_a_concepts_own_strength_is_the_blend_of_the_outputs(strength):
    world, layer = World(4), Attention(4)
    plain, full = layer.to_v(world.e), edited(layer, world, world.matcher(), "v")
    own = edited(layer, world, world.matcher(strength=strength), "v")
    torch.testing.assert_close(own, plain + strength * (full - plain), rtol=1e-10, atol=1e-10)
    adapter = PerfusionValueAdapter(world.matcher(), world.targets)
    with attach(layer, AdapterSet((AdapterEntry("to_v", adapter),)), strength):
        torch.testing.assert_close(layer.to_v(world.e), own, rtol=1e-10, atol=1e-10)


@given(st.integers(0, 30), st.integers(2, 4))
def test_exact_projection_is_the_papers_qr_form(seed, count):
    """C^-1 = L L', i~ = L' i, QR, u = L'^-1 q; e_perp = e - sum (e' C^-1 u) u."""
    world = World(seed, concepts=count)
    factor = torch.linalg.cholesky(world.inverse)
    q = torch.linalg.qr((world.directions @ factor).mT)[0]  # DIM J
    u = torch.linalg.solve(factor.mT, q)
    wanted = world.e - (world.e @ world.inverse @ u) @ u.mT
    got = world.matcher(exact=True)(world.e).rest
    torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-8)
    # what is left holds nothing of any concept
    assert float((got @ world.inverse @ world.directions.mT).abs().max()) < 1e-8


@given(st.integers(0, 30))
def test_orthogonal_concepts_do_not_meet(seed):
    world, layer = World(seed, concepts=3, orthogonal=True), Attention(seed)
    exact = edited(layer, world, world.matcher(exact=True), "v")
    near = edited(layer, world, world.matcher(exact=False), "v")
    torch.testing.assert_close(exact, near, rtol=1e-9, atol=1e-9)
    plain = layer.to_v(world.e)
    singles = plain.clone()
    for j in range(3):
        alone = PerfusionValueAdapter(ConceptMatcher([world.concept(j)]), world.targets[j : j + 1])
        with attach(layer, AdapterSet((AdapterEntry("to_v", alone),))):
            singles += layer.to_v(world.e) - plain
    torch.testing.assert_close(exact, singles, rtol=1e-9, atol=1e-9)


def test_a_chain_of_attachments_is_the_approximate_form():
    world, layer = World(5, concepts=2), Attention(5)
    together = edited(layer, world, world.matcher(), "v")
    sets = [
        AdapterSet(
            (
                AdapterEntry(
                    "to_v",
                    PerfusionValueAdapter(
                        ConceptMatcher([world.concept(j)]), world.targets[j : j + 1]
                    ),
                ),
            )
        )
        for j in range(2)
    ]
    with attach(layer, sets[0] + sets[1]):
        torch.testing.assert_close(layer.to_v(world.e), together, rtol=1e-10, atol=1e-10)


def test_approximation_error_grows_with_the_cosine():
    """Perfusion.md 8.4: error of the cheap form against the exact one, by the angle in C^-1."""
    world = World(6, concepts=2, orthogonal=True)
    norm = lambda v: (v @ world.inverse @ v).sqrt()  # noqa: E731
    first, second = (i / norm(i) for i in world.directions)
    errors = []
    for cosine in (0.0, 0.2, 0.5, 0.8):
        world.directions = torch.stack([first, cosine * first + (1 - cosine**2) ** 0.5 * second])
        exact, near = (world.matcher(exact=x)(world.e).rest for x in (True, False))
        errors.append(float((exact - near).norm() / world.e.norm()))
    assert errors[0] < 1e-10
    assert errors == sorted(errors)
    assert errors[-1] > 0.1


def test_key_lock_gives_the_super_class_output():
    """Perfusion.md 8.5: at e = i* with o*_V = W_V i_super the block answers the super-class."""
    world, layer = World(7), Attention(7)
    full = lambda a: torch.ones_like(a)  # noqa: E731
    matcher = world.matcher(gate=full)
    world.targets = world.superclasses @ layer.to_v.weight.mT
    world.e = world.directions[0].expand(1, 1, -1).contiguous()
    adapters = both_adapters(world, matcher)
    with attach(layer, adapters):
        got = layer(world.e)
    wanted = layer(world.superclasses[0].expand(1, 1, -1))
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


def test_tokens_commute_and_rows_are_independent():
    world, layer = World(8, concepts=2), Attention(8)
    got = edited(layer, world, world.matcher(exact=True), "v")
    order = torch.tensor([2, 0, 3, 1])
    world.e = world.e[:, order]
    torch.testing.assert_close(edited(layer, world, world.matcher(exact=True), "v"), got[:, order])
    world.e = world.e[1:]
    alone = edited(layer, world, world.matcher(exact=True), "v")
    torch.testing.assert_close(alone, got[1:, order])


def test_chosen_rows_and_reach():
    world, layer = World(9), Attention(9)
    plain = layer.to_v(world.e)
    full = edited(layer, world, world.matcher(), "v")
    half = edited(layer, world, world.matcher(strength=torch.tensor([0.0, 1.0])), "v")
    torch.testing.assert_close(half[0], plain[0])
    torch.testing.assert_close(half[1], full[1])
    strict = edited(layer, world, world.matcher(reach=0), "v")
    similarity = world.similarity(world.e)
    for b in range(2):
        words = similarity[b, 1:]  # the first token is the start mark
        assert words.max() > 0
        best = 1 + int((words >= 0.7 * words.max()).nonzero()[0])
        for m in range(LENGTH):
            torch.testing.assert_close(strict[b, m], (full if m == best else plain)[b, m])


@pytest.mark.parametrize(
    ("similarity", "starts", "place"),
    [
        ([0.9, 0.1, 1.0, 1.1, 0.8], [0], 2),  # a token after the word says it louder
        ([0.9, 0.1, 0.2, 0.6, 0.1], [0], 3),  # the start mark is no word
        ([0.9, 0.5, 0.9, 0.6, 1.0], [0, 2], 4),  # there is one in each part of a long prompt
        ([0.9, -0.3, -0.1, -0.2, -0.4], [0], 2),  # and it is none when no word matches either
    ],
)
def test_a_word_stands_where_it_first_matches_well(similarity, starts, place):
    encodings = torch.randn(1, 5, DIM, dtype=torch.float64)
    encodings[0, starts] = encodings[0, 0].clone()
    found = first_match(encodings, torch.tensor(similarity, dtype=torch.float64)[None, :, None])
    assert found.tolist() == [[[place]]]


def test_global_lock_replaces_the_keys_of_chosen_rows():
    world, layer = World(10), Attention(10)
    other = torch.randn(1, LENGTH, DIM, dtype=torch.float64)
    entry = AdapterEntry("to_k", GlobalKeyAdapter(other), torch.tensor([1.0, 0.0]))
    with attach(layer, AdapterSet((entry,))):
        got = layer.to_k(world.e)
    torch.testing.assert_close(got[0], layer.to_k(other[0]))
    torch.testing.assert_close(got[1], layer.to_k(world.e[1]))
    # beside a negative prompt of twice its length ComfyUI repeats a prompt, and so are keys
    twice = GlobalKeyAdapter(other[:, :2]).substitute(world.e)
    assert torch.equal(twice, torch.cat([other[:, :2], other[:, :2]], 1).expand_as(world.e))
    with pytest.raises(LayoutError, match="equally long"):
        GlobalKeyAdapter(other[:, :3]).substitute(world.e)


def test_the_match_is_computed_once_and_follows_changes():
    world = World(11)
    calls = []

    def gate(a):
        calls.append(a.shape)
        return torch.sigmoid(a)

    matcher = world.matcher(gate=gate)
    with torch.no_grad():
        first = matcher(world.e)
        assert matcher(world.e) is first
        assert len(calls) == 1
        world.e.mul_(2)  # changed in place: the old match must not be used
        assert not torch.equal(matcher(world.e).rest, first.rest)
        fresh = world.e.clone()
        assert matcher(fresh) is not first
        del fresh
        gc.collect()
        assert len(calls) == 3
    # under gradients a layer may run twice, and must then do the same twice
    assert matcher(world.e) is not matcher(world.e)
    assert len(calls) == 5
    with torch.inference_mode():
        inside = world.e.clone()
        assert matcher(inside) is matcher(inside)


def test_half_precision_stays_close():
    world, layer = World(12, concepts=2), Attention(12)
    wanted = edited(layer, world, world.matcher(), "v")
    layer.to(torch.bfloat16)
    world.e = world.e.to(torch.bfloat16)
    got = edited(layer, world, world.matcher(), "v")
    assert got.dtype == torch.bfloat16
    bound = torch.finfo(torch.bfloat16).eps * float(wanted.abs().max())
    assert float((got.double() - wanted).abs().max()) < bound
    assert float((layer.to_v(world.e).double() - wanted).abs().max()) > 50 * bound


def test_exactly_apart_from_what_is_there_alone():
    """A concept without strength in a sample takes nothing out of it, nor from its neighbour."""
    world = World(17, concepts=2)
    alone = ConceptMatcher([world.concept(0)], exact=True)(world.e).rest
    both = world.matcher(exact=True)(world.e).rest
    assert float((both - alone).abs().max()) > 0.05
    off = ConceptMatcher([world.concept(0), world.concept(1, strength=0.0)], exact=True)
    torch.testing.assert_close(off(world.e).rest, alone)
    rows = torch.tensor([0.0, 1.0], dtype=torch.float64)
    mixed = ConceptMatcher([world.concept(0), world.concept(1, strength=rows)], exact=True)
    torch.testing.assert_close(mixed(world.e).rest, torch.stack([alone[0], both[1]]))


def test_concepts_of_several_strengths_in_one_batch():
    """Numbers and samples' strengths may stand beside each other."""
    world, layer = World(16, concepts=2), Attention(16)
    rows = torch.tensor([0.0, 0.5], dtype=torch.float64)
    mixed = ConceptMatcher([world.concept(0, strength=rows), world.concept(1, strength=0.7)])
    got = edited(layer, world, mixed, "v")
    for b, own in enumerate((0.0, 0.5)):
        alone = ConceptMatcher([world.concept(0, strength=own), world.concept(1, strength=0.7)])
        torch.testing.assert_close(got[b], edited(layer, world, alone, "v")[b])


def test_wrong_sizes_and_settings():
    world = World(15)
    with pytest.raises(LayoutError, match="width 7, but the model uses 6"):
        world.matcher()(torch.zeros(1, 2, 6))
    with pytest.raises(LayoutError, match="gives 4"):
        PerfusionValueAdapter(world.matcher(), world.targets).edit(world.e, torch.zeros(2, 4, 4))
    with pytest.raises(LayoutError, match="as many"):
        PerfusionValueAdapter(world.matcher(), torch.zeros(2, OUT))
    with pytest.raises(ConfigError, match="no concept"):
        ConceptMatcher([])
    for bad in ((-5, 0.1), (0.5, 0.0), (0.5, -1), (float("nan"), 0.1), (0.5, float("nan"))):
        with pytest.raises(ConfigError):
            SigmoidGate(*bad)
