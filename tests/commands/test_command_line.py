"""The command line itself: options out of records, files of settings, ends and exit statuses."""

import json
import os
import signal
import sys
import time
import types
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from difflora_core.commands import main as main_module
from difflora_core.commands import options
from difflora_core.commands.main import main
from difflora_core.commands.registry import COMMANDS, listing
from difflora_core.config import Config, check_range
from difflora_core.errors import ConfigError, DiffLoRAError, InterruptedTraining


@dataclass(frozen=True)
class Course(Config):
    """How it goes.

    Args:
        steps: how many.
        rate: how fast.
    """

    steps: int
    rate: float = 0.5

    def __post_init__(self):
        check_range("Course", "steps", self.steps, 1, 10**9)
        check_range("Course", "rate", self.rate, 0, 1)


@dataclass(frozen=True)
class Settings(Config):
    """Does a thing.

    Args:
        source: what it is done to.
        course: how it goes.
        words: some of them.
        quick: or slow.
        place: where, if anywhere.
    """

    source: str
    course: Course = field(default_factory=lambda: Course(3))
    words: tuple[str, ...] = ()
    quick: bool = False
    place: str | None = None


@pytest.fixture
def toy(monkeypatch):
    """A registered command of the name `toy`, which does what the test says."""

    def register(run):
        module = types.ModuleType("difflora_core.commands.toy")
        module.Settings, module.run = Settings, run
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setitem(main_module.COMMANDS, "toy", "a toy")

    return register


def read(*words):
    return options.read_settings(Settings, words, "toy")


def test_the_fields_are_the_options():
    assert read("here") == Settings("here")
    assert read("here", "--course.steps", "7", "--words", "a", "b", "--quick") == Settings(
        "here", Course(7), ("a", "b"), True
    )


def test_help_tells_every_field_and_its_default(capsys):
    with pytest.raises(SystemExit) as ended:
        read("--help")
    assert ended.value.code == 0
    told = capsys.readouterr().out
    for piece in ("Does a thing.", "SOURCE", "what it is done to", "--course.steps", "how many"):
        assert piece in told
    assert "--config FILE" in told


@pytest.mark.parametrize("words", [[], ["a", "--course.step", "3"], ["a", "--course.steps", "x"]])
def test_misuse_ends_with_2(words, capsys):
    with pytest.raises(SystemExit) as ended:
        read(*words)
    assert ended.value.code == 2
    assert capsys.readouterr().err


def test_the_line_wins_over_the_file_and_the_file_over_the_defaults(tmp_path):
    file = tmp_path / "settings.json"
    file.write_text(json.dumps({"source": "of the file", "course": {"rate": 0.25}, "quick": True}))
    assert read("--config", str(file)) == Settings("of the file", Course(3, 0.25), (), True)
    assert read(f"--config={file}", "here", "--course.steps", "9", "--no-quick") == Settings(
        "here", Course(9, 0.25), (), False
    )


@given(
    st.builds(
        Settings,
        st.text(min_size=1, max_size=9, alphabet="abc/ .é"),
        st.builds(Course, st.integers(1, 10**9), st.floats(0, 1)),
        st.lists(st.text(max_size=5, alphabet="xyz "), max_size=3).map(tuple),
        st.booleans(),
        st.none() | st.text(min_size=1, max_size=5, alphabet="uvw"),
    )
)
def test_what_a_run_writes_a_run_reads(settings):
    """config.json of a run, given back with --config, is the same run."""
    given_back = json.loads(settings.to_json())
    read_back = {
        name: options.build(hint, given_back[name], name)
        for name, hint in options.typing.get_type_hints(Settings).items()
    }
    line = options._line(Settings, read_back)()
    assert Settings(**vars(line)) == settings


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"sauce": 1}', "unknown settings sauce; there are source, course"),
        ('{"course": {"pace": 1}}', "unknown settings pace"),
        ('{"course": 3}', "expected a group of settings"),
        ('{"quick": 1}', "expected bool"),
        ('{"course": {"rate": 7}}', "must lie in 0 to 1"),
        ("[]", "no table of settings"),
        ('{"source": "a", "source": "b"}', "a key stands there twice"),
        ("{", "not valid JSON"),
    ],
)
def test_a_wrong_file_of_settings_is_refused(tmp_path, text, said):
    file = tmp_path / "settings.json"
    file.write_text(text)
    with pytest.raises(ConfigError, match=said):
        read("a", "--config", str(file))


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"gone\.json cannot be read"):
        read("a", "--config", str(tmp_path / ("a long folder " * 8) / "gone.json"))
    with pytest.raises(ConfigError, match="needs the name of a file"):
        read("a", "--config")


def test_without_tyro_one_sentence_says_what_to_install(toy, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tyro", None)
    toy(lambda settings, console: None)
    assert main(["toy", "a"]) == 1
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "pip install 'difflora[train]'" in told


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_settings_and_runs(name):
    module = import_module(f"difflora_core.commands.{name}")
    assert issubclass(module.Settings, Config)
    assert callable(module.run)
    assert f"`{name}`" in module.__doc__.split(":")[0]
    assert f"  {name} " in listing()


def test_every_file_with_settings_is_a_command():
    folder = Path(main_module.__file__).parent
    files = [f.stem for f in folder.glob("*.py") if "class Settings(" in f.read_text("utf-8")]
    assert sorted(files) == sorted(COMMANDS)


def test_ends_and_their_statuses(toy, capsys):
    def raising(error):
        def run(settings, console):
            raise error

        return run

    toy(lambda settings, console: console.print(f"[red]did {settings.source}[/red]"))
    assert main(["toy", "it"]) == 0
    assert capsys.readouterr().out == "[red]did it[/red]\n"  # text, no markup
    toy(raising(DiffLoRAError("no good. Do better.")))
    assert main(["toy", "it"]) == 1
    assert capsys.readouterr().err == "toy: no good. Do better.\n"
    toy(raising(InterruptedTraining("stopped after step 3; run it again to go on")))
    assert main(["toy", "it"]) == 130
    assert "toy was stopped after step 3" in capsys.readouterr().err
    toy(raising(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):  # bugs keep their traceback
        main(["toy", "it"])


@pytest.fixture
def ctrl_c():
    """Sets what Ctrl-C does in this process: in the background of a script it is ignored."""
    before = signal.getsignal(signal.SIGINT)
    yield lambda handler: signal.signal(signal.SIGINT, handler)
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("number", "status", "on_ctrl_c"),
    [
        (signal.SIGINT, 130, signal.default_int_handler),
        (signal.SIGTERM, 143, signal.default_int_handler),
        (signal.SIGTERM, 143, signal.SIG_IGN),
    ],
)
def test_signals_stop_a_command(toy, capsys, ctrl_c, number, status, on_ctrl_c):
    ctrl_c(on_ctrl_c)
    before = signal.getsignal(signal.SIGTERM)

    def run(settings, console):
        os.kill(os.getpid(), number)
        time.sleep(60)
        raise AssertionError("the signal was not heard")

    toy(run)
    assert main(["toy", "it"]) == status
    assert "run it again to go on" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before


def test_as_a_process(command):
    assert command("--help").stdout.startswith("python -m difflora_core COMMAND")
    assert "There is no command bogus." in command("bogus", code=2).stderr
    assert "COMMAND" in command(code=2).stderr
    refused = command("inspect", "/nowhere/at/all", code=1)
    assert refused.stderr == "inspect: There is no file at /nowhere/at/all.\n"
