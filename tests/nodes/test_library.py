"""The identity library in real ComfyUI: add, list, pick, and files nobody should trust."""

import json
import struct
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from difflora_core.comfy_client import ComfyPromptError
from difflora_core.models.lae.autoencoder import LoRALatent
from difflora_core.storage.identity_library import add_people
from difflora_core.storage.library_file import Library, read_library, write_library

DIFFLORA = ["demo", 5]


def node(class_type, **inputs):
    return {"class_type": class_type, "inputs": inputs}


def start(count=1, seed=70):
    return {
        "demo": node("DiffLoRA_LoadDemo"),
        "new": node(
            "DiffLoRA_InventIdentity", difflora_model=DIFFLORA, seed=seed, count=count, steps=2
        ),
    }


def add(library, name, identity="new", **changes):
    inputs = {"difflora_model": DIFFLORA, "identity": [identity, 0], "same_name": "number"}
    return node("DiffLoRA_AddToLibrary", library=library, name=name, **(inputs | changes))


def listed(library, **changes):
    numbers = {"first": 1, "count": 48, "columns": 8}
    return node("DiffLoRA_ListLibrary", library=library, **(numbers | changes))


def picked(library, name="", number=1):
    return node("DiffLoRA_PickFromLibrary", library=library, name=name, number=number)


def saved(identity, prefix):
    return {
        f"{prefix}_lora": node(
            "DiffLoRA_DecodeLoRA", difflora_model=DIFFLORA, lora_latent=[identity, 0]
        ),
        f"{prefix}_save": node(
            "SaveLoRA", lora=[f"{prefix}_lora", 0], prefix=f"loras/{prefix}", steps=0
        ),
    }


def refused(comfy, nodes, at, pattern):
    with pytest.raises(ComfyPromptError, match=pattern) as caught:
        comfy.run(nodes)
    assert caught.value.node_id == at
    assert "Traceback" not in caught.value.message


@pytest.fixture(scope="module")
def folder(comfy_server):
    path = comfy_server.base_directory / "models" / "difflora_library"
    path.mkdir(parents=True, exist_ok=True)
    return path


def test_kept_people_come_back_exactly(comfy, comfy_server, folder, face_picture):
    nodes = start(2) | saved("new", "kept")
    nodes["photo"] = node("LoadImage", image=comfy.upload_picture(face_picture))
    nodes["add"] = add("cast", "Ada", thumbnail=["photo", 0])
    nodes["names"] = node("PreviewAny", source=["add", 1])
    assert comfy.run(nodes).outputs["names"]["text"] == ["Ada 1\nAda 2"]
    found = {
        "demo": node("DiffLoRA_LoadDemo"),
        "by_name": picked("cast", "Ada 1"),
        "by_number": picked("cast", number=2),
        "name": node("PreviewAny", source=["by_number", 1]),
        "list": listed("cast"),
        **saved("by_name", "again"),
    }
    shown = comfy.run(found)
    assert shown.outputs["name"]["text"] == ["Ada 2"]
    assert shown.picture("by_name").shape == (96, 96, 3)
    sheet = shown.picture("list")
    assert sheet.shape[1] == 2 * 96
    assert sheet.std() > 20
    kept, again = (
        load_file(max(comfy_server.output_directory.glob(f"loras/{prefix}_*")))
        for prefix in ("kept", "again")
    )
    assert all(torch.equal(kept[key], again[key]) for key in kept)
    with safe_open(folder / "cast.safetensors", "pt") as file:
        facts = json.loads(file.metadata()["difflora_library"])
    assert facts["model_name"] == "difflora.safetensors"
    assert set(facts["people"][0]) == {"name", "added"}


def test_a_change_of_the_file_is_seen(comfy, folder):
    comfy.run(start() | {"add": add("growing", "one")})
    nodes = {"list": listed("growing"), "names": node("PreviewAny", source=["list", 0])}
    assert comfy.run(nodes).outputs["names"]["text"] == ["one"]
    comfy.run(start(seed=71) | {"add": add("growing", "two")})
    assert comfy.run(nodes).outputs["names"]["text"] == ["one\ntwo"]


def test_a_name_that_is_taken(comfy, folder):
    nodes = start(seed=72) | {"add": add("names", "Eve"), "more": add("names", " Eve")}
    comfy.run(nodes)
    assert set(read_library(folder / "names.safetensors").names) == {"Eve", "Eve 2"}
    before = read_library(folder / "names.safetensors").people
    comfy.run(start(seed=73) | {"add": add("names", "Eve", same_name="replace")})
    after = read_library(folder / "names.safetensors")
    assert sorted(after.names) == ["Eve", "Eve 2"]
    assert after.people[-1].name == "Eve"
    assert after.people != before
    nodes = start(seed=74) | {"add": add("names", "Eve", same_name="refuse")}
    refused(comfy, nodes, "add", "'Eve' is in this library already")


def test_server_and_other_programs_write_at_once(comfy, folder):
    """Prompts in ComfyUI, and this process beside it, on one library."""
    path = folder / "shared.safetensors"
    comfy.run(start(seed=75) | {"add": add("shared", "first")})
    like = read_library(path).latents

    def through_server(k):
        comfy.run(start(seed=80 + k) | {"add": add("shared", f"server {k}")})

    def beside_it(k):
        person = LoRALatent(like.z[:1] + k, like.layout_hash, like.space)
        add_people(path, person, [f"other {k}"])

    with ThreadPoolExecutor(8) as pool:
        jobs = [pool.submit(through_server, k) for k in range(4)]
        jobs += [pool.submit(beside_it, k) for k in range(12)]
        for job in jobs:
            job.result()
    names = {"first"} | {f"server {k}" for k in range(4)} | {f"other {k}" for k in range(12)}
    assert set(read_library(path).names) == names


