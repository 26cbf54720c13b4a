"""The build of the demo world: files that are not what a stage made, and the whole chain, tiny."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from difflora_core.demo import paths
from difflora_core.demo.build import __main__ as build
from difflora_core.demo.build import made

ROOT = Path(__file__).resolve().parents[2]
QUIET = Console(quiet=True)


@pytest.fixture
def world(tmp_path, monkeypatch) -> Path:
    """Two stages in a folder: both write `second`, as the stages of one model do."""
    for name, folder in (("ROOT", ""), ("ARTEFACTS", "artefacts"), ("BUILD", "build")):
        monkeypatch.setattr(paths, name, tmp_path / folder)
    monkeypatch.setattr(paths, "MANIFEST", tmp_path / "artefacts" / "manifest.json")
    for name in ("FIRST_BASE", "FACE_READER"):
        monkeypatch.setattr(paths, name, tmp_path / "build" / name)
    (tmp_path / "artefacts").mkdir()
    stages = (
        build.Stage("one", 1, writes("first", "second")),
        build.Stage("two", 1, writes("second")),
    )
    monkeypatch.setattr(build, "STAGES", stages)
    return tmp_path


def writes(*names: str):
    def run(report) -> dict[str, object]:
        for name in names:
            path = paths.ARTEFACTS / name
            path.write_text((path.read_text() if path.exists() else "") + name)
            report(1, 1, {})
        return {}

    return run


def test_done_stages_are_skipped_and_a_file_belongs_to_its_last_stage(world, capsys):
    assert build.main([]) == 0
    assert (world / "artefacts" / "second").read_text() == "secondsecond"
    assert build.main([]) == 0
    assert (world / "artefacts" / "second").read_text() == "secondsecond"
    manifest = json.loads(paths.MANIFEST.read_text())
    assert set(manifest["stages"]) == {"one", "two"}
    assert "files" not in manifest["stages"]["one"]
    record = made.read(made.marker("one"))
    assert set(record["files"]) == {"artefacts/first", "artefacts/second"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda p: p.write_text("edited"),
            "is another file than the stage one made",
        ),
        (lambda p: p.unlink(), "is missing, which the stage one made"),
    ],
)
def test_an_edited_file_is_noticed_before_anything_runs(world, change, said, capsys):
    build.main(["--only", "one"])
    change(world / "artefacts" / "first")
    assert build.main([]) == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert f"artefacts/first {said}" in printed
    assert "delete build/done/one.json" in printed
    assert not made.marker("two").exists()
    assert build.main(["--list"]) == 1
    made.marker("one").unlink()
    assert build.main([]) == 0


def test_what_benchmarks_write_belongs_to_no_stage(world, monkeypatch):
    """Strengths are chosen anew between two stages, and the build goes on."""
    monkeypatch.setattr(paths, "STRENGTHS", paths.ARTEFACTS / "chosen")
    first = build.Stage("one", 1, writes("first", "chosen"))  # somebody chose while it ran
    monkeypatch.setattr(build, "STAGES", (first, build.STAGES[1]))
    build.main(["--only", "one"])
    (paths.ARTEFACTS / "chosen").write_text("anew")
    assert build.main([]) == 0
    assert "chosen" in json.loads(paths.MANIFEST.read_text())["files"]


def test_files_of_another_commit_are_said(world, monkeypatch, capsys):
    build.main([])
    monkeypatch.setattr(build, "_commit", lambda: "another")
    assert build.main(["--list"]) == 0
    assert "done, by commit " in capsys.readouterr().out


def test_a_stage_that_was_stopped_owns_what_it_wrote_before(world, monkeypatch):
    def stops(report):
        writes("early")(report)
        raise build.InterruptedTraining("stopped")

    first, _ = build.STAGES
    monkeypatch.setattr(build, "STAGES", (build.Stage("one", 1, stops),))
    assert build.main([]) == 1
    monkeypatch.setattr(build, "STAGES", (first,))
    assert build.main([]) == 0
    assert "artefacts/early" in made.read(made.marker("one"))["files"]


@pytest.mark.slow
def test_the_whole_chain_tiny_interrupted_anywhere(tmp_path):
    """Every stage, poor: killed again and again, it goes on and ends with every artefact."""
    command = [sys.executable, str(Path(__file__).with_name("tiny_build.py")), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"}
    kills, answer = 0, None
    while answer is None:
        running = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        try:
            printed, _ = running.communicate(timeout=45 + 45 * kills if kills < 4 else None)
            answer = running.returncode
        except subprocess.TimeoutExpired:
            running.send_signal(signal.SIGKILL)
            running.wait()
            kills += 1
    assert answer == 0, printed[-2000:]
    here = {p.relative_to(tmp_path / "artefacts") for p in (tmp_path / "artefacts").rglob("*.*")}
    made_once = {p.relative_to(paths.ARTEFACTS) for p in paths.ARTEFACTS.rglob("*.*")}
    benchmarks = {Path("linear.safetensors"), Path("strengths.json")}
    assert here >= made_once - benchmarks
    manifest = json.loads((tmp_path / "artefacts" / "manifest.json").read_text())
    assert list(manifest["stages"]) == [stage.name for stage in build.STAGES]
    again = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "about 0 minutes" in again.stdout
    with (tmp_path / "artefacts" / "judges" / "prompts.safetensors").open("ab") as file:
        file.write(b"x")
    edited = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert edited.returncode == 1
    assert "prompts.safetensors is another file" in edited.stdout


def test_a_stage_that_was_killed_after_it_wrote_goes_on(world, monkeypatch):
    """It wrote over the file of a stage that is done: that is no edit."""

    def killed(report):
        writes("second")(report)
        raise KeyboardInterrupt

    first, second = build.STAGES
    monkeypatch.setattr(build, "STAGES", (first, build.Stage("two", 1, killed)))
    with pytest.raises(KeyboardInterrupt):
        build.main([])
    monkeypatch.setattr(build, "STAGES", (first, second))
    assert build.main([]) == 0
    (world / "artefacts" / "second").write_text("edited")
    assert build.main([]) == 1


def test_what_no_stage_makes_is_listed_when_it_is_written(world):
    assert build.main([]) == 0
    before = json.loads(paths.MANIFEST.read_text())
    (world / "artefacts" / "strengths.json").write_text("{}")
    made.list_artefacts()
    after = json.loads(paths.MANIFEST.read_text())
    digest = "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
    new = {"strengths.json": {"bytes": 2, "sha256": digest}}
    assert after == before | {"files": before["files"] | new}


def test_the_manifest_is_of_the_files_that_ship():
    """Every file that git keeps, as it is; and no record of a stage that the build lacks."""
    manifest = made.read(paths.MANIFEST)
    listed = subprocess.run(
        ["git", "-C", str(paths.ARTEFACTS), "ls-files"], capture_output=True, text=True, check=False
    ).stdout.split("\n")
    shipped = {name for name in listed if name and name != paths.MANIFEST.name}
    if not shipped:
        pytest.skip("this copy of the pack is not a git checkout")
    assert manifest["files"].keys() == shipped
    for name, facts in manifest["files"].items():
        path = paths.ARTEFACTS / name
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        assert (path.stat().st_size, digest) == (facts["bytes"], facts["sha256"]), name
    assert manifest["stages"].keys() <= {stage.name for stage in build.STAGES}
