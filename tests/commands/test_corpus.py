"""`corpus` on the command line: LoRA files, or people of a dataset, become a store."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from difflora_core.commands.corpus import Settings
from difflora_core.commands.inspect import facts_of
from difflora_core.commands.main import main
from difflora_core.commands.networks import network_config
from difflora_core.commands.run_folder import SETTINGS
from difflora_core.data.choices import ChoiceSettings
from difflora_core.data.encodings import Latents
from difflora_core.data.lora_store import LoRAStore
from difflora_core.data.prepare import PrepareConfig, prepare
from difflora_core.data.prepared import PreparedDataset
from difflora_core.demo import paths
from difflora_core.demo.networks.base import UNET_CONFIG, demo_layout, load_base
from difflora_core.demo.world.identities import split_seeds
from difflora_core.demo.world.scenes import render_portraits
from difflora_core.lora.layout import TARGETS, layout_from_unet_config
from difflora_core.lora.weights import LoRALayer, LoRAWeights
from difflora_core.models.difflora import DiffLoRAModel
from difflora_core.storage.checkpoint import load_model, save_model
from difflora_core.storage.image_files import write_image
from difflora_core.storage.lora_file import write_lora_file
from difflora_core.training.difflora.dataset_people import DatasetPeople, seed_of
from difflora_core.training.lora.dreambooth import DreamBoothExamples, train_dreambooth
from difflora_core.vision.features import FeatureSizes

PEOPLE, KILLS = 3, 3


def write(path, seed, strength=1.0):
    """A random LoRA of the demo's base."""
    layout, draw = demo_layout(2), torch.Generator().manual_seed(seed)
    layers = {
        s.name: LoRALayer(
            torch.randn(2, s.in_features, generator=draw) * 0.1 * strength,
            torch.randn(s.out_features, 2, generator=draw),
            2.0,
        )
        for s in layout
    }
    write_lora_file(path, LoRAWeights(layers), layout)


def test_what_a_corpus_has_no_place_for_is_counted(tmp_path, capsys):
    """Convolutions and text encoders of LoRA files."""
    for number in range(2):
        path = tmp_path / "loras" / f"{number}.safetensors"
        write(path, number)
        if number:
            stem = "lora_unet_input_blocks_1_0_in_layers_2"
            extra = {
                f"{stem}.lora_down.weight": torch.ones(2, 8, 3, 3),
                f"{stem}.lora_up.weight": torch.ones(8, 2, 1, 1),
                "lora_unet_input_blocks_0_0.diff": torch.ones(8, 4, 3, 3),
                "lora_te1_text_model_encoder_layers_0_mlp_fc1.diff": torch.ones(4, 4),
            }
            save_file(load_file(path) | extra, path)
    words = ["corpus", str(tmp_path / "loras"), str(tmp_path / "out"), "--base", "demo"]
    assert main([*words, "--rank", "2"]) == 0
    sentence = (
        "1 of 2 LoRA files change more than the layers of the corpus; that was left out: "
        "2 of convolutions, 1 of text encoders."
    )
    assert sentence in capsys.readouterr().out


def test_corpus_of_files(tmp_path, capsys):
    write(tmp_path / "loras" / "anna.safetensors", 0)
    write(tmp_path / "loras" / "more" / "bodo.safetensors", 1)
    write(tmp_path / "loras" / "loud.safetensors", 2, 50.0)
    (tmp_path / "loras" / "broken.safetensors").write_bytes(b"x" * 100)
    words = ["corpus", str(tmp_path / "loras"), str(tmp_path / "out"), "--base", "demo"]
    assert main([*words, "--rank", "2"]) == 0
    said = capsys.readouterr().out
    assert "2 LoRAs in the corpus, 2 left out." in said
    assert "broken left out: " in said
    assert "loud left out: its change is" in said
    store = LoRAStore(tmp_path / "out", demo_layout(2))
    assert [row.identity for row in store.rows] == ["anna", "more/bodo"]
    facts = facts_of(tmp_path / "out")
    assert (facts["kind"], facts["LoRAs"], facts["rank"]) == ("Corpus of LoRAs", "2", "2")
    assert facts["left out"] == "1"
    assert main([*words, "--rank", "2", "--checks.spread", "1000"]) == 0
    assert len(LoRAStore(tmp_path / "out")) == 3
    assert main([*words, "--rank", "4"]) == 1
    assert "at rank 2" in capsys.readouterr().err
    assert main(["corpus", str(tmp_path / "none"), str(tmp_path / "x")]) == 1
    assert "neither a dataset" in capsys.readouterr().err


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    """Drawn people, prepared; the first has a picture more than the others."""
    photos, folder = tmp_path_factory.mktemp("photos"), tmp_path_factory.mktemp("dataset")
    for who, seed in enumerate(split_seeds("train", PEOPLE, 70)):
        own = render_portraits([seed] * 3, range(3))
        (photos / f"p{who}").mkdir()
        for number in range(2 + (who == 0)):
            write_image(own.images[number], photos / f"p{who}" / f"{number}.png")
            (photos / f"p{who}" / f"{number}.txt").write_text(own.captions[number])
    choices = ChoiceSettings(same_person=0.3)
    faces = {"faces": str(paths.FACES), "smallest_face": 12}
    prepare(photos, folder, PrepareConfig(resolution=64, encoding="png", choices=choices, **faces))
    return folder


