"""Small LoRA files that mean gigabytes, and numbers at the end of their range."""

import resource
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from difflora_core.errors import DiffLoRAError, LoRAFileError
from difflora_core.lora.formats.lycoris import full_layer
from difflora_core.lora.formats.state_dict import from_state_dict
from difflora_core.lora.layout import LayerShape, LoRALayout
from difflora_core.storage.lora_file import load_lora
from difflora_core.storage.safetensors_io import write_atomic

NAMES = {f"m.{k}": f"m.{k}" for k in range(600)}
LAYOUT = LoRALayout("x", 2, (LayerShape("m.0", 6, 8),))
SECONDS, BYTES = 5.0, 2**30


def ones(*shape):
    return torch.ones(shape, dtype=torch.float16)


def loha(out, width, rank):
    return {
        f"hada_w{n}_{part}": ones(*shape)
        for n in (1, 2)
        for part, shape in (("a", (out, rank)), ("b", (rank, width)))
    }


def layers(count, parts):
    return {f"m.{k}.{name}": tensor for k in range(count) for name, tensor in parts.items()}


SMALL_LOKR = {
    f"lokr_w{n}_{p}": ones(*((256, 1) if p == "a" else (1, 256))) for n in (1, 2) for p in "ab"
}
BOMBS = {
    "LoKr of two columns": {"m.0.lokr_w1": ones(6000, 1), "m.0.lokr_w2": ones(6000, 1)},
    "LoKr of two rows": {"m.0.lokr_w1": ones(1, 6000), "m.0.lokr_w2": ones(1, 6000)},
    "LoKr of 300 layers": layers(300, SMALL_LOKR),
    "LoHa of 7 GB": layers(1, loha(12_000, 12_000, 10)) | {"m.0.alpha": ones()},
    "LoHa of many components": layers(1, loha(2000, 2000, 60)),
    "Tucker": {
        "m.0.lora_up.weight": ones(9, 99),
        "m.0.lora_mid.weight": ones(99, 1, 40, 40),
        "m.0.lora_down.weight": ones(1, 9000),
    },
    "LoRA of one row": {"m.0.lora_up.weight": ones(200_000, 1), "m.0.lora_down.weight": ones(1, 2)},
}  # fmt: skip


@pytest.mark.parametrize("kind", BOMBS)
def test_a_small_file_never_becomes_gigabytes(tmp_path, kind):
    path = write_atomic(BOMBS[kind], {}, tmp_path / "bomb.safetensors")
    assert path.stat().st_size < 2**20
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    for names, rank in ((NAMES, 128), (NAMES, 8), (LAYOUT, None)):
        try:
            read = load_lora(path, names, rank)
        except DiffLoRAError:
            continue
        assert read.weights.numel() < 2**28
    assert time.process_time() - began < 3 * SECONDS
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < BYTES


def test_bombs_are_named_as_such(tmp_path):
    for kind, message in (
        ("LoKr of 300 layers", "Choose a smaller rank"),
        ("LoHa of many components", "too large to be read as a LoRA"),
        ("LoRA of one row", "no model has more than 65536"),
    ):
        with pytest.raises(LoRAFileError, match=message):
            from_state_dict(BOMBS[kind], NAMES, 128)
    with pytest.raises(LoRAFileError, match="no model has more than 65536"):
        from_state_dict(BOMBS["LoKr of two columns"], NAMES, 1)


def test_a_whole_change_of_a_large_matrix_is_refused_at_once():
    began = time.process_time()
    with pytest.raises(LoRAFileError, match="too large"):
        from_state_dict({"m.0.diff": torch.zeros(6000, 6000)}, NAMES, 8)
    assert time.process_time() - began < SECONDS


@given(
    shape=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    rank=st.integers(1, 12),
    inner=st.integers(1, 4),
    size=st.sampled_from([1e-20, 1.0, 1e8]),
)
def test_whole_changes_against_the_svd(shape, rank, inner, size):
    """Of full and of deficient rank, at both ends of the range."""
    generator = torch.Generator().manual_seed(sum(shape) + rank)
    left, right = (
        torch.randn(*s, generator=generator, dtype=torch.float64)
        for s in ((shape[0], inner), (inner, shape[1]))
    )
    delta = size * left @ right
    layer, error = full_layer(delta, rank)
    values = torch.linalg.svdvals(delta)
    best = float(values[rank:].norm() / values.norm())
    assert float(error) == pytest.approx(best, abs=1e-7)
    true = float((layer.delta().double() - delta).norm() / delta.norm())
    assert true == pytest.approx(best, abs=1e-5)


