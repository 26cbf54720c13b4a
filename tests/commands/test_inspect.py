"""`inspect` on one of everything, and on what is no such thing."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from difflora_core.commands.inspect import facts_of
from difflora_core.commands.run_folder import SETTINGS, VERSIONS
from difflora_core.demo import paths
from difflora_core.demo.networks.base import demo_layout
from difflora_core.errors import DiffLoRAError
from difflora_core.lora.weights import LoRALayer, LoRAWeights
from difflora_core.storage.lora_corpus import LoRACorpus, save_corpus


def test_a_model():
    facts = facts_of(paths.DIFFLORA)
    assert facts["kind"] == "DiffLoRA model, preset functional"
    assert (facts["base"], facts["layers"], facts["rank"]) == ("demo", "84", "4")
    assert facts["face encoder"] == "demo_faces/rec_demo.onnx"


def test_a_lora():
    facts = facts_of(paths.OLD_LORA)
    assert facts["kind"] == "LoRA file (LoRA)"
    assert (facts["base"], facts["rank"], facts["alpha"]) == ("demo", "4", "4")


def test_a_lora_of_another_family_with_an_awkward_licence(tmp_path):
    stem = "lora_unet_input_blocks_1_1_transformer_blocks_0_attn2_to_k"
    tensors = {f"{stem}.lokr_w1": torch.ones(4, 4), f"{stem}.lokr_w2": torch.ones(16, 192)}
    save_file(tensors, tmp_path / "x.safetensors", {"modelspec.license": "[b]mine\x1b[31m"})
    facts = facts_of(tmp_path / "x.safetensors")
    assert facts["kind"] == "LoRA file (LoKr)"
    assert facts["base"] == "sd15"  # 4 * 192 features of text
    assert facts["licence"] == "[b]mine\\x1b[31m"


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        (paths.CONCEPTS / "demo_hat.safetensors", "Concept, method "),
        (paths.STYLES / "demo_sepia.safetensors", "Style, method "),
        (paths.FACES, "Face analysis"),
    ],
)
def test_other_artefacts(path, kind):
    assert facts_of(path)["kind"].startswith(kind)


def test_a_corpus(tmp_path):
    layout = demo_layout(2)
    layers = {
        s.name: LoRALayer(torch.ones(3, 2, s.in_features), torch.ones(3, s.out_features, 2), 2.0)
        for s in layout
    }
    save_corpus(LoRACorpus(layout, (0, 1, 5), LoRAWeights(layers)), tmp_path / "c.safetensors")
    facts = facts_of(tmp_path / "c.safetensors")
    assert (facts["kind"], facts["people"], facts["rank"]) == ("LoRA corpus", "3", "2")


def test_folders(tmp_path, write_hyperlora):
    small_hyperlora = write_hyperlora(tmp_path / "hyper")
    facts = facts_of(small_hyperlora)
    assert (facts["kind"], facts["layers"], facts["rank"]) == ("HyperLoRA model", "12", "2")
    assert "not for commercial use" in facts["licence"]
    (small_hyperlora / "resampler.safetensors").unlink()
    assert facts_of(small_hyperlora)["missing"] == "resampler.safetensors"
    run = tmp_path / "run"
    (run / "lae").mkdir(parents=True)
    (run / SETTINGS).write_text("{}")
    (run / VERSIONS).write_text(json.dumps({"torch": "9", "called": "train a b"}))
    (run / "lae" / "events.jsonl").write_text('{"step": 1}\n{"step": 2, "loss": 0.5}\n')
    facts = facts_of(run)
    assert (facts["kind"], facts["called"]) == ("Run", "train a b")
    assert facts["last event of lae"] == '{"step": 2, "loss": 0.5}'


def test_what_is_no_such_thing(tmp_path):
    save_file({"weight": torch.ones(2)}, tmp_path / "some.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(paths.OLD_LORA.read_bytes()[:5000])
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    (tmp_path / "empty").mkdir()
    for name, said in {
        "some.safetensors": "of no kind that is known",
        "cut.safetensors": "cut|truncated",
        "picture.png": "not a safetensors file",
        "empty": "of no kind that is known",
        "gone": "no file at",
    }.items():
        with pytest.raises(DiffLoRAError, match=said):
            facts_of(tmp_path / name)
    shutil.copytree(paths.FACES, tmp_path / "faces")
    (tmp_path / "faces" / "rec_demo.onnx").unlink()
    assert facts_of(tmp_path / "faces")["recogniser"] == "missing"
