"""What machines can do: named GPUs, and the machine at hand by a measurement."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional as F

from ..config import Config, check_range, parse_json
from ..errors import ConfigError, shown
from ..storage.atomic import write_text

SHARE = 0.25
"""Of a GPU's products that training SDXL reaches: a published LoRA step at 1024 px in bfloat16
takes 288 ms on an RTX 4090 (165 TFLOP/s) for about 12 TFLOP."""


@dataclass(frozen=True)
class Machine(Config):
    """What one GPU, or a CPU, can do.

    Args:
        name: what it is called.
        memory_gb: of the GPU, or of the computer where there is none; 10^9 bytes.
        tflops: 10^12 operations a second that training reaches, not the data sheet's.
        disk_mb_s: written to disk, 10^6 bytes a second.
        link_gb_s: between machines of a cluster, 10^9 bytes a second.

    Raises:
        ConfigError: a value out of range.
    """

    name: str
    memory_gb: float
    tflops: float
    disk_mb_s: float = 1000.0
    link_gb_s: float = 25.0

    def __post_init__(self) -> None:
        for name in ("memory_gb", "tflops", "disk_mb_s", "link_gb_s"):
            check_range("Machine", name, getattr(self, name), 1e-6, 1e9)


MACHINES: Mapping[str, Machine] = {
    name: Machine(name, gigabytes, SHARE * dense)
    for name, gigabytes, dense in (
        ("rtx3060", 12.9, 25.0),
        ("rtx4090", 25.8, 165.0),
        ("a100", 85.9, 312.0),
        ("h100", 85.9, 989.0),
        ("h200", 151.0, 989.0),
    )
}
"""Named GPUs: memory, and dense bfloat16 products with float32 sums by their data sheets."""


def machine(name: str) -> Machine:
    """A machine by name, or by a file that `inspect --measure` wrote.

    Raises:
        ConfigError: it is neither.
    """
    if name in MACHINES:
        return MACHINES[name]
    try:
        data = parse_json(Path(name).read_bytes(), shown(name))
    except OSError as error:
        raise ConfigError(
            f"{shown(name)} is no known GPU ({', '.join(MACHINES)}) and no file of a measured "
            "machine. Write one with: inspect FILE --measure"
        ) from error
    return Machine.from_dict(data)


def measure(path: Path) -> Machine:
    """Measures this machine for some seconds and writes what it can do.

    Raises:
        ConfigError: the file cannot be written.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = Machine(
        name=torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        memory_gb=_memory(device) / 1e9,
        tflops=_operations(device) / 1e12,
        disk_mb_s=_disk(path.resolve().parent) / 1e6,
    )
    write_text(path, found.to_json() + "\n", ConfigError)
    return found


def _operations(device: torch.device, seconds: float = 2.0) -> float:
    """Operations a second of what SDXL spends its time on: attention and feed-forward, both ways.

    A layer of 1,280 features on 1,024 places, forward and backward, in bfloat16 on a GPU.
    """
    kind = torch.bfloat16 if device.type == "cuda" else torch.float32
    tokens, width = 1024, 1280
    x = torch.zeros(1, tokens, width, device=device, dtype=kind, requires_grad=True)
    into = torch.zeros(8 * width, width, device=device, dtype=kind)
    out = torch.zeros(width, 4 * width, device=device, dtype=kind)

    def layer() -> None:
        heads = x.unflatten(2, (20, 64)).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2).flatten(2)
        gate, value = F.linear(mixed, into).chunk(2, -1)
        F.linear(gate * value, out).sum().backward()
        if device.type == "cuda":
            torch.cuda.synchronize()

    layer()
    begun, count = time.perf_counter(), 0
    while (spent := time.perf_counter() - begun) < seconds:
        layer()
        count += 1
    products = 2 * tokens * (2 * tokens * width + 8 * width * width + 4 * width * width)
    return 2 * count * products / spent  # the weights are frozen: backward is as much again


def _memory(device: torch.device) -> float:
    """Bytes of the GPU, or of the computer."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def _disk(folder: Path, size: int = 2**26) -> float:
    """Bytes a second that reach the disk of a folder."""
    block = os.urandom(2**20)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            begun = time.perf_counter()
            for _ in range(size // len(block)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            return size / (time.perf_counter() - begun)
    except OSError as error:
        raise ConfigError(
            f"{shown(str(folder), 300)} cannot be written: {error.strerror}."
        ) from error
