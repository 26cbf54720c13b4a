"""The LoRA corpus on disk and its construction; refinement from a predicted LoRA."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from difflora_core.errors import CheckpointError, InterruptedTraining, LayoutError
from difflora_core.storage.lora_corpus import LoRACorpus, load_corpus, save_corpus
from difflora_core.training.difflora.lora_corpus import CorpusConfig, build_corpus
from difflora_core.training.difflora.refine import refine, refinement_config
from difflora_core.training.lora.dreambooth import DreamBoothConfig, train_dreambooth

CONFIG = CorpusConfig(base="tiny", group=2, dreambooth=DreamBoothConfig(rank=2, steps=3))


def same(a, b):
    """True when all values agree."""
    return all(torch.equal(a[n].down, b[n].down) and torch.equal(a[n].up, b[n].up) for n in a)


def test_corpus_survives_interruption(base, people, tmp_path):
    whole = build_corpus(base, (5, 9, 4), people, CONFIG, tmp_path / "a.safetensors")
    asked = []

    def stop(step, steps, metrics):
        assert steps == 6
        if step == 4:
            raise InterruptedTraining("enough")

    def examples(identities):
        asked.append(tuple(identities))
        return people(identities)

    path = tmp_path / "b.safetensors"
    with pytest.raises(InterruptedTraining):
        build_corpus(base, (5, 9, 4), examples, CONFIG, path, progress=stop)
    assert not path.exists()
    resumed = build_corpus(base, (5, 9, 4), examples, CONFIG, path)
    assert asked == [(5, 9), (4,), (4,)]
    assert same(whole.weights, resumed.weights)
    again = build_corpus(base, (5, 9, 4), None, CONFIG, path)
    assert again.identities == (5, 9, 4)
    assert again.layout == base.layout("tiny", 2)
    assert same(whole.weights, again.weights)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]
    with pytest.raises(CheckpointError, match="other settings"):
        build_corpus(base, (5, 9), people, CONFIG, path)
    other = replace(CONFIG, dreambooth=replace(CONFIG.dreambooth, steps=4))
    with pytest.raises(CheckpointError, match=r"dreambooth\.steps 3 there and 4 here"):
        build_corpus(base, (5, 9, 4), people, other, path)


def test_what_a_kill_left_is_taken_up_or_refused(base, people, tmp_path):
    """A part of other people, a lost snapshot, and a folder that was to be removed."""
    config = replace(CONFIG, dreambooth=replace(CONFIG.dreambooth, snapshots=(1,)))
    path = tmp_path / "corpus.safetensors"
    parts = tmp_path / "corpus.safetensors.parts"

    def stop_at(last):
        def progress(step, steps, metrics):
            if step == last:
                raise InterruptedTraining("enough")

        return progress

    with pytest.raises(InterruptedTraining):
        build_corpus(base, (5, 9, 4), people, config, path, progress=stop_at(2))
    snapshot = parts / "group-00000" / "snapshot-1.safetensors"
    whole = snapshot.read_bytes()
    for damage in (whole[:-1], bytes([*whole[:-1], whole[-1] ^ 1]), None):
        snapshot.unlink()
        if damage is not None:
            snapshot.write_bytes(damage)
        with pytest.raises(CheckpointError, match="after step 1 are lost: delete"):
            build_corpus(base, (5, 9, 4), people, config, path, progress=stop_at(99))
        # the run is at its end now, and stays refused
    snapshot.write_bytes(whole)
    with pytest.raises(InterruptedTraining):
        build_corpus(base, (5, 9, 4), people, config, path, progress=stop_at(4))
    first = parts / "group-00000.safetensors"
    right = first.read_bytes()
    save_corpus(replace(load_corpus(first), identities=(9, 5)), first)
    with pytest.raises(CheckpointError, match="other people"):
        build_corpus(base, (5, 9, 4), people, config, path)
    first.write_bytes(bytes([*right[:-1], right[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="is damaged; delete it"):
        build_corpus(base, (5, 9, 4), people, config, path)
    first.write_bytes(right)
    build_corpus(base, (5, 9, 4), people, config, path)
    parts.mkdir()
    (parts / "left").write_text("by a kill")
    build_corpus(base, (5, 9, 4), None, config, path)
    assert [p.name for p in tmp_path.iterdir()] == ["corpus.safetensors"]


def test_corpus_does_not_depend_on_the_groups(base, people, tmp_path):
    base.unet.double()

    def examples(identities):
        return people(identities, dtype=torch.float64)

    alone = CorpusConfig(base="tiny", group=1, dreambooth=CONFIG.dreambooth)
    a = build_corpus(base, (5, 9, 4), examples, CONFIG, tmp_path / "a")
    b = build_corpus(base, (4, 9, 5), examples, alone, tmp_path / "b").select((5, 9, 4))
    for name in a.weights:
        torch.testing.assert_close(a.weights[name].up, b.weights[name].up, atol=1e-6, rtol=0)


def test_shared_down_is_written_once(base, weights_of, tmp_path):
    layout = base.layout("tiny", 2)
    shared = weights_of(layout, 8, shared_down=True)
    own = weights_of(layout, 8)
    a = save_corpus(LoRACorpus(layout, tuple(range(8)), shared), tmp_path / "shared")
    b = save_corpus(LoRACorpus(layout, tuple(range(8)), own.scaled(0.5)), tmp_path / "own")
    assert a.stat().st_size < 0.8 * b.stat().st_size
    assert same(load_corpus(a).weights, shared)
    back = load_corpus(b).weights
    for name in back:
        torch.testing.assert_close(back[name].delta(), 0.5 * own[name].delta())
    with pytest.raises(LayoutError, match="no LoRA of 1"):
        load_corpus(a).select([3, 80])
    with pytest.raises(LayoutError, match="one LoRA for each"):
        LoRACorpus(layout, (1,) * 8, shared)


def test_hostile_corpus_files(base, tmp_path):
    path = tmp_path / "c.safetensors"
    with pytest.raises(CheckpointError):
        load_corpus(path)
    path.write_bytes(b"\xff" * 64)
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_corpus(path)
    save_file({"identities": torch.tensor([1])}, path)
    with pytest.raises(CheckpointError, match="not a LoRA corpus"):
        load_corpus(path)
    facts = {"format": "difflora-lora-corpus-1", "layout": base.layout("t", 1).to_json()}
    save_file({"identities": torch.tensor([1])}, path, metadata=facts)
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_corpus(path)


def test_refinement_is_dreambooth_from_the_prediction(base, people, weights_of):
    predicted = weights_of(base.layout("tiny", 2), 3, shared_down=True)
    config = refinement_config(2)
    assert config.steps == 25
    short = DreamBoothConfig(rank=2, steps=3, train_down=False)
    refined = refine(base, predicted, people(), short)
    expected = train_dreambooth(base, people(), short, initial=predicted)[3]
    assert same(refined, expected)
    assert all(torch.equal(refined[n].down, predicted[n].down) for n in refined)
    assert not any(torch.equal(refined[n].up, predicted[n].up) for n in refined)
    single = refine(base, predicted.batch_item(1), people().select([1]), short)
    assert single.batch_shape == torch.Size()
    torch.testing.assert_close(
        single[next(iter(single))].up,
        expected.batch_item(1)[next(iter(single))].up,
        atol=2e-4,
        rtol=0,
    )
    with pytest.raises(LayoutError, match="batch"):
        refine(base, predicted, people().select([0, 1]), short)
