"""Concept and covariance files: sizes, rounding, round trips, and files that mean harm."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save, save_file

from difflora_core.errors import CheckpointError, ConfigError, LayoutError
from difflora_core.lora.layout import sdxl_layout
from difflora_core.storage.adapter_file import METADATA_KEY, read_concept, write_concept
from difflora_core.storage.covariance_file import read_covariance, write_covariance
from difflora_core.text.covariance import Covariance
from difflora_core.text.new_words import Concept


def concept(layers=None, dim=6, widths=(4, 5), contexts=("photo of a {}", "the {}"), **changes):
    g = torch.Generator().manual_seed(1)
    layers = layers or {f"input_blocks.{k}.1.attn2.to_v": 3 + k for k in range(3)}
    direction, dual = torch.randn(dim, generator=g), torch.randn(dim, generator=g)
    parts = {
        "method": "perfusion",
        "word": "<my-hat>",
        "superclass": "hat",
        "base": "tiny",
        "embeddings": tuple(torch.randn(w, generator=g) for w in widths),
        "direction": direction,
        "covector": 1e-4 * dual / (dual @ direction),
        "values": {name: torch.randn(width, generator=g) for name, width in layers.items()},
        "probe": torch.randn(64, generator=g),
        "contexts": contexts,
        "facts": {"steps": 7},
    }
    parts["covector"] = parts["covector"] / (parts["covector"] @ direction)
    return Concept(**{**parts, **changes})


@pytest.fixture(scope="module")
def sdxl():
    """A concept of SDXL's real size, with long contexts."""
    layers = {s.name: s.out_features for s in sdxl_layout(1) if s.name.endswith("attn2.to_v")}
    assert len(layers) == 70
    assert sum(layers.values()) == 83_200
    contexts = tuple(
        f"photo number {k} of a person, smiling, striped blue background, red shirt, wearing {{}}"
        for k in range(8)
    )
    return concept(layers, 2048, (768, 1280), contexts)


def test_sizes_at_sdxl(sdxl, tmp_path):
    fine = write_concept(tmp_path / "fine.safetensors", sdxl)
    coarse = write_concept(tmp_path / "coarse.safetensors", sdxl, int8=True)
    assert fine.size <= 180 * 1024
    assert coarse.size <= 100 * 1024
    assert fine.error < 5e-4
    assert coarse.error < 1e-2
    for written in (fine, coarse):
        again = read_concept(written.path)
        exact = torch.cat(list(sdxl.values.values())).double()
        stored = torch.cat(list(again.values.values())).double()
        assert list(again.values) == list(sdxl.values)
        error = float((stored - exact).norm() / exact.norm())
        assert error == pytest.approx(written.error, rel=1e-3)
        assert float(again.covector.double() @ again.direction.double()) == pytest.approx(
            1, abs=1e-5
        )
        assert again.contexts == sdxl.contexts


@pytest.mark.parametrize("int8", [False, True])
def test_round_trip(tmp_path, int8):
    one = concept(method="infusion")
    path = write_concept(tmp_path / "deep" / "one.safetensors", one, int8).path
    again = read_concept(path)
    for name in ("method", "word", "superclass", "base", "contexts", "facts"):
        assert getattr(again, name) == getattr(one, name)
    torch.testing.assert_close(again.direction, one.direction, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(again.covector, one.covector, rtol=5e-3, atol=1e-3)
    assert torch.equal(again.probe, one.probe)
    for mine, kept in zip(one.embeddings, again.embeddings, strict=True):
        torch.testing.assert_close(kept, mine, rtol=1e-3, atol=1e-3)
    second = write_concept(tmp_path / "again.safetensors", again, int8)
    assert second.error < 1e-3  # what was rounded once stays
    assert not list(tmp_path.glob("**/.*"))  # nothing temporary is left


def test_the_inverse_covariance_is_not_in_the_file(sdxl, tmp_path):
    path = write_concept(tmp_path / "one.safetensors", sdxl).path
    assert set(load_file(path)) == {
        "direction", "covector", "probe", "values", "embedding.0", "embedding.1",
    }  # fmt: skip


def test_what_cannot_be_written(tmp_path):
    with pytest.raises(CheckpointError, match="must end in"):
        write_concept(tmp_path / "one.pt", concept())
    huge = concept(values={"a.attn2.to_v": torch.full((3,), 1e6)})
    with pytest.raises(CheckpointError, match="too large"):
        write_concept(tmp_path / "one.safetensors", huge)
    assert write_concept(tmp_path / "one.safetensors", huge, int8=True).error < 1e-2
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match="could not be written"):
        write_concept(tmp_path / "file" / "one.safetensors", concept())


def test_what_is_no_concept():
    with pytest.raises(ConfigError, match="cannot be taught"):
        concept(word="two words")
    with pytest.raises(ConfigError, match="Unknown concept method"):
        concept(method="magic")
    with pytest.raises(ConfigError, match="super-class"):
        concept(superclass=" ")
    with pytest.raises(ConfigError, match="once"):
        concept(contexts=("no slot",))
    with pytest.raises(LayoutError, match="not finite"):
        concept(direction=torch.full((6,), torch.nan))
    with pytest.raises(LayoutError, match="differ"):
        concept(direction=torch.ones(5))
    with pytest.raises(LayoutError, match="not vectors"):
        concept(values={})


