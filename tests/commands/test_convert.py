"""`convert`: what a LoRA changes stays, whatever it is called; what is no LoRA is refused."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from difflora_core.commands.convert import Settings, convert, run
from difflora_core.demo.networks.base import demo_layout
from difflora_core.errors import DiffLoRAError, LoRAFileError

LAYOUT = demo_layout(2)
NAMES = {layer.name: layer for layer in LAYOUT}


def kohya(seed, rank=3, alpha=1.5, layers=5):
    """A LoRA in kohya's names, and the change of each of its layers by canonical name."""
    generator = torch.Generator().manual_seed(seed)
    state, changes = {}, {}
    for shape in list(LAYOUT)[-layers:]:
        down = torch.randn(rank, shape.in_features, generator=generator) * 0.1
        up = torch.randn(shape.out_features, rank, generator=generator) * 0.1
        stem = f"lora_unet_{shape.name.replace('.', '_')}"
        state |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
        state[f"{stem}.alpha"] = torch.tensor(alpha)
        changes[shape.name] = alpha / rank * up.double() @ down.double()
    return state, changes


def changes_of(file, to):
    """Changes in a file by canonical name, read by the naming's own rule."""
    state, found = load_file(file), {}
    for shape in LAYOUT:
        stem = {
            "kohya": f"lora_unet_{shape.name.replace('.', '_')}",
            "kohya_diffusers": f"lora_unet_{shape.diffusers_name.replace('.', '_')}",
            "generic": f"diffusion_model.{shape.name}",
            "peft": f"unet.{shape.diffusers_name}",
        }[to]
        if to == "peft" and f"{stem}.lora_A.weight" in state:
            up, down = (state[f"{stem}.lora_{x}.weight"].double() for x in "BA")
            found[shape.name] = up @ down
        elif f"{stem}.lora_up.weight" in state:
            up, down = (state[f"{stem}.lora_{x}.weight"].double() for x in ("up", "down"))
            found[shape.name] = state[f"{stem}.alpha"].double() / len(down) * up @ down
    return found


def same(found, wanted, tolerance):
    assert found.keys() == wanted.keys()
    for name, change in wanted.items():
        error = (found[name] - change).norm() / change.norm()
        assert error < tolerance, name


@pytest.mark.parametrize("to", ["kohya", "kohya_diffusers", "generic", "peft"])
@given(seed=st.integers(0, 2**31), rank=st.integers(1, 6), alpha=st.floats(0.25, 8))
def test_there_and_back_is_the_same_change(tmp_path_factory, to, seed, rank, alpha):
    folder = tmp_path_factory.mktemp("convert")
    state, changes = kohya(seed, rank, alpha)
    save_file(state, folder / "a.safetensors")
    exact = {"precision": "float32", "base": "demo"}
    convert(folder / "a.safetensors", folder / "b.safetensors", Settings("", "", to, **exact))
    same(changes_of(folder / "b.safetensors", to), changes, 1e-5)
    convert(folder / "b.safetensors", folder / "c.safetensors", Settings("", "", "kohya", **exact))
    same(changes_of(folder / "c.safetensors", "kohya"), changes, 1e-5)


def test_half_precision_and_metadata_as_a_process(tmp_path, command):
    state, changes = kohya(1)
    about = {"modelspec.title": "Old", "modelspec.trigger_phrase": "sks, person"}
    save_file(state, tmp_path / "a.safetensors", about)
    words = ("convert", tmp_path / "a.safetensors", tmp_path / "sub" / "b.safetensors")
    said = command(*words, "--license", "mine").stdout
    assert said == "b.safetensors: for demo. 5 layers read, ranks 3.\n"
    same(changes_of(tmp_path / "sub" / "b.safetensors", "kohya"), changes, 2e-3)
    with safe_open(tmp_path / "sub" / "b.safetensors", "pt") as file:
        metadata = file.metadata()
        kinds = {file.get_tensor(k).dtype for k in file.keys() if "alpha" not in k}
    assert kinds == {torch.float16}
    assert metadata["modelspec.title"] == "Old"
    assert metadata["modelspec.trigger_phrase"] == "sks, person"
    assert metadata["modelspec.license"] == "mine"
    assert metadata["ss_network_dim"] == "3"


def test_a_smaller_rank_is_the_best_of_that_rank(tmp_path):
    state, changes = kohya(2, rank=6)
    save_file(state, tmp_path / "a.safetensors")
    settings = Settings("", "", rank=2, precision="float32")
    said = convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", settings)
    found = changes_of(tmp_path / "b.safetensors", "kohya")
    worst = 0.0
    for name, change in changes.items():
        values = torch.linalg.svdvals(change)
        best = float(values[2:].square().sum().sqrt())  # Eckart and Young
        assert float((found[name] - change).norm()) == pytest.approx(best, rel=1e-4)
        worst = max(worst, best / float(change.norm()))
    assert f"at most {worst:.1%} of a layer lost" in said


