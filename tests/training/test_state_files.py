"""Whatever lies where a run's state should be is refused in words, or taken up bit for bit."""

import json
import random
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from difflora_core.config import Config
from difflora_core.errors import CheckpointError, DiffLoRAError, InterruptedTraining
from difflora_core.training.loop import ByStep, Hooks, LoopConfig, train
from difflora_core.training.state_file import RunIdentity, differences, write_state

LOOP = LoopConfig(
    steps=12, learning_rate=1e-2, matrix_rate=0.01, warmup=2, ema=0.9, checkpoint_every=3,
    log_every=2, seed=3, validate_every=4, patience=0, precision="fp16",
)  # fmt: skip


class Normed(nn.Module):
    """A network with buffers, matrices, and a bias that never has a gradient."""

    def __init__(self):
        super().__init__()
        self.norm, self.net, self.unused = nn.BatchNorm1d(3), nn.Linear(3, 4), nn.Linear(2, 2)
        with torch.no_grad():
            for i, p in enumerate(self.parameters()):
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) / 2)

    def forward(self, batch):
        loss = self.net(self.norm(batch["x"])).square().mean()
        return loss, {"error": loss.detach()}


def run(folder, loop=LOOP, stop=None, module=None):
    """Train, or go on, with a new module; everything that the run leaves in it."""
    module = module or Normed()
    generator = torch.Generator().manual_seed(5)
    make = ByStep(lambda step: {"x": torch.randn(6, 3, generator=generator)}, generator)
    asked = iter([False] * stop + [True]) if stop is not None else iter([False] * 99)

    def validate():
        with torch.no_grad():
            return float(module.net.weight.square().mean())

    train(module, make, loop, folder, Hooks(validate=validate, stop=lambda: next(asked)))
    return module.state_dict()


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run stopped after ten steps, and what the whole run leaves."""
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.raises(InterruptedTraining):
        run(folder, stop=10)
    return folder, run(tmp_path_factory.mktemp("straight"))


@pytest.fixture
def folder(stopped, tmp_path):
    """A copy of the stopped run."""
    for file in stopped[0].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def texts_of(path):
    """The metadata of a file."""
    with safe_open(path, "pt") as file:
        return file.metadata()


class Raw(Config):
    """Facts as any text."""

    def __init__(self, text):
        self.text = text

    def to_json(self):
        return self.text


def lie(path, tensors=None, facts=None):
    """Write a state anew with other parts, its digest made as ours are."""
    texts = texts_of(path)
    told = json.loads(texts["facts"])
    text = facts if isinstance(facts, str) else json.dumps({**told, **(facts or {})})
    parts = {n: t for n, t in {**load_file(path), **(tensors or {})}.items() if t is not None}
    write_state(path, parts, Raw(text), RunIdentity(texts["fingerprint"], {}))


def refused(folder, match):
    """Raises unless going on is refused and leaves a module as it was."""
    module, before = Normed(), Normed().state_dict()
    with pytest.raises(CheckpointError, match=match):
        run(folder, module=module)
    assert all(torch.equal(before[name], t) for name, t in module.state_dict().items())


def test_the_copy_is_taken_up(folder, stopped):
    lie(folder / "state.safetensors")
    again = run(folder)
    assert all(torch.equal(again[name], t) for name, t in stopped[1].items())


NAN, ONES = torch.full((4, 3), torch.nan), torch.ones(3)
TENSORS = {
    "a weight less": {"model.norm.bias": None},
    "a weight of another kind": {"model.net.weight": torch.ones(4, 3).half()},
    "a weight as integers": {"model.net.weight": torch.ones(4, 3).int()},
    "a weight that is no number": {"model.net.weight": NAN},
    "an infinite weight": {"model.net.weight": torch.full((4, 3), torch.inf)},
    "a buffer less": {"buffer.norm.running_mean": None},
    "a buffer more": {"buffer.norm.other": ONES},
    "a buffer of another shape": {"buffer.norm.running_var": torch.ones(1)},
    "a buffer that is no number": {"buffer.norm.running_var": ONES * torch.nan},
    "a count as a float": {"buffer.norm.num_batches_tracked": torch.tensor(10.0)},
    "an average less": {"ema.norm.bias": None},
    "an average more": {"ema.other": ONES},
    "an average of another shape": {"ema.net.weight": torch.ones(1)},
    "an average that is no number": {"ema.net.weight": NAN},
    "a moment less": {"optimizer.0.1.exp_avg": None},
    "a moment more": {"optimizer.0.1.other": ONES},
    "a moment of another shape": {"optimizer.0.1.exp_avg": torch.ones(1)},
    "a moment that is no number": {"optimizer.0.1.exp_avg": ONES * torch.nan},
    "a square below zero": {"optimizer.0.1.exp_avg_sq": -ONES},
    "a moment of no parameter": {"optimizer.0.99.exp_avg": ONES},
    "an index that is a word": {"optimizer.0.first.exp_avg": ONES},
    "an optimiser more": {"optimizer.2.0.exp_avg": ONES},
    "half a step": {"optimizer.0.1.step": torch.tensor(1.5)},
    "no step": {"optimizer.0.1.step": torch.tensor(0.0)},
    "a step too far": {"optimizer.0.1.step": torch.tensor(11.0)},
    "no generator": {"generator": None},
    "a short generator": {"generator": torch.zeros(16, dtype=torch.uint8)},
    "an empty generator": {"generator": torch.zeros(0, dtype=torch.uint8)},
    "another engine": {"generator": torch.zeros(5056, dtype=torch.uint8)},
    "anything else": {"other": ONES},
    "nothing at all": {name: None for name in ("generator", "ema.norm.bias")},
}


@pytest.mark.parametrize("what", TENSORS)
def test_a_state_with_other_parts_is_refused_before_anything_is_put_in_place(folder, what):
    lie(folder / "state.safetensors", TENSORS[what])
    refused(folder, r"state\.safetensors (is damaged; delete it|belongs to another model)")


HUGE = "1" + "0" * 400
FACTS = {
    "a step before the first": {"step": -1},
    "a step past the last": {"step": 13, "judged": 12},
    "half a step": {"step": 9.5},
    "a step that is a word": {"step": "9"},
    "a step that is a truth": {"step": True},
    "judged in the future": {"judged": 11},
    "judged before all": {"judged": -2},
    "more averages than steps": {"updates": 11},
    "averages below zero": {"updates": -1},
    "a best that is no number": {"best": float("nan")},
    "a best of minus infinity": {"best": float("-inf")},
    "a meter of nothing": {"meter": [["loss", "0x1p0", 0]]},
    "a meter of words": {"meter": [["loss", "much", 1]]},
    "a meter of hugeness": {"meter": [["loss", "0x1p9999", 1]]},
    "a meter of numbers": {"meter": [1]},
    "a meter that is a table": {"meter": {"loss": 1}},
    "no loss scale": {"scale": None},
    "a loss scale of zero": {"scale": [0.0, 1]},
    "a loss scale below zero": {"scale": [-2.0, 1]},
    "an endless loss scale": {"scale": [float("inf"), 1]},
    "a growth below zero": {"scale": [2.0, -1]},
    "an unknown fact": {"other": 1},
    "no facts": "",
    "a list": "[]",
    "a number": "3",
    "nothing": "{}",
    "no JSON": "{'step': 3}",
    "depth": "[" * 50_000,
    "digits": '{"step": ' + "9" * 5000 + "}",
    "hugeness": '{"step": ' + HUGE + ', "judged": -1, "updates": 0, "meter": [], "best": null, '
    '"scale": [1.0, 0]}',
}  # fmt: skip


@pytest.mark.parametrize("what", FACTS)
def test_numbers_that_no_run_has_are_refused(folder, what):
    lie(folder / "state.safetensors", facts=FACTS[what])
    refused(folder, r"state\.safetensors is damaged; delete it")


BEST = {
    "a weight less": ({"norm.bias": None}, None),
    "a weight that is no number": ({"net.weight": NAN}, None),
    "a weight of another kind": ({"net.weight": torch.ones(4, 3).double()}, None),
    "a loss that is no number": (None, {"value": float("nan")}),
    "a loss of minus infinity": (None, {"value": float("-inf")}),
    "a step before the first": (None, {"step": -1}),
    "a step that is a word": (None, {"step": "4"}),
    "a worse loss than was known": (None, {"value": 1e9}),
    "no facts": (None, "null"),
}


@pytest.mark.parametrize("what", BEST)
def test_a_best_that_no_run_has_is_refused(folder, what):
    lie(folder / "best.safetensors", *BEST[what])
    refused(folder, r"best\.safetensors (is damaged|belongs to another model|is missing or older)")


def test_a_state_knows_that_it_had_a_best(folder):
    (folder / "best.safetensors").unlink()
    refused(folder, r"best\.safetensors is missing or older than state\.safetensors beside it")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": 9}, "seed 3 there and 9 here"),
        ({"learning_rate": 0.02}, "learning_rate 0.01 there and 0.02 here"),
        ({"matrix_rate": 0.0}, "matrix_rate 0.01 there and 0.0 here"),
        ({"ema": 0.0}, "ema 0.9 there and 0.0 here"),
        ({"steps": 20}, "steps 12 there and 20 here"),
        ({"precision": "no"}, "precision 'fp16' there and 'no' here"),
        ({"ema": 0.5, "seed": 4}, "ema 0.9 there and 0.5 here; seed 3 there and 4 here"),
    ],
)
def test_another_run_is_refused_with_what_differs(folder, changes, words):
    """Averaging and Muon switched off, and so on again, would leave states of other names."""
    with pytest.raises(CheckpointError, match=words):
        run(folder, replace(LOOP, **changes))
    there = replace(LOOP, **changes)
    (folder / "other").mkdir()
    with pytest.raises(InterruptedTraining):
        run(folder / "other", there, stop=5)
    with pytest.raises(CheckpointError, match="another training"):
        run(folder / "other")


@pytest.mark.parametrize("settings", ["", "[]", "[" * 9999, '{"seed": "\\ud800"}', '{"seed": 7}'])
def test_what_another_run_says_of_itself_is_not_trusted(folder, settings):
    path = folder / "state.safetensors"
    texts = texts_of(path) | {"settings": settings, "fingerprint": "other"}
    save_file(load_file(path), path, metadata={n: t for n, t in texts.items() if n != "digest"})
    refused(folder, "is damaged")  # without the digest
    write_state(path, load_file(path), Raw("{}"), RunIdentity("other", {"seed": settings}))
    with pytest.raises(CheckpointError, match="another training") as found:
        run(folder)
    str(found.value).encode()
    assert len(str(found.value)) < 500


def test_differences_are_named():
    here = {"a": 1, "b": {"c": (1, 2), "d": 0.5}, "new": True}
    assert differences(json.loads(json.dumps(here)), here) == []
    there = {"a": True, "b": {"c": [1, 3], "d": 0.5}, "old": 3}
    assert differences(there, here) == [
        "a True there and 1 here",
        "b.c [1, 3] there and [1, 2] here",
        "new None there and True here",
    ]


@pytest.mark.parametrize("change", [{"version": "2"}, {"version": None}, {"format": "pt"}])
def test_another_version_says_so(folder, change):
    path = folder / "state.safetensors"
    texts = {n: t for n, t in {**texts_of(path), **change}.items() if t is not None}
    save_file(load_file(path), path, metadata=texts)
    refused(folder, "no training state of this version")


@pytest.mark.parametrize("name", ["state.safetensors", "best.safetensors"])
def test_every_byte_counts(folder, stopped, name):
    """Flipped, cut, repeated or exchanged bytes: an error of ours, or the very same run."""
    rng, path = random.Random(name), folder / name
    files = {file: file.read_bytes() for file in folder.iterdir()}
    whole = files[path]
    for _ in range(150):
        for file, content in files.items():
            file.write_bytes(content)
        at, length = rng.randrange(len(whole)), rng.choice([1, 1, 1, 8, 64])
        new = rng.choice(
            [
                whole[:at],
                whole[:at] + bytes([whole[at] ^ 1 << rng.randrange(8)]) + whole[at + 1 :],
                whole[:at] + rng.randbytes(length) + whole[at + length :],
                whole[:at] + whole[at : at + length] + whole[at:],
                whole[:at] + rng.choice([b"NaN", b"-1", b"[]", b'"', b"1e999"]) + whole[at + 3 :],
            ]
        )
        path.write_bytes(new)
        try:
            again = run(folder)
        except DiffLoRAError as error:
            str(error).encode()
            continue
        assert all(torch.equal(again[n], t) for n, t in stopped[1].items())


def test_a_killed_run_leaves_no_event_twice(folder):
    """What was logged after the state that is gone on from, and half a line, goes."""
    log = folder / "events.jsonl"
    sound = log.read_text()
    with log.open("a") as file:
        file.write('{"step": 12, "loss": 1.0}\nnothing\n{"step": 10, "lo')
    run(folder)
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert steps == [2, 4, 6, 8, 10, 12]
    assert log.read_text().startswith(sound)
