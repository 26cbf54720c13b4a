"""`train` on the demo base: killed and resumed, both methods, and what it refuses."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from difflora_core.commands import generate
from difflora_core.commands.encoders import file_digest, open_encoders
from difflora_core.commands.local_base import open_base
from difflora_core.commands.main import plain_console
from difflora_core.commands.networks import network_config
from difflora_core.commands.run_folder import SETTINGS
from difflora_core.commands.train import Settings, run
from difflora_core.commands.train_data import Encoders, load_people, split_people
from difflora_core.data.choices import ChoiceSettings
from difflora_core.data.lora_store import NewLoRA, StoreWriter
from difflora_core.data.prepare import PrepareConfig, prepare
from difflora_core.data.prepared import PreparedDataset
from difflora_core.demo import paths
from difflora_core.demo.networks.base import demo_layout
from difflora_core.demo.world.identities import split_seeds
from difflora_core.demo.world.scenes import render_portraits
from difflora_core.errors import ConfigError, DatasetError, DiffLoRAError
from difflora_core.lora.weights import LoRALayer, LoRAWeights
from difflora_core.storage.checkpoint import load_model, read_description
from difflora_core.storage.image_files import write_image
from difflora_core.training.difflora.functional import FunctionalConfig
from difflora_core.training.difflora.lae import LAETrainConfig
from difflora_core.training.difflora.latent_dit import LatentDiTConfig
from difflora_core.training.loop import LoopConfig
from difflora_core.vision.features import FeatureSizes

PEOPLE = 5
SMALL = PrepareConfig(
    resolution=64,
    faces=str(paths.FACES),
    smallest_face=12,
    encoding="png",
    choices=ChoiceSettings(same_person=0.3),
)
COURSE = LoopConfig(steps=2, warmup=1, log_every=1, checkpoint_every=1)


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """Folders of drawn people; every second one has a picture less."""
    folder = tmp_path_factory.mktemp("photos")
    for who, seed in enumerate(split_seeds("train", PEOPLE, 50)):
        own = render_portraits([seed] * 4, range(4))
        for number in range(4 - who % 2):
            (folder / f"p{who}").mkdir(exist_ok=True)
            write_image(own.images[number], folder / f"p{who}" / f"{number}.png")
            (folder / f"p{who}" / f"{number}.txt").write_text(own.captions[number])
    return folder


@pytest.fixture(scope="session")
def dataset(photos, tmp_path_factory):
    """The same, prepared."""
    folder = tmp_path_factory.mktemp("dataset")
    prepare(photos, folder, SMALL)
    return folder


@pytest.fixture(scope="session")
def settings(dataset):
    """Settings of a run of seconds."""

    def make(folder, **given):
        usual = {
            "clip_vision": str(paths.CLIP_VISION),
            "rank": 4,
            "held_out": 0.4,
            "samples": 1,
            "likeness": COURSE,
            "functional": FunctionalConfig(batch=4),
            "functional_loop": replace(COURSE, steps=6, validate_every=2, ema=0.9),
            "lae": LAETrainConfig(loop=COURSE, batch=4),
            "dit": LatentDiTConfig(loop=COURSE, batch=4),
            "license": "for tests",
        }
        return Settings(str(dataset), str(folder), **{**usual, **given})

    return make


def start(folder, words):
    """The command as a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "difflora_core", "train", *words],
        cwd=paths.ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def until(condition, process):
    """Waits until something is so, while a process runs."""
    deadline = time.monotonic() + 280
    while not condition():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_killed_stopped_and_gone_on_with_it_ends_as_the_straight_run(tmp_path, settings):
    straight = settings(tmp_path / "straight")
    run(straight, plain_console())
    (tmp_path / "settings.json").write_text(
        json.dumps({**straight.to_dict(), "folder": str(tmp_path / "run")})
    )
    words = ["--config", str(tmp_path / "settings.json")]
    state = tmp_path / "run" / "functional" / "state.safetensors"
    killed = start(tmp_path / "run", words)
    until(state.exists, killed)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "run" / "difflora-model.safetensors").exists()
    stopped = start(tmp_path / "run", words)
    until(lambda: "goes on" in (tmp_path / "run" / "log.txt").read_text(), stopped)
    os.kill(stopped.pid, signal.SIGTERM)
    said = stopped.communicate()[0]
    assert stopped.returncode == 143, said
    assert "run it again to go on" in said
    run(replace(straight, folder=str(tmp_path / "run")), plain_console())
    one, other = (
        load_file(tmp_path / name / "difflora-model.safetensors") for name in ("straight", "run")
    )
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    _check_what_a_run_leaves(tmp_path / "run", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "how"), [(2, "--multi_gpu"), (4, "--multi_gpu"), (2, "--use_fsdp")]
)
def test_several_processes_give_the_model_of_one(tmp_path, settings, corpus, count, how):
    """Real processes as accelerate starts them, both methods, the same global batch."""
    alone = settings(tmp_path / "one", method="both", corpus=str(corpus), held_out=0.0)
    run(alone, plain_console())
    folder = tmp_path / "several"
    (tmp_path / "settings.json").write_text(json.dumps({**alone.to_dict(), "folder": str(folder)}))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = ["-m", "accelerate.commands.launch", how, "--num_machines", "1"]
    launcher += ["--num_processes", str(count), "--main_process_port", str(port)]
    launcher += ["--mixed_precision", "no", "--dynamo_backend", "no", "-m", "difflora_core"]
    ended = subprocess.run(
        [sys.executable, *launcher, "train", "--config", str(tmp_path / "settings.json")],
        cwd=paths.ROOT, capture_output=True, text=True, timeout=900,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout + ended.stderr
    for name in ("difflora-model.safetensors", "difflora-model-paper.safetensors"):
        one, other = load_file(tmp_path / "one" / name), load_file(folder / name)
        assert one.keys() == other.keys()
        apart = [(one[k].double() - other[k].double()).square().sum() for k in one]
        whole = [tensor.double().square().sum() for tensor in one.values()]
        # Another seed ends thirty times as far away; Adam makes much of rounding in tiny gradients.
        assert sum(apart) ** 0.5 < 1e-3 * sum(whole) ** 0.5
    told = (folder / "log.txt").read_text()
    assert told.count("A new run in") == 1  # of several processes one speaks


def _check_what_a_run_leaves(folder, tmp_path):
    """Model, card, sample, settings; and `generate` reads the model."""
    about = read_description(folder / "difflora-model.safetensors")
    assert about.config.face_encoder == "demo_faces/rec_demo.onnx"
    assert about.source["license"] == "for tests"
    assert about.source["people"] == 3
    assert about.source["dataset"]
    card = (folder / "difflora-model.md").read_text()
    assert "- face recogniser: demo_faces/rec_demo.onnx" in card
    assert 'license_name: "for tests"' in card
    assert Image.open(folder / "samples" / "model-000.png").size == (64, 64)
    assert Settings.from_json((folder / SETTINGS).read_text()).license == "for tests"
    events = (folder / "functional" / "events.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in events] == [1, 2, 3, 4, 5, 6]
    made = generate.Settings(
        str(folder / "difflora-model.safetensors"),
        (str(paths.ROOT / "workflows" / "difflora_demo_person.png"),),
        str(tmp_path / "her.safetensors"),
        str(paths.FACES),
        str(paths.CLIP_VISION),
    )
    generate.run(made, plain_console())
    with safe_open(tmp_path / "her.safetensors", "pt") as file:
        assert file.metadata()["modelspec.license"] == "for tests"  # the model's terms bind it


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """LoRAs of some of the people, small random ones."""
    layout, g = demo_layout(4), torch.Generator().manual_seed(0)
    layers = {
        s.name: LoRALayer(
            torch.randn(4, 4, s.in_features, generator=g) / 10,
            torch.randn(4, s.out_features, 4, generator=g) / 10,
            4.0,
        )
        for s in layout
    }
    writer = StoreWriter(tmp_path_factory.mktemp("corpus"), layout, "")
    loras, names = LoRAWeights(layers), ("p0", "p1", "p3", "p4")
    writer.add([NewLoRA(name, loras.batch_item(k)) for k, name in enumerate(names)])
    writer.write_index()
    return writer.folder


def test_both_methods_leave_two_models(tmp_path, settings, corpus):
    course = replace(COURSE, steps=2)
    both = settings(
        tmp_path,
        method="both",
        corpus=str(corpus),
        functional_loop=course,
        name="two",
        held_out=0.0,
        targets="transformer",
    )
    run(both, plain_console())
    presets = {
        path.name: read_description(path).config.preset for path in tmp_path.glob("*.safetensors")
    }
    assert presets == {
        "difflora-two.safetensors": "functional",
        "difflora-two-paper.safetensors": "paper",
    }
    paper = load_model(tmp_path / "difflora-two-paper.safetensors")
    assert paper.license == "for tests"
    assert paper.layout == demo_layout()
    wider = load_model(tmp_path / "difflora-two.safetensors").layout
    assert {s.name for s in wider if ".ff." not in s.name and ".proj_" not in s.name} == {
        s.name for s in demo_layout()
    }
    assert len(wider) == len(demo_layout()) * 3 // 2  # four beside eight of attention


def test_one_portrait_of_each_is_enough_for_paper_alone(tmp_path, settings, corpus, photos):
    """What a teacher made a LoRA of has one photo: nothing has to be drawn."""
    for person in photos.iterdir():
        (tmp_path / "photos" / person.name).mkdir(parents=True)
        for suffix in (".png", ".txt"):
            name = f"{person.name}/0{suffix}"
            (tmp_path / "photos" / name).write_bytes((photos / name).read_bytes())
    prepare(tmp_path / "photos", tmp_path / "single", SMALL)
    single = replace(settings(tmp_path / "run"), dataset=str(tmp_path / "single"), held_out=0.0)
    run(replace(single, method="paper", corpus=str(corpus)), plain_console())
    made = read_description(tmp_path / "run" / "difflora-model.safetensors")
    assert made.source["people"] == PEOPLE
    with pytest.raises(DatasetError, match="one to see and one to draw"):
        run(replace(single, folder=str(tmp_path / "other")), plain_console())


def test_sdxl_of_a_folder_in_half_precision(tmp_path, settings, tiny_sdxl):
    """bfloat16, checkpointed, in parts, the average in the computer's memory: all together."""
    folder, _ = tiny_sdxl
    course = replace(
        COURSE, precision="bf16", checkpointing=True, accumulate=2, ema=0.9, ema_on_cpu=True
    )
    sdxl = settings(tmp_path, base=str(folder), size="small", functional_loop=course)
    run(sdxl, plain_console())
    about = read_description(tmp_path / "difflora-model.safetensors")
    assert about.layout.base == "sdxl"
    assert about.source["base_model"].startswith(folder.name)
    assert Image.open(tmp_path / "samples" / "model-000.png").size == (64, 64)


def test_trackers_are_told(tmp_path, settings):
    quick = settings(tmp_path / "run", trackers=("tensorboard",), functional_loop=COURSE, samples=0)
    run(quick, plain_console())
    assert list((tmp_path / "run" / "trackers" / "functional").rglob("events.out.tfevents*"))
    with pytest.raises(ConfigError, match="no-such-tracker is unknown or not installed"):
        run(settings(tmp_path / "other", trackers=("no-such-tracker",)), plain_console())


def test_people_are_split_and_those_with_fewer_pictures_kept(dataset, tmp_path):
    device = torch.device("cpu")
    _, image = open_encoders("", str(paths.CLIP_VISION), device)
    encoders = Encoders(open_base("demo", device).model, image, file_digest(paths.CLIP_VISION))
    prepared = PreparedDataset(dataset)
    people = load_people(prepared, encoders, tmp_path, lambda *_: None)
    assert [int((row >= 0).sum()) for row in people.pictures.people] == [4, 3, 4, 3, 4]
    again = load_people(prepared, encoders, tmp_path, lambda *_: None)
    assert torch.equal(again.pictures.latents, people.pictures.latents)
    learn, judge = split_people(people, 0.4, seed=3)
    assert sorted(learn.names + judge.names) == ["p0", "p1", "p2", "p3", "p4"]
    assert len(judge) == 2
    assert split_people(people, 0.4, seed=3)[1].names == judge.names
    assert split_people(people, 0.1, seed=3)[1] is None
    photos = people.photos()
    first = people.pictures.features.select(people.pictures.people[1, [0, 1, 2, 0]])
    assert torch.equal(photos.face[4:8], first.face)  # who has fewer is seen again
    assert torch.equal(people.pictures.time_ids[0], torch.tensor([128.0, 128, 0, 0, 128, 128]))


def test_what_does_not_suit_is_refused(tmp_path, settings, corpus, photos):
    with pytest.raises(ConfigError, match="needs a corpus of LoRAs"):
        settings(tmp_path, method="paper")
    with pytest.raises(ConfigError, match="cannot be the name"):
        settings(tmp_path, name="a/b")
    for number, (given, said) in enumerate(
        [
            ({"clip_vision": ""}, "Name the CLIP vision"),
            ({"clip_vision": str(paths.OLD_LORA)}, "is no CLIP vision"),
            ({"method": "paper", "corpus": str(corpus), "rank": 2}, "rank"),
            ({"method": "paper", "corpus": str(tmp_path)}, "no corpus of LoRAs"),
            ({"dataset": str(tmp_path)}, "no prepared dataset"),
        ]
    ):
        faulty = replace(settings(tmp_path / f"run{number}"), **given)
        with pytest.raises(DiffLoRAError, match=said):
            run(faulty, plain_console())
    blind = tmp_path / "blind"
    prepare(photos, blind, replace(SMALL, faces=""))
    with pytest.raises(DatasetError, match="Nobody looked for faces"):
        run(replace(settings(tmp_path / "last"), dataset=str(blind)), plain_console())
    with pytest.raises(ConfigError, match="judge by by nobody: prepare both with one face"):
        run(settings(tmp_path / "judged", validation=str(blind)), plain_console())


def test_the_full_size_network_takes_the_encoders_at_hand():
    config = network_config(FeatureSizes(512, 1024, 257, 1280), True, preset="paper")
    assert config.feature_sizes == FeatureSizes(512, 1024, 257, 1280)
    assert (config.lae.latent_tokens, config.preset) == (64, "paper")
    own = network_config(FeatureSizes(512, 1024, 257, 1280), True, "paper", "conv1d")
    assert (own.lae.kind, config.lae.kind, own.lae.latent_dim) == ("conv1d", "structured", 64)


def test_pictures_of_several_shapes_train_in_batches_of_one(photos, tmp_path, settings):
    """Whole portraits, and their middles: three buckets; the base is told each one's own size."""
    for number, path in enumerate(sorted(photos.rglob("*.png"))):
        left, top = ((0, 0), (8, 0), (0, 8))[number % 3]
        own = tmp_path / "photos" / path.relative_to(photos)
        own.parent.mkdir(parents=True, exist_ok=True)
        Image.open(path).crop((left, top, 64 - left, 64 - top)).save(own)
    prepare(tmp_path / "photos", tmp_path / "dataset", SMALL)
    dataset = PreparedDataset(tmp_path / "dataset")
    assert len(dataset.buckets) == 3
    quick = settings(tmp_path / "run", functional_loop=COURSE, samples=1)
    run(replace(quick, dataset=str(tmp_path / "dataset")), plain_console())
    assert (tmp_path / "run" / "difflora-model.safetensors").exists()
    assert "people to judge by: cosine" in (tmp_path / "run" / "log.txt").read_text()
    _, image = open_encoders("", str(paths.CLIP_VISION), torch.device("cpu"))
    base = open_base("demo", torch.device("cpu")).model
    encoders = Encoders(base, image, file_digest(paths.CLIP_VISION))
    people = load_people(dataset, encoders, tmp_path / "features", lambda *_: None).pictures
    for row in range(len(dataset)):
        height, width = (int(side) * 4 for side in people.latents[torch.tensor([row])].shape[2:])
        assert people.time_ids[row, 4:].tolist() == [2 * height, 2 * width]
        assert dataset[row].picture.shape[:2] == (height, width)
        box = (
            people.boxes[row]
            * 4
            * torch.tensor(people.latents[torch.tensor([row])].shape[2:] * 2).flip(0)
        )
        torch.testing.assert_close(box, dataset[row].box)
