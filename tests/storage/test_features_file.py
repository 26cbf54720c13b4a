"""Features come back as they were; other files are refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from difflora_core.errors import CheckpointError
from difflora_core.storage.features_file import METADATA_KEY, read_features, write_features
from difflora_core.vision.features import TENSORS, ImageFeatures


@pytest.fixture
def features():
    generator = torch.Generator().manual_seed(3)
    face = torch.nn.functional.normalize(torch.randn(2, 4, generator=generator), dim=-1)
    tokens = torch.randn(2, 3, 5, generator=generator).half().float()
    image = torch.randn(2, 6, generator=generator)
    return ImageFeatures(face, torch.tensor([True, False]), image, tokens, "crop", "rec.onnx")


@pytest.mark.parametrize("part", ["both", "face", "image"])
def test_there_and_back(features, tmp_path, part):
    """Also where one encoder was not connected."""
    nothing = torch.zeros(2, 0)
    if part == "face":
        features = ImageFeatures(
            features.face, features.face_found, nothing, nothing[..., None], "crop", "rec.onnx"
        )
    if part == "image":
        none = torch.tensor([False, False])
        features = ImageFeatures(nothing, none, features.image, features.image_tokens)
    again = read_features(write_features(tmp_path / "a.safetensors", features))
    for name in TENSORS:
        assert torch.equal(getattr(again, name), getattr(features, name)), name
    assert again.recogniser == features.recogniser
    assert again.image_region == features.image_region


def test_other_files(features, tmp_path):
    path = write_features(tmp_path / "a.safetensors", features)
    good, facts = load_file(path), json.dumps
    document = {"format": "difflora-features", "version": 1, "image_region": "", "recogniser": ""}
    wrong = {
        "no identity features": ({"face": good["face"]}, document),
        "no photo": ({name: tensor[:0] for name, tensor in good.items()}, document),
        "do not fit together": ({**good, "face": good["face"][:1]}, document),
        "another format": (good, {**document, "version": 2}),
        "damaged": (good, {**document, "recogniser": 3}),
        "NaN": ({**good, "image": good["image"] / 0}, document),
    }
    for words, (tensors, described) in wrong.items():
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(tensors, path, {METADATA_KEY: facts(described)})
        with pytest.raises(CheckpointError, match=words):
            read_features(path)
    path.write_bytes(b"x" * 100)
    with pytest.raises(CheckpointError):
        read_features(path)
    with pytest.raises(CheckpointError, match="must end in"):
        write_features(tmp_path / "a.pt", features)
