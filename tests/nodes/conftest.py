"""Real ComfyUI for the node tests: started once, on the CPU, with a base directory of its own."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from difflora_core.demo.comfy_client import ComfyClient
from difflora_core.demo.comfy_server import ComfyServer


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every test in this folder needs ComfyUI."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.comfy)


@pytest.fixture(scope="session")
def comfy_server(comfyui: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    """A running ComfyUI with this pack: base directory, input and output folders, log."""
    with ComfyServer(tmp_path_factory.mktemp("comfyui")) as server:
        yield server


@pytest.fixture(scope="session")
def comfy(comfy_server: ComfyServer) -> ComfyClient:
    """Its client: `run(prompt)`, `object_info()`, `interrupt()`, `upload_picture(path)`."""
    return comfy_server.client
