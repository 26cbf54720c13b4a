"""LoRA files: round trip, metadata, privacy, and files that lie about themselves."""

import contextlib
import io
import json
import stat
import struct
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from difflora_core.errors import DiffLoRAError, LayoutError, LoRAFileError
from difflora_core.lora.layout import LayerShape, LoRALayout, sdxl_layout
from difflora_core.lora.weights import LoRALayer, LoRAWeights
from difflora_core.storage.lora_file import (
    LoRAInfo,
    base_of,
    load_lora,
    read_lora_file,
    write_lora_file,
    write_lora_state,
)

LAYOUT = LoRALayout(
    "sdxl",
    2,
    (
        LayerShape("input_blocks.4.1.transformer_blocks.0.attn1.to_q", 6, 8, "down.attn1.to_q"),
        LayerShape(
            "middle_block.1.transformer_blocks.0.attn2.to_out.0", 8, 5, "mid.attn2.to_out.0"
        ),
    ),
)


def weights(alpha=2.0, layout=LAYOUT, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return LoRAWeights(
        {
            s.name: LoRALayer(
                torch.randn(layout.rank, s.in_features, generator=generator),
                torch.randn(s.out_features, layout.rank, generator=generator),
                alpha,
            )
            for s in layout
        }
    )


@pytest.mark.parametrize("naming", ["kohya_ldm", "kohya_diffusers", "generic", "diffusers"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_round_trip(tmp_path, naming, dtype):
    wanted = weights(1.0).to(dtype).to(torch.float32)
    path = write_lora_file(tmp_path / "new" / "a.safetensors", wanted, LAYOUT, None, naming, dtype)
    result = load_lora(path, LAYOUT)
    LAYOUT.check(result.weights)
    for name in wanted:
        torch.testing.assert_close(result.weights[name].delta(), wanted[name].delta())
        assert result.weights[name].down.dtype == torch.float32
    assert [p.name for p in path.parent.iterdir()] == ["a.safetensors"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_metadata_for_other_programs(tmp_path):
    info = LoRAInfo(title="A face", model_hash="abc", seed=7, steps=20, gate=(0.25, 0.75))
    path = write_lora_file(tmp_path / "a.safetensors", weights(1.0), LAYOUT, info)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["modelspec.sai_model_spec"] == "1.0.0"
    assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert metadata["modelspec.title"] == "A face"
    assert metadata["ss_network_module"] == "networks.lora"
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("2", "1")
    assert metadata["ss_base_model_version"] == "sdxl_base_v1-0"
    assert (metadata["difflora.seed"], metadata["difflora.gate"]) == ("7", "0.25,0.75")
    assert read_lora_file(path).metadata == metadata
    # privacy: short known texts only, so neither an embedding nor a list of pictures fits in
    assert all(
        key.split(".")[0] in ("modelspec", "difflora") or key[:3] == "ss_" for key in metadata
    )
    assert max(map(len, metadata.values())) < 100


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = write_lora_file(tmp_path / "a.safetensors", weights(), LAYOUT)
    before = path.read_bytes()
    bad = weights(seed=1)
    bad[LAYOUT.layers[0].name].up[0, 0] = torch.nan
    with pytest.raises(LoRAFileError, match="not finite"):
        write_lora_file(path, bad, LAYOUT)
    with pytest.raises(LayoutError):
        write_lora_file(path, weights(layout=replace(LAYOUT, rank=3)), LAYOUT)
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1
    with pytest.raises(LoRAFileError, match=r"must end in \.safetensors"):
        write_lora_file(tmp_path / "a.pt", weights(), LAYOUT)
    with pytest.raises(LoRAFileError, match="could not be written"):
        write_lora_file(path / "inside" / "b.safetensors", weights(), LAYOUT)


def container(header, data=b"", length=None):
    """Bytes of a safetensors file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(*span, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(span)}


def pickled(as_zip):
    """What torch writes for a .pt file, in its old and its new form."""
    buffer = io.BytesIO()
    state = {"lora_unet_a.lora_up.weight": torch.ones(2)}
    torch.save(state, buffer, _use_new_zipfile_serialization=as_zip)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a safetensors file"),
        (b"abc", "not a safetensors file"),
        (b"<html><body>404 Not Found</body></html>", "not a safetensors file"),
        (pickled(False), "this is a pickle"),
        (pickled(True), "this is a pickle"),
        (container({}, length=2**62), "claims a header"),
        (container({}, length=2**63 + 5), "claims a header"),
        (container({"a": entry(0, 8)}, length=5000), "truncated"),
        (container(b"{not json"), "header is damaged"),
        (container(b"[" * 100_000), "header is damaged"),
        (container(b'{"a": 1, "a": 2}'), "header is damaged"),
        (container(b"\xff\xfe{}"), "header is damaged"),
        (container([1, 2]), "not a table of tensors"),
        (container({"__metadata__": {"a": 1}}), "metadata is not"),
        (container({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)), "overlaps"),
        (container({"a": entry(0, 8), "b": entry(0, 8)}, bytes(8)), "overlaps"),
        (container({"a": entry(4, 12)}, bytes(12)), "overlaps another one or leaves a gap"),
        (container({"a": entry(0, 8)}, bytes(4)), "need 8 bytes, but 4"),
        (container({"a": entry(0, 8)}, bytes(9)), "need 8 bytes, but 9"),
        (container({"a": entry(0, 8, shape=(3,))}, bytes(8)), "makes no sense"),
        (container({"a": entry(0, 8, shape=(-2,))}, bytes(8)), "makes no sense"),
        (container({"a": entry(0, 8, dtype="X9")}, bytes(8)), "makes no sense"),
        (container({"a": entry(8, 0)}, bytes(8)), "makes no sense"),
        (container({"a": [1]}, bytes(8)), "makes no sense"),
        (container({"a": entry(0, 8, shape=(2**40, 2**40))}, bytes(8)), "makes no sense"),
    ],
)  # fmt: skip
def test_hostile_files(tmp_path, content, message):
    path = tmp_path / "face.safetensors"
    path.write_bytes(content)
    with pytest.raises(LoRAFileError, match=message) as caught:
        load_lora(path, LAYOUT)
    assert "face.safetensors" in str(caught.value)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(LoRAFileError, match="There is no LoRA file"):
        load_lora(tmp_path / "no.safetensors", LAYOUT)
    with pytest.raises(LoRAFileError, match="cannot be opened"):
        load_lora(tmp_path, LAYOUT)


def test_wrong_content(tmp_path):
    path = tmp_path / "a.safetensors"
    stem = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
    save_file({f"{stem}.lora_up.weight": torch.full((8, 2), torch.nan)}, path)
    with pytest.raises(LoRAFileError, match=r"a\.safetensors: .*NaN"):
        load_lora(path, LAYOUT)
    save_file({"model.layers.0.weight": torch.zeros(2)}, path)
    with pytest.raises(LayoutError, match="No layer of this LoRA"):
        load_lora(path, LAYOUT)
    save_file(
        {f"{stem}.lora_up.weight": torch.zeros(8, 2), f"{stem}.lora_down.weight": torch.ones(2, 7)},
        path,
    )
    with pytest.raises(LayoutError, match="does not fit sdxl"):
        load_lora(path, LAYOUT)


@given(data=st.data())
def test_every_cut_and_every_changed_byte_is_an_error_or_a_lora(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("fuzz") / "a.safetensors"
    write_lora_file(path, weights(), LAYOUT)
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
        path.write_bytes(content)
        with pytest.raises(LoRAFileError):
            load_lora(path, LAYOUT)
        return
    content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    with contextlib.suppress(DiffLoRAError):
        LAYOUT.check(load_lora(path, LAYOUT).weights)


def test_full_size_file(tmp_path):
    layout = sdxl_layout(8)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(8 * 10240, generator=generator).half()
    made = LoRAWeights(
        {
            s.name: LoRALayer(
                noise[: 8 * s.in_features].view(8, -1),
                noise[: 8 * s.out_features].view(-1, 8),
                8.0,
            )
            for s in layout
        }
    )
    path = write_lora_file(tmp_path / "sdxl.safetensors", made, layout)
    assert 23_224_320 <= path.stat().st_size < 23_600_000
    result = load_lora(path, layout)
    assert result.report.layers == 560
    last = layout.layers[-1].name
    assert torch.equal(result.weights[last].up, made[last].up.float())


@pytest.mark.parametrize(
    ("width", "base"), [(2048, "sdxl"), (768, "sd15"), (1024, "sd21"), (128, "demo"), (7, None)]
)
@pytest.mark.parametrize("stem", ["lora_unet_a_attn2_to_k", "unet.a.attn2.to_v"])
def test_base_is_read_off_the_text_width(stem, width, base):
    down, up = torch.ones(2, width), torch.ones(8, 2)
    plain = {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
    peft = {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}
    assert base_of(plain) == base_of(peft) == base
    kron = {f"{stem}.lokr_w1": torch.ones(2, width), f"{stem}.lokr_w2": up[:, :1]}
    assert base_of(kron) == base
    assert base_of({f"{stem}.diff_b": torch.ones(width)}) is None


def test_state_of_any_family_is_kept(tmp_path):
    state = {
        "x.hada_w1_a": torch.ones(3, 2), "x.alpha": torch.tensor(1e-9), "y.diff_b": torch.ones(3),
        "z.lora_down.weight": torch.ones(2, 4), "z.lora_up.weight": torch.ones(3, 2),
        "bundle_emb.me.clip_l": torch.ones(1, 4),
    }  # fmt: skip
    info = LoRAInfo("t", "", trigger_words=("a", "b"), strength=0.5)
    file = read_lora_file(write_lora_state(tmp_path / "a.safetensors", state, "sdxl", info))
    assert file.tensors.keys() == state.keys()
    assert all(torch.equal(file.tensors[key].float(), state[key]) for key in state)
    assert file.metadata["ss_network_dim"] == "2"
    assert file.metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    with pytest.raises(LoRAFileError, match="Choose bfloat16 or float32"):
        write_lora_state(tmp_path / "b.safetensors", {"x.diff": torch.tensor([1e6])}, "sdxl", info)
    assert not (tmp_path / "b.safetensors").exists()
