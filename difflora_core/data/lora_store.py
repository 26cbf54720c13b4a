"""A corpus of LoRAs too large for memory: shards that anybody adds, and an index over them.

    store.json            StoreFacts: layout and base model, written first
    shards/*.safetensors  some LoRAs each, flat, with what is known of them in the header
    index.parquet         a row a LoRA, made of the headers
    index.json            IndexFacts, written last: the digest of the index

A shard's name is the digest of its content, so that several machines add to one store without
speaking to each other, and the same LoRAs added twice are one file. A shard is there as a whole or
not at all; nothing is read that the index does not vouch for.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import build, parse_json
from ..errors import ConfigError, DatasetError, LayoutError, counted, shown
from ..lora.flat import flatten, unflatten
from ..lora.layout import LoRALayout
from ..lora.statistics import RunningStatistics, WeightStatistics
from ..lora.tokens import TokenGrid
from ..lora.weights import LoRAWeights
from ..storage.atomic import write_text
from ..storage.safetensors_io import TensorFile, open_tensors, write_atomic
from .lora_checks import LoRACheckSettings, why_unusable
from .lora_index import IndexRow, read_index, read_json, write_index

FACTS, SHARDS = "store.json", "shards"
FORMAT, VERSION = "difflora-lora-store", 1
_KIND = "shard of LoRAs"
_ROWS = "rows"


@dataclass(frozen=True)
class StoreFacts:
    """What `store.json` says: the layout's text, and which weights the LoRAs were trained on."""

    format: str
    version: int
    layout: str
    base_digest: str


@dataclass(frozen=True, eq=False)
class NewLoRA:
    """A LoRA to add.

    Attributes:
        identity: whose it is; once in a store.
        weights: one LoRA of the store's layout; None where its training failed.
        likeness: that it reached, in [-1, 1]; None where nobody measured.
        source: what it was made from, for skipping it the next time; a digest or a name.
        failure: why there are no weights.
    """

    identity: str
    weights: LoRAWeights | None
    likeness: float | None = None
    source: str = ""
    failure: str = ""


class StoreWriter:
    """Adds LoRAs to a store; any number of writers may.

    Args:
        folder: of the store; it is made when missing.
        layout: of all its LoRAs.
        base_digest: tells the weights they were trained on from others of the same family.

    Raises:
        DatasetError: the store is of another layout or base, or cannot be written.
    """

    def __init__(self, folder: Path, layout: LoRALayout, base_digest: str) -> None:
        self.folder, self.layout = folder, layout
        facts = StoreFacts(FORMAT, VERSION, layout.to_json(), base_digest)
        if (folder / FACTS).exists():
            _check_same(folder, _read_facts(folder), layout, base_digest)
        else:
            write_text(folder / FACTS, json.dumps(asdict(facts)) + "\n", DatasetError)

    def add(self, loras: Sequence[NewLoRA]) -> list[IndexRow]:
        """Checks LoRAs and writes those that can be used as one shard; the others are noted in it.

        Raises:
            LayoutError: one does not have the store's layout.
            DatasetError: an identity is there twice, or the shard cannot be written.
        """
        if len({lora.identity for lora in loras}) != len(loras):
            raise DatasetError("An identity stands twice among the LoRAs to add.")
        tensors: dict[str, Tensor] = {}
        rows = []
        for lora in loras:
            norm, reason, place, digest = 0.0, lora.failure or "its training failed", -1, ""
            if lora.weights is not None:
                norm, reason = why_unusable(lora.weights)
            if lora.weights is not None and not reason:
                flat = flatten(self.layout, lora.weights).detach().cpu().float().contiguous()
                place, digest = len(tensors), _digest(flat)
                tensors[str(place)] = flat
            likeness = None if lora.likeness is None else round(float(lora.likeness), 6)
            facts = (lora.identity, "", place, norm, likeness, digest, lora.source, reason)
            rows.append(IndexRow(*facts))
        text = json.dumps([asdict(row) for row in rows])
        name = hashlib.sha256(text.encode()).hexdigest()[:24]
        path = self.folder / SHARDS / f"{name}.safetensors"
        if not path.exists():
            metadata = {_ROWS: text, "layout_hash": self.layout.hash}
            write_atomic(tensors, metadata, path, DatasetError)
        return rows

    def rows(self) -> Iterator[IndexRow]:
        """What is known of every LoRA of every shard, from the headers."""
        for path in sorted((self.folder / SHARDS).glob("[0-9a-f]*.safetensors")):
            with open_tensors(path, _KIND, DatasetError) as file:
                yield from _shard_rows(file, self.layout)

    def write_index(
        self, checks: LoRACheckSettings | None = None, sources: Mapping[str, str] | None = None
    ) -> LoRAStore:
        """Makes the index of all shards.

        A LoRA that can be used takes the place of one of the same identity that could not.

        Args:
            checks: which LoRAs are kept.
            sources: identity to what its LoRA is made from now; what was made from something else,
                as from pictures that have changed since, does not count. None counts everything.

        Returns:
            The store, to read.

        Raises:
            DatasetError: a shard is damaged or of another layout, or two LoRAs of one identity
                differ.
        """
        unique: dict[str, IndexRow] = {}
        for row in self.rows():
            if sources is not None and sources.get(row.identity) != row.source:
                continue
            other = unique.setdefault(row.identity, row)
            if other.reason and not row.reason:
                unique[row.identity] = row
            elif not row.reason and other.digest != row.digest:
                raise DatasetError(
                    f"{shown(row.identity)} is in the corpus twice, with different LoRAs (shards "
                    f"{other.shard} and {row.shard}). Move one of the shards away."
                )
        rows = [unique[name] for name in sorted(unique)]
        write_index(self.folder, rows, checks or LoRACheckSettings())
        return LoRAStore(self.folder)


