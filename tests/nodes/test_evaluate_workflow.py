"""`evaluate` with a row that a real ComfyUI draws by a workflow."""

import json
import shutil

import pytest

from difflora_core.commands.comfy_servers import Servers
from difflora_core.commands.evaluate import Settings, run
from difflora_core.commands.evaluate_backbones import Backbones
from difflora_core.commands.main import plain_console
from difflora_core.demo.comfyui.server import free_port
from difflora_core.demo.paths import ROOT
from difflora_core.errors import DatasetError
from difflora_core.evaluation.protocol import read_protocol
from difflora_core.storage.image_files import read_texts

WORKFLOW = ROOT / "workflows" / "api" / "multiply_demo.json"


@pytest.fixture
def settings(tmp_path):
    """A run of one row over two people; `url` is of the server."""

    def make(url):
        return Settings(
            str(tmp_path / "run"),
            (f"another={WORKFLOW}",),
            first_people=2,
            first_prompts=1,
            seeds=1,
            steps=1,
            backbones=Backbones(faces="demo"),
            servers=Servers((url,), wait=0.0),
        )

    return make


def drawn(folder):
    """The row's pictures: bytes and time of each."""
    found = sorted((folder / "run" / "pictures" / "another").rglob("*.png"))
    return {p.relative_to(folder): (p.read_bytes(), p.stat().st_mtime_ns) for p in found}


def test_a_workflow_is_a_row(comfy_server, settings, tmp_path):
    """Drawn once, with the protocol's prompt; without its server what is there is enough."""
    run(settings(comfy_server.client.url), plain_console())
    before = drawn(tmp_path)
    assert len(before) == 2
    assert len({data for data, _ in before.values()}) == 2
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["rows"]["another"]["pictures"] == 2
    prompt = read_protocol("demo").text(0)
    assert all(read_texts(tmp_path / path)["prompt"] == prompt for path in before)
    nobody = settings(f"http://127.0.0.1:{free_port()}")
    run(nobody, plain_console())
    assert drawn(tmp_path) == before
    shutil.rmtree(tmp_path / "run" / "pictures" / "another")
    with pytest.raises(DatasetError, match="No server is left, and 2 pictures of 2"):
        run(nobody, plain_console())
