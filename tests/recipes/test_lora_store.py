"""LoRAs trained into a store: as one at a time, resumed, and without whoever diverges."""

from dataclasses import replace

import pytest
import torch

from difflora_core.data.lora_checks import LoRACheckSettings
from difflora_core.errors import InterruptedTraining
from difflora_core.training.difflora.lora_corpus import CorpusConfig
from difflora_core.training.difflora.lora_store import StoreTrainer, open_store
from difflora_core.training.lora.dreambooth import DreamBoothConfig, train_dreambooth

ALONE = DreamBoothConfig(rank=2, steps=3)
CONFIG = CorpusConfig(base="tiny", group=2, dreambooth=ALONE)
NAMES = ("5", "9", "4")


def train_store(base, names, examples, config, writer, likeness=None, progress=None):
    """Trains what is missing; gives name to reason of whoever could not be trained."""
    trainer = StoreTrainer(base, examples, config, writer, likeness)
    return trainer.train_all(trainer.plan(names), progress)


@pytest.fixture
def examples(people):
    """Pictures of people by name, each with a seed of its own."""

    def of(names):
        return replace(people([int(name) for name in names]), seeds=[int(name) for name in names])

    return of


def test_a_store_holds_what_training_alone_gives(base, examples, tmp_path):
    writer = open_store(tmp_path, base, CONFIG)
    assert not train_store(base, NAMES, examples, CONFIG, writer, lambda name, w: int(name) / 10)
    store = writer.write_index(LoRACheckSettings(likeness=0.45, spread=1e6))
    assert [row.identity for row in store.rows] == ["5", "9"]
    assert "0.400, below 0.45" in store.left_out[0].reason
    for number, row in enumerate(store.rows):
        alone = train_dreambooth(base, examples([row.identity]), ALONE)[3].batch_item(0)
        for name, layer in store[number].layers.items():
            torch.testing.assert_close(layer.delta(), alone[name].delta(), atol=1e-6, rtol=1e-4)
    assert not list((tmp_path / "work").glob("*"))


def test_what_is_done_is_not_trained_again(base, examples, tmp_path):
    """By content: other pictures or settings of somebody are trained, the rest is not."""
    writer = open_store(tmp_path, base, CONFIG)
    steps = []

    def count(step, total, metrics):
        steps.append(step)

    train_store(base, NAMES, examples, CONFIG, writer, progress=count)
    assert len(steps) == 6
    train_store(base, NAMES, examples, CONFIG, writer, progress=count)
    assert len(steps) == 6
    train_store(base, (*NAMES, "7"), examples, CONFIG, writer, progress=count)
    assert len(steps) == 9


def test_a_stopped_training_goes_on(base, examples, tmp_path):
    def stop(step, total, metrics):
        if step == 5 and (tmp_path / "s" / "shards").exists():
            raise InterruptedTraining("enough")

    whole = open_store(tmp_path / "whole", base, CONFIG)
    train_store(base, NAMES, examples, CONFIG, whole)
    writer = open_store(tmp_path / "s", base, CONFIG)
    with pytest.raises(InterruptedTraining):
        train_store(base, NAMES, examples, CONFIG, writer, progress=stop)
    train_store(base, NAMES, examples, CONFIG, writer)
    expected = [row.digest for row in whole.write_index().rows]
    assert [row.digest for row in writer.write_index().rows] == expected


def test_who_diverges_is_named_and_the_rest_kept(base, examples, tmp_path):
    """Damaged pictures of one person in a group: the others are trained as without that one."""

    def damaged(names):
        made = examples(names)
        latents = made.latents.clone()
        for row, name in enumerate(names):
            if name == "9":
                latents[row] = float("nan")
        return replace(made, latents=latents)

    wide = replace(CONFIG, group=3)
    writer = open_store(tmp_path, base, wide)
    failed = train_store(base, NAMES, damaged, wide, writer)
    assert set(failed) == {"9"}
    assert "no longer a number" in failed["9"]
    store = writer.write_index(LoRACheckSettings(spread=1e6))
    assert [row.identity for row in store.rows] == ["4", "5"]
    assert store.left_out[0].identity == "9"
    alone = train_dreambooth(base, examples(["5"]), ALONE)[3].batch_item(0)
    for name, layer in store[1].layers.items():
        torch.testing.assert_close(layer.delta(), alone[name].delta(), atol=1e-6, rtol=1e-4)
    assert train_store(base, NAMES, damaged, wide, writer) == failed
    train_store(base, NAMES, examples, wide, writer)  # its pictures are whole again
    assert len(writer.write_index(LoRACheckSettings(spread=1e6))) == 3