class LoRAStore:
    """An indexed store, read LoRA by LoRA.

    Args:
        folder: of the store.
        layout: that is expected; None takes what is there.
        base_digest: that is expected; empty takes what is there.

    Attributes:
        layout: of all LoRAs.
        facts: how they were judged.
        rows: those that are kept, sorted by identity.
        left_out: the others.

    Raises:
        DatasetError: there is no complete store, its index was changed, or it is of another base.
    """

    def __init__(
        self, folder: str | Path, layout: LoRALayout | None = None, base_digest: str = ""
    ) -> None:
        self.folder = Path(folder)
        facts = _read_facts(self.folder)
        self.layout = LoRALayout.from_json(facts.layout)
        _check_same(self.folder, facts, layout or self.layout, base_digest or facts.base_digest)
        self.facts, rows = read_index(self.folder)
        self.rows = tuple(row for row in rows if not row.reason)
        self.left_out = tuple(row for row in rows if row.reason)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> LoRAWeights:
        """The LoRA of a row, float32.

        Raises:
            DatasetError: its shard is missing, damaged, or not the one that was indexed.
        """
        row = self.rows[number]
        with self._open(row.shard) as file:
            return self._read(file, row)

    def batch(self, numbers: Sequence[int]) -> LoRAWeights:
        """LoRAs of some rows, (B, ...) float32."""
        return LoRAWeights.stack([self[number] for number in numbers])

    def stream(self) -> Iterator[tuple[int, LoRAWeights]]:
        """Number and LoRA of every row, shard by shard: each file is opened once."""
        order = sorted(range(len(self)), key=lambda n: (self.rows[n].shard, self.rows[n].place))
        start = 0
        while start < len(order):
            shard, end = self.rows[order[start]].shard, start
            with self._open(shard) as file:
                while end < len(order) and self.rows[order[end]].shard == shard:
                    yield order[end], self._read(file, self.rows[order[end]])
                    end += 1
            start = end

    def statistics(self, grid: TokenGrid) -> WeightStatistics:
        """Mean and scale of the tokens of all LoRAs, in one pass over the files.

        Args:
            grid: of the store's layout.
        """
        running = RunningStatistics(grid.mask())
        for _, weights in self.stream():
            running.add(grid.encode(weights)[0])
        return running.result()

    def _open(self, shard: str) -> Any:
        """The file of a shard."""
        return open_tensors(self.folder / SHARDS / f"{shard}.safetensors", _KIND, DatasetError)

    def _read(self, file: TensorFile, row: IndexRow) -> LoRAWeights:
        """One LoRA of an open shard."""
        name = str(row.place)
        kind, shape = file.header.tensors.get(name, ("", ()))
        if (kind, shape) == ("F32", (self.layout.numel,)):
            flat = file.read(name)
            if _digest(flat) == row.digest:
                return unflatten(self.layout, flat)
        raise DatasetError(
            f"{shown(row.shard)} does not hold the LoRA of {shown(row.identity)} that was indexed. "
            "Index the corpus again; what is damaged has to be trained again."
        )


def _shard_rows(file: TensorFile, layout: LoRALayout) -> list[IndexRow]:
    """What a shard's header says of its LoRAs.

    Raises:
        DatasetError: it is of another layout, or makes no sense.
    """
    place = shown(file.path.name)
    metadata = file.header.metadata
    if metadata.get("layout_hash") != layout.hash:
        raise DatasetError(f"{place} holds LoRAs of another base or rank. Move it away.")
    try:
        data = parse_json(metadata.get(_ROWS, ""), place)
        rows: tuple[IndexRow, ...] = build(tuple[IndexRow, ...], data, place)
    except ConfigError as damage:
        raise DatasetError(f"{place} is damaged: {damage} Move it away.") from damage
    wanted = {str(row.place): ("F32", (layout.numel,)) for row in rows if row.place >= 0}
    if dict(file.header.tensors) != wanted:
        raise DatasetError(f"{place} does not hold the LoRAs that it names. Move it away.")
    return [replace(row, shard=file.path.stem) for row in rows]


def _read_facts(folder: Path) -> StoreFacts:
    """What a store says of itself.

    Raises:
        DatasetError: there is none, or it is damaged.
    """
    facts: StoreFacts = read_json(StoreFacts, folder / FACTS, "There is no corpus of LoRAs")
    if facts.format != FORMAT or facts.version != VERSION:
        raise DatasetError(f"{shown(str(folder), 300)} is no corpus of format {FORMAT} {VERSION}.")
    return facts


def _check_same(folder: Path, facts: StoreFacts, layout: LoRALayout, base_digest: str) -> None:
    """Refuses a store of another base model."""
    try:
        there = LoRALayout.from_json(facts.layout)
    except LayoutError as damage:
        raise DatasetError(f"{shown(str(folder / FACTS), 300)} is damaged: {damage}") from damage
    place = shown(str(folder), 300)
    if there.hash != layout.hash:
        raise DatasetError(
            f"{place} is a corpus for {shown(there.base)} at rank {there.rank}, "
            f"{counted(len(there), 'layer')}; wanted is {shown(layout.base)} at rank "
            f"{layout.rank}, {counted(len(layout), 'layer')}. LoRAs of different bases cannot be "
            "mixed."
        )
    if facts.base_digest != base_digest:
        raise DatasetError(
            f"{place} holds LoRAs that were trained on other weights of {shown(there.base)}. Use "
            "that base model, or another folder."
        )


def _digest(flat: Tensor) -> str:
    """SHA-256 of a vector's bytes."""
    return hashlib.sha256(flat.view(torch.uint8).numpy().data).hexdigest()