def altered(path, change):
    """The file with its tensors and description changed by a function."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        document = json.loads(file.metadata()[METADATA_KEY])
    tensors = load_file(path)
    change(tensors, document)
    save_file(tensors, path, metadata={METADATA_KEY: json.dumps(document)})
    return path


HOSTILE = {
    "longer layer table": lambda t, d: d["layers"].update({"more": 5}),
    "negative width": lambda t, d: d["layers"].update({"input_blocks.0.1": -3}),
    "huge width": lambda t, d: d["layers"].update({"input_blocks.0.1": 2**60}),
    "boolean width": lambda t, d: d["layers"].update({"input_blocks.0.1": True}),
    "layers a list": lambda t, d: d.update(layers=[3, 4, 5]),
    "other version": lambda t, d: d.update(version=99),
    "word missing": lambda t, d: d.pop("word"),
    "word of another kind": lambda t, d: d.update(word=["<my-hat>"]),
    "word with a space": lambda t, d: d.update(word="a b"),
    "endless word": lambda t, d: d.update(word="x" * 10_000),
    "unknown method": lambda t, d: d.update(method="exec"),
    "contexts of numbers": lambda t, d: d.update(contexts=[1]),
    "context without slot": lambda t, d: d.update(contexts=["hat"]),
    "a thousand contexts": lambda t, d: d.update(contexts=["a {}"] * 1000),
    "facts a list": lambda t, d: d.update(facts=[]),
    "tensor missing": lambda t, d: t.pop("direction"),
    "tensor too many": lambda t, d: t.update(extra=torch.zeros(3)),
    "no embeddings": lambda t, d: [t.pop("embedding.0"), t.pop("embedding.1")],
    "gap in the embeddings": lambda t, d: t.update({"embedding.7": t.pop("embedding.1")}),
    "values too short": lambda t, d: t.update(values=t["values"][:-1].clone()),
    "values not finite": lambda t, d: t["values"].fill_(torch.inf),
    "values of integers": lambda t, d: t.update(values=t["values"].to(torch.int32)),
    "int8 without scales": lambda t, d: t.update(values=t["values"].to(torch.int8)),
    "matrix for a vector": lambda t, d: t.update(direction=torch.zeros(2, 3)),
    "empty probe": lambda t, d: t.update(probe=torch.zeros(0)),
    "zero covector": lambda t, d: t["covector"].zero_(),
    "other width": lambda t, d: t.update(covector=torch.ones(5)),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_concepts(tmp_path, name):
    path = write_concept(tmp_path / "one.safetensors", concept()).path
    read_concept(altered(path, lambda tensors, document: None))  # writing again is no harm
    with pytest.raises(CheckpointError):
        read_concept(altered(path, HOSTILE[name]))


def test_files_that_are_something_else(tmp_path):
    path = tmp_path / "one.safetensors"
    with pytest.raises(CheckpointError, match="no concept file"):
        read_concept(path)
    path.write_bytes(b"\x80\x04\x95" + b"x" * 100)
    with pytest.raises(CheckpointError, match="pickle"):
        read_concept(path)
    save_file({"a": torch.zeros(3)}, path)
    with pytest.raises(CheckpointError, match="holds no concept"):
        read_concept(path)
    with pytest.raises(CheckpointError, match="holds no covariance"):
        read_covariance(path)
    path.write_bytes(save({"a": torch.zeros(3)}, {METADATA_KEY: "{" * 3000}))
    with pytest.raises(CheckpointError, match="damaged"):
        read_concept(path)
    whole = write_concept(path, concept()).path.read_bytes()
    for cut in (0, 5, 40, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(CheckpointError):
            read_concept(path)


def covariance(probe=True):
    g = torch.Generator().manual_seed(0)
    rows = torch.randn(50, 6, generator=g)
    return Covariance(rows.mT @ rows / 50, 50, 1e-2, torch.ones(64) if probe else None)


def test_covariance_round_trip(tmp_path):
    one = covariance()
    path = write_covariance(tmp_path / "c.safetensors", one)
    again = read_covariance(path)
    assert torch.equal(again.matrix, one.matrix.float())
    assert (again.tokens, again.ridge) == (50, 1e-2)
    assert torch.equal(again.probe, one.probe)
    direction = torch.arange(6.0)
    torch.testing.assert_close(again.covector(direction), one.covector(direction))
    with pytest.raises(CheckpointError, match="fingerprint"):
        write_covariance(path, covariance(probe=False))
    with pytest.raises(CheckpointError, match="must end in"):
        write_covariance(tmp_path / "c.bin", one)


@pytest.mark.parametrize("change", ["", "matrix", "nan", "text", "probe", "flat"])
def test_hostile_covariances(tmp_path, change):
    path = write_covariance(tmp_path / "c.safetensors", covariance())
    tensors = load_file(path)
    text = json.dumps({"format": "difflora-covariance", "version": 1, "tokens": 50, "ridge": 0.0})
    if change == "matrix":
        tensors["matrix"] = torch.zeros(6, 5)
    elif change == "nan":
        tensors["matrix"][0, 0] = torch.nan
    elif change == "text":
        text = '{"format": "difflora-covariance", "version": 1, "tokens": "many"}'
    elif change == "probe":
        del tensors["probe"]
    elif change == "flat":
        tensors["matrix"] = torch.ones(6, 6)
    save_file(tensors, path, metadata={"difflora_covariance": text})
    if not change:  # the file that the others differ from
        assert read_covariance(path).tokens == 50
        return
    with pytest.raises(CheckpointError):
        read_covariance(path)


def test_files_of_the_first_version_are_read_as_they_were_meant():
    folder = Path(__file__).parents[1] / "contracts" / "0.1.0"
    kept = read_concept(folder / "concept.safetensors")
    assert (kept.word, kept.superclass, kept.contexts) == (
        "<hat>",
        "hat",
        ("a {}", "photo of a {}"),
    )
    (values,) = kept.values.values()
    assert torch.equal(values, torch.arange(16.0) / 8)
    c = read_covariance(folder / "covariance.safetensors")
    assert torch.equal(c.matrix, torch.diag(torch.arange(1.0, 4.0)))
