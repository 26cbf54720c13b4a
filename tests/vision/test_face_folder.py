import json
import shutil

import pytest

from difflora_core.errors import EncoderError
from difflora_core.vision.face_encoder import InsightFaceEncoder
from difflora_core.vision.face_folder import find_face_folder


@pytest.mark.parametrize(
    ("place", "name"),
    [
        (".", None),
        ("antelopev2", "antelopev2"),
        ("antelopev2/antelopev2", "antelopev2"),
        ("models/antelopev2", "antelopev2"),
        ("models/antelopev2/antelopev2", "antelopev2"),
        (".", "antelopev2"),
    ],
)
def test_usual_and_nested_places_are_found(face_directory, tmp_path, place, name):
    target = tmp_path / place
    shutil.copytree(face_directory, target, dirs_exist_ok=True)
    folder = find_face_folder(tmp_path, name)
    assert folder.path == target.resolve()
    assert (folder.detector, folder.recogniser) == ("detector.onnx", "recogniser.onnx")
    assert folder.problem() == ""


def test_package_folder_with_its_own_name_inside(face_directory, tmp_path):
    shutil.copytree(face_directory, tmp_path / "buffalo_l" / "buffalo_l")
    encoder = InsightFaceEncoder(tmp_path / "buffalo_l")
    assert encoder.name == "buffalo_l/recogniser.onnx"


def test_named_package_goes_before_loose_files(face_directory, tmp_path):
    shutil.copytree(face_directory, tmp_path, dirs_exist_ok=True)
    shutil.copytree(face_directory, tmp_path / "mine")
    assert find_face_folder(tmp_path, "mine").path.name == "mine"


@pytest.mark.parametrize(
    ("gone", "words"),
    [("detector.onnx", "lacks a detector"), ("recogniser.onnx", "lacks a recogniser")],
)
def test_half_there(face_directory, tmp_path, gone, words):
    shutil.copytree(face_directory, tmp_path / "half")
    (tmp_path / "half" / gone).unlink()
    with pytest.raises(EncoderError, match=words) as caught:
        InsightFaceEncoder(tmp_path, "half")
    assert "found" in str(caught.value)


@pytest.mark.parametrize("cut", [0, 100, 0.5, 0.99])
def test_truncated_file_is_named(face_directory, tmp_path, cut):
    shutil.copytree(face_directory, tmp_path / "cut")
    file = tmp_path / "cut" / "recogniser.onnx"
    content = file.read_bytes()
    file.write_bytes(content[: cut if isinstance(cut, int) else int(cut * len(content))])
    with pytest.raises(EncoderError, match=r"recogniser\.onnx"):
        InsightFaceEncoder(tmp_path / "cut")


def test_renamed_text_file_is_named(face_directory, tmp_path):
    shutil.copytree(face_directory, tmp_path / "p")
    (tmp_path / "p" / "page.onnx").write_text("<html>Not found</html>")
    with pytest.raises(EncoderError, match=r"page\.onnx.*half download"):
        InsightFaceEncoder(tmp_path / "p")


def test_absent_folder_and_empty_folder(tmp_path):
    with pytest.raises(EncoderError, match="does not exist"):
        InsightFaceEncoder(tmp_path / "nowhere", "antelopev2")
    with pytest.raises(EncoderError, match=r"no \.onnx files"):
        InsightFaceEncoder(tmp_path, "antelopev2")
    assert list(tmp_path.iterdir()) == []  # nothing was made or downloaded


def test_other_packages_are_offered(face_directory, tmp_path):
    shutil.copytree(face_directory, tmp_path / "buffalo_l")
    with pytest.raises(EncoderError, match="holds the packages buffalo_l"):
        find_face_folder(tmp_path, "antelopev2")


def test_manifest_of_version_2(face_directory, tmp_path):
    folder = tmp_path / "raccoon"
    shutil.copytree(face_directory, folder / "onnx")
    tasks = {
        "detection": {"file": "onnx/detector.onnx"},
        "recognition": {"file": "onnx/recogniser.onnx", "embedding_dimension": 128},
    }
    document = {
        "manifest_version": 2, "model_id": "raccoon", "license": "MODEL.LICENSE", "tasks": tasks,
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(document))
    assert InsightFaceEncoder(folder).embedding_dim == 128
    (folder / "onnx" / "recogniser.onnx").unlink()
    with pytest.raises(EncoderError, match="lacks a recogniser"):
        InsightFaceEncoder(folder)


def test_other_manifests_are_ignored_as_insightface_ignores_them(face_directory, tmp_path):
    shutil.copytree(face_directory, tmp_path / "p")
    (tmp_path / "p" / "manifest.json").write_text('{"stages": []}')
    assert InsightFaceEncoder(tmp_path / "p").embedding_dim == 128


def test_an_absolute_name_never_leads_to_a_download(face_directory, tmp_path):
    """0.7.3 resolves every name with this function; an absolute folder is returned as it is."""
    from insightface.utils import ensure_available

    found = ensure_available("models", str(face_directory), root=str(tmp_path))
    assert found == str(face_directory)


def test_a_folder_that_vanishes_is_not_downloaded(face_directory, tmp_path, monkeypatch):
    """Between the check and the load; `no_network` sees to it that nobody asks for it."""
    from difflora_core.vision import face_encoder

    folder = shutil.copytree(face_directory, tmp_path / "buffalo_l")

    def gone(directory, name=None):
        found = find_face_folder(directory, name)
        shutil.rmtree(folder)
        return found

    monkeypatch.setattr(face_encoder, "find_face_folder", gone)
    with pytest.raises(EncoderError, match="could not load the models"):
        InsightFaceEncoder(folder)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name",
    ["/{folder}/elsewhere.onnx", "../elsewhere.onnx", "x" * 5000, "\0", "\ud800", 3, None, []],
)
def test_a_manifest_names_files_of_its_folder_alone(face_directory, tmp_path, name):
    folder = shutil.copytree(face_directory, tmp_path / "mine")
    shutil.copy(folder / "recogniser.onnx", tmp_path / "elsewhere.onnx")
    if isinstance(name, str):
        name = name.replace("/{folder}", str(tmp_path))
    tasks = {"detection": {"file": "detector.onnx"}, "recognition": {"file": name}}
    manifest = {"manifest_version": 2, "tasks": tasks}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    expected = "manifest.json .* is damaged" if name == "\ud800" else "lacks a recogniser"
    with pytest.raises(EncoderError, match=expected) as caught:
        find_face_folder(folder)
    assert len(str(caught.value).encode()) < 2000
