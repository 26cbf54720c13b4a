"""Prices from steps in turn: the order and the arithmetic by hand, and the graphs of all rows."""

import random

import pytest
import torch

from benchmarks.concepts.methods import REGISTERED
from benchmarks.cost import concept_price, sdxl_step, style_price
from benchmarks.cost.interleaving.pairs import WARM_UP, interleave, mean_price, price
from benchmarks.cost.overhead import ROWS, graph
from difflora_core.adapters.lora import lora_adapter_set
from difflora_core.lora.weights import LoRALayer, LoRAWeights

NARROW = {
    **concept_price.SDXL_UNET_CONFIG,
    "block_out_channels": [32, 64, 64],
    "attention_head_dim": [2, 4, 4],
    "cross_attention_dim": 32,
}


def test_steps_alternate_and_both_sides_have_the_same_neighbours():
    taken = []

    def step(name):
        taken.append(name)
        return float(len(taken)), 0.0

    base, own = interleave(lambda: step("b"), lambda: step("v"), 4)
    assert "".join(taken) == "bvvb" * ((WARM_UP + 4) // 2)
    first = 2 * WARM_UP + 1  # number of the first step that counts
    assert [wall for wall, _ in base] == [first, first + 3, first + 4, first + 7]
    assert [wall for wall, _ in own] == [first + 1, first + 2, first + 5, first + 6]


def test_ratios_are_taken_within_a_pair():
    slower = [1.0, 10.0, 100.0]  # the machine gets slower
    base = [(s, 2 * s) for s in slower]
    own = [(s * cost, 2 * s) for s, cost in zip(slower, (1.5, 1.2, 3.0), strict=True)]
    cpu = {"cpu_seconds_per_step": 20.0, "cpu_ratio": 1.0}
    assert price(base, own) == {"seconds_per_step": 12.0, "ratio": 1.5, **cpu}


def test_one_disturbed_step_does_not_count():
    base, own = [(1.0, 1.0)] * 5, [(1.2, 1.1)] * 4 + [(30.0, 9.0)]
    found = price(base, own)
    cpu = {"cpu_seconds_per_step": 1.1, "cpu_ratio": 1.1}
    assert found == {"seconds_per_step": 1.2, "ratio": 1.2, **cpu}


def test_another_program_does_not_change_a_price():
    """Slow phases as long as many steps come and go, and single steps are interrupted."""
    draw, clock = random.Random(0), iter(range(10_000))

    def step(seconds):
        phase = 1.0 + 0.9 * ((next(clock) // 11) % 2)
        interrupted = 3.0 if draw.random() < 0.15 else 1.0
        wall = seconds * phase * interrupted * draw.uniform(0.95, 1.05)
        return wall, wall

    for cost in (1.0, 1.08):
        found = price(*interleave(lambda: step(1.0), lambda cost=cost: step(cost), 250))
        assert found["ratio"] == pytest.approx(cost, abs=0.02)


def test_a_slower_copy_of_the_model_does_not_change_a_price():
    """The variant costs 1.2; one of the two models is 2 % slower, whosever it is."""
    halves = [price([(1.02, 1.02)], [(1.2, 1.2)]), price([(1.0, 1.0)], [(1.2 * 1.02, 1.2 * 1.02)])]
    found = mean_price(halves)
    assert found["ratio"] == found["cpu_ratio"] == pytest.approx(1.2)


@pytest.mark.parametrize("row", ROWS)
def test_every_link_of_a_row_ends_at_a_node(row):
    nodes = graph("person.png", row, 3)
    for name, entry in nodes.items():
        for value in entry["inputs"].values():
            if isinstance(value, list):
                assert value[0] in nodes, name


def test_base_and_variant_have_models_of_their_own():
    """A weight patch changes its model: on a shared one the base would pay for it too."""
    for row in ROWS:
        sources = [models_of(graph("person.png", row, 3, swapped)) for swapped in (False, True)]
        assert sources == [[0, 1], [1, 0]]


def models_of(nodes):
    """Numbers of the models under base and variant."""
    sources = []
    for name in ("base", "model"):
        node = nodes["interleave"]["inputs"][name][0]
        while nodes[node]["class_type"] != "Benchmark_OwnDemo":
            node = nodes[node]["inputs"]["model"][0]
        sources.append(nodes[node]["inputs"]["number"])
    return sources


def test_price_on_a_narrow_unet():
    """Keys and values of 70 cross-attentions; a method may change values alone."""
    rows = concept_price.concept_prices(3, NARROW, side=8)
    counts = {name: row["projections"] for name, row in rows.items()}
    assert counts.pop("base") == counts.pop("base_again") == 0
    assert counts["perfusion"] == 140
    for name in REGISTERED:
        assert counts.pop(f"two_{name}") == counts.pop(name) in (70, 140)
    assert not counts
    for row in rows.values():
        assert set(row) == {
            *("seconds_per_step", "ratio", "cpu_seconds_per_step", "cpu_ratio", "projections")
        }
    assert rows["base"]["ratio"] == rows["base"]["cpu_ratio"] == 1.0


def test_concepts_change_what_a_step_computes():
    """Else the price would be that of hooks that do nothing."""
    unet = sdxl_step.small_memory_unet(NARROW)
    step = concept_price.concept_step(unet, NARROW, 8)
    bare = step()
    torch.testing.assert_close(step(), bare, atol=0, rtol=0)
    names = concept_price.module_names(NARROW)
    for adapters in concept_price.concept_adapters(NARROW).values():
        with sdxl_step.attached(unet, adapters, names):
            changed = step()
        assert torch.equal(changed, bare) is (adapters is None)


def test_equal_shapes_share_their_memory():
    unet = sdxl_step.small_memory_unet(NARROW)
    parameters = [p for m in unet.modules() for p in m.parameters(recurse=False)]
    shapes = {tuple(p.shape) for p in parameters}
    assert len({p.data_ptr() for p in parameters}) == len(shapes) < len(parameters) / 10


@pytest.mark.slow
def test_price_at_full_size():
    """All 140 projections of SDXL: at most 3 % of a step."""
    rows = concept_price.concept_prices(6)
    assert rows["perfusion"]["projections"] == 140
    assert rows["perfusion"]["cpu_ratio"] <= 1.03


def test_price_of_styles_on_a_narrow_unet():
    rows = style_price.style_prices(1, NARROW, side=8, counted_side=8)
    acting = set(rows) - {"base", "base_again"}
    assert acting
    assert rows["base"]["operations_ratio"] == rows["base_again"]["operations_ratio"] == 1.0
    for name in acting:
        assert rows[name]["projections"] == 280  # queries and values of both attentions, 70 blocks
        assert 1.0 < rows[name]["operations_ratio"] < 1.5


def test_operations_are_those_of_the_products():
    """A low-rank change of one layer on 2 x 16 tokens, written out."""
    unet = sdxl_step.small_memory_unet(NARROW)
    shape = next(iter(concept_price.layout_from_unet_config("sdxl", NARROW, 1)))
    down, up = torch.ones(3, shape.in_features), torch.ones(shape.out_features, 3)
    change = lora_adapter_set(LoRAWeights({shape.name: LoRALayer(down, up, 3.0)}))
    names = concept_price.module_names(NARROW)
    bare, own = (
        style_price.operations(unet, NARROW, adapters, names, 8) for adapters in (None, change)
    )
    assert own - bare == 2 * 2 * 16 * 3 * (shape.in_features + shape.out_features)


@pytest.mark.slow
def test_operations_of_styles_at_full_size():
    """Styles on queries and values, as the recipes have them, take at most 8 % of a step."""
    rows = style_price.style_prices(1)
    for name in set(rows) - {"base", "base_again"}:
        assert rows[name]["projections"] == 280
        assert 1 < rows[name]["operations_ratio"] <= 1.08
