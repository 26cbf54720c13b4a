"""A corpus of LoRAs in one file: one trained LoRA per identity, factors batched."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import parse_json
from ..errors import CheckpointError, LayoutError, counted, described
from ..lora.layout import LoRALayout
from ..lora.weights import LoRALayer, LoRAWeights
from .safetensors_io import Header, open_tensors, write_atomic

FORMAT = "difflora-lora-corpus-1"
KIND = "LoRA corpus"


@dataclass(frozen=True, eq=False)
class LoRACorpus:
    """LoRAs of M identities.

    Args:
        layout: layers, shapes and rank.
        identities: M identity numbers, in the order of the batch; no two are equal.
        weights: down (M, r, in), up (M, out, r).
        source: facts about the making (settings, commit); JSON.

    Raises:
        LayoutError: the weights do not fit the layout or the identities.
    """

    layout: LoRALayout
    identities: tuple[int, ...]
    weights: LoRAWeights
    source: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.layout.check(self.weights)
        count = len(self.identities)
        if self.weights.batch_shape != (count,) or len(set(self.identities)) != count:
            raise LayoutError(
                f"A corpus needs one LoRA for each identity, got {counted(count, 'number')} "
                f"({len(set(self.identities))} different) and LoRAs {self.weights.batch_shape}."
            )

    def __len__(self) -> int:
        return len(self.identities)

    def select(self, identities: Sequence[int]) -> LoRACorpus:
        """The LoRAs of these identities, in this order.

        Raises:
            LayoutError: an identity is not in the corpus.
        """
        rows = {identity: row for row, identity in enumerate(self.identities)}
        missing = [identity for identity in identities if identity not in rows]
        if missing:
            raise LayoutError(
                f"The corpus has no LoRA of {counted(len(missing), 'identity')}: {missing[:3]}."
            )
        index = torch.tensor([rows[identity] for identity in identities], dtype=torch.long)
        picked = {
            name: LoRALayer(layer.down[index], layer.up[index], layer.alpha)
            for name, layer in self.weights.layers.items()
        }
        return LoRACorpus(self.layout, tuple(identities), LoRAWeights(picked), self.source)

    @staticmethod
    def join(parts: Sequence[LoRACorpus]) -> LoRACorpus:
        """One corpus of several with the same layout; keeps the first one's source.

        Raises:
            LayoutError: no part, different layouts, or an identity twice.
        """
        if not parts or any(part.layout != parts[0].layout for part in parts):
            raise LayoutError("Only corpora of one LoRA layout can be joined, and at least one.")
        layers = {
            shape.name: LoRALayer(
                torch.cat([part.weights[shape.name].folded().down for part in parts]),
                torch.cat([part.weights[shape.name].folded().up for part in parts]),
                float(parts[0].layout.rank),
            )
            for shape in parts[0].layout
        }
        identities = tuple(identity for part in parts for identity in part.identities)
        return LoRACorpus(parts[0].layout, identities, LoRAWeights(layers), parts[0].source)


def save_corpus(corpus: LoRACorpus, path: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Write a corpus as one file, atomically; a `down` that all share is written once.

    Raises:
        CheckpointError: a weight is not finite, or the file cannot be written.
    """
    tensors: dict[str, Tensor] = {"identities": torch.tensor(corpus.identities)}
    for name, layer in corpus.weights.folded().layers.items():
        down, up = (part.detach().cpu().to(dtype) for part in (layer.down, layer.up))
        shared = len(corpus) > 1 and bool((down == down[:1]).all())
        tensors[f"down.{name}"] = (down[:1] if shared else down).contiguous()
        tensors[f"up.{name}"] = up.contiguous()
        if not all(bool(torch.isfinite(part).all()) for part in (down, up)):
            raise CheckpointError(f"The corpus was not saved: {name} holds values not finite.")
    facts = {
        "format": FORMAT,
        "layout": corpus.layout.to_json(),
        "layout_hash": corpus.layout.hash,
        "source": json.dumps(dict(corpus.source), sort_keys=True),
    }
    return write_atomic(tensors, facts, path)


def load_corpus(path: Path) -> LoRACorpus:
    """Read a corpus as float32.

    Raises:
        CheckpointError: the file is missing, damaged, no corpus, or holds other tensors than its
            layout asks for, or values not finite.
    """
    try:
        return _load(path)
    except (CheckpointError, LayoutError) as error:
        raise CheckpointError(f"{path} cannot be read as a LoRA corpus: {error}") from error


def _load(path: Path) -> LoRACorpus:
    """The corpus of a file; the message of an error says nothing of the file yet."""
    with open_tensors(path, KIND) as file:
        layout = _checked(file.header)
        tensors, facts = file.read_all(), file.header.metadata
    identities = tuple(tensors["identities"].tolist())
    if min(identities, default=0) < 0:
        raise _altered(f"it has an identity {min(identities)}, and they are numbered from 0")
    layers = {
        shape.name: LoRALayer(
            _single(tensors[f"down.{shape.name}"]).expand(len(identities), -1, -1),
            _single(tensors[f"up.{shape.name}"]),
            float(layout.rank),
        )
        for shape in layout
    }
    source = parse_json(facts.get("source", "{}"), "its source", CheckpointError)
    if not isinstance(source, dict):
        raise _altered("its source is no table")
    return LoRACorpus(layout, identities, LoRAWeights(layers), source)


def _checked(header: Header) -> LoRALayout:
    """The layout of a corpus, after a check of its tensors against it."""
    if header.metadata.get("format") != FORMAT:
        raise CheckpointError(f"it is not a LoRA corpus of format {FORMAT}.")
    layout = LoRALayout.from_json(header.metadata.get("layout", ""))
    if layout.hash != header.metadata.get("layout_hash"):
        raise _altered("its layout does not match its own hash")
    kinds = {name: kind for name, (kind, _) in header.tensors.items()}
    shapes = {name: shape for name, (_, shape) in header.tensors.items()}
    count = math.prod(shapes.get("identities", ()))
    wanted: dict[str, set[tuple[int, ...]]] = {"identities": {(count,)}}
    for s in layout:
        sizes = (layout.rank, s.in_features)
        wanted[f"down.{s.name}"] = {(count, *sizes), (1, *sizes)}
        wanted[f"up.{s.name}"] = {(count, s.out_features, layout.rank)}
    missing, extra = sorted(wanted.keys() - shapes), sorted(shapes.keys() - wanted)
    if missing or extra:
        raise _altered(
            f"its tensors are not those of its layout, {len(missing)} missing (first "
            f"{described(missing[:1])}), {len(extra)} unexpected (first {described(extra[:1])})",
        )
    for name, shape in shapes.items():
        whole = kinds[name] == "I64"
        if shape not in wanted[name] or whole is not (name == "identities"):
            raise _altered(f"{name} has another shape or type than its layout asks for")
        if not whole and kinds[name] not in ("F32", "F16", "BF16", "F64"):
            raise _altered(f"{name} is stored as {kinds[name]}")
    return layout


def _single(stored: Tensor) -> Tensor:
    """A factor in float32, where numbers of float64 may have no place."""
    factor = stored.float()
    if not bool(factor.isfinite().all()):
        raise _altered("it holds a number beyond float32")
    return factor


def _altered(reason: str) -> CheckpointError:
    """What to say of a file that was written as a corpus and is none any more."""
    return CheckpointError(f"{reason}. Delete it and make the corpus again.")
