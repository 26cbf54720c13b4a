"""Folders of runs: what they keep, who may use them, and how progress is told."""

import io
import json
from dataclasses import dataclass

import pytest
from filelock import FileLock
from rich.console import Console

from difflora_core.commands.progress import EVERY, Watch, duration
from difflora_core.commands.run_folder import LOCK, LOG, SETTINGS, VERSIONS, run_folder
from difflora_core.config import Config
from difflora_core.errors import ConfigError


@dataclass(frozen=True)
class ToySettings(Config):
    """Of a toy."""

    steps: int = 3
    name: str = "a"

    def __post_init__(self):
        if not 0 <= self.steps < 10**9:
            raise ConfigError("steps")


@pytest.fixture
def console():
    return Console(file=io.StringIO(), markup=False, width=200)


def test_a_run_says_what_it_is(tmp_path, console):
    with run_folder(tmp_path / "run", ToySettings(), console) as run:
        run.say("half way")
    assert json.loads((run.path / SETTINGS).read_text()) == {"steps": 3, "name": "a"}
    assert {"difflora", "torch", "python"} <= json.loads((run.path / VERSIONS).read_text()).keys()
    with run_folder(tmp_path / "run", ToySettings(5), console):
        pass
    log = (run.path / LOG).read_text()
    assert "A new run in" in log.splitlines()[0]
    assert "half way" in log.splitlines()[1]
    assert "goes on; other settings: steps 3 there and 5 here." in log.splitlines()[2]


def test_a_folder_of_other_files_is_left_alone(tmp_path, console):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="holds other files and no run"):
        with run_folder(tmp_path, ToySettings(), console):
            pass
    assert [own.name for own in tmp_path.iterdir()] == ["thesis.txt"]


def test_two_processes_do_not_share_a_folder(tmp_path, console):
    with run_folder(tmp_path / "run", ToySettings(), console):
        pass
    with FileLock(tmp_path / "run" / LOCK):
        with pytest.raises(ConfigError, match="Another process works in"):
            with run_folder(tmp_path / "run", ToySettings(), console):
                pass


def test_a_damaged_record_is_named(tmp_path, console):
    with run_folder(tmp_path, ToySettings(), console):
        pass
    (tmp_path / SETTINGS).write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json is damaged"):
        with run_folder(tmp_path, ToySettings(), console):
            pass


def test_a_place_that_is_a_file_is_named(tmp_path, console):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="file cannot be used"):
        with run_folder(tmp_path / "file", ToySettings(), console):
            pass


def test_rate_and_time_left_do_not_count_what_an_earlier_run_did(console):
    times, lines = iter([0.0, 10.0, 10.0 + EVERY, 60.0]), []
    with Watch("fit", console, lines.append, clock=lambda: next(times)) as watch:
        watch(500, 1000, {})  # where the earlier run ended
        watch(520, 1000, {"loss": 0.5})  # too soon for a line
        watch(580, 1000, {"loss": 0.25})
        watch(1000, 1000, {})
    assert lines == [
        "fit 500/1000",
        "fit 580/1000, 2/s, 3.5 min left, loss 0.25",
        "fit 1000/1000, 8.33/s, 0 s left",
    ]


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "0 s"), (89, "89 s"), (90, "1.5 min"), (3000, "50 min"), (9000, "2.5 h")],
)
def test_durations_in_words(seconds, words):
    assert duration(seconds) == words
    assert duration(86_400 * 12.34) == "12.3 days"
