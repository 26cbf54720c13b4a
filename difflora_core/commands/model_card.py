"""The model card: what a trained model is, what it was made with, and on what terms."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import counted
from ..models.difflora import DiffLoRAModel
from ..storage.atomic import write_text


def write_card(file: Path, model: DiffLoRAModel, source: Mapping[str, Any], settings: str) -> Path:
    """Writes the card beside a model's file, with the fields at its top that model hubs read.

    Args:
        file: of the model.
        model: the model.
        source: facts of its making, as they stand in the file.
        settings: of the run, as JSON.
    """
    count = sum(p.numel() for p in model.parameters())
    rows = "\n".join(f"| {name} | {_cell(value)} |" for name, value in source.items())
    license = source.get("license") or "unknown"
    text = f"""---
library_name: difflora
pipeline_tag: image-to-image
tags: [difflora, lora, {model.layout.base}]
license: other
license_name: {json.dumps(license)}
---

# {file.name}

A DiffLoRA model: photos of a person to that person's LoRA of rank {model.layout.rank} for
{model.layout.base}, in {counted(len(model.layout), "layer")}.
Preset {model.config.preset}, {count:,} numbers.

Put it into ComfyUI's `models/difflora`, or run
`python -m difflora_core generate {file.name} PHOTO`. It knows people by these encoders alone:

- face recogniser: {model.config.face_encoder or "none"}
- CLIP vision: {model.config.image_encoder or "none"}

| | |
|---|---|
{rows}

## Settings

```json
{settings}
```
"""
    return write_text(file.with_suffix(".md"), text)


def _cell(value: object) -> str:
    """A value in a table."""
    return str(value).replace("|", "/").replace("\n", " ")
