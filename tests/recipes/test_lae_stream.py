"""The autoencoder on a store that is read as it goes: what a corpus in memory gives, in less."""

import pytest
import torch

from difflora_core.data.lora_rows import LoRARows
from difflora_core.data.lora_store import NewLoRA, StoreWriter
from difflora_core.errors import CheckpointError, ConfigError, InterruptedTraining
from difflora_core.lora.layout import sdxl_layout
from difflora_core.lora.weights import LoRALayer, LoRAWeights
from difflora_core.models.lae.autoencoder import LoRAAutoencoder
from difflora_core.models.lae.config import LAEConfig
from difflora_core.training.difflora import lae as recipe
from difflora_core.training.difflora import lae_stream, latent_dit
from difflora_core.training.loop import LoopConfig

CPU = torch.device("cpu")
COUNT = 37
"""More than two parts, and no multiple of one."""
LOOP = LoopConfig(steps=6, warmup=1, log_every=3, checkpoint_every=2, validate_every=3)


def tiny(layout, parts):
    sizes = {
        "latent_tokens": 2, "latent_dim": 4, "width": 16, "depth": 1, "heads": 2, "basis_size": 8,
        "decoder_width": 16,
    }  # fmt: skip
    config = LAEConfig(**sizes, parts=parts)
    return LoRAAutoencoder(config, layout, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def layout(base):
    return base.layout("tiny", 2)


@pytest.fixture
def store(layout, weights_of, tmp_path):
    """LoRAs in a store of several shards, and the same in memory, in the store's order."""
    writer = StoreWriter(tmp_path / "store", layout, "")
    whole = weights_of(layout, COUNT).to(torch.float32)
    for start in range(0, COUNT, 10):
        numbers = range(start, min(start + 10, COUNT))
        writer.add([NewLoRA(f"{n:02d}", whole.batch_item(n)) for n in numbers])
    return writer.write_index(), whole


def some(weights, rows):
    layers = weights.layers.items()
    return LoRAWeights({n: LoRALayer(v.down[rows], v.up[rows], v.alpha) for n, v in layers})


def near(one, other):
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("parts", [("up",), ("down", "up")])
def test_the_same_autoencoder_as_from_memory(layout, store, tmp_path, parts, monkeypatch):
    found, whole = store
    monkeypatch.setattr(lae_stream, "GRAM_VALUES", 5000)  # several passes
    config = recipe.LAETrainConfig(loop=LOOP, batch=8, angular=0.1)
    learn, judge = list(range(3, COUNT)), [0, 1, 2]
    memory, stream = tiny(layout, parts), tiny(layout, parts)
    one = recipe.fit(memory, some(whole, learn), config, tmp_path / "a", some(whole, judge))
    rows = LoRARows(found, learn)
    other = recipe.fit(stream, rows, config, tmp_path / "b", LoRARows(found, judge))
    assert other["validation"] == pytest.approx(one["validation"], rel=1e-3)
    statistics = {n: b for n, b in memory.named_buffers() if n.startswith(("mean_", "scale_"))}
    assert statistics
    near(statistics, dict(stream.named_buffers()))
    near(dict(memory.named_parameters()), dict(stream.named_parameters()))


def test_a_stopped_run_goes_on_and_another_corpus_is_refused(layout, store, tmp_path):
    found, _ = store
    config = recipe.LAETrainConfig(loop=LOOP, batch=8)

    def stop(step, steps, metrics):
        if step == 3:
            raise InterruptedTraining("enough")

    straight, resumed = tiny(layout, ("down", "up")), tiny(layout, ("down", "up"))
    recipe.fit(straight, LoRARows(found), config, tmp_path / "a")
    with pytest.raises(InterruptedTraining):
        recipe.fit(resumed, LoRARows(found), config, tmp_path / "b", progress=stop)
    resumed = tiny(layout, ("down", "up"))
    recipe.fit(resumed, LoRARows(found), config, tmp_path / "b")
    wanted = straight.state_dict()
    assert all(torch.equal(tensor, wanted[n]) for n, tensor in resumed.state_dict().items())
    with pytest.raises(CheckpointError, match="another training"):
        recipe.fit(resumed, LoRARows(found, range(30)), config, tmp_path / "b")


def test_no_more_than_a_part_is_read_at_once(layout, store, tmp_path, monkeypatch):
    found, _ = store
    asked, batch = [], found.batch
    monkeypatch.setattr(found, "batch", lambda rows: asked.append(len(rows)) or batch(rows))
    lae = tiny(layout, ("down", "up"))
    config = recipe.LAETrainConfig(loop=LOOP, batch=8)
    recipe.fit(lae, LoRARows(found), config, tmp_path, LoRARows(found))
    latents = latent_dit.corpus_latents(Held(lae), LoRARows(found))
    assert latents.shape == (COUNT, 1, 2, 4)
    assert max(asked) == lae_stream.AT_ONCE
    assert set(asked) == {1, 8, lae_stream.AT_ONCE, COUNT % lae_stream.AT_ONCE}


class Held:
    """As much of a model as the encoding asks for."""

    def __init__(self, lae):
        self.lae, self.device = lae, CPU


def test_rows_of_a_store(store):
    found, whole = store
    rows = LoRARows(found, [5, 2, 9])
    assert len(rows) == 3
    assert torch.equal(next(iter(rows.batch([2, 0, 2]).layers.values())).down[0],
                       next(iter(whole.layers.values())).down[9])  # fmt: skip
    assert rows.digest != LoRARows(found, [2, 5, 9]).digest
    assert [part.batch_shape[0] for part in LoRARows(found).parts(16)] == [16, 16, 5]


@pytest.mark.parametrize("encoder", ["own", "mirror"])
@pytest.mark.parametrize("parts", [("up",), ("down", "up")])
def test_the_linear_kind_is_the_best_of_its_size(layout, tmp_path, parts, encoder):
    g = torch.Generator().manual_seed(0)
    sizes = {shape.name: (shape.in_features, shape.out_features) for shape in layout}
    layers = {
        name: LoRALayer(
            torch.randn(COUNT, 2, n, generator=g), torch.randn(COUNT, m, 2, generator=g), 2.0
        )
        for name, (n, m) in sizes.items()
    }
    whole = LoRAWeights(layers)
    writer = StoreWriter(tmp_path / "store", layout, "")
    writer.add([NewLoRA(f"{n:02d}", whole.batch_item(n)) for n in range(COUNT)])
    found = writer.write_index()
    config = LAEConfig(kind="linear", latent_tokens=2, latent_dim=4, parts=parts, encoder=encoder)
    settings = recipe.LAETrainConfig(canonical=False)
    for corpus in (whole, LoRARows(found)):
        lae = LoRAAutoencoder(config, layout, generator=torch.Generator().manual_seed(0))
        figures = recipe.fit(lae, corpus, settings, tmp_path / "run", whole)
        tokens = lae.tokens(whole).double()
        again = lae.decode(lae.encode(tokens.float())).double()
        centred = lae.groups.flatten(tokens - tokens.mean(0))
        least = torch.linalg.svdvals(centred)[8:].square().sum()  # Eckart and Young
        left = (tokens - again).square().sum()
        torch.testing.assert_close(left, least, rtol=1e-3, atol=0)
        kept = 1 - float(least / centred.square().sum())
        assert figures["kept"] == pytest.approx(kept, rel=1e-3)
        assert figures["validation"] == pytest.approx(recipe.reconstruction_error(lae, whole))


def test_a_linear_autoencoder_of_too_few_loras_says_so(layout, store, tmp_path):
    config = LAEConfig(kind="linear", latent_tokens=2, latent_dim=32)
    lae = LoRAAutoencoder(config, layout)
    with pytest.raises(ConfigError, match="a linear autoencoder of 64 numbers needs 65 LoRAs"):
        recipe.fit(lae, store[1], recipe.LAETrainConfig(), tmp_path)


def test_a_linear_autoencoder_of_sdxl_is_too_large():
    with torch.device("meta"), pytest.raises(ConfigError, match="take the kind structured"):
        LoRAAutoencoder(LAEConfig(kind="linear"), sdxl_layout(8))
