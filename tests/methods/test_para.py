"""PaRa as a method: bound, order, export, file."""

from dataclasses import replace

import pytest
import torch

from difflora_core.adapters.attach import attach
from difflora_core.adapters.lora import lora_adapter_set
from difflora_core.adapters.para import orthonormal
from difflora_core.errors import CheckpointError, ConfigError, LayoutError
from difflora_core.lora.layout import sdxl_layout
from difflora_core.methods.base import AppliedAdaptation, PreparedAdaptation, TrainedAdaptation
from difflora_core.methods.para import PaRa, PaRaConfig, check_rank, join
from difflora_core.storage.adapter_file import read_adaptation, write_adaptation

LAYERS = ("input_blocks.1.attn2.to_v", "middle_block.attn2.to_v")
DIM, OUT = 6, 4


def trained(seed=0, rank=1, bound=1.0, layers=LAYERS, out=OUT):
    g = torch.Generator().manual_seed(seed)
    made = {}
    for layer in layers:
        directions = orthonormal(torch.randn(out, rank, generator=g, dtype=torch.float64))
        made[layer] = {"directions": directions, "width": torch.tensor([float(DIM)])}
    return TrainedAdaptation("para", "tiny", PaRaConfig(bound), {}, made)


def applied(adaptation, strength=1.0):
    return AppliedAdaptation(PreparedAdaptation(adaptation), adaptation.settings, strength)


class Live:
    """The layers of a network of this process."""

    def __init__(self, net):
        self.net = net

    def __call__(self, layer, rows):
        return self.net.get_submodule(layer)(rows)

    def weight(self, layer):
        return self.net.get_submodule(layer).weight.detach()


def test_two_follow_one_another(net, encodings):
    first, second, e, model = trained(1), trained(2), encodings(), net()
    with attach(model, PaRa.adapters([applied(first), applied(second, 0.5)])):
        got = model(e)
    for layer in LAYERS:
        weight = model.get_submodule(layer).weight
        for part, strength in ((first, 1.0), (second, 0.5)):
            q = part.layers[layer]["directions"]
            edit = PaRa.weight_edits(applied(part))[layer]
            new = edit.function(weight.data, *edit.tensors)
            torch.testing.assert_close(new, weight.data - q @ q.mT @ weight.data)
            weight.data = weight.data + strength * (new - weight.data)
    torch.testing.assert_close(model(e), got)


def test_as_a_lora_it_is_exactly_the_same(net, encodings):
    part, e, model = trained(3, rank=2), encodings(), net()
    with attach(model, PaRa.adapters([applied(part)])):
        wanted = model(e)
    lora = PaRa.as_lora(PreparedAdaptation(part), Live(model))
    for layer in LAYERS:
        q, weight = part.layers[layer]["directions"], model.get_submodule(layer).weight
        assert torch.equal(lora[layer].up, -q)
        torch.testing.assert_close(lora[layer].down, q.mT @ weight)
        assert lora[layer].scaling == 1
    with attach(model, lora_adapter_set(lora)):
        torch.testing.assert_close(model(e), wanted)
    assert PaRa.exports_lora()
    for layer in LAYERS:  # now it is in the weights
        edit = PaRa.weight_edits(applied(part))[layer]
        weight = model.get_submodule(layer).weight
        weight.data = edit.function(weight.data, *edit.tensors)
    with pytest.raises(ConfigError, match="on the connected model already"):
        PaRa.as_lora(PreparedAdaptation(part), Live(model))
    with pytest.raises(LayoutError, match="5 outputs instead of 4"):
        PaRa.as_lora(PreparedAdaptation(trained(out=5)), Live(net()))


