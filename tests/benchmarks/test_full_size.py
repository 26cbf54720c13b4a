"""Time and memory of the full-size model, on a tiny one."""

import torch

from benchmarks.cost import full_size
from difflora_core.demo.paths import DIFFLORA
from difflora_core.storage.checkpoint import load_model


def test_every_part_is_timed_and_the_file_has_its_size():
    model = load_model(DIFFLORA).eval().requires_grad_(False).to(torch.bfloat16)
    photo = full_size.random_photo(model)
    model.config.feature_sizes.check(photo.sizes)
    assert photo.face.norm().item() == 1.0
    with torch.autocast("cpu", torch.bfloat16):
        rows = full_size.measure(model, steps=2)
    assert len(rows) == 5
    assert all(row["seconds"] > 0 for row in rows.values())
    bytes_of_factors = 2 * model.layout.numel
    megabytes = rows["LoRA file, float16"]["megabytes"]
    assert bytes_of_factors / 1e6 < megabytes < bytes_of_factors / 1e6 + 0.1


def test_memory_is_a_plausible_number():
    assert 0.1 < full_size.peak_gigabytes("cpu") < 1000
