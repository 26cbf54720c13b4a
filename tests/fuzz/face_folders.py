"""insightface folders: a manifest or a model file that is not what it should be."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
from onnx import TensorProto, helper

from difflora_core.vision.face_folder import FaceFolder, find_face_folder

from .byte_edits import BYTE_EDITS
from .reader import JSON_FILE_EDITS, Reader

MANIFEST = {
    "manifest_version": 2,
    "name": "tiny",
    "tasks": {"detection": {"file": "a.onnx"}, "recognition": {"file": "b.onnx"}},
}


def _model(outputs: int, side: int) -> bytes:
    """A model of one operation for every output."""
    names = [f"y{k}" for k in range(outputs)]
    nodes = [helper.make_node("Identity", ["x"], [name]) for name in names]
    value = lambda name: helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 3, side, side])  # noqa: E731
    graph = helper.make_graph(nodes, "tiny", [value("x")], [value(name) for name in names])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


FILES = {"a.onnx": _model(9, 64), "b.onnx": _model(1, 112)}


def _folder(path: Path, name: str) -> FaceFolder:
    """The folder of a file that is read, with what belongs to it."""
    folder = path.with_name("tiny")
    folder.mkdir(exist_ok=True)
    for file, content in FILES.items():
        (folder / file).write_bytes(path.read_bytes() if file == name else content)
    (folder / "manifest.json").unlink(missing_ok=True)
    if name == "manifest.json":
        path.rename(folder / name)
    return find_face_folder(folder)


def _check(folder: FaceFolder, path: Path) -> None:
    assert folder.complete, "not complete"
    assert folder.problem() == "", "a problem"
    for name in folder.files:
        file = (folder.path / name).resolve()
        assert file.is_file(), "a file that is not there"
        assert file.parent == folder.path, "a file outside the folder"
    assert {folder.detector, folder.recogniser} <= set(folder.files), "roles"


MANIFESTS = {"manifest.json": lambda: json.dumps(MANIFEST).encode()}
MODELS = {name: (lambda c=content: c) for name, content in FILES.items()}
READERS = (
    Reader(
        "face folder's manifest", MANIFESTS, _folder, _check, JSON_FILE_EDITS, file="manifest.json"
    ),
    Reader("face folder's models", MODELS, _folder, _check, BYTE_EDITS, file="one.onnx"),
)
