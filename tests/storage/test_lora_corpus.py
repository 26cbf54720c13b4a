"""Corpora of LoRAs: the way to a file and back, and files that do not hold what they say."""

import math

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from difflora_core.errors import CheckpointError
from difflora_core.lora.layout import LayerShape, LoRALayout
from difflora_core.lora.weights import LoRALayer, LoRAWeights
from difflora_core.storage.lora_corpus import LoRACorpus, load_corpus, save_corpus

LAYOUT = LoRALayout("tiny", 2, (LayerShape("a.to_q", 6, 8), LayerShape("b.to_v", 8, 5)))


@pytest.fixture
def corpus():
    layers = {
        shape.name: LoRALayer(
            torch.randn(3, 2, shape.in_features), torch.randn(3, shape.out_features, 2), 2.0
        )
        for shape in LAYOUT
    }
    return LoRACorpus(LAYOUT, (7, 1, 4), LoRAWeights(layers), {"steps": 3})


def damaged(path, change):
    """Writes a file again after a change of its tensors."""
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        facts = file.metadata()
    change(tensors)
    save_file(tensors, path, metadata=facts)
    return path


def test_round_trip(corpus, tmp_path):
    back = load_corpus(save_corpus(corpus, tmp_path / "c.safetensors"))
    assert (back.layout, back.identities, back.source) == (LAYOUT, (7, 1, 4), {"steps": 3})
    for name, layer in corpus.weights.layers.items():
        assert torch.equal(back.weights[name].down, layer.down)
        assert torch.equal(back.weights[name].up, layer.up)


CHANGES = {
    "missing": (lambda t: t.pop("up.b.to_v"), r"1 missing \(first \['up.b.to_v'\]\).*make the"),
    "no identities": (lambda t: t.pop("identities"), r"1 missing \(first \['identities'\]\)"),
    "extra": (lambda t: t.update(spare=torch.ones(1)), r"1 unexpected \(first \['spare'\]\)"),
    "nan": (lambda t: t["down.a.to_q"].view(-1)[3:4].fill_(math.nan), "down.a.to_q holds NaN"),
    "inf": (lambda t: t["up.b.to_v"].view(-1)[:1].fill_(math.inf), "up.b.to_v holds.*Make it"),
    "shape": (
        lambda t: t.update({"up.a.to_q": torch.ones(3, 9, 2)}),
        "up.a.to_q has another shape.*make the",
    ),
    "count": (lambda t: t.update(identities=torch.tensor([1, 2])), "cannot be read as a LoRA"),
    "one number": (lambda t: t.update(identities=torch.tensor(1)), "cannot be read as a LoRA"),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_files_that_do_not_hold_what_they_say(corpus, tmp_path, kind):
    change, message = CHANGES[kind]
    path = damaged(save_corpus(corpus, tmp_path / "c.safetensors"), change)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_corpus(path)
    assert str(path) in str(caught.value)


def test_no_file_and_half_a_file(corpus, tmp_path):
    path = tmp_path / "c.safetensors"
    with pytest.raises(CheckpointError, match=r"cannot be read as a LoRA corpus: There is no"):
        load_corpus(path)
    save_corpus(corpus, path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match=r"cannot be read as a LoRA corpus: .*damaged"):
        load_corpus(path)
