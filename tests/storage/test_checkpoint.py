"""Checkpoints: exact round trips, atomic writes, and every bad file named as such."""

import json
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from difflora_core.diffusion.sampler import SampleSettings
from difflora_core.errors import CheckpointError
from difflora_core.lora.layout import LayerShape, LoRALayout
from difflora_core.models.difflora import DiffLoRAConfig, DiffLoRAModel
from difflora_core.models.dit import DiTConfig
from difflora_core.models.lae.config import LAEConfig
from difflora_core.models.mif import MIFConfig
from difflora_core.models.predictor import PredictorConfig
from difflora_core.storage.checkpoint import METADATA_KEY, load_model, save_model
from difflora_core.storage.safetensors_io import write_atomic
from difflora_core.vision.features import ImageFeatures

LAYOUT = LoRALayout(
    "tiny", 2, tuple(LayerShape(f"middle_block.1.attn1.to_{p}", 8, 6) for p in "qkv")
)


def build(kind: str = "structured", preset: str = "functional") -> DiffLoRAModel:
    config = DiffLoRAConfig.build(
        MIFConfig(
            face_dim=12, image_dim=10, token_dim=8, image_token_count=5, width=16, tokens=2, heads=2
        ),
        PredictorConfig(width=32, depth=1),
        DiTConfig(width=32, depth=2, heads=2),
        LAEConfig(
            kind=kind, latent_tokens=3, latent_dim=4, width=16, heads=2, depth=1, basis_size=8,
            decoder_width=16, conv_channels=4,
        ),
        preset=preset,
        face_encoder="tiny faces",
    )  # fmt: skip
    g = torch.Generator().manual_seed(0)
    model = DiffLoRAModel(config, LAYOUT, generator=g)
    with torch.no_grad():
        for p in model.parameters():  # as after training: no zeros
            p.add_(0.1 * torch.randn(p.shape, generator=g))
    model.fit_latent_statistics(torch.randn(20, 3, 4, generator=g))
    return model.eval()


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(build(), tmp_path_factory.mktemp("models") / "good.safetensors")


def rewrite(good: Path, path: Path, change=None, tensors=None) -> Path:
    """The good file with its document or its tensors altered."""
    weights = load_file(good)
    with good.open("rb") as file:
        size = struct.unpack("<Q", file.read(8))[0]
        document = json.loads(json.loads(file.read(size))["__metadata__"][METADATA_KEY])
    if change:
        change(document)
    if tensors:
        tensors(weights)
    save_file(weights, path, metadata={METADATA_KEY: json.dumps(document)})
    return path


def _source(path: Path) -> dict:
    """Facts about the making of a file, as safetensors' own reader gives them."""
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()[METADATA_KEY])["source"]


