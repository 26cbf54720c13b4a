"""`corpus` on the command line: a folder of LoRA files becomes a store."""

import torch

from difflora_core.commands.inspect import facts_of
from difflora_core.commands.main import main
from difflora_core.data.lora_store import LoRAStore
from difflora_core.demo.networks.base import demo_layout
from difflora_core.lora.weights import LoRALayer, LoRAWeights
from difflora_core.storage.lora_file import write_lora_file


def write(path, seed, strength=1.0):
    """A random LoRA of the demo's base."""
    layout, draw = demo_layout(2), torch.Generator().manual_seed(seed)
    layers = {
        s.name: LoRALayer(
            torch.randn(2, s.in_features, generator=draw) * 0.1 * strength,
            torch.randn(s.out_features, 2, generator=draw),
            2.0,
        )
        for s in layout
    }
    write_lora_file(path, LoRAWeights(layers), layout)


def test_corpus_of_files(tmp_path, capsys):
    write(tmp_path / "loras" / "anna.safetensors", 0)
    write(tmp_path / "loras" / "more" / "bodo.safetensors", 1)
    write(tmp_path / "loras" / "loud.safetensors", 2, 50.0)
    (tmp_path / "loras" / "broken.safetensors").write_bytes(b"x" * 100)
    words = ["corpus", str(tmp_path / "loras"), str(tmp_path / "out"), "--base", "demo"]
    assert main([*words, "--rank", "2"]) == 0
    said = capsys.readouterr().out
    assert "2 LoRAs in the corpus, 2 left out." in said
    assert "broken left out: " in said
    assert "loud left out: its change is" in said
    store = LoRAStore(tmp_path / "out", demo_layout(2))
    assert [row.identity for row in store.rows] == ["anna", "more/bodo"]
    facts = facts_of(tmp_path / "out")
    assert (facts["kind"], facts["LoRAs"], facts["rank"]) == ("Corpus of LoRAs", "2", "2")
    assert facts["left out"] == "1"
    assert main([*words, "--rank", "2", "--checks.spread", "1000"]) == 0
    assert len(LoRAStore(tmp_path / "out")) == 3
    assert main([*words, "--rank", "4"]) == 1
    assert "at rank 2" in capsys.readouterr().err
    assert main(["corpus", str(tmp_path / "none"), str(tmp_path / "x")]) == 1
    assert "no LoRA file" in capsys.readouterr().err
