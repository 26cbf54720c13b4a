"""A HyperLoRA folder: read as published, and every way in which it can be wrong."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from difflora_core.errors import CheckpointError
from difflora_core.storage.hyperlora_folder import FILES, is_hyperlora_folder, load_hyperlora
from difflora_core.storage.identity_library import add_people
from difflora_core.storage.identity_models import load_identity_model
from difflora_core.storage.library_file import read_library
from difflora_core.storage.safetensors_io import TensorFile

BASIS, RESAMPLER, PROJECTOR = FILES[1:]


@pytest.fixture
def folder(write_hyperlora, tmp_path):
    return write_hyperlora(tmp_path / "variant")


def edit(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_number_arrives_and_the_basis_as_it_is_stored(write_hyperlora, tmp_path, dtype):
    folder = write_hyperlora(tmp_path, dtype=dtype)
    model = load_identity_model(folder)
    stored = load_file(folder / BASIS)
    names = [f"{i}.{p}.id_{f}_basis" for i in range(3) for p in
             ("to_q", "to_k", "to_v", "to_out") for f in ("down", "up")]  # fmt: skip
    assert all(torch.equal(b, stored[n]) for b, n in zip(model.basis, names, strict=True))
    network = load_file(folder / RESAMPLER)
    assert all(torch.equal(v, network[n]) for n, v in model.resampler.state_dict().items())
    assert {p.dtype for p in model.basis} == {dtype}
    assert {p.dtype for p in model.resampler.parameters()} == {torch.float32}
    assert not model.training
    assert (model.config.heads, model.config.face_tokens, model.layout.rank) == (2, 3, 2)


def test_the_basis_is_read_once_and_never_copied(folder, monkeypatch):
    """What the model holds is the memory into which the file was read."""
    read, own = {}, TensorFile.read

    def watched(self, name, finite=True):
        assert (self.path, name) not in read
        read[self.path, name] = own(self, name, finite)
        return read[self.path, name]

    monkeypatch.setattr(TensorFile, "read", watched)
    model = load_hyperlora(folder)
    held = {p.data_ptr() for p in model.parameters()}
    assert held == {tensor.data_ptr() for tensor in read.values()}
    assert sum(p.numel() for p in model.parameters()) == sum(t.numel() for t in read.values())


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=f"lacks {name}"):
        load_identity_model(folder)
    for other in FILES:
        (folder / other).unlink(missing_ok=True)
    assert not is_hyperlora_folder(folder)
    with pytest.raises(CheckpointError, match="no model that is known"):
        load_identity_model(folder)


def test_files_of_another_variant_are_refused(folder, write_hyperlora, tmp_path):
    one = {"lora_unet_middle_block_1_transformer_blocks_0_attn1": (8, None)}
    fewer = write_hyperlora(tmp_path / "fewer", one)
    wider = write_hyperlora(tmp_path / "wider", image=20)
    deeper = write_hyperlora(tmp_path / "deeper", depth=3)
    for source, name, words in (
        (fewer, FILES[0], "the one holds 24 basis tensors, the other names 8"),
        (fewer, RESAMPLER, "latents is"),
        (wider, PROJECTOR, "2 tensors differ"),
        (wider, RESAMPLER, "do not belong together|does not fit"),
    ):
        right = (folder / name).read_bytes()
        (folder / name).write_bytes((source / name).read_bytes())
        with pytest.raises(CheckpointError, match=words):
            load_hyperlora(folder)
        (folder / name).write_bytes(right)
    (folder / RESAMPLER).write_bytes((deeper / RESAMPLER).read_bytes())
    assert load_hyperlora(folder).config.depth == 3  # the depth is the resampler's own


def test_another_order_or_size_in_the_table_is_refused(folder):
    path = folder / FILES[0]
    table = json.loads(path.read_text())
    turned = dict(reversed(list(table.items())[:2]))
    path.write_text(json.dumps({**turned, **table}))
    with pytest.raises(
        CheckpointError, match=r"do not belong together: 0\.to_q\.id_down_basis has"
    ):
        load_hyperlora(folder)
    for change in ({"hidden_size": -1}, {"hidden_size": "6"}, {"hidden_size": 6.0}, {}, 5):
        path.write_text(json.dumps(table | {next(iter(table)): change}))
        with pytest.raises(CheckpointError, match="damaged"):
            load_hyperlora(folder)
    path.write_text(json.dumps({"lora_unet_conv_in": {"hidden_size": 6}}))
    with pytest.raises(CheckpointError, match="names no attention module of SDXL"):
        load_hyperlora(folder)
    for text in ("[]", "{}", "{", "null"):
        path.write_text(text)
        with pytest.raises(CheckpointError, match="damaged"):
            load_hyperlora(folder)


@pytest.mark.parametrize("name", FILES[1:])
def test_damaged_tensors_are_refused(folder, name):
    path, right = folder / name, (folder / name).read_bytes()
    first = next(iter(load_file(path)))
    for change, words in (
        (lambda t: t[first].view(-1).__setitem__(0, torch.nan), "NaN or infinite"),
        (lambda t: t.__setitem__(first, t[first].to(torch.int32)), "stored as I32"),
        (lambda t: t.pop(first), "do not belong|differ|lacks"),
        (lambda t: t.__setitem__("surprise", torch.zeros(2)), "do not belong|differ"),
    ):
        edit(path, change)
        with pytest.raises(CheckpointError, match=words):
            load_hyperlora(folder)
        path.write_bytes(right)
    path.write_bytes(right[:-8])
    with pytest.raises(CheckpointError, match="cut"):
        load_hyperlora(folder)


def test_a_training_checkpoint_is_read_without_its_base_lora(folder):
    before = load_hyperlora(folder)
    edit(
        folder / BASIS,
        lambda t: t.update(
            {k.replace(".id_", ".base_"): v[..., :1].clone() for k, v in list(t.items())}
        ),
    )
    after = load_hyperlora(folder)
    assert all(torch.equal(a, b) for a, b in zip(before.basis, after.basis, strict=True))
    assert after.latent_space == before.latent_space


def test_no_heads_of_the_size_are_named(folder):
    with pytest.raises(CheckpointError, match="no heads of 48"):
        load_hyperlora(folder, head_dim=48)


def test_a_library_keeps_what_its_latents_are(folder, tmp_path):
    model = load_hyperlora(folder)
    z = torch.nn.functional.normalize(torch.randn(2, 24, 5), dim=-1)
    add_people(tmp_path / "people.safetensors", model.wrap(z), ["Ada", "Ben"], model_name="v")
    found = read_library(tmp_path / "people.safetensors").latent(1)
    assert found.unit_tokens
    assert found.license == model.license
    assert torch.equal(found.z, z[1:])
    model.check_latent(found)
