"""Time and memory of the full-size model, on a tiny one and on the meta device."""

import subprocess
import sys

import pytest
import torch

from benchmarks.cost import full_size
from difflora_core.demo.paths import DIFFLORA
from difflora_core.lora.layout import sdxl_layout
from difflora_core.storage.checkpoint import load_model

# SDXL's UNet by its published configuration: transformer blocks by their width.
TRANSFORMER_BLOCKS = {640: 2 * 2 + 3 * 2, 1280: 2 * 10 + 10 + 3 * 10}
TEXT_WIDTH = 2048


def test_every_part_is_timed_and_the_file_has_its_size(monkeypatch):
    timed = []

    def fake_seconds(call):
        call()
        timed.append(call)
        return float(len(timed))

    monkeypatch.setattr(full_size, "seconds", fake_seconds)
    model = load_model(DIFFLORA).eval().requires_grad_(False).to(torch.bfloat16)
    photo = full_size.random_photo(model)
    model.config.feature_sizes.check(photo.sizes)
    assert photo.face.norm().item() == 1.0
    with torch.autocast("cpu", torch.bfloat16):
        rows = full_size.measure(model, steps=2)
    assert [row["seconds"] for row in rows.values()] == [1.0, 2.0, 3.0, 4.0, 5.0]
    bytes_of_factors = 2 * model.layout.numel
    megabytes = rows["LoRA file, float16"]["megabytes"]
    assert bytes_of_factors / 1e6 < megabytes < bytes_of_factors / 1e6 + 0.1


def test_seconds_are_those_of_the_second_call(monkeypatch):
    clock = iter([100.0, 107.0])
    monkeypatch.setattr(full_size.time, "perf_counter", lambda: next(clock))
    calls = []
    assert full_size.seconds(lambda: calls.append(1)) == 7.0
    assert len(calls) == 2


def test_values_of_a_lora_are_those_of_sdxls_attention():
    """Self-attention has four square projections; cross-attention reads keys and values of text."""
    rank, values = 8, 0
    for width, blocks in TRANSFORMER_BLOCKS.items():
        shapes = [(width, width)] * 6 + [(TEXT_WIDTH, width)] * 2
        values += blocks * sum(rank * (into + out) for into, out in shapes)
    layout = sdxl_layout(rank)
    assert len(list(layout)) == 8 * sum(TRANSFORMER_BLOCKS.values()) == 560
    assert layout.numel == values == 11_612_160


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_memory_of_the_weights_is_counted_from_their_shapes(dtype, size):
    with torch.device("meta"):
        part = torch.nn.Sequential(torch.nn.Linear(30, 50), torch.nn.Linear(50, 7, bias=False))
        part.register_buffer("statistics", torch.zeros(11))
    part.to(dtype)
    assert full_size.weight_gigabytes(part) == (30 * 50 + 50 + 50 * 7 + 11) * size / 1e9


def test_peak_memory_grows_by_what_is_held():
    """A process of its own holds 300 MB more for a moment; the peak remembers it."""
    program = """
import torch
from benchmarks.cost.full_size import peak_gigabytes
before = peak_gigabytes("cpu")
held = torch.ones(75_000_000)
during = peak_gigabytes("cpu")
del held
print(before, during, peak_gigabytes("cpu"))
"""
    command = [sys.executable, "-c", program]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    before, during, after = map(float, text.split())
    assert during - before == pytest.approx(0.3, abs=0.01)
    assert after == pytest.approx(during, abs=0.01)
