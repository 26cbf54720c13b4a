"""Concept and covariance files: sizes, rounding, round trips, and files that mean harm."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save, save_file

from difflora_core.errors import CheckpointError, ConfigError, LayoutError
from difflora_core.lora.layout import sdxl_layout
from difflora_core.lora.weights import LoRALayer, LoRAWeights
from difflora_core.methods.base import TrainedAdaptation
from difflora_core.methods.lora import lora_adaptation, lora_weights
from difflora_core.methods.perfusion import PerfusionConfig
from difflora_core.methods.registry import METHODS
from difflora_core.storage.adapter_file import METADATA_KEY, read_adaptation, write_adaptation
from difflora_core.storage.covariance_file import read_covariance, write_covariance
from difflora_core.storage.safetensors_io import write_atomic
from difflora_core.text.covariance import Covariance
from difflora_core.text.new_words import LearnedWord


def concept(layers=None, dim=6, widths=(4, 5), contexts=("photo of a {}", "the {}"), **changes):
    """A random concept; `changes` are of its word, its tensors or its record."""
    g = torch.Generator().manual_seed(1)
    layers = layers or {f"input_blocks.{k}.1.attn2.to_v": 3 + k for k in range(3)}
    direction, dual = torch.randn(dim, generator=g), torch.randn(dim, generator=g)
    word = {
        "word": "<my-hat>",
        "superclass": "hat",
        "embeddings": tuple(torch.randn(w, generator=g) for w in widths),
    }
    shared = {"direction": direction, "covector": dual / (dual @ direction)}
    values = {name: torch.randn(width, generator=g) for name, width in layers.items()}
    word |= {"probe": torch.randn(64, generator=g), "contexts": contexts}
    word |= {name: changes.pop(name) for name in list(changes) if name in word}
    shared |= {name: changes.pop(name) for name in list(changes) if name in shared}
    method = changes.get("method", "perfusion")
    parts = {
        "method": method,
        "base": "tiny",
        "settings": METHODS[method].Config() if method in METHODS else PerfusionConfig(),
        "shared": shared,
        "layers": {name: {"values": v} for name, v in changes.pop("values", values).items()},
        "word": LearnedWord(**word),
        "facts": {"steps": 7},
    }
    return TrainedAdaptation(**{**parts, **changes})


def values_of(adaptation):
    """All values, float64."""
    return torch.cat([tensors["values"] for tensors in adaptation.layers.values()]).double()


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
    fine = write_adaptation(tmp_path / "fine.safetensors", sdxl)
    coarse = write_adaptation(tmp_path / "coarse.safetensors", sdxl, int8=True)
    assert fine.size <= 180 * 1024
    assert coarse.size <= 100 * 1024
    assert fine.error < 5e-4
    assert coarse.error < 1e-2
    for written in (fine, coarse):
        again = read_adaptation(written.path)
        exact, stored = values_of(sdxl), values_of(again)
        assert list(again.layers) == list(sdxl.layers)
        error = float((stored - exact).norm() / exact.norm())
        assert error == pytest.approx(written.error, rel=1e-3)
        product = again.shared["covector"].double() @ again.shared["direction"].double()
        assert float(product) == pytest.approx(1, abs=1e-5)
        assert again.word.contexts == sdxl.word.contexts


@pytest.mark.parametrize("int8", [False, True])
def test_round_trip(tmp_path, int8):
    one = concept(settings=PerfusionConfig(bias=0.45, reach=2))
    path = write_adaptation(tmp_path / "deep" / "one.safetensors", one, int8).path
    again = read_adaptation(path)
    for name in ("method", "base", "settings", "facts"):
        assert getattr(again, name) == getattr(one, name)
    for name in ("word", "superclass", "contexts"):
        assert getattr(again.word, name) == getattr(one.word, name)
    for name, tolerance in (("direction", 1e-3), ("covector", 5e-3)):
        torch.testing.assert_close(again.shared[name], one.shared[name], rtol=tolerance, atol=1e-3)
    assert torch.equal(again.word.probe, one.word.probe)
    for mine, kept in zip(one.word.embeddings, again.word.embeddings, strict=True):
        torch.testing.assert_close(kept, mine, rtol=1e-3, atol=1e-3)
    second = write_adaptation(tmp_path / "again.safetensors", again, int8)
    assert second.error < 1e-3  # what was rounded once stays
    assert not list(tmp_path.glob("**/.*"))  # nothing temporary is left


def test_the_inverse_covariance_is_not_in_the_file(sdxl, tmp_path):
    path = write_adaptation(tmp_path / "one.safetensors", sdxl).path
    assert set(load_file(path)) == {
        "direction", "covector", "probe", "values", "embedding.0", "embedding.1",
    }  # fmt: skip


def test_what_cannot_be_written(tmp_path):
    with pytest.raises(CheckpointError, match="must end in"):
        write_adaptation(tmp_path / "one.pt", concept())
    huge = concept(values={"a.attn2.to_v": torch.full((3,), 1e6)})
    with pytest.raises(CheckpointError, match="too large"):
        write_adaptation(tmp_path / "one.safetensors", huge)
    assert write_adaptation(tmp_path / "one.safetensors", huge, int8=True).error < 1e-2
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match="could not be written"):
        write_adaptation(tmp_path / "file" / "one.safetensors", concept())


def test_what_is_no_concept():
    with pytest.raises(ConfigError, match="cannot be taught"):
        concept(word="two words")
    with pytest.raises(ConfigError, match="super-class"):
        concept(superclass=" ")
    with pytest.raises(ConfigError, match="once"):
        concept(contexts=("no slot",))
    with pytest.raises(LayoutError, match="not finite"):
        concept(direction=torch.full((6,), torch.nan))
    with pytest.raises(LayoutError, match="changes no layer"):
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
    "unknown setting": lambda t, d: d.update(settings={"bias": 0.5, "more": 1}),
    "setting out of range": lambda t, d: d.update(settings={"bias": 99.0}),
    "settings a list": lambda t, d: d.update(settings=[1]),
    "scale of nothing": lambda t, d: d.update(shared_scales={"direction": 0.0}),
    "scale of text": lambda t, d: d.update(shared_scales={"direction": "1"}),
    "hash of other layers": lambda t, d: d.update(layout_hash="0" * 16),
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
    path = write_adaptation(tmp_path / "one.safetensors", concept()).path
    read_adaptation(altered(path, lambda tensors, document: None))  # writing again is no harm
    with pytest.raises(CheckpointError):
        read_adaptation(altered(path, HOSTILE[name]))


def test_files_that_are_something_else(tmp_path):
    path = tmp_path / "one.safetensors"
    with pytest.raises(CheckpointError, match="no concept or style file"):
        read_adaptation(path)
    path.write_bytes(b"\x80\x04\x95" + b"x" * 100)
    with pytest.raises(CheckpointError, match="pickle"):
        read_adaptation(path)
    save_file({"a": torch.zeros(3)}, path)
    with pytest.raises(CheckpointError, match="holds no concept or style"):
        read_adaptation(path)
    with pytest.raises(CheckpointError, match="holds no covariance"):
        read_covariance(path)
    path.write_bytes(save({"a": torch.zeros(3)}, {METADATA_KEY: "{" * 3000}))
    with pytest.raises(CheckpointError, match="damaged"):
        read_adaptation(path)
    whole = write_adaptation(path, concept()).path.read_bytes()
    for cut in (0, 5, 40, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(CheckpointError):
            read_adaptation(path)


def small_lora():
    g = torch.Generator().manual_seed(3)
    layers = {
        f"middle_block.{k}.attn1.to_q": LoRALayer(
            torch.randn(2, 5 + k, generator=g), torch.randn(4, 2, generator=g), 1.5
        )
        for k in range(3)
    }
    return LoRAWeights(layers)


@pytest.mark.parametrize(("int8", "error"), [(False, 1e-3), (True, 2e-2)])
def test_an_adaptation_without_a_word_and_with_matrices(tmp_path, int8, error):
    """The second version of the format: any tensors on any layers."""
    weights = small_lora()
    written = write_adaptation(
        tmp_path / "lora.safetensors", lora_adaptation(weights, "tiny"), int8
    )
    assert 0 < written.error < error
    again = read_adaptation(written.path)
    assert (again.method, again.base, again.word) == ("lora", "tiny", None)
    for name, layer in lora_weights(again).layers.items():
        assert layer.alpha == pytest.approx(1.5, rel=1e-2)
        torch.testing.assert_close(layer.delta(), weights[name].delta(), rtol=0, atol=20 * error)


def test_what_could_not_be_read_is_not_written(tmp_path):
    """The method looks at it first."""
    one, path = lora_adaptation(small_lora()), tmp_path / "a.safetensors"
    layer = next(iter(one.layers))
    bare = {**one.layers[layer], "down": torch.tensor(1.0)}
    cases = {
        "do not fit each other": replace(one, layers={layer: bare}),
        "not hold the factors": replace(one, shared={"down": torch.ones(2)}),
        "not known here": replace(one, method="magic"),
        "does not hold the tensors": replace(concept(), shared={"probe": torch.ones(2)}),
        "has no word": replace(concept(), word=None),
    }
    for message, bad in cases.items():
        with pytest.raises(CheckpointError, match=message):
            write_adaptation(path, bad)
        assert not path.exists()


def test_a_factor_of_everything_is_kept_exactly(tmp_path):
    """Alpha alone may be far outside of what half precision holds."""
    weights = LoRAWeights({"a.to_q": LoRALayer(torch.ones(2, 3), torch.ones(4, 2), 3e-9)})
    path = write_adaptation(tmp_path / "a.safetensors", lora_adaptation(weights), int8=True).path
    assert lora_weights(read_adaptation(path))["a.to_q"].alpha == pytest.approx(3e-9, rel=1e-6)


ODD = {
    "two alphas": lambda t, d: (
        [own.update(alpha=[2]) for own in d["layers"].values()] and t.update(alpha=torch.ones(6))
    ),
    "a layer less": lambda t, d: d["layers"].pop("middle_block.0.attn1.to_q"),
    "a shape of text": lambda t, d: d["layers"]["middle_block.0.attn1.to_q"].update(up="wide"),
    "five dimensions": lambda t, d: d["layers"]["middle_block.0.attn1.to_q"].update(up=[1] * 5),
    "factors that do not fit": lambda t, d: d["layers"]["middle_block.0.attn1.to_q"].update(
        up=[2, 4]
    ),
    "a word from nowhere": lambda t, d: d.update(word="<hat>", superclass="hat"),
    "a tensor that nobody knows": lambda t, d: t.update(direction=torch.ones(4)),
    "the first version's number": lambda t, d: d.update(version=1),
    "a later version": lambda t, d: d.update(version=3),
}


@pytest.mark.parametrize("name", ODD)
def test_hostile_adaptations_without_a_word(tmp_path, name):
    path = write_adaptation(tmp_path / "a.safetensors", lora_adaptation(small_lora())).path
    with pytest.raises(CheckpointError):
        read_adaptation(altered(path, ODD[name]))


def test_an_unknown_method_is_named_with_what_to_do(tmp_path):
    path = write_adaptation(tmp_path / "one.safetensors", concept()).path
    altered(path, lambda t, d: d.update(method="hypernet"))
    with pytest.raises(
        CheckpointError, match=r"'hypernet' is not known here.*Update the node pack"
    ):
        read_adaptation(path)
    altered(path, lambda t, d: d.update(version=7))
    with pytest.raises(CheckpointError, match=r"7; this version reads .* up to 2. Update"):
        read_adaptation(path)


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
    kept = read_adaptation(folder / "concept.safetensors")
    word = kept.word
    assert (kept.method, word.word, word.superclass) == ("perfusion", "<hat>", "hat")
    assert word.contexts == ("a {}", "photo of a {}")
    assert kept.settings == PerfusionConfig()
    assert torch.equal(values_of(kept), (torch.arange(16.0) / 8).double())
    c = read_covariance(folder / "covariance.safetensors")
    assert torch.equal(c.matrix, torch.diag(torch.arange(1.0, 4.0)))


@pytest.mark.parametrize("kind", ["layers", "shared"])
def test_thousands_of_tensors_are_refused_at_once(tmp_path, kind):
    """Names times layers would take minutes."""
    import time

    count, layers = 4000, 4096
    names = {f"l{k}": {f"t{k}" if kind == "layers" else "t": [1]} for k in range(layers)}
    document = {
        "format": "difflora-concept", "version": 2, "method": "lora", "word": "", "superclass": "",
        "base": "x", "layers": names, "facts": {}, "contexts": [],
    }  # fmt: skip
    tensors = {f"t{k}": torch.zeros(1) for k in range(count)}
    path = tmp_path / "many.safetensors"
    write_atomic(tensors, {"difflora_concept": json.dumps(document)}, path)
    began = time.process_time()
    with pytest.raises(CheckpointError, match=r"makes no sense|more than any concept or style"):
        read_adaptation(path)
    assert time.process_time() - began < 3