@pytest.mark.parametrize("name", ["../cast", "/etc/cast", "a/b", "", ".hidden", "con:1"])
def test_library_stays_in_its_folder(comfy, name):
    refused(comfy, start() | {"add": add(name, "Ada")}, "add", "cannot be a file name")
    refused(comfy, {"list": listed(name)}, "list", "cannot be a file name")


def test_what_is_not_there_is_named(comfy, folder):
    comfy.run(start(seed=76) | {"add": add("there", "Ada")})
    refused(comfy, {"list": listed("nowhere")}, "list", "no identity library 'nowhere'.*there")
    shown = {"pick": picked("there", "Bob"), "show": node("PreviewAny", source=["pick", 1])}
    refused(comfy, shown, "pick", "There is no 'Bob' in this library. It holds: Ada")
    shown["pick"] = picked("there", number=2)
    refused(comfy, shown, "pick", "no number 2: this library holds 1")
    refused(comfy, {"list": listed("there", first=5)}, "list", "nobody to show from number 5")
    refused(comfy, start() | {"add": add("there", "two\nlines")}, "add", "visible characters")


def test_library_that_nobody_is_left_in(comfy, folder):
    path = folder / "empty again.safetensors"
    comfy.run(start(seed=79) | {"add": add("empty again", "Ada")})
    before = read_library(path).latents
    nobody = LoRALatent(before.z[:0], before.layout_hash, before.space)
    write_library(path, Library(nobody, ()))
    refused(comfy, {"list": listed("empty again")}, "list", "nobody to show.*holds 0")
    shown = {"pick": picked("empty again"), "show": node("PreviewAny", source=["pick", 1])}
    refused(comfy, shown, "pick", "no number 1: this library holds 0")
    comfy.run(start(seed=79) | {"add": add("empty again", "Eve")})
    assert read_library(path).names == ["Eve"]


def test_thumbnails_that_do_not_fit(comfy, plain_picture):
    nodes = start(3)
    photo = node("LoadImage", image=comfy.upload_picture(plain_picture))
    nodes |= {"photo": photo, "two": node("RepeatImageBatch", image=["photo", 0], amount=2)}
    nodes["add"] = add("thumbs", "Ada", thumbnail=["two", 0])
    refused(comfy, nodes, "add", "2 thumbnails for 3 identities")


def test_library_of_another_model(comfy, folder):
    stranger = LoRALatent(torch.zeros(1, 8, 16), "0" * 32, "stranger")
    add_people(
        folder / "foreign.safetensors", stranger, ["Mallory"], model_name="other.safetensors"
    )
    refused(comfy, start() | {"add": add("foreign", "Ada")}, "add", "another DiffLoRA model .other")
    nodes = {"demo": node("DiffLoRA_LoadDemo"), "pick": picked("foreign")} | saved("pick", "no")
    refused(comfy, nodes, "no_lora", "another base model or LoRA layout")


def hostile_files(good: bytes, folder):
    """Name to bytes of files that are wrong in one way each."""
    picture = folder / "bomb.safetensors"
    tensors = {"latents": torch.zeros(1, 2, 2), "picture.0": torch.zeros(9, dtype=torch.uint8)}
    facts = {"format": "difflora_library", "version": 1, "layout_hash": "", "space": ""}
    people = [{"name": "x", "added": ""}]
    text = json.dumps(facts | {"model_name": "", "people": people})
    save_file(tensors, picture, metadata={"difflora_library": text})
    return {
        "cut": (good[: len(good) // 2], "safetensors|need"),
        "empty": (b"", "not a safetensors file"),
        "huge_header": (struct.pack("<Q", 2**40) + b"{}", "claims a header"),
        "pickle": (b"\x80\x04N." + b"x" * 20, "pickle|claims a header"),
        "another": (struct.pack("<Q", 2) + b"{}", "is no identity library"),
        "bomb": (picture.read_bytes(), "thumbnail of this library is damaged"),
    }


def test_hostile_files_are_refused(comfy, folder):
    comfy.run(start(seed=77) | {"add": add("good", "Ada")})
    good = (folder / "good.safetensors").read_bytes()
    for name, (data, pattern) in hostile_files(good, folder).items():
        (folder / f"{name}.safetensors").write_bytes(data)
        refused(comfy, {"list": listed(name)}, "list", pattern)
        before = (folder / f"{name}.safetensors").read_bytes()
        with pytest.raises(ComfyPromptError):
            comfy.run(start(seed=78) | {"add": add(name, "Eve")})
        assert (folder / f"{name}.safetensors").read_bytes() == before  # never overwritten


def test_sheet_shows_every_person(comfy, folder):
    people = LoRALatent(torch.zeros(5, 2, 2), "h", "s")
    add_people(folder / "five.safetensors", people, [f"p{k}" for k in range(5)])
    nodes = {"list": listed("five", first=2, count=3, columns=2)}
    sheet = comfy.run(nodes).picture("list")
    assert sheet.shape[1] == 2 * 96
    assert np.ptp(sheet) > 100
