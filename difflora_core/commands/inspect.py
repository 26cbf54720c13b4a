"""`inspect`: what a file or folder is, and what it holds; nothing is trusted, little is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ..config import Config, parse_json
from ..data import lora_store, prepared
from ..errors import CheckpointError, ConfigError, EncoderError, counted, shown
from ..lora.formats.change import keys_by_role, kind_of
from ..lora.layout import LoRALayout
from ..models.hyperlora.model import HyperLoRAModel
from ..storage import (
    adapter_file,
    checkpoint,
    covariance_file,
    features_file,
    hyperlora_folder,
    library_file,
    lora_corpus,
)
from ..storage.lora_file import base_of, read_lora_file
from ..storage.safetensors_io import Header, read_header
from ..training.event_log import EVENTS
from ..vision.face_folder import read_face_folder
from . import run_folder
from .machine import measure

Facts = dict[str, str]
"""What is said of a file: name to value, in order."""


@dataclass(frozen=True)
class Settings(Config):
    """Says what a file or folder is, and what it holds.

    Args:
        path: a LoRA, a model, a concept or style, a corpus, a library, or the folder of a run, of a
            HyperLoRA model or of a face analysis.
        measure: measures this machine for some seconds instead, and writes to path what plan reads.
    """

    path: str
    measure: bool = False


def run(settings: Settings, console: Console) -> None:
    """Prints the facts, one a line.

    Raises:
        DiffLoRAError: there is nothing, or it is damaged or unknown.
    """
    path = Path(settings.path)
    facts = _measured(path) if settings.measure else facts_of(path)
    for name, value in facts.items():
        console.print(f"{name:<14}  {value}")


def _measured(path: Path) -> Facts:
    """What this machine can do, written to a file."""
    found = measure(path)
    return {"kind": "Machine"} | {name: f"{value}" for name, value in found.to_dict().items()}


def facts_of(path: Path) -> Facts:
    """What is said of a file or folder.

    Raises:
        DiffLoRAError: see `run`.
    """
    if path.is_dir():
        return _folder(path)
    header = read_header(path, "file")
    for key, describe in FILES.items():
        if key in header.metadata:
            return describe(path, header)
    if header.metadata.get("format") == lora_corpus.FORMAT:
        return _corpus(path, header)
    if keys_by_role(dict.fromkeys(header.tensors, torch.empty(0))):
        return _lora(path)
    raise CheckpointError(
        f"{shown(path.name)} is a .safetensors file of {counted(len(header.tensors), 'tensor')}, "
        "but of no kind that is known here."
    )


def _lora(path: Path) -> Facts:
    """A LoRA of any family, by its tensors; the metadata only adds words."""
    file = read_lora_file(path)
    groups = [
        {role.removesuffix("_peft"): file.tensors[key] for role, key in keys.items()}
        for keys in keys_by_role(file.tensors).values()
    ]
    downs = [group["down"] for group in groups if "down" in group]
    alphas = {float(group["alpha"]) for group in groups if "alpha" in group}
    kinds = {_family(group) for group in groups} - {""}
    said = {
        name: file.metadata[key]
        for name, key in (
            ("title", "modelspec.title"),
            ("trigger words", "modelspec.trigger_phrase"),
            ("made by", "difflora.model_hash"),
            ("seed", "difflora.seed"),
            ("licence", "modelspec.license"),
        )
        if file.metadata.get(key)
    }
    return {
        "kind": f"LoRA file ({', '.join(sorted(kinds)) or 'of an unknown family'})",
        "base": base_of(file.tensors) or "cannot be read off its layers",
        "layers": str(len(groups)),
        "rank": _listed({len(down) for down in downs if down.ndim}) or "none",
        "alpha": _listed(alphas) or "not said",
        "stored as": _listed({str(t.dtype).removeprefix("torch.") for t in file.tensors.values()}),
        **{name: shown(value) for name, value in said.items()},
    }


def _family(group: Mapping[str, torch.Tensor]) -> str:
    """What a layer of a LoRA file is called."""
    marks = {"up": "LoRA", "hada_w1_a": "LoHa", "diff": "whole changes"}
    marks |= dict.fromkeys(("lokr_w1", "lokr_w1_a"), "LoKr")
    if {"dora", "oft_blocks", "a1"} & set(group):
        return kind_of(group)
    return next((name for role, name in marks.items() if role in group), "")


def _model(path: Path, header: Header) -> Facts:
    """A DiffLoRA model, by its description."""
    about = checkpoint.read_description(path)
    config, source = about.config, about.source
    return {
        "kind": f"DiffLoRA model, preset {config.preset}",
        **_layout(about.layout),
        "numbers": _millions(header),
        "latent": f"{config.lae.latent_tokens} x {config.lae.latent_dim}",
        "face encoder": shown(config.face_encoder) or "not said",
        "image encoder": shown(config.image_encoder) or "not said",
        **{f"its {shown(name)}": shown(str(value), 300) for name, value in source.items()},
    }


def _adaptation(path: Path, header: Header) -> Facts:
    """A concept or style."""
    made = adapter_file.read_adaptation(path)
    return {
        "kind": f"{'Concept' if made.word else 'Style'}, method {made.method}",
        "base": shown(made.base),
        **({"word": shown(made.word.word)} if made.word else {}),
        "layers": str(len(made.layers)),
        "stored as": _types(header),
    }


def _corpus(path: Path, header: Header) -> Facts:
    """A corpus of LoRAs in one file."""
    layout = LoRALayout.from_json(header.metadata.get("layout", ""))
    people = header.tensors.get("identities", ("", (0,)))[1]
    return {"kind": "LoRA corpus", "people": str(people[0]), **_layout(layout)}


def _library(path: Path, header: Header) -> Facts:
    """An identity library."""
    library = library_file.read_library(path)
    facts = {"kind": "Identity library", "people": str(len(library))}
    facts["model"] = shown(library.model_name) or "not said"
    return facts | ({"licence": library.latents.license} if library.latents.license else {})


def _features(path: Path, header: Header) -> Facts:
    """Features of photos."""
    found = features_file.read_features(path)
    sizes = found.sizes
    return {
        "kind": "Features of one person",
        "photos": str(len(found)),
        "with a face": str(int(found.face_found.sum())),
        "recogniser": shown(found.recogniser) or "not said",
        "sizes": f"face {sizes.face}, image {sizes.image}, {sizes.tokens} x {sizes.token_dim}",
    }


def _covariance(path: Path, header: Header) -> Facts:
    """What concepts of one pair of text encoders share."""
    found = covariance_file.read_covariance(path)
    return {"kind": "Covariance of text encoders", "tokens": str(found.tokens)}


FILES: Mapping[str, Callable[[Path, Header], Facts]] = {
    checkpoint.METADATA_KEY: _model,
    adapter_file.METADATA_KEY: _adaptation,
    library_file.METADATA_KEY: _library,
    features_file.METADATA_KEY: _features,
    covariance_file.METADATA_KEY: _covariance,
}
"""A field of the metadata to what describes such a file."""


def _folder(path: Path) -> Facts:
    """A folder of a known kind."""
    if (path / prepared.FACTS).exists():
        return _dataset(path)
    if (path / lora_store.FACTS).exists():
        return _lora_store(path)
    if (path / run_folder.VERSIONS).exists() and (path / run_folder.SETTINGS).exists():
        return _run(path)
    if hyperlora_folder.is_hyperlora_folder(path):
        return _hyperlora(path)
    if (path / "model_index.json").exists():
        index = _table(path / "model_index.json")
        parts = [shown(name) for name, value in index.items() if isinstance(value, list)]
        kind = shown(str(index.get("_class_name")))
        return {"kind": f"diffusers folder, {kind}", "parts": ", ".join(parts)}
    if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
        return {"kind": "Dataset in Arrow form"}
    try:
        faces = read_face_folder(path)
    except EncoderError as damage:
        return {"kind": "Face analysis, unusable", "why": str(damage)}
    if not faces.files:
        raise ConfigError(f"The folder {shown(str(path), 300)} is of no kind that is known here.")
    return {
        "kind": "Face analysis" + ("" if faces.complete else ", incomplete"),
        "detector": faces.detector or "missing",
        "recogniser": faces.recogniser or "missing",
    }


def _dataset(path: Path) -> Facts:
    """A dataset that `prepare` made."""
    dataset = prepared.PreparedDataset(path)
    sizes = ", ".join(f"{height} x {width}" for height, width in list(dataset.buckets)[:8])
    return {
        "kind": "Prepared dataset",
        "pictures": str(len(dataset)),
        "people": str(dataset.facts.people),
        "sizes": sizes + (", …" if len(dataset.buckets) > 8 else ""),
        "face encoder": shown(dataset.facts.face_encoder) or "none",
        "licence": shown(str(dataset.facts.settings.get("licence", "")), 300) or "not given",
        "notes": "; ".join(map(shown, dataset.facts.notes)) or "none",
    }


def _lora_store(path: Path) -> Facts:
    """A corpus of LoRAs in shards."""
    store = lora_store.LoRAStore(path)
    return {
        "kind": "Corpus of LoRAs",
        "base": shown(store.layout.base),
        "layers": str(len(store.layout)),
        "rank": str(store.layout.rank),
        "LoRAs": str(len(store)),
        "left out": str(len(store.left_out)),
    }


def _run(path: Path) -> Facts:
    """The folder of a run."""
    versions = _table(path / run_folder.VERSIONS)
    facts = {"kind": "Run", "called": shown(str(versions.pop("called", "")), 300)}
    facts["versions"] = ", ".join(f"{shown(k)} {shown(str(v))}" for k, v in versions.items())
    models = sorted(own.name for own in path.glob("*.safetensors"))
    last = [log for log in sorted(path.rglob(EVENTS)) if log.stat().st_size]
    for log in last:
        line = log.read_bytes().splitlines()[-1]
        stage = log.parent.relative_to(path).as_posix()
        facts[f"last event of {stage}"] = shown(line.decode("utf-8", "replace"), 300)
    return facts | ({"models": ", ".join(map(shown, models))} if models else {})


def _hyperlora(path: Path) -> Facts:
    """A HyperLoRA model, by the headers of its files: the basis alone has 3 GB."""
    missing = [name for name in hyperlora_folder.FILES if not (path / name).is_file()]
    if missing:
        return {"kind": "HyperLoRA model, incomplete", "missing": ", ".join(missing)}
    modules = _table(path / hyperlora_folder.MODULES)
    header = read_header(path / hyperlora_folder.BASIS, "HyperLoRA file")
    shapes = [shape for n, (_, shape) in header.tensors.items() if n.endswith("id_down_basis")]
    return {
        "kind": "HyperLoRA model",
        "base": "sdxl",
        "layers": str(4 * len(modules)),
        "rank": _listed({shape[2] for shape in shapes if len(shape) == 3}),
        "basis": _listed({shape[0] for shape in shapes if shape}),
        "stored as": _types(header),
        "licence": HyperLoRAModel.license,
    }


def _layout(layout: LoRALayout) -> Facts:
    """Base, layers and rank of the LoRAs that a file makes or holds."""
    return {
        "base": shown(layout.base),
        "layers": str(len(layout)),
        "rank": str(layout.rank),
        "LoRA": f"{layout.numel / 1e6:.3g} M numbers",
    }


def _millions(header: Header) -> str:
    """How many numbers a file holds, and how they are stored."""
    count = sum(torch.Size(shape).numel() for _, shape in header.tensors.values())
    return f"{count / 1e6:.4g} M as {_types(header)}"


def _types(header: Header) -> str:
    """How tensors are stored, as safetensors spells it."""
    return _listed({kind for kind, _ in header.tensors.values()})


def _table(path: Path) -> dict[str, Any]:
    """A JSON file that holds a table.

    Raises:
        CheckpointError: it does not, or cannot be read.
    """
    try:
        data = parse_json(path.read_bytes(), shown(path.name), CheckpointError)
    except OSError as error:
        raise CheckpointError(
            f"{shown(str(path), 300)} cannot be read: {error.strerror}."
        ) from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{shown(path.name)} is damaged: it holds no table.")
    return data


def _listed(values: set[Any]) -> str:
    """Different values in order: "4, 8"."""
    return ", ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in sorted(values))
