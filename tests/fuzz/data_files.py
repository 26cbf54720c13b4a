"""What training reads and prepares: pictures, lists of pictures, datasets, corpora in shards."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from PIL import Image

from difflora_core.config import ConfigError
from difflora_core.data.folder_sources import MetadataSource
from difflora_core.data.lora_store import LoRAStore, NewLoRA, StoreWriter
from difflora_core.data.pictures import open_picture
from difflora_core.data.prepared import (
    FACTS,
    FORMAT,
    SHARD_ROWS,
    DatasetFacts,
    ShardFile,
    read_facts,
)
from difflora_core.data.sources import Entry
from difflora_core.lora.layout import LayerShape, LoRALayout
from difflora_core.lora.weights import LoRALayer, LoRAWeights

from .byte_edits import BYTE_EDITS
from .reader import JSON_FILE_EDITS, Reader, sound

LAYOUT = LoRALayout("demo", 2, (LayerShape("a", 5, 3), LayerShape("b", 4, 6)))


def _picture(kind: str, mode: str) -> bytes:
    """A small picture file."""
    buffer = io.BytesIO()
    Image.effect_noise((24, 16), 40).convert(mode).save(buffer, kind)
    return buffer.getvalue()


def _facts() -> bytes:
    """Facts of a dataset of two files."""
    files = (
        ShardFile("data-00000.arrow", 1000, SHARD_ROWS, "ab"),
        ShardFile("data-00001.arrow", 100, 3, "cd"),
    )
    counts = {"pictures": 300, "duplicate": 41}
    facts = DatasetFacts(FORMAT, 1, {"a": [1]}, "d", "x/y.onnx", files, 5, counts, ("a note",))
    return facts.to_json().encode()


def _check_facts(facts: DatasetFacts, path: Path) -> None:
    path.write_text(facts.to_json(), "utf-8")
    assert read_facts(path.parent) == facts, "comes back changed"


def _shard() -> bytes:
    """A shard of two LoRAs."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        draw = torch.Generator().manual_seed(0)
        loras = [
            NewLoRA(
                name,
                LoRAWeights(
                    {
                        s.name: LoRALayer(
                            torch.randn(2, s.in_features, generator=draw),
                            torch.randn(s.out_features, 2, generator=draw),
                            2.0,
                        )
                        for s in LAYOUT
                    }
                ),
                0.5,
            )
            for name in ("anna", "bodo")
        ]
        StoreWriter(Path(folder), LAYOUT, "x").add(loras)
        (shard,) = (Path(folder) / "shards").iterdir()
        return shard.read_bytes()


def _read_shard(path: Path, family: str) -> list[LoRAWeights]:
    """The LoRAs of a store whose only shard is the file."""
    folder = path.parent / "store"
    writer = StoreWriter(folder, LAYOUT, "x")
    (folder / "shards").mkdir(exist_ok=True)
    (folder / "shards" / "ab.safetensors").write_bytes(path.read_bytes())
    store: LoRAStore = writer.write_index()
    return [weights for _, weights in store.stream()]


def _check_shard(loras: list[LoRAWeights], path: Path) -> None:
    for weights in loras:
        LAYOUT.check(weights)
        for layer in weights.layers.values():
            sound(layer.down)
            sound(layer.up)


def _read_list(path: Path, family: str) -> list[Entry]:
    """Entries of a list; a list that gives none is refused here, since its reader never is."""
    entries = [e for e in MetadataSource(str(path.parent)).entries() if "line 1" not in e.key]
    if not entries:
        raise ConfigError("nothing in it")
    return entries


def _check_list(entries: list[Entry], path: Path) -> None:
    for entry in entries:
        for text in (entry.key, entry.person, entry.refused, *entry.captions):
            text.encode()
        assert entry.repeats >= 1, "repeats"


def _check_picture(picture: Image.Image, path: Path) -> None:
    assert picture.mode == "RGB", "mode"
    assert min(picture.size) > 0, "size"
    picture.tobytes()


PICTURES = {
    f"{kind} {mode}": (lambda k=kind, m=mode: _picture(k, m))
    for kind, mode in (
        *(("PNG", "RGB"), ("PNG", "P"), ("PNG", "LA"), ("JPEG", "RGB"), ("JPEG", "CMYK")),
        *(("WEBP", "RGB"), ("TIFF", "RGB"), ("BMP", "RGB"), ("GIF", "P")),
    )
}
LINE = b'{"file_name": "x.png", "person": "anna", "text": ["a", "b"], "repeats": 3}'
READERS = (
    Reader(
        "picture to train on",
        PICTURES,
        lambda path, _: open_picture(path.read_bytes()),
        _check_picture,
        BYTE_EDITS,
        share=3,
    ),
    Reader(
        "dataset facts", {"facts": _facts}, lambda path, _: read_facts(path.parent),
        _check_facts, JSON_FILE_EDITS, share=3, file=FACTS,
    ),
    Reader(
        "list of pictures", {"a line": lambda: LINE}, _read_list, _check_list, JSON_FILE_EDITS,
        share=2, file="metadata.jsonl",
    ),
    Reader("shard of LoRAs", {"two": _shard}, _read_shard, _check_shard, share=3),
)  # fmt: skip
