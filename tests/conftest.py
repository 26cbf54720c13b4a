"""Shared fixtures: where ComfyUI is, and this pack loaded the way ComfyUI loads it."""

import asyncio
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import settings

from difflora_core.adapters.base import AdapterSet

ROOT = Path(__file__).resolve().parents[1]
COMFYUI = Path(os.environ.get("COMFYUI_PATH", ROOT / ".comfyui")).resolve()

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach the network
if COMFYUI.is_dir():
    # First on the path, or our folder `nodes/` hides ComfyUI's module of that name.
    sys.path.insert(0, str(COMFYUI))
settings.register_profile("difflora", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("difflora")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests for a GPU say why they do not run."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def comfyui() -> Path:
    """ComfyUI's folder; its modules can be imported here, on the CPU where there is no GPU."""
    if not (COMFYUI / "main.py").exists():
        pytest.skip(f"no ComfyUI in {COMFYUI}: run make setup, or set COMFYUI_PATH")
    from comfy.cli_args import args

    args.cpu = not torch.cuda.is_available()
    return COMFYUI


@pytest.fixture(scope="session")
def pack(comfyui: Path, tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """This pack as load_custom_node loads it: named after its path, its entry point called.

    `importlib.import_module(".nodes.features", pack.__name__)` gives one of its modules.
    """
    import folder_paths

    folder_paths.set_input_directory(str(tmp_path_factory.mktemp("input")))  # photos are put there
    name = str(ROOT).replace(".", "_x_")
    spec = importlib.util.spec_from_file_location(name, ROOT / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    extension = asyncio.run(module.comfy_entrypoint())
    asyncio.run(extension.on_load())
    return module


@pytest.fixture(scope="session")
def merged_weights() -> Callable[..., dict[str, torch.Tensor]]:
    """Makes weights with linear adapters merged in, by layer: what becomes of the rows of 1."""

    def merged(
        module: torch.nn.Module, adapters: AdapterSet, strength: float = 1.0
    ) -> dict[str, torch.Tensor]:
        result: dict[str, torch.Tensor] = {}
        for entry in adapters:
            path = f"{entry.layer}.weight"
            weight = result.get(entry.layer, module.get_parameter(path).detach())
            rows = torch.eye(weight.shape[1], dtype=weight.dtype)
            change = entry.adapter.edit(rows, rows @ weight.mT).mT - weight
            result[entry.layer] = weight + entry.strength * strength * change
        return result

    return merged


@pytest.fixture(scope="session")
def sd15_config() -> dict[str, object]:
    """Stable Diffusion 1.5's UNet, as far as it differs from diffusers' defaults."""
    return {
        "sample_size": 64,
        "block_out_channels": [320, 640, 1280, 1280],
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
    }
