"""Files that the library writes itself: concepts, models, libraries, corpora, covariances."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import torch

from difflora_core.lora.layout import LoRALayout
from difflora_core.lora.weights import LoRALayer, LoRAWeights
from difflora_core.methods.base import ConceptMethod, StyleMethod, TrainedAdaptation
from difflora_core.methods.registry import METHODS
from difflora_core.models.difflora import DiffLoRAModel
from difflora_core.models.lae.autoencoder import LoRALatent
from difflora_core.storage.adapter_file import read_adaptation, write_adaptation
from difflora_core.storage.checkpoint import load_model, save_model
from difflora_core.storage.covariance_file import read_covariance, write_covariance
from difflora_core.storage.features_file import read_features, write_features
from difflora_core.storage.identity_library import add_people
from difflora_core.storage.library_file import Library, read_library, write_library
from difflora_core.storage.lora_corpus import LoRACorpus, load_corpus, save_corpus
from difflora_core.storage.thumbnail import make_thumbnail, read_thumbnail
from difflora_core.text.covariance import Covariance
from difflora_core.text.new_words import LearnedWord
from difflora_core.vision.features import TENSORS, ImageFeatures
from tests.contracts import contract_files

from .byte_edits import BYTE_EDITS
from .reader import JSON_FILE_EDITS, Reader, as_text, same, sound, written

LAYERS = ("input_blocks.1.attn2.to_v", "middle_block.attn2.to_v")
OTHER_LAYERS = ("a.to_v", "b.attn1.to_v")


def _concept(method: str, int8: bool = False, layers: tuple[str, ...] = LAYERS) -> bytes:
    """A concept of six numbers in, four out."""
    g = torch.Generator().manual_seed(7)
    direction = torch.randn(6, generator=g)
    shared = {"direction": direction, "covector": direction / direction.square().sum()}
    word = LearnedWord(
        "<a>",
        "hat",
        (torch.randn(3, generator=g), torch.randn(3, generator=g)),
        torch.randn(64, generator=g),
    )
    made = TrainedAdaptation(
        method, "tiny", METHODS[method].Config(), shared,
        {name: {"values": torch.randn(4, generator=g)} for name in layers}, word, {"steps": 3},
    )  # fmt: skip
    return written(lambda path: write_adaptation(path, made, int8))


def _style(method: str) -> bytes:
    """What the tests of a method without a word take for trained."""
    example = import_module(f"tests.methods.examples.{method}").example
    made = example(None, lambda: None)[0].adaptation
    return written(lambda path: write_adaptation(path, made))


def _check_adaptation(made: TrainedAdaptation, path: Path) -> None:
    sound(made)
    copy = path.with_name("copy.safetensors")
    write_adaptation(copy, made)
    again = read_adaptation(copy)
    assert again.layers.keys() == made.layers.keys(), "other layers"
    assert (again.method, again.base, again.settings) == (made.method, made.base, made.settings), (
        "facts"
    )
    assert (again.word and again.word.word) == (made.word and made.word.word), "another word"


def _check_model(model: DiffLoRAModel, path: Path) -> None:
    sound(dict(model.state_dict()))
    copy = save_model(model, path.with_name("copy.safetensors"), source={})
    again = load_model(copy)
    assert again.config == model.config, "configuration"
    assert again.layout == model.layout, "layout"
    assert same(dict(again.state_dict()), dict(model.state_dict())), "weights"


def _check_library(library: Library, path: Path) -> None:
    sound(
        [
            library.latents.z,
            library.names,
            library.model_name,
            library.latents.layout_hash,
            library.latents.space,
        ]
    )
    sound([person.added for person in library.people])
    copy = path.with_name("copy.safetensors")
    write_library(copy, library)
    again = read_library(copy)
    assert again.people == library.people, "people"
    assert torch.equal(again.latents.z, library.latents.z), "latents"


def _corpus(shared: bool) -> bytes:
    g = torch.Generator().manual_seed(3)
    layout = contract_files.tiny_layout()
    layers = {
        shape.name: LoRALayer(
            torch.randn(1, 2, shape.in_features, generator=g).expand(3, -1, -1)
            if shared
            else torch.randn(3, 2, shape.in_features, generator=g),
            torch.randn(3, shape.out_features, 2, generator=g),
            2.0,
        )
        for shape in layout
    }
    corpus = LoRACorpus(layout, (7, 1, 4), LoRAWeights(layers), {"steps": 3, "settings": {"a": 1}})
    return written(lambda path: save_corpus(corpus, path))


def _check_corpus(corpus: LoRACorpus, path: Path) -> None:
    sound(
        [
            corpus.layout,
            corpus.source,
            {n: [v.down, v.up, v.alpha] for n, v in corpus.weights.layers.items()},
        ]
    )
    assert all(number >= 0 for number in corpus.identities), "identity below 0"
    assert isinstance(corpus.source, dict), "source"
    again = load_corpus(save_corpus(corpus, path.with_name("copy.safetensors")))
    assert again.identities == corpus.identities, "identities"
    assert again.layout == corpus.layout, "layout"
    assert same(dict(again.weights.layers), dict(corpus.weights.layers)), "weights"


def _check_features(features: ImageFeatures, path: Path) -> None:
    parts = [getattr(features, name) for name in TENSORS]
    sound([*parts, features.recogniser])
    again = read_features(write_features(path.with_name("copy.safetensors"), features))
    assert same([getattr(again, name) for name in TENSORS], parts), "comes back changed"
    assert again.recogniser == features.recogniser, "another recogniser"


def _check_covariance(covariance: Covariance, path: Path) -> None:
    sound([covariance.matrix, covariance.ridge, covariance.probe, covariance.inverse])
    assert covariance.tokens > 0, "tokens"
    again = read_covariance(write_covariance(path.with_name("copy.safetensors"), covariance))
    assert same(again, covariance), "comes back changed"


def _check_layout(layout: LoRALayout, path: Path) -> None:
    sound(layout)
    assert isinstance(layout.base, str), "base"
    assert type(layout.rank) is int, "rank"
    assert layout.layers, "no layer"
    for shape in layout:
        assert {type(shape.name), type(shape.diffusers_name)} == {str}, "names"
        assert {type(shape.in_features), type(shape.out_features)} == {int}, "sizes"
        assert min(shape.in_features, shape.out_features) > 0, "sizes below 1"
    assert LoRALayout.from_json(layout.to_json()) == layout, "comes back changed"
    assert layout.hash, "hash"


def _library(names: list[str]) -> bytes:
    z = torch.randn(len(names), 2, 3, generator=torch.Generator().manual_seed(1))
    pictures = [
        make_thumbnail(torch.rand(9, 9, 3, generator=torch.Generator().manual_seed(2))),
        *[None] * (len(names) - 1),
    ]
    latents = LoRALatent(z, contract_files.tiny_layout().hash)
    return written(lambda path: add_people(path, latents, names, pictures, "model"))


def _noise(height: int, width: int) -> torch.Tensor:
    return torch.rand(height, width, 3, generator=torch.Generator().manual_seed(2))


WORDS = [name for name, method in METHODS.items() if issubclass(method, ConceptMethod)]
STYLES = [name for name, method in METHODS.items() if issubclass(method, StyleMethod)]
ADAPTATIONS = {
    **{name: (lambda m=name: _concept(m)) for name in WORDS},
    **{f"{name}, 8 bits": (lambda m=name: _concept(m, int8=True)) for name in WORDS},
    **{f"{name}, version 2": (lambda m=name: _concept(m, layers=OTHER_LAYERS)) for name in WORDS},
    **{name: (lambda m=name: _style(m)) for name in STYLES},
    "LoRA": lambda: written(contract_files.write_small_adapter),
    "own contexts": lambda: written(contract_files.write_small_concept),
}
MODEL = {"demo": lambda: written(contract_files.write_checkpoint)}
LIBRARY = {
    "two people": lambda: written(contract_files.write_library),
    "five people": lambda: _library(["Ada", "Żółć 李", "Ben", "C", "D"]),
}
CORPUS = {"own factors": lambda: _corpus(False), "shared factors": lambda: _corpus(True)}
LAYOUTS = {"demo": lambda: contract_files.tiny_layout().to_json().encode()}

COVARIANCE = {"three directions": lambda: written(contract_files.write_small_covariance)}
FEATURES = {"two photos": lambda: written(contract_files.write_small_features)}
THUMBNAIL = {"picture": lambda: make_thumbnail(_noise(20, 30))}

READERS = (
    Reader(
        "concept", ADAPTATIONS, lambda path, _: read_adaptation(path), _check_adaptation, share=4
    ),
    Reader(
        "covariance", COVARIANCE, lambda path, _: read_covariance(path), _check_covariance, share=2
    ),
    Reader("features", FEATURES, lambda path, _: read_features(path), _check_features, share=2),
    Reader("library", LIBRARY, lambda path, _: read_library(path), _check_library, share=3),
    Reader("corpus", CORPUS, lambda path, _: load_corpus(path), _check_corpus, share=3),
    Reader("checkpoint", MODEL, lambda path, _: load_model(path), _check_model),
    Reader(
        "layout JSON",
        LAYOUTS,
        lambda path, _: LoRALayout.from_json(as_text(path)),
        _check_layout,
        JSON_FILE_EDITS,
        share=4,
        file="file.json",
    ),
    Reader(
        "thumbnail",
        THUMBNAIL,
        lambda path, _: read_thumbnail(path.read_bytes()),
        lambda pixels, path: sound(pixels),
        BYTE_EDITS,
        share=2,
        file="file.jpg",
    ),
)