def test_joined_it_is_one_of_both_ranks(net):
    first, second = trained(1), trained(2, layers=LAYERS[1:])
    both = join(first, second)
    assert [t["directions"].shape[1] for t in both.layers.values()] == [2, 1]
    assert set(both.layers) == set(LAYERS)
    model = net()
    q = both.layers[LAYERS[1]]["directions"]
    weight = model.get_submodule(LAYERS[1]).weight.data
    left = weight - q @ q.mT @ weight
    for part in (first, second):
        assert float((part.layers[LAYERS[1]]["directions"].mT @ left).abs().max()) < 1e-12
    with pytest.raises(LayoutError, match="coincide"):
        join(first, first)
    with pytest.raises(ConfigError, match="trained by lora; only PaRa"):
        join(first, replace(second, method="lora"))
    with pytest.raises(LayoutError, match="different base models"):
        join(first, trained(2, out=5))
    with pytest.raises(ConfigError, match="2 of 4 directions"):
        join(trained(1, bound=0.25), trained(2, bound=0.25))


def test_the_bound_is_on_all_together_and_says_what_fits():
    check_rank("layer", 16, 640, 1 / 40)
    check_rank("layer", 32, 1280, 1 / 40)
    with pytest.raises(
        ConfigError, match=r"17 of 640 directions \(2.7%\) out of layer.*beyond 2.5%.*16 in all"
    ):
        check_rank("layer", 17, 640, 1 / 40)
    part = trained(1, bound=0.25)
    PaRa.adapters([applied(part)])
    with pytest.raises(ConfigError, match="2 of 4 directions"):
        PaRa.adapters([applied(part), applied(trained(2, bound=0.25))])
    PaRa.adapters([applied(part), applied(trained(2, bound=0.5))])  # raised on purpose
    for wrong in (0.0, 1.5, float("nan")):
        with pytest.raises(ConfigError, match="bound"):
            PaRaConfig(wrong)


def test_sdxls_counts():
    """related.md 1: rank 4 on the 560 attention projections, against a LoRA of that rank."""
    layout = sdxl_layout(4)
    layers = {
        shape.name: {
            "directions": torch.empty(shape.out_features, 4, device="meta"),
            "width": torch.tensor([float(shape.in_features)]),
        }
        for shape in layout
    }
    numbers = sum(t["directions"].numel() for t in layers.values())
    assert (len(layers), numbers, layout.numel) == (560, 2_662_400, 5_806_080)


@pytest.mark.parametrize("int8", [False, True])
def test_the_file_keeps_a_true_projection(tmp_path, int8):
    part = trained(5, rank=2)
    written = write_adaptation(tmp_path / "one.safetensors", part, int8)
    again = read_adaptation(written.path)
    assert again.settings == part.settings
    assert PaRa.layer_sizes(again) == PaRa.layer_sizes(part)
    assert written.error < (0.01 if int8 else 1e-3)
    for layer in LAYERS:
        q, exact = again.layers[layer]["directions"], part.layers[layer]["directions"].float()
        torch.testing.assert_close(q.mT @ q, torch.eye(2), rtol=0, atol=1e-6)
        torch.testing.assert_close(q, exact, rtol=0, atol=0.02 if int8 else 2e-3)


def test_files_that_make_no_sense_are_refused(tmp_path):
    def changed(**tensors):
        layers = {name: {**own, **tensors} for name, own in trained(rank=2).layers.items()}
        return replace(trained(), layers=layers)

    for tensors, words in (
        ({"directions": torch.ones(OUT, 2)}, "coincide"),
        ({"directions": torch.zeros(OUT, 2)}, "coincide"),
        ({"directions": torch.ones(2, OUT)}, "has directions"),
        ({"directions": torch.ones(OUT)}, "has directions"),
        ({"width": torch.tensor([0.5])}, "how large"),
        ({"width": torch.ones(2)}, "how large"),
        ({"more": torch.ones(2)}, "does not hold"),
    ):
        with pytest.raises(LayoutError, match=words):
            PaRa.check(changed(**tensors))
        with pytest.raises(CheckpointError, match=words):
            write_adaptation(tmp_path / "no.safetensors", changed(**tensors))
    with pytest.raises(LayoutError, match="does not hold"):
        PaRa.check(replace(trained(), shared={"more": torch.ones(1)}))
