"""Load DiffLoRA Demo: one base, whatever older workflows and demo folders say."""

import numpy as np
import pytest

from tests.nodes.sampler_graphs import cfg, guided, node, sampling_nodes


def test_word_by_word_has_no_effect(comfy):
    """A workflow that switched it on draws what one draws that did not."""
    shown = {}
    for on in (False, True):
        graph = {"demo": node("DiffLoRA_LoadDemo", word_by_word=on), **sampling_nodes()}
        for name, text in (("words", "photo of a person, wearing a red hat"), ("none", "")):
            graph[name] = node("CLIPTextEncode", clip=["demo", 1], text=text)
        shown[on] = comfy.run(graph | guided("p", cfg(["demo", 0], ["words", 0]))).pictures["p"]
    np.testing.assert_array_equal(shown[True], shown[False])


@pytest.fixture
def older_folder(demo_world, tmp_path, monkeypatch):
    """A demo folder of the time when weights for single words lay beside the base."""
    import folder_paths

    folder = tmp_path / "demo"
    folder.mkdir()
    for path in demo_world.iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "words.safetensors").write_bytes(b"not read")
    own = {"difflora_demo": ([str(folder)], set())}
    monkeypatch.setattr(
        folder_paths, "folder_names_and_paths", folder_paths.folder_names_and_paths | own
    )
    return folder


@pytest.mark.usefixtures("pack")
def test_an_older_folder_loads_by_its_base_alone(older_folder, parts):
    made = parts("nodes.demo").LoadDemo.execute(word_by_word=True).result
    load_unet, (path,) = made[0].cached_patcher_init
    assert load_unet.__name__ == "load_demo_unet"
    assert path == older_folder / "base.safetensors"
    assert len(made) == 7


@pytest.mark.usefixtures("pack")
def test_the_preset_chooses_the_model(parts, is_shipped):
    if not is_shipped:
        pytest.skip("the trained demo world is not here")
    load = parts("nodes.demo").LoadDemo
    made = {preset: load.execute(preset=preset).result[5] for preset in ("functional", "paper")}
    assert {preset: model.settings.config.preset for preset, model in made.items()} == {
        "functional": "functional",
        "paper": "paper",
    }
    assert load.fingerprint_inputs(preset="paper") != load.fingerprint_inputs()


@pytest.mark.usefixtures("pack")
def test_an_older_folder_has_no_model_of_the_paper(older_folder, parts):
    (older_folder / "difflora_paper.safetensors").unlink(missing_ok=True)
    load = parts("nodes.demo").LoadDemo
    assert len(load.execute().result) == 7
    with pytest.raises(parts("difflora_core.errors").FileNameError, match="difflora_paper"):
        load.execute(preset="paper")