def test_lokr_becomes_a_lora(tmp_path):
    layer = next(x for x in LAYOUT if x.name.endswith("attn2.to_k"))
    stem = f"lora_unet_{layer.name.replace('.', '_')}"
    first = torch.randn(4, 4, generator=torch.Generator().manual_seed(3))
    second = torch.ones(layer.out_features // 4, layer.in_features // 4)
    save_file(
        {f"{stem}.lokr_w1": first, f"{stem}.lokr_w2": second, f"{stem}.alpha": torch.tensor(1.0)},
        tmp_path / "a.safetensors",
    )
    settings = Settings("", "", precision="float32")
    convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", settings)
    wanted = {layer.name: torch.kron(first, second).double()}  # full matrices: alpha counts not
    same(changes_of(tmp_path / "b.safetensors", "kohya"), wanted, 1e-5)


def test_convolutions_are_carried_whole(tmp_path):
    """Kohya's LoCon to what diffusers loads: 4-D factors, the same change."""
    state, changes = kohya(9)
    down, up = torch.randn(2, 4, 3, 3), torch.randn(64, 2, 1, 1)
    stem = "lora_unet_input_blocks_0_0"
    state |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
    save_file({**state, f"{stem}.alpha": torch.tensor(1.0)}, tmp_path / "a.safetensors")
    said = convert(
        tmp_path / "a.safetensors",
        tmp_path / "b.safetensors",
        Settings("", "", "peft", precision="float32"),
    )
    assert said == "for demo. 6 layers read, ranks 2, 3."
    made = load_file(tmp_path / "b.safetensors")
    found = made["unet.conv_in.lora_B.weight"], made["unet.conv_in.lora_A.weight"]
    assert [t.shape for t in found] == [up.shape, down.shape]
    torch.testing.assert_close(
        found[0].flatten(1) @ found[1].flatten(1), up.flatten(1) @ down.flatten(1) / 2
    )
    same(changes_of(tmp_path / "b.safetensors", "peft"), changes, 1e-5)


def test_a_pt_file_of_tensors_alone(tmp_path):
    state, changes = kohya(4)
    torch.save({"state_dict": state, "steps": 7}, tmp_path / "a.pt")
    settings = Settings("", "", precision="float32")
    convert(tmp_path / "a.pt", tmp_path / "b.safetensors", settings)
    same(changes_of(tmp_path / "b.safetensors", "kohya"), changes, 1e-5)


class _Runs:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pt_file_that_would_run_code_is_not_opened(tmp_path, zipped):
    state, trace = kohya(5)[0], tmp_path / "it ran"
    state["x"] = _Runs(trace)
    torch.save(state, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(LoRAFileError, match="cannot be read as tensors alone"):
        convert(tmp_path / "a.pt", tmp_path / "b.safetensors", Settings("", ""))
    assert not trace.exists()
    assert not (tmp_path / "b.safetensors").exists()


def test_an_old_torch_does_not_open_pickles(tmp_path, monkeypatch):
    torch.save(kohya(6)[0], tmp_path / "a.pt")
    monkeypatch.setattr(torch, "__version__", "2.5.1+cu124")
    with pytest.raises(LoRAFileError, match=r"use torch 2\.6 or newer"):
        convert(tmp_path / "a.pt", tmp_path / "b.safetensors", Settings("", ""))


def test_of_a_folder_the_rest_is_converted(tmp_path, capsys):
    state, changes = kohya(7)
    (tmp_path / "in").mkdir()
    save_file(state, tmp_path / "in" / "good.safetensors")
    torch.save(state, tmp_path / "in" / "also.pt")
    (tmp_path / "in" / "bad.safetensors").write_bytes(b"nothing")
    (tmp_path / "in" / "notes.txt").write_text("no LoRA")
    with pytest.raises(LoRAFileError, match="1 of 3 files in in were not converted"):
        run(Settings(str(tmp_path / "in"), str(tmp_path / "out")), Console())
    assert "bad.safetensors: NOT CONVERTED." in capsys.readouterr().out
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == [
        "also.safetensors",
        "good.safetensors",
    ]
    same(changes_of(tmp_path / "out" / "also.safetensors", "kohya"), changes, 2e-3)


def test_what_cannot_be_converted_is_refused_and_nothing_is_written(tmp_path):
    state, _ = kohya(8)
    save_file(state, tmp_path / "a.safetensors")
    save_file({"some.weight": torch.ones(3)}, tmp_path / "none.safetensors")
    key = next(iter(state))
    save_file({**state, key: state[key] * torch.nan}, tmp_path / "nan.safetensors")
    before = (tmp_path / "a.safetensors").read_bytes()
    for source, target, settings, said in (
        ("a.safetensors", "a.safetensors", {}, "the source itself"),
        ("a.safetensors", "b.pt", {}, "must end in .safetensors"),
        ("none.safetensors", "b.safetensors", {}, "say --base"),
        ("nan.safetensors", "b.safetensors", {}, "NaN"),
        ("a.safetensors", "b.safetensors", {"base": "sdxl"}, "is made for demo"),
    ):
        with pytest.raises(DiffLoRAError, match=said):
            convert(tmp_path / source, tmp_path / target, Settings("", "", **settings))
    assert (tmp_path / "a.safetensors").read_bytes() == before
    assert not (tmp_path / "b.safetensors").exists()
