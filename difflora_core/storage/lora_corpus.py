"""A corpus of LoRAs in one file: one trained LoRA per identity, factors batched."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, LayoutError
from ..lora.layout import LoRALayout
from ..lora.weights import LoRALayer, LoRAWeights
from .safetensors_io import read_file, write_atomic

FORMAT = "difflora-lora-corpus-1"


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
                f"A corpus needs one LoRA for each identity, got {count} numbers "
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
                f"The corpus has no LoRA of {len(missing)} identities: {missing[:3]}."
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
        tensors, facts = read_file(path, "LoRA corpus")
    except CheckpointError as error:
        raise CheckpointError(f"{path} cannot be read as a LoRA corpus: {error}") from error
    if facts.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a LoRA corpus of format {FORMAT}.")
    try:
        layout = LoRALayout.from_json(facts["layout"])
        if layout.hash != facts["layout_hash"]:
            raise CheckpointError(f"{path}: the LoRA layout was altered.")
        _check_tensors(path, layout, tensors)
        identities = tuple(int(number) for number in tensors["identities"])
        layers = {
            shape.name: LoRALayer(
                tensors[f"down.{shape.name}"].float().expand(len(identities), -1, -1),
                tensors[f"up.{shape.name}"].float(),
                float(layout.rank),
            )
            for shape in layout
        }
        return LoRACorpus(layout, identities, LoRAWeights(layers), json.loads(facts["source"]))
    except (KeyError, TypeError, ValueError, RuntimeError, LayoutError) as error:
        raise CheckpointError(f"{path} cannot be read as a LoRA corpus: {error}.") from error


def _check_tensors(path: Path, layout: LoRALayout, tensors: Mapping[str, Tensor]) -> None:
    """Raises CheckpointError unless a file has the tensors of its layout alone, all finite."""
    wanted = {"identities"} | {f"{part}.{s.name}" for s in layout for part in ("down", "up")}
    missing, extra = sorted(wanted - tensors.keys()), sorted(tensors.keys() - wanted)
    if missing or extra:
        raise CheckpointError(
            f"{path} cannot be read as a LoRA corpus: its tensors are not those of its layout, "
            f"{len(missing)} missing (first {missing[:1]}), {len(extra)} unexpected (first "
            f"{extra[:1]}). Delete it and make the corpus again."
        )
    broken = [name for name in sorted(wanted) if not bool(tensors[name].float().isfinite().all())]
    if broken:
        raise CheckpointError(
            f"{path} cannot be read as a LoRA corpus: {broken[0]} holds values not finite. Delete "
            "it and make the corpus again."
        )
