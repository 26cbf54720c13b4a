"""The pack inside real ComfyUI, and the client's whole conversation with it."""

import numpy as np
import pytest
from PIL import Image

from difflora_core.comfy_client import ComfyInterrupted, ComfyPromptError
from difflora_core.demo.comfyui.server import ComfyServer, ComfyServerError


def picture_prompt(color=0x336699, size=16):
    """A prompt of core nodes: one plain picture, saved."""
    plain = {"width": size, "height": size, "batch_size": 1, "color": color}
    return {
        "1": {"class_type": "EmptyImage", "inputs": plain},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "test"}},
    }


def test_pack_is_loaded_without_a_warning(comfy_server):
    log = comfy_server.log_file.read_text()
    log = log[: log.index("To see the GUI go to")]  # what tests did to it later is theirs
    assert "DiffLoRA" in log
    failed = [line for line in log.splitlines() if "IMPORT FAILED" in line]
    assert not [line for line in failed if "custom_nodes" in line]  # core's own are core's
    lines = [line for line in log.splitlines() if "custom_nodes/DiffLoRA" in line]
    assert not [line for line in lines if "WARNING" in line.upper() or "ERROR" in line.upper()]


def test_every_node_of_ours_is_registered(comfy, pack):
    from importlib import import_module

    nodes = import_module(".nodes", pack.__name__).NODES
    info = comfy.object_info()
    assert {node.GET_SCHEMA().node_id for node in nodes} <= set(info)


def test_prompt_gives_its_picture(comfy, comfy_server):
    steps = []
    result = comfy.run(picture_prompt(), on_progress=steps.append)
    np.testing.assert_array_equal(result.picture(2)[0, 0], [0x33, 0x66, 0x99])
    assert {step.node_type for step in steps} >= {"SaveImage"}
    assert list((comfy_server.output_directory).glob("test*.png"))


def test_same_prompt_again_is_cached(comfy):
    first = comfy.run(picture_prompt(color=1))
    again = comfy.run(picture_prompt(color=1))
    assert "1" in again.cached
    np.testing.assert_array_equal(first.picture(), comfy.run(picture_prompt(color=1)).picture(2))


def test_refused_prompt_names_the_node(comfy):
    prompt = picture_prompt()
    prompt["1"]["inputs"]["width"] = 0
    with pytest.raises(ComfyPromptError, match=r"Node 1 \(EmptyImage\)") as caught:
        comfy.run(prompt)
    assert caught.value.node_id == "1"


def test_failing_node_names_itself(comfy, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    name = comfy.upload_picture(tmp_path / "broken.png")
    prompt = picture_prompt()
    prompt["1"] = {"class_type": "LoadImage", "inputs": {"image": name}}
    with pytest.raises(ComfyPromptError, match=r"Node 1 \(LoadImage\)"):
        comfy.run(prompt)


def test_uploaded_picture_is_loaded_unchanged(comfy, tmp_path):
    pixels = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)
    Image.fromarray(pixels).save(tmp_path / "pixels.png")
    prompt = picture_prompt()
    name = comfy.upload_picture(tmp_path / "pixels.png")
    prompt["1"] = {"class_type": "LoadImage", "inputs": {"image": name}}
    np.testing.assert_array_equal(comfy.run(prompt).picture(), pixels)


def test_interrupt_stops_the_run(comfy, interrupt):
    blur = {"image": ["1", 0], "blur_radius": 31, "sigma": 10.0}
    prompt = picture_prompt(size=512)
    for node in range(3, 23):
        prompt[str(node)] = {"class_type": "ImageBlur", "inputs": dict(blur)}
        blur["image"] = [str(node), 0]
    prompt["2"]["inputs"]["images"] = blur["image"]
    with pytest.raises(ComfyInterrupted):
        comfy.run(prompt, on_progress=lambda step: interrupt() if step.node_id == "3" else None)
    assert comfy.run(picture_prompt(color=5)).picture().shape == (16, 16, 3)


@pytest.mark.slow
def test_pack_that_cannot_be_imported_is_an_error(comfyui, tmp_path):
    pack = tmp_path / "BrokenPack"
    pack.mkdir()
    (pack / "__init__.py").write_text("raise RuntimeError('broken on purpose')\n")
    with pytest.raises(ComfyServerError, match="BrokenPack"):
        ComfyServer(tmp_path / "base", packs=[pack]).start()


def test_missing_comfyui_is_a_readable_error(monkeypatch, tmp_path):
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    with pytest.raises(ComfyServerError, match="COMFYUI_PATH"):
        ComfyServer(tmp_path / "base").start()
