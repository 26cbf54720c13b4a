"""`multiply` with real ComfyUI: one portrait a person becomes folders that `prepare` reads."""

import json
import os
import signal
import threading

import pytest
from PIL import Image

from difflora_core.commands.main import main
from difflora_core.commands.multiply import PROMPTS, Drawing
from difflora_core.data import drawn_people
from difflora_core.demo.comfyui.server import ComfyServer, free_port
from difflora_core.demo.paths import FACES, ROOT
from difflora_core.demo.world.identities import split_seeds
from difflora_core.demo.world.scenes import render_portraits

API = ROOT / "workflows" / "api"
PROMPT_LINES = ("photo of a person, smiling, blue background", "photo of a person, red shirt")


@pytest.fixture
def words(tmp_path):
    """Words of the command without its servers: two portraits, one file that is none."""
    folder = tmp_path / "portraits"
    folder.mkdir()
    for number, image in enumerate(render_portraits(split_seeds("test", 2), [0, 0]).images):
        pixels = (image * 255).round().byte().numpy()
        Image.fromarray(pixels).save(folder / f"p{number}.png")
    (folder / "broken.png").write_bytes(b"x")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPT_LINES))
    options = {"prompts": tmp_path / "prompts.txt", "drawn.pictures": 2, "drawn.likeness": 0.2}
    options |= {"faces": FACES, "drawn.same": 2, "workflow": API / "multiply_demo.json"}
    pairs = [(f"--{name}", str(value)) for name, value in options.items() if name != "workflow"]
    usual = [str(folder), str(tmp_path / "out"), str(options["workflow"])]
    return ["multiply", *usual, *(word for pair in pairs for word in pair)]


def everything(folder):
    """Bytes of all pictures and texts."""
    found = [p for part in ("drawn", "pictures") for p in (folder / part).rglob("*.*")]
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in found}


def test_portraits_become_folders(words, comfy_server, is_shipped, tmp_path, capsys):
    """Drawn, filtered, done once; and what is down, refuses or fails is said."""
    url = comfy_server.client.url
    nobody = f"http://127.0.0.1:{free_port()}"
    assert main([*words, "--comfyui", url, nobody, "--wait", "0.1"]) == 0
    said = capsys.readouterr().out
    assert f"{nobody} is given up: " in said
    drawn = sorted((tmp_path / "out" / "drawn").rglob("*.png"))
    assert len(drawn) == 4
    assert all(Image.open(path).size == (64, 64) for path in drawn)
    dropped = [json.loads(line) for line in (tmp_path / "out" / "dropped.jsonl").open()]
    assert "broken.png" in [row["source"] for row in dropped]
    kept = sorted((tmp_path / "out" / "pictures").rglob("*.png"))
    if is_shipped:  # random networks draw no faces
        assert len(kept) == 2 + 4 - (len(dropped) - 1)
        assert len(kept) > 3
    before = everything(tmp_path / "out")
    assert main([*words, "--comfyui", nobody]) == 0  # nothing is left to be drawn
    assert "0 pictures to draw" in capsys.readouterr().out
    assert everything(tmp_path / "out") == before


def test_what_no_server_can_do(words, comfy_server, tmp_path, capsys):
    """Nobody answers; a model that the server lacks; a portrait that the workflow refuses."""
    nobody = f"http://127.0.0.1:{free_port()}"
    assert main([*words, "--comfyui", nobody, "--wait", "0"]) == 1
    assert "No server is left, and 4 pictures of 4 are not drawn" in capsys.readouterr().err
    url = comfy_server.client.url
    lacking = API / "multiply_sdxl_photomaker.json"
    assert main([*words[:3], str(lacking), *words[4:], "--comfyui", url]) == 1
    told = capsys.readouterr()
    assert "cannot do this and is left out: Node" in told.out
    assert "not in list" in told.out  # and nothing else is wrong with that workflow
    Image.new("RGB", (64, 64), "grey").save(tmp_path / "portraits" / "p0.png")
    (tmp_path / "portraits" / "p1.png").unlink()
    assert main([*words, "--comfyui", url, "--tries", "2"]) == 1
    assert "No picture could be drawn: Node 3 (DiffLoRA_Personalize)" in capsys.readouterr().err


@pytest.mark.slow
def test_a_server_that_is_killed_in_the_middle(words, comfy_server, tmp_path, monkeypatch, capsys):
    """The pictures are those of one server alone, none twice and none missing."""
    words += ["--drawn.pictures", "4"]
    alone = [words[0], words[1], str(tmp_path / "alone"), *words[3:]]
    assert main([*alone, "--comfyui", comfy_server.client.url]) == 0
    drawn = []
    keep = drawn_people.keep_drawing

    with ComfyServer(tmp_path / "second") as second:
        once = threading.Event()

        def kept(drawing: Drawing, picture):
            keep(drawing, picture)
            drawn.append(drawing.file.name)
            if len(drawn) >= 3 and not once.is_set():
                once.set()
                os.kill(second.running_pid(), signal.SIGKILL)

        monkeypatch.setattr("difflora_core.commands.multiply.keep_drawing", kept)
        servers = [comfy_server.client.url, second.client.url]
        assert main([*words, "--comfyui", *servers, "--wait", "1"]) == 0
    assert once.is_set()
    assert len(drawn) == len(set(drawn)) == 8
    assert f"{second.client.url} does not answer" in capsys.readouterr().out
    assert everything(tmp_path / "out") == everything(tmp_path / "alone")


def test_usual_prompts_differ():
    assert len(set(PROMPTS)) == len(PROMPTS) >= 12
