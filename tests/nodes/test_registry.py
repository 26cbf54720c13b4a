"""The pack as the registry takes it: valid, packed by ComfyUI's own tool, laid out, started.

Its workflows go through comfy-test's converter and validator too.
"""

import asyncio
import importlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from comfy_test.comfyui.validator import WorkflowValidation
from comfy_test.comfyui.workflow_converter import WorkflowConverter, set_object_info

from difflora_core.demo.comfyui.server import ComfyServer
from difflora_core.demo.comfyui.workflow_api import PACK, workflow_to_prompt
from difflora_core.demo.workflows.runner import read_workflow

SHIPPED = {"README.md", "LICENSE", "__init__.py", "pyproject.toml", "requirements.txt"}
FOLDERS = {"difflora_core", "locales", "nodes", "web", "workflows"}
MAX_BYTES = 60 * 2**20
WORKFLOWS = sorted((PACK / "workflows").glob("*.json"))


def git(*arguments, folder):
    """Runs git and returns what it wrote."""
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def comfy_cli(*arguments, folder, home):
    """Runs ComfyUI's command line tool without its questions and reports."""
    command = [sys.executable, "-m", "comfy_cli", "--skip-prompt", "--no-enable-telemetry"]
    environment = {**os.environ, "HOME": str(home), "DO_NOT_TRACK": "1"}
    return subprocess.run(
        [*command, *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """The files of the pack that git keeps, as a repository of its own."""
    if not (PACK / ".git").exists():
        pytest.skip("the registry's tool packs what git keeps, and this is no git checkout")
    folder = tmp_path_factory.mktemp("checkout")
    for name in git("ls-files", "-z", folder=PACK).split("\0")[:-1]:
        if (PACK / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(PACK / name, folder / name)
    git("init", "--quiet", folder=folder)
    git("add", "--all", folder=folder)
    return folder


@pytest.fixture(scope="module")
def packed(checkout, tmp_path_factory):
    """The archive that would be uploaded."""
    result = comfy_cli("node", "pack", folder=checkout, home=tmp_path_factory.mktemp("home"))
    assert result.returncode == 0, result.stdout + result.stderr
    return checkout / "node.zip"


@pytest.fixture(scope="module")
def installed(packed, tmp_path_factory):
    """ComfyUI with the archive laid out as `comfy node install difflora` does."""
    base = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(packed) as archive:
        archive.extractall(base / "custom_nodes" / "difflora")
    with ComfyServer(base, packs=()) as server:
        yield server


def test_registry_accepts_the_pack(checkout, tmp_path):
    result = comfy_cli("node", "validate", folder=checkout, home=tmp_path)
    said = result.stdout + result.stderr
    assert result.returncode == 0, said
    assert "All validation checks passed" in said
    assert "warning" not in said.lower()


def test_pack_holds_what_runs_and_nothing_else(packed):
    with zipfile.ZipFile(packed) as archive:
        names = [Path(name) for name in archive.namelist()]
        size = sum(item.compress_size for item in archive.infolist())
    assert {path.parts[0] for path in names if len(path.parts) > 1} == FOLDERS
    assert {path.name for path in names if len(path.parts) == 1} == SHIPPED
    assert not [path for path in names if path.suffix == ".pyc" or "__pycache__" in path.parts]
    assert size < MAX_BYTES


def test_installed_pack_is_complete(installed, comfy, ask):
    info, expected = installed.client.object_info(), comfy.object_info()
    ours = {node for node in expected if node.startswith("DiffLoRA_")}
    assert {node for node in info if node.startswith("DiffLoRA_")} == ours
    assert {info[node]["python_module"] for node in ours} == {"custom_nodes.difflora"}
    for node in ours:
        assert ask(installed.client, f"/extensions/difflora/docs/{node}.md")
    templates = installed.client.get("/workflow_templates")["difflora"]
    assert set(templates) == {path.stem for path in WORKFLOWS}
    photos = {path.name for path in (PACK / "workflows").glob("difflora_demo_*.png")}
    assert photos <= {path.name for path in (installed.base_directory / "input").iterdir()}


def test_photos_are_offered_once(pack, tmp_path, monkeypatch):
    """Whoever deletes one wants it gone; a new input folder gets them all."""
    import folder_paths

    paths = importlib.import_module(".nodes.model_paths", pack.__name__)
    monkeypatch.setattr(folder_paths, "get_user_directory", lambda: str(tmp_path / "user"))
    for name in ("one", "two"):
        folder = tmp_path / name
        folder.mkdir()
        monkeypatch.setattr(folder_paths, "get_input_directory", lambda folder=folder: str(folder))
        paths.offer_photos()
        photos = sorted(path.name for path in folder.iterdir())
        assert len(photos) > 2
        (folder / photos[0]).unlink()
        paths.offer_photos()
        assert sorted(path.name for path in folder.iterdir()) == photos[1:]
    (tmp_path / "user" / "difflora" / paths.OFFERED).write_text("damaged")
    paths.offer_photos()
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == photos


def test_a_list_without_files_says_what_to_do(pack):
    paths = importlib.import_module(".nodes.model_paths", pack.__name__)
    assert paths.choices(["a.safetensors"], "difflora") == ["a.safetensors"]
    (only,) = paths.choices([], "difflora")
    assert only == "none yet: put one into models/difflora, press R"
    assert "Put the file into" in paths.problem(paths.difflora_file, only)
    assert "Put the file into" in paths.problem(paths.difflora_file, None)


@pytest.fixture
def entry(pack, monkeypatch):
    """Calls the entry point as a ComfyUI of a version would."""
    import comfyui_version

    def call(version):
        monkeypatch.setattr(comfyui_version, "__version__", version)
        return asyncio.run(pack.comfy_entrypoint())

    return call


def test_an_old_comfyui_is_told_which_one_is_needed(entry, monkeypatch):
    """Reported of 0.3.64: every node missing, with a TypeError of Python's in the log."""
    from comfy_api.latest import io

    def schema(self, node_id, display_name=None, category="", inputs=(), outputs=()):
        raise AssertionError("every node of ours asks for more than that")

    monkeypatch.setattr(io.Schema, "__init__", schema)
    with pytest.raises(
        RuntimeError, match=r"needs ComfyUI 0\.24\.0 or newer, and this is 0\.3\.64"
    ):
        entry("0.3.64")


@pytest.mark.parametrize("version", ["0.24.0", "0.30.0", "0.31.0-rc1", "1.0.0+local"])
def test_a_comfyui_that_has_what_is_needed_works(entry, version, caplog):
    assert entry(version) is not None
    assert not caplog.records


def test_an_old_one_that_has_all_nodes_is_tried_and_told(entry, caplog):
    assert entry("0.23.9") is not None
    (told,) = (record.getMessage() for record in caplog.records)
    assert told.startswith("DiffLoRA is made for ComfyUI 0.24.0 and newer, and this is 0.23.9: ")


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_another_converter_and_validator_agree(comfy, path):
    """comfy-test leaves out nodes that nothing follows.

    Its validator's first level puts widget values on the wrong widgets, of core's KSampler too: it
    knows neither seed controls nor combos of today's schemas, nor the second level types that
    follow what is connected. ComfyUI checks both.
    """
    info, workflow = comfy.object_info(), read_workflow(path)
    set_object_info(info)
    theirs = WorkflowConverter.convert_to_api(read_workflow(path))
    ours = workflow_to_prompt(workflow, info)
    assert {node: theirs[node]["inputs"] for node in theirs} == {
        node: ours[node]["inputs"] for node in theirs
    }
    followed = {
        value[0] for entry in ours.values() for value in entry["inputs"].values() if is_link(value)
    }
    assert not (set(ours) - set(theirs)) & followed
    errors = WorkflowValidation(info).validate(workflow).errors
    known = [e for e in errors if e.level == "schema" or "COMFY_MATCHTYPE" in e.message]
    assert [str(error) for error in errors if error not in known] == []


def is_link(value):
    """True for [node id, output]."""
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str)
