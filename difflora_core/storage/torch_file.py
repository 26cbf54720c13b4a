"""Tensors of a `.pt` file, read by torch without running what a pickle could hold.

The command line converts such files once; ComfyUI's nodes never meet one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import LoRAFileError, shown
from ..limits import FILE_BYTES, NAME_LENGTH, TENSORS

SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
SAFE_TORCH = (2, 6)
"""Before it, `weights_only` could be made to run code (CVE-2025-32434)."""
_GROUPS = ("state_dict", "model", "weights")
"""Names under which trainers put the tensors."""


def read_torch_file(path: Path) -> dict[str, Tensor]:
    """The tensors of a file that `torch.save` wrote, by name, on the CPU.

    Args:
        path: holds a table of tensors, perhaps below one of the usual names.

    Raises:
        LoRAFileError: it cannot be read, holds more than tensors, or torch is too old to read it
            safely.
    """
    name = shown(path.name)
    found = tuple(int(n) for n in re.findall(r"\d+", torch.__version__)[:2])
    if found < SAFE_TORCH:
        raise LoRAFileError(
            f"{name} is a pickle, and torch {torch.__version__} cannot read one safely: use torch "
            "2.6 or newer, or convert it to safetensors in a program that you trust."
        )
    try:
        if path.stat().st_size > FILE_BYTES:
            raise LoRAFileError(f"{name} has more than {FILE_BYTES} bytes.")
        data: Any = torch.load(path, map_location="cpu", weights_only=True)
    except LoRAFileError:
        raise
    except Exception as error:  # torch raises whatever a broken archive makes it meet
        raise LoRAFileError(
            f"{name} cannot be read as tensors alone ({_reason(error)}). Files that hold anything "
            "else can run code and are not opened."
        ) from error
    for group in _GROUPS:
        if isinstance(data, Mapping) and isinstance(data.get(group), Mapping):
            data = data[group]
    tensors = dict(_tensors(data)) if isinstance(data, Mapping) else {}
    if not tensors or len(tensors) > TENSORS:
        raise LoRAFileError(f"{name} holds no table of tensors.")
    return tensors


def _tensors(data: Mapping[Any, Any]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a table under names of a usual length, with memory of their own."""
    for name, value in data.items():
        if isinstance(name, str) and len(name) <= NAME_LENGTH and type(value) is Tensor:
            yield name, value.detach().clone()


def _reason(error: Exception) -> str:
    """The first line of what torch says."""
    return shown(str(error).strip().split("\n")[0] or type(error).__name__, 160)