def of_people(dataset, *more):
    """Words of a training of seconds."""
    course = {"steps": 3, "precision": "no", "learning-rate": 0.01, "checkpoint-every": 1}
    options = [word for k, v in course.items() for word in (f"--training.{k}", str(v))]
    usual = [str(dataset), "--base", "demo", "--rank", "2", "--group", "2", *options]
    return [*usual, "--training.no-checkpointing", "--device", "cpu", *more]


def corpus(folder, words):
    """Runs the command; gives its exit status."""
    return main(["corpus", words[0], str(folder), *words[1:]])


def test_corpus_of_a_dataset(dataset, tmp_path, capsys):
    """Everybody's LoRA is what training alone gives; what is done is not done again."""
    judge = ["--judge.faces", str(paths.FACES), "--judge.pictures", "2", "--judge.steps", "2"]
    assert corpus(tmp_path / "out", of_people(dataset, *judge)) == 0
    assert f"{PEOPLE} LoRAs in the corpus, 0 left out." in capsys.readouterr().out
    store = LoRAStore(tmp_path / "out", demo_layout(2))
    assert [row.identity for row in store.rows] == [f"p{n}" for n in range(PEOPLE)]
    assert all(row.likeness is not None and -1 <= row.likeness <= 1 for row in store.rows)
    base, data = load_base(paths.BASE), PreparedDataset(dataset)
    people = DatasetPeople(data, Latents(data))
    course = Settings.from_json((tmp_path / "out" / SETTINGS).read_text()).course
    for number in (0, 2):
        name = store.rows[number].identity
        pictures = [data[row] for row in people.rows(name)]
        alone = DreamBoothExamples(
            torch.stack([base.encode_images(p.picture[None])[0].half().float() for p in pictures])[
                None
            ],
            [[p.captions[0] for p in pictures]],
            [seed_of(name)],  # of whole pictures the base is told what it is told when it draws
        )
        expected = train_dreambooth(base, alone, course)[3].batch_item(0)
        for layer in expected:
            found = store[number][layer]
            torch.testing.assert_close(found.delta(), expected[layer].delta(), atol=1e-5, rtol=1e-3)
    before = files(tmp_path / "out")
    assert not (tmp_path / "out" / "work").exists()
    assert corpus(tmp_path / "out", of_people(dataset, *judge)) == 0
    assert files(tmp_path / "out") == before
    strict = ["--checks.likeness", "1"]
    assert corpus(tmp_path / "out", of_people(dataset, *judge, *strict)) == 0
    assert "its likeness is" in capsys.readouterr().out
    assert len(LoRAStore(tmp_path / "out")) == 0


def files(folder):
    """Bytes of what a corpus is."""
    kept = [*folder.glob("shards/*"), *(folder / n for n in ("index.parquet", "store.json"))]
    return {path.name: path.read_bytes() for path in [*kept, folder / "index.json"]}


def test_other_settings_take_the_place_of_what_was_trained(dataset, tmp_path, capsys):
    words = of_people(dataset)
    assert corpus(tmp_path / "out", words) == 0
    first = [row.digest for row in LoRAStore(tmp_path / "out").rows]
    assert corpus(tmp_path / "out", [*words, "--training.steps", "2"]) == 0
    second = LoRAStore(tmp_path / "out")
    assert len(second) == PEOPLE
    assert not {row.digest for row in second.rows} & set(first)
    assert corpus(tmp_path / "out", words) == 0  # trained before: nothing is to be done
    assert [row.digest for row in LoRAStore(tmp_path / "out").rows] == first


def test_what_a_training_cannot_do(dataset, tmp_path, capsys):
    """No model to train on, two ranks, a rate out of range, a judge that is not there."""
    words = of_people(dataset)
    for more, said in (
        (["--base", "sdxl"], "name the checkpoint file"),
        (["--training.rank", "5"], "one rank"),
        (["--training.learning-rate", "1e9"], "learning_rate"),
        (["--judge.faces", str(paths.CLIP_VISION.parent)], "no .onnx files"),
    ):
        assert corpus(tmp_path / "out", [*words, *more]) == 1
        assert said in capsys.readouterr().err


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_random_moments(dataset, tmp_path):
    """SIGKILL while it encodes, trains, writes, indexes: the same bytes as without."""
    script = Path(__file__).with_name("corpus_until_killed.py")
    words = ["3", str(KILLS), str(tmp_path / "out"), *of_people(dataset)]
    subprocess.run(
        [sys.executable, str(script), *words],
        env={**os.environ, "PYTHONPATH": str(paths.ROOT), "OMP_NUM_THREADS": "1"},
        check=True,
        timeout=280,
    )
    assert files(tmp_path / "out") == files(tmp_path / "out-whole")
    assert len(LoRAStore(tmp_path / "out")) == PEOPLE


