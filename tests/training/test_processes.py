"""Two and four real processes over gloo: the weights of one; they stop, fail and go on together."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from difflora_core.errors import ConfigError
from difflora_core.training.processes import Processes, split

PROGRAM = Path(__file__).with_name("two_processes.py")


@pytest.fixture(scope="module")
def program():
    """The program's own functions, to run them in this one process."""
    spec = importlib.util.spec_from_file_location("two_processes", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


LAUNCHES = [(2, "plain"), (2, "FSDP"), *(
    pytest.param((4, kind), marks=pytest.mark.slow) for kind in ("plain", "FSDP")
)]  # fmt: skip


@pytest.fixture(scope="module", params=LAUNCHES, ids=str)
def launched(request, tmp_path_factory, program, launch_processes):
    """What all processes found, and their folder; one launch for all tests."""
    (count, kind), folder = request.param, tmp_path_factory.mktemp("several")
    stopped = program.run(folder / "one process stopped", progress=program.stop_at(15))
    assert stopped["error"] == "Stopped"
    return launch_processes(PROGRAM, folder, count, kind), folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory, program):
    """The same training in this process."""
    return program.run(tmp_path_factory.mktemp("one"))


def close(a, b):
    """Equal to rounding."""
    torch.testing.assert_close(torch.tensor(a), torch.tensor(b), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", ["finish", "parts", "taken over", "resume"])
def test_two_processes_give_the_weights_of_one(launched, alone, case):
    """Straight, in parts of parts, from one process's state, and after a stop of rank 1."""
    first, *others = (found[case] for found in launched[0])
    assert all(other == first | {"result": other["result"]} for other in others)
    close(first["weights"], alone["weights"])
    assert first["result"]["best_step"] == alone["result"]["best_step"]
    for name in ("loss", "error", "validation"):
        assert first["result"][name] == pytest.approx(alone["result"][name], rel=1e-3)


def test_of_fsdp_each_process_holds_a_part_and_all_of_it_afterwards(launched, request):
    found = [one["held"] for one in launched[0]]
    assert all(one["kinds"] == ["Parameter"] for one in found)
    count = sum(one["held"] for one in found)
    if "FSDP" in request.node.name:
        assert count == found[0]["all"]  # nothing twice
    else:
        assert count == len(found) * found[0]["all"]


def test_who_is_told_of_a_step_may_look_at_all_weights(launched):
    """Previews are drawn so, by the main process alone."""
    first, *others = (found["shown"] for found in launched[0])
    assert first["seen"] == [first["end"]]
    assert all(other == {"seen": [], "end": first["end"]} for other in others)


def test_a_loss_that_compares_samples_is_computed_whole_by_everyone(launched, program, tmp_path):
    alone = program.run(tmp_path, draws=program.compared, splits=False)
    for found in launched[0]:
        close(found["compared"]["weights"], alone["weights"])
    plain = program.run(tmp_path / "plain")
    assert (torch.tensor(plain["weights"]) - torch.tensor(alone["weights"])).abs().max() > 1e-2


def test_a_resumed_run_of_two_is_that_of_two(launched):
    found, folder = launched
    assert found[0]["resume"] == found[0]["finish"]
    logs = [(folder / name / "events.jsonl").read_text() for name in ("finish", "stop")]
    assert logs[0] == logs[1]
    assert len(logs[0].splitlines()) == 6  # the main process alone writes


def test_one_process_takes_over_from_two(launched, alone, program):
    _, folder = launched
    run = folder / "stop for one"
    assert (run / "state.safetensors").exists()
    close(program.run(run)["weights"], alone["weights"])


@pytest.mark.parametrize(
    ("case", "kind", "message"),
    [
        ("stop", "Stopped", "stopped after step 12"),
        ("stop for one", "Stopped", "stopped after step 15"),
        ("keyboard", "Stopped", "stopped after step 4"),
        ("not a number", "DivergedError", "step 7, process"),
        ("failure", ("DiffLoRAError", "ValueError"), "a broken picture"),
        ("validation fails", ("DiffLoRAError", "ValueError"), "a broken judge"),
        ("validation stops", "Stopped", "stopped after step 20"),
        ("disk", ("OSError", "DiffLoRAError"), "no space left"),
        ("uneven", "ConfigError", "multiple of"),
    ],
)
def test_what_happens_to_one_process_ends_all(launched, case, kind, message):
    """Even where the last alone saw it (main alone for the disk)."""
    first, last = (kind, kind) if isinstance(kind, str) else kind
    count = len(launched[0])
    middle = "DiffLoRAError" if first != last else first
    kinds = [first, *[middle] * (count - 2), last]
    assert [found[case]["error"] for found in launched[0]] == kinds
    assert all(message in found[case]["message"] for found in launched[0])


def test_patience_ends_all_with_the_main_process_judging(launched):
    for found in launched[0]:
        result = found["patience"]["result"]
        assert (result["steps"], result["best_step"], result["validation"]) == (15, 5, 1.0)


def test_a_broken_batch_is_named_on_every_process(launched):
    count = len(launched[0])
    for found in launched[0]:
        message = found["not a number"]["message"]
        assert f"process {count} of {count}" in message
        assert "'person 15'" in message  # the last part of the batch
        assert "'person 7'" not in message
    text = f"process {count} of {count} failed: ValueError"
    assert text in launched[0][0]["failure"]["message"]


def test_a_batch_is_cut_along_its_samples():
    batch = {
        "x": torch.arange(6), "names": list("abcdef"), "scale": torch.tensor(3.0), "all": ("a", "b")
    }  # fmt: skip
    first, second = split(batch, 2)
    assert first["x"].tolist() == [0, 1, 2]
    assert second["names"] == ["d", "e", "f"]
    assert second["scale"] == 3
    assert second["all"] == ("a", "b")
    assert split(batch, 1) == [batch]
    with pytest.raises(ConfigError, match="6 samples"):
        split(batch, 4)
    with pytest.raises(ConfigError, match="5 and 6 samples"):
        split({**batch, "names": list("abcde")}, 2)


def test_a_process_alone_has_nobody_to_ask():
    alone = Processes()
    assert alone.agree_on(None, [1.0, 2.0]) == [1.0, 2.0]
    with pytest.raises(ValueError, match="own"):
        alone.agree(ValueError("own"))
    assert replace(alone, rank=1).is_main is False