def plain(up, down, **more):
    tensors = {"lora_up.weight": up, "lora_down.weight": down} | more
    return {f"m.0.{name}": tensor for name, tensor in tensors.items()}


def test_every_type_of_one_layer_is_read_and_mixed_ones_together():
    generator = torch.Generator().manual_seed(0)
    up, down = (torch.randn(*s, generator=generator) for s in ((8, 2), (2, 6)))
    kinds = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16)
    for first in (*kinds, torch.float32, torch.float64):
        for second in (*kinds, torch.float32, torch.float64):
            a, b = up.to(first), down.to(second)
            state = plain(a, b, alpha=torch.tensor(4.0).to(second))
            layer = from_state_dict(state, LAYOUT).weights["m.0"]
            wanted = 2 * a.double() @ b.double()
            torch.testing.assert_close(layer.delta().double(), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "state",
    [
        plain(torch.ones(8, 2), torch.full((2, 6), 3e38)),
        plain(torch.full((8, 2), 1e38), torch.full((2, 6), 1e38)),
        plain(torch.full((8, 2), 1e8), torch.full((2, 6), 1e8)),
        plain(torch.ones(8, 2), torch.ones(2, 6), alpha=torch.tensor(3e38)),
        plain(torch.ones(8, 2), torch.ones(2, 6), alpha=torch.tensor(float("nan"))),
        plain(torch.ones(8, 2), torch.ones(2, 6), alpha=torch.ones(0)),
        plain(torch.ones(8, 2), torch.ones(2, 6), alpha=torch.ones(2)),
        plain(torch.ones(()), torch.ones(())),
        plain(torch.ones(0, 2), torch.ones(2, 6)),
        plain(torch.ones(8, 0), torch.ones(0, 6)),
        plain(torch.ones(8, 2, dtype=torch.int32), torch.ones(2, 6)),
        plain(torch.ones(8, 2, dtype=torch.complex64), torch.ones(2, 6)),
        plain(torch.ones(8, 2), torch.ones(2, 6)) | {"m.0.lora_B.weight": torch.ones(8, 2)},
        plain(torch.ones(8, 2), torch.ones(2, 6)) | {"m.0.diff": torch.ones(8, 6)},
        {"m.0.lokr_w1": torch.ones(2, 2), "m.0.lokr_w2": torch.ones(())},
        {"m.0.diff": torch.full((8, 6), 1e38, dtype=torch.float64)},
        {"m.0.diff": torch.ones(())},
    ],
    ids=range(17),
)
def test_numbers_and_shapes_that_make_no_sense(state):
    with pytest.raises(LoRAFileError):
        from_state_dict(state, LAYOUT)


PEFT = {"unet.m.0.lora_A.weight": torch.ones(2, 6), "unet.m.0.lora_B.weight": torch.ones(8, 2)}


@pytest.mark.parametrize(
    "text",
    [
        "[]", "3", '"x"', "null", "{", "[" * 100_000, '{"unet.lora_alpha": NaN}',
        '{"unet.lora_alpha": 1e999}', '{"unet.lora_alpha": ' + "9" * 5000 + "}",
        '{"unet.lora_alpha": "4"}', '{"unet.lora_alpha": [4]}', '{"unet.lora_alpha": true}',
        '{"unet.lora_alpha": 1e30}', '{"unet.alpha_pattern": [1]}', '{"unet.alpha_pattern": 3}',
        '{"unet.alpha_pattern": {"m.0": "x"}}', '{"unet.lora_alpha": 4, "unet.lora_alpha": 8}',
        '{"a": "\\ud800"}',
    ],
)  # fmt: skip
def test_metadata_of_another_shape(text):
    with pytest.raises(LoRAFileError) as caught:
        from_state_dict(PEFT, LAYOUT, metadata={"lora_adapter_metadata": text})
    str(caught.value).encode()
    assert len(str(caught.value)) < 500


def test_the_last_pattern_counts_and_many_cost_nothing():
    patterns = ", ".join(f'"x{k}.y": 1' for k in range(100_000))
    text = f'{{"unet.lora_alpha": 2, "unet.alpha_pattern": {{"m.0": 4, {patterns}, "0": 8}}}}'
    began = time.process_time()
    found = from_state_dict(PEFT, LAYOUT, metadata={"lora_adapter_metadata": text})
    assert float(found.weights["m.0"].delta()[0, 0]) == 8 / 2 * 2
    assert time.process_time() - began < SECONDS
