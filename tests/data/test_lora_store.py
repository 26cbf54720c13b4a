"""A corpus in shards: what goes in comes out, and nothing that was touched is read."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from difflora_core.data.collect_loras import collect_loras
from difflora_core.data.lora_checks import LoRACheckSettings, why_unusable
from difflora_core.data.lora_store import LoRAStore, NewLoRA, StoreWriter
from difflora_core.demo.networks.base import demo_layout
from difflora_core.errors import DatasetError, LayoutError
from difflora_core.lora.distance import squared_norm
from difflora_core.lora.flat import flatten, unflatten
from difflora_core.lora.layout import LayerShape, LoRALayout
from difflora_core.lora.statistics import RunningStatistics, WeightStatistics
from difflora_core.lora.tokens import TokenGrid
from difflora_core.lora.weights import LoRALayer, LoRAWeights
from difflora_core.storage.lora_file import write_lora_file

ROOT = Path(__file__).resolve().parents[2]
LAYOUT = LoRALayout("demo", 2, (LayerShape("a", 5, 3), LayerShape("b", 4, 6)))


def lora(seed, scale=1.0, alpha=3.0, batch=(), layout=LAYOUT):
    """Random weights of a layout."""
    draw = torch.Generator().manual_seed(seed)
    layers = {
        s.name: LoRALayer(
            torch.randn(*batch, layout.rank, s.in_features, generator=draw) * scale,
            torch.randn(*batch, s.out_features, layout.rank, generator=draw),
            alpha,
        )
        for s in layout
    }
    return LoRAWeights(layers)


def filled(folder, count=7, each=3):
    """A store of LoRAs "0", "1", ... in shards of some."""
    writer = StoreWriter(folder, LAYOUT, "weights")
    for start in range(0, count, each):
        numbers = range(start, min(start + each, count))
        writer.add([NewLoRA(str(n), lora(n), likeness=0.5, source=f"s{n}") for n in numbers])
    return writer


def equal(one, other):
    """Whether two LoRAs change the weights alike, to rounding of float32."""
    return all(torch.allclose(one[n].delta(), other[n].delta(), atol=1e-6) for n in ("a", "b"))


@given(st.integers(0, 10**6), st.lists(st.integers(1, 3), max_size=2))
def test_flat_and_back(seed, batch):
    """Exactly, in float64, with the scale folded in."""
    weights = lora(seed, batch=tuple(batch)).to(torch.float64)
    flat = flatten(LAYOUT, weights)
    assert flat.shape == (*batch, LAYOUT.numel)
    back = unflatten(LAYOUT, flat)
    for name, layer in weights.folded().layers.items():
        assert torch.equal(back[name].down, layer.down)
        assert torch.equal(back[name].up, layer.up)
        assert back[name].scaling == 1
    with pytest.raises(LayoutError, match="Expected"):
        unflatten(LAYOUT, flat[..., 1:])
    with pytest.raises(LayoutError):
        flatten(replace(LAYOUT, rank=1), weights)


def test_what_goes_in_comes_out(tmp_path):
    """In any order and grouping: the same index, LoRA by LoRA and as a stream."""
    store = filled(tmp_path / "one").write_index()
    assert [row.identity for row in store.rows] == [str(n) for n in range(7)]
    assert all(equal(store[n], lora(n)) for n in range(7))
    streamed = dict(store.stream())
    assert sorted(streamed) == list(range(7))
    assert all(equal(weights, lora(n)) for n, weights in streamed.items())
    assert store.batch([4, 1]).batch_shape == (2,)
    assert equal(store.batch([4, 1]).batch_item(0), lora(4))
    assert store.rows[2].norm == pytest.approx(float(squared_norm(lora(2)).sqrt()), rel=1e-6)
    again = filled(tmp_path / "one").write_index()  # added twice: one file
    assert again.rows == store.rows
    other = filled(tmp_path / "two", each=2).write_index()
    assert [row.digest for row in other.rows] == [row.digest for row in store.rows]


@given(st.lists(st.integers(1, 4), min_size=1, max_size=5), st.integers(0, 1000))
def test_running_statistics_are_those_of_the_whole(parts, seed):
    grid = TokenGrid(LAYOUT)
    tokens, mask = grid.encode(lora(seed, batch=(sum(parts),)).to(torch.float64))
    tokens = tokens + 5  # a mean far from 0 shows a formula that cancels
    running = RunningStatistics(mask)
    for part in tokens.split(parts):
        running.add(part)
    found, whole = running.result(torch.float64), WeightStatistics.fit(tokens, mask)
    assert torch.allclose(found.mean, whole.mean, atol=1e-12)
    assert torch.allclose(found.scale, whole.scale, rtol=1e-10)
    places = torch.where(mask, tokens, 0.0)
    spread = (places - places.mean(0)).square().sum((0, 2)) / (mask.sum(-1) * len(tokens))
    if len(tokens) > 1:
        assert torch.allclose(found.scale.square(), spread, rtol=1e-10)


def test_statistics_of_a_store(tmp_path):
    grid = TokenGrid(LAYOUT)
    found = filled(tmp_path / "s").write_index().statistics(grid)
    tokens = torch.cat([grid.encode(lora(n))[0] for n in range(7)])
    whole = WeightStatistics.fit(tokens, grid.mask())
    assert torch.allclose(found.mean, whole.mean, atol=1e-6)
    assert torch.allclose(found.scale, whole.scale, rtol=1e-5)
    with pytest.raises(LayoutError, match="no LoRAs"):
        RunningStatistics(grid.mask()).result()


def test_loras_are_checked(tmp_path):
    """NaN, nothing, too strong, unlike: left out with the reason, and the rest is kept."""
    writer = filled(tmp_path / "s")
    bad = lora(1)
    bad["b"].up[0, 0] = float("nan")
    writer.add(
        [
            NewLoRA("nan", bad),
            NewLoRA("zero", lora(2, 0.0)),
            NewLoRA("strong", lora(3, 30.0)),
            NewLoRA("huge", lora(3, 1e30)),
            NewLoRA("stranger", lora(4), likeness=0.1),
            NewLoRA("unmeasured", lora(5)),
        ]
    )
    store = writer.write_index(LoRACheckSettings(likeness=0.3))
    reasons = {row.identity: row.reason for row in store.left_out}
    assert set(reasons) == {"nan", "zero", "strong", "huge", "stranger"}
    assert "b holds values that are not finite" in reasons["nan"]
    assert "changes nothing" in reasons["zero"]
    assert "times as strong" in reasons["strong"]
    assert "too large" in reasons["huge"]
    assert "0.100, below 0.3" in reasons["stranger"]
    assert len(store) == 8
    writer.add([NewLoRA("nan", lora(9))])  # trained again
    again = writer.write_index()
    assert {row.identity for row in again.left_out} == {"zero", "strong", "huge"}
    assert equal(again[[row.identity for row in again.rows].index("nan")], lora(9))


def test_norm_is_that_of_delta_w():
    weights = lora(6).to(torch.float64)
    whole = torch.cat([layer.delta().flatten() for layer in weights.layers.values()])
    assert why_unusable(weights)[0] == pytest.approx(float(whole.norm()), rel=1e-6)


def test_an_identity_twice(tmp_path):
    writer = filled(tmp_path / "s")
    with pytest.raises(DatasetError, match="stands twice"):
        writer.add([NewLoRA("x", lora(1)), NewLoRA("x", lora(2))])
    writer.add([NewLoRA("3", lora(99))])
    with pytest.raises(DatasetError, match="3 is in the corpus twice"):
        writer.write_index()


def test_another_base_is_refused(tmp_path):
    """Another layout, rank, or weights of the same family; a foreign shard put in by hand."""
    filled(tmp_path / "s").write_index()
    for layout, base, message in (
        (replace(LAYOUT, rank=3), "weights", "at rank 3"),
        (replace(LAYOUT, base="sdxl"), "weights", "wanted is sdxl"),
        (LAYOUT, "others", "other weights of demo"),
    ):
        with pytest.raises(DatasetError, match=message):
            LoRAStore(tmp_path / "s", layout, base)
        with pytest.raises(DatasetError, match=message):
            StoreWriter(tmp_path / "s", layout, base)
    LoRAStore(tmp_path / "s", LAYOUT, "weights")
    small = replace(LAYOUT, rank=1)
    foreign = StoreWriter(tmp_path / "foreign", small, "weights")
    foreign.add([NewLoRA("x", lora(1, layout=small))])
    (shard,) = (tmp_path / "foreign" / "shards").iterdir()
    shard.rename(tmp_path / "s" / "shards" / shard.name)
    with pytest.raises(DatasetError, match="another base or rank"):
        filled(tmp_path / "s").write_index()


def test_an_index_that_was_edited_is_noticed(tmp_path):
    """A value changed with a proper tool, a file cut, no index: each says what to do."""
    parquet = pytest.importorskip("pyarrow.parquet")
    folder = tmp_path / "s"
    writer = filled(folder)
    with pytest.raises(DatasetError, match="not indexed"):
        LoRAStore(folder)
    writer.write_index()
    table = parquet.read_table(folder / "index.parquet")
    norms = table.column("norm").to_pylist()
    edited = table.set_column(3, "norm", [[norms[0] * 2, *norms[1:]]])
    parquet.write_table(edited, folder / "index.parquet")
    with pytest.raises(DatasetError, match="was changed since"):
        LoRAStore(folder)
    writer.write_index()
    assert len(LoRAStore(folder)) == 7
    for wrong in (b"", b"{}", b"[1]"):
        (folder / "index.json").write_bytes(wrong)
        with pytest.raises(DatasetError, match="not indexed"):
            LoRAStore(folder)
    (folder / "store.json").write_text('{"format": "x"}', "utf-8")
    with pytest.raises(DatasetError, match="no corpus"):
        LoRAStore(folder)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux")
def test_an_index_is_read_without_threads(tmp_path):
    """Arrow's aborted the program at its end now and then."""
    filled(tmp_path / "s").write_index()
    program = (
        "import os, sys, pyarrow.parquet\n"
        "from difflora_core.data.lora_store import LoRAStore\n"
        "def threads(): return len(os.listdir('/proc/self/task'))\n"
        "before = threads()\n"
        "assert len(LoRAStore(sys.argv[1])) == 7\n"
        "print(threads() - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "s")],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "0"


def test_shards_that_were_touched(tmp_path):
    """Gone, cut, a bit turned over, or exchanged: refused when read."""
    folder = tmp_path / "s"
    store = filled(folder).write_index()
    shard = folder / "shards" / f"{store.rows[0].shard}.safetensors"
    other = folder / "shards" / f"{store.rows[3].shard}.safetensors"
    whole = shard.read_bytes()
    flipped = bytearray(whole)
    flipped[-1] ^= 0x10
    for damaged in (whole[:-4], bytes(flipped), other.read_bytes(), b""):
        shard.write_bytes(damaged)
        with pytest.raises(DatasetError):
            [store[n] for n in range(3)]
        with pytest.raises(DatasetError):
            list(store.stream())
    shard.unlink()
    with pytest.raises(DatasetError, match="There is no shard"):
        store[0]
    assert equal(store[3], lora(3))


def test_lora_files_of_others(tmp_path):
    """Read once, by content; what cannot be used is named with the reason."""
    layout, big = demo_layout(2), demo_layout(4)
    files = []
    for name, seed, own in (("0", 0, layout), ("1", 1, layout), ("big", 4, big)):
        files.append(tmp_path / f"{name}.safetensors")
        write_lora_file(files[-1], lora(seed, 0.1, layout=own), own, dtype=torch.float32)
    files.append(tmp_path / "broken.safetensors")
    files[-1].write_bytes(b"nothing")
    writer = StoreWriter(tmp_path / "s", layout, "")
    names = [file.stem for file in files]
    assert set(collect_loras(files, names, writer, most_lost=0.95).refused) == {"broken"}
    store = writer.write_index()
    assert [row.identity for row in store.rows] == ["0", "1", "big"]
    for name, layer in lora(1, 0.1, layout=layout).layers.items():
        assert torch.allclose(store[1][name].delta(), layer.delta(), atol=1e-6)
    shards = sorted((tmp_path / "s" / "shards").iterdir())
    collect_loras(files, names, writer, most_lost=0.95)
    assert sorted((tmp_path / "s" / "shards").iterdir()) == shards
    strict = StoreWriter(tmp_path / "strict", layout, "")
    assert "loses" in collect_loras(files[2:3], ["x"], strict, most_lost=0.01).refused["x"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_writers_that_are_killed(tmp_path):
    """Two writers at once, killed again and again: whole shards, nobody twice, nobody missing."""
    script = Path(__file__).with_name("add_until_killed.py")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), str(tmp_path / "s"), "5"]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True, timeout=120
    )
    assert int(done.stdout) >= 2
    store = StoreWriter(tmp_path / "s", LAYOUT, "weights").write_index()
    assert [row.identity for row in store.rows] == sorted(str(n) for n in range(60))
    assert all(equal(store[n], lora(int(row.identity))) for n, row in enumerate(store.rows))