@pytest.mark.slow
def test_corpus_on_a_cluster_that_loses_a_machine(ray_cluster, dataset, tmp_path, monkeypatch):
    """The bytes are those of one process with as many threads; so are those of two processes."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    words = [*of_people(dataset), "--group", "1", "--training.steps", "20"]
    assert corpus(tmp_path / "alone", words) == 0
    assert corpus(tmp_path / "processes", [*words, "--workers", "2"]) == 0
    assert files(tmp_path / "processes") == files(tmp_path / "alone")
    nodes = [ray_cluster.add_node(num_cpus=1) for _ in range(2)]

    def kill():
        while not list((tmp_path / "ray" / "shards").glob("*")):
            time.sleep(0.02)
        ray_cluster.remove_node(nodes[0], allow_graceful=False)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    assert corpus(tmp_path / "ray", [*words, "--workers", "2", "--ray", ray_cluster.address]) == 0
    killer.join(30)
    assert not killer.is_alive()
    assert files(tmp_path / "ray") == files(tmp_path / "alone")
    assert len(LoRAStore(tmp_path / "ray")) == PEOPLE
    torch.set_num_threads(threads)


@pytest.mark.parametrize("targets", ["attention", "transformer"])
def test_people_are_trained_over_the_down_of_a_model(targets, dataset, tmp_path, capsys):
    """All begin with it and keep it; with other numbers everybody is trained anew."""
    layout = layout_from_unet_config("demo", UNET_CONFIG, 2, TARGETS[targets])
    config = network_config(FeatureSizes(8, 8, 2, 8), False)
    files = [tmp_path / f"{seed}.safetensors" for seed in range(2)]
    for seed, file in enumerate(files):
        draw = torch.Generator().manual_seed(seed)
        save_model(DiffLoRAModel(config, layout, generator=draw), file)
    words = of_people(dataset, "--training.no-train-down", "--down", str(files[0]))
    assert main(["corpus", *words[:1], str(tmp_path / "out"), *words[1:]]) == 0
    store = LoRAStore(tmp_path / "out")
    assert store.layout == layout
    shared = load_model(files[0]).lae.down_factors()
    for number in range(PEOPLE):
        for name, layer in store[number].layers.items():
            torch.testing.assert_close(layer.folded().down, shared[name].detach())
    again = [str(files[1]) if word == str(files[0]) else word for word in words]
    assert main(["corpus", *again[:1], str(tmp_path / "out"), *again[1:]]) == 0
    assert f"{PEOPLE} to train" in capsys.readouterr().out.split("goes on")[1]
    other = load_model(files[1]).lae.down_factors()
    name, layer = next(iter(LoRAStore(tmp_path / "out")[0].layers.items()))
    torch.testing.assert_close(layer.folded().down, other[name].detach())
    rank = words.index("--rank") + 1
    wrong = [*words[:rank], "4", *words[rank + 1 :]]
    assert main(["corpus", *wrong[:1], str(tmp_path / "x"), *wrong[1:]]) == 1
    layers = f"{len(layout)} layers of demo"
    said = capsys.readouterr().err.replace("\n", " ")
    assert f"is for {layers} at rank 2, the corpus for {layers} at rank 4" in said
    write(tmp_path / "loras" / "anna.safetensors", 0)
    files_alone = ["corpus", str(tmp_path / "loras"), str(tmp_path / "y"), "--base", "demo"]
    assert main([*files_alone, "--rank", "2", "--down", str(files[0])]) == 1
    assert "--down is for a dataset alone" in capsys.readouterr().err


def test_people_are_trained_over_the_down_that_serves_a_corpus(dataset, tmp_path, capsys):
    free = of_people(dataset)
    assert main(["corpus", *free[:1], str(tmp_path / "free"), *free[1:]]) == 0
    words = of_people(dataset, "--training.no-train-down", "--down", str(tmp_path / "free"))
    assert main(["corpus", *words[:1], str(tmp_path / "out"), *words[1:]]) == 0
    every = LoRAStore(tmp_path / "free")
    for name, layer in LoRAStore(tmp_path / "out")[0].layers.items():
        changes = torch.cat([every[k].layers[name].delta().double() for k in range(PEOPLE)])
        best = torch.linalg.svd(changes)[2][:2]  # 2 in: right singular vectors, Eckart and Young
        own = layer.folded().down.double()
        torch.testing.assert_close(own.mT @ own, best.mT @ best, atol=1e-4, rtol=0)
    rank = words.index("--rank") + 1
    wrong = [*words[:rank], "4", *words[rank + 1 :]]
    assert main(["corpus", *wrong[:1], str(tmp_path / "x"), *wrong[1:]]) == 1
    assert str(tmp_path / "free") in capsys.readouterr().err