@pytest.mark.parametrize("kind", ["structured", "conv1d"])
@pytest.mark.parametrize("preset", ["functional", "paper"])
def test_round_trip_is_exact(tmp_path: Path, kind: str, preset: str) -> None:
    model = build(kind, preset)
    path = save_model(model, tmp_path / "new" / "m.safetensors", source={"commit": "abc"})
    again = load_model(path)
    assert again.config == model.config
    assert again.layout == model.layout
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    assert _source(path) == {"commit": "abc"}
    assert not again.training
    assert [p.name for p in path.parent.iterdir()] == ["m.safetensors"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_storage_keeps_statistics_exact(tmp_path: Path, dtype) -> None:
    model = build()
    path = save_model(model, tmp_path / "half.safetensors", dtype)
    full = save_model(model, tmp_path / "full.safetensors")
    assert path.stat().st_size < 0.6 * full.stat().st_size
    again = load_model(path)
    assert torch.equal(again.latent_scale, model.latent_scale)
    g = torch.Generator().manual_seed(3)
    first, other = (model.latent(torch.randn(1, 3, 4, generator=g)) for _ in range(2))
    wanted, read, apart = (
        m.decode(z)["middle_block.1.attn1.to_q"].delta()
        for m, z in ((model, first), (again, first), (model, other))
    )
    error = (read - wanted).norm() / wanted.norm()
    assert 0 < error < 2 * torch.finfo(dtype).eps
    assert (apart - wanted).norm() > 10 * (read - wanted).norm()
    half = load_model(path, dtype=torch.float16)
    assert half.dit.latent_in.weight.dtype == torch.float16
    assert half.latent_mean.dtype == torch.float32


class Casting:
    """Layers that cast their weights when they compute, as ComfyUI's do."""

    class Linear(torch.nn.Linear):
        def forward(self, x):
            bias = None if self.bias is None else self.bias.to(x)
            return torch.nn.functional.linear(x, self.weight.to(x), bias)

    class Conv1d(torch.nn.Conv1d):
        def forward(self, x):
            return self._conv_forward(x, self.weight.to(x), self.bias.to(x))

    class ConvTranspose1d(torch.nn.ConvTranspose1d):
        def forward(self, x, output_size=None):
            weight, bias = self.weight.to(x), self.bias.to(x)
            return torch.nn.functional.conv_transpose1d(
                x, weight, bias, self.stride, self.padding, self.output_padding, self.groups
            )

    LayerNorm = torch.nn.LayerNorm


@pytest.mark.parametrize("kind", ["structured", "conv1d"])
@pytest.mark.parametrize("preset", ["functional", "paper"])
def test_a_model_as_stored_is_smaller_and_makes_the_same_loras(tmp_path, kind, preset) -> None:
    path = save_model(build(kind, preset), tmp_path / "half.safetensors", torch.bfloat16)
    whole = load_model(path, Casting)
    small = load_model(path, Casting, as_stored=True)
    bytes_of = lambda m: sum(t.nbytes for t in m.state_dict().values())  # noqa: E731
    layers = [m for m in small.modules() if isinstance(m, torch.nn.Linear)]
    assert {m.weight.dtype for m in layers} == {torch.bfloat16}
    assert bytes_of(small) < 0.75 * bytes_of(whole)
    g = torch.Generator().manual_seed(3)
    photo = ImageFeatures(
        torch.randn(1, 12, generator=g), torch.ones(1, dtype=torch.bool),
        torch.randn(1, 10, generator=g), torch.randn(1, 5, 8, generator=g),
    )  # fmt: skip
    made = []
    for model in (whole, small):
        with torch.no_grad():
            condition = model.condition(photo)
            drawn = model.sample_latent(condition, [0], SampleSettings(steps=2))
            made.append([model.decode(drawn), model.decode(model.mean_latent(condition))])
    for first, second in zip(*made, strict=True):
        for name in first:
            assert torch.equal(first[name].down, second[name].down)
            assert torch.equal(first[name].up, second[name].up)


def test_values_that_would_not_survive_are_not_saved(tmp_path: Path) -> None:
    model = build()
    with torch.no_grad():
        model.dit.latent_in.weight[0, 0] = 1e6
    with pytest.raises(CheckpointError, match=r"dit\.latent_in\.weight"):
        save_model(model, tmp_path / "m.safetensors", torch.float16)
    assert list(tmp_path.iterdir()) == []
    save_model(model, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match="float32, float16"):
        save_model(model, tmp_path / "m.safetensors", torch.float64)


def test_a_failed_write_keeps_the_old_file(good: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(good.read_bytes())
    shared = torch.zeros(4)
    with pytest.raises(CheckpointError, match="cannot be stored"):
        write_atomic({"a": shared, "b": shared.to(torch.complex64)}, {}, path)
    assert path.read_bytes() == good.read_bytes()
    assert len(list(tmp_path.iterdir())) == 1
    with pytest.raises(CheckpointError, match="could not be written"):
        write_atomic({"a": shared}, {}, path / "inside_a_file.safetensors")


def test_another_base_is_refused(good: Path) -> None:
    assert load_model(good, base="tiny").layout.base == "tiny"
    with pytest.raises(CheckpointError, match="tiny, but sdxl"):
        load_model(good, base="sdxl")


def test_missing_renamed_and_cut_files(good: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no DiffLoRA model at"):
        load_model(tmp_path / "nothing.safetensors")
    pickled = tmp_path / "pickled.safetensors"
    torch.save({"a": torch.zeros(2)}, pickled)
    with pytest.raises(CheckpointError, match="pickle"):
        load_model(pickled)
    pickled.write_bytes(b"\x80\x04K\x01.")
    with pytest.raises(CheckpointError, match="pickle"):
        load_model(pickled)
    data = good.read_bytes()
    for keep in (0, 4, 8, 9, 200, len(data) // 2, len(data) - 1):
        cut = tmp_path / "cut.safetensors"
        cut.write_bytes(data[:keep])
        with pytest.raises(CheckpointError, match="cut"):
            load_model(cut)


@pytest.mark.parametrize("length", [2**64 - 1, 2**63, 2**32, 10**8, 65 * 2**20])
def test_huge_header(tmp_path: Path, length: int) -> None:
    path = tmp_path / "huge.safetensors"
    path.write_bytes(struct.pack("<Q", length) + b"{}" + bytes(100))
    with pytest.raises(CheckpointError, match="header"):
        load_model(path)


def test_overlapping_and_outside_offsets(tmp_path: Path) -> None:
    for second in ([0, 8], [4, 12], [8, 1 << 40]):
        header = {
            "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
            "b": {"dtype": "F32", "shape": [2], "data_offsets": second},
        }
        text = json.dumps(header).encode()
        path = tmp_path / "overlap.safetensors"
        path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(16))
        with pytest.raises(CheckpointError, match=r"overlaps|makes no sense"):
            load_model(path)


def test_safetensors_of_something_else(tmp_path: Path) -> None:
    save_file({"lora_unet_x.lora_up.weight": torch.zeros(2, 2)}, tmp_path / "lora.safetensors")
    with pytest.raises(CheckpointError, match="no DiffLoRA model"):
        load_model(tmp_path / "lora.safetensors")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d.update(version=99), "Update the node pack"),
        (lambda d: d.update(format="other"), "format"),
        (lambda d: d.pop("config"), "damaged"),
        (lambda d: d.update(config=[]), "unusable settings"),
        (lambda d: d["config"]["dit"].update(depth=10**9), "depth"),
        (lambda d: d["config"]["dit"].update(evil=1), "unknown settings"),
        (lambda d: d["config"]["lae"].update(latent_dim="16"), "unusable settings"),
        (lambda d: d["layout"].update(rank=3), "hash"),
        (lambda d: d["layout"].update(rank=0), "unusable settings"),
        (lambda d: d["layout"].update(rank="2"), "unusable settings"),
        (lambda d: d["layout"].update(layers=[]), "impossible sizes"),
        (lambda d: d["layout"].update(layers=[3]), "unusable settings|damaged"),
        (lambda d: d["layout"]["layers"][0].update(in_features=-1), "impossible sizes"),
        (lambda d: d["layout"]["layers"][0].update(in_features=2**60), "impossible sizes"),
        (lambda d: d["layout"]["layers"][0].update(name="renamed"), "hash"),
        (lambda d: d.update(base="sdxl"), "hash"),
        (lambda d: d["config"]["dit"].update(width=64), "has shape"),
        (lambda d: d["config"]["dit"].update(depth=3), "missing"),
        (lambda d: d["config"]["lae"].update(latent_dim=5), "unusable settings"),
    ],
)
def test_altered_settings(good: Path, tmp_path: Path, change, words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        load_model(rewrite(good, tmp_path / "altered.safetensors", change))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("latent_mean"), "missing"),
        (lambda t: t.update(extra=torch.zeros(1)), "unexpected"),
        (lambda t: t.update(latent_mean=torch.zeros(4, 3)), "has shape"),
        (lambda t: t.update(latent_mean=torch.zeros(3, 4, dtype=torch.int64)), "not as a float"),
        (lambda t: t.update(latent_mean=torch.full((3, 4), torch.nan)), "NaN"),
        (lambda t: t.update(latent_mean=torch.full((3, 4), torch.inf)), "NaN"),
        (lambda t: t.update(latent_scale=torch.zeros(3, 4)), "positive"),
    ],
)
def test_altered_tensors(good: Path, tmp_path: Path, change, words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        load_model(rewrite(good, tmp_path / "altered.safetensors", tensors=change))


@given(st.data())
def test_any_damage_to_the_header_raises_only_our_error(good: Path, tmp_path_factory, data) -> None:
    raw = bytearray(good.read_bytes())
    size = struct.unpack("<Q", raw[:8])[0]
    for _ in range(data.draw(st.integers(1, 5))):
        raw[data.draw(st.integers(0, 8 + size - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("damaged") / "m.safetensors"
    path.write_bytes(raw)
    try:
        load_model(path)
    except CheckpointError:
        pass


def test_every_header_length_is_read(tmp_path: Path) -> None:
    """A length whose first byte looks like a pickle's (0x80) is still a good file."""
    model = build()
    first_bytes = set()
    for extra in range(0, 256, 8):
        path = save_model(model, tmp_path / "m.safetensors", source={"note": "x" * extra})
        assert len(_source(path)["note"]) == extra
        first_bytes.add(path.read_bytes()[0])
    assert 0x80 in first_bytes


def test_deeply_nested_settings(good: Path, tmp_path: Path) -> None:
    path = tmp_path / "deep.safetensors"
    save_file(load_file(good), path, metadata={METADATA_KEY: "[" * 200_000})
    with pytest.raises(CheckpointError, match="damaged"):
        load_model(path)


@pytest.mark.parametrize("count", [4096, 20_000])
def test_thousands_of_layers_are_judged_in_a_moment(tmp_path: Path, count: int) -> None:
    """A file of 2 MB with 20,000 layers took 40 seconds."""
    import time

    layers = [
        {"name": f"l{k}", "in_features": 8, "out_features": 8, "diffusers_name": ""}
        for k in range(count)
    ]
    model = build()
    document = {
        "format": "difflora", "version": 1, "base": "tiny", "config": model.config.to_dict(),
        "layout": {"base": "tiny", "rank": 2, "layers": layers}, "layout_hash": "",
    }  # fmt: skip
    if count <= 4096:
        document["layout_hash"] = LoRALayout.from_dict(document["layout"]).hash
    path = tmp_path / "many.safetensors"
    write_atomic({"a": torch.zeros(1)}, {METADATA_KEY: json.dumps(document)}, path)
    began = time.process_time()
    with pytest.raises(CheckpointError, match=r"tensors? missing|impossible sizes"):
        load_model(path)
    assert time.process_time() - began < 5
