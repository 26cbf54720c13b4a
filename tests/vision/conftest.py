"""Tiny real ONNX models that insightface itself loads, and pictures they understand.

A "face" is a green square. The detector is a matched filter: it fires where a square of about the
right size lies, so a square that fills the frame is missed, as real detectors miss such faces.
"""

import socket

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from difflora_core.vision.face_cutout import OUTLINE

# stride: (inner square, ring from, ring to, side of the box), all in detector pixels
FILTERS = {8: (19, 27, 37, 24), 16: (43, 59, 77, 52)}
POINTS = np.array([[-0.2, -0.2], [0.2, -0.2], [0, 0.05], [-0.15, 0.25], [0.15, 0.25]])
GREEN = torch.tensor([0.0, 1.0, 0.0])


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Any attempt to reach the network fails the test."""

    def refuse(*args, **kwargs):
        pytest.fail("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def _kernel(inner, start, end):
    distance = np.abs(np.arange(end) - end // 2)
    square = np.maximum(distance[:, None], distance[None, :])
    middle, ring = square <= inner // 2, square > start // 2
    spatial = middle / middle.sum() - 2 * ring / ring.sum()  # twice: corners must not count
    colour = np.array([-0.5, 1.0, -0.5]) / 2  # 1 for green, 0 for every grey
    return (colour[:, None, None] * spatial)[None].astype(np.float32)


def _detector(side):
    """SCRFD layout; `side` None makes the input size free."""
    nodes, weights, outputs = [], [], []

    def constant(name, value):
        weights.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def node(kind, inputs, output, **attributes):
        nodes.append(helper.make_node(kind, inputs, [output], name=f"n_{output}", **attributes))
        return output

    constant("zero", np.float32(0))
    constant("column", np.array([-1, 1], dtype=np.int64))
    for stride in (8, 16, 32):
        inner, start, end, box = FILTERS.get(stride, (1, 1, 1, 32))
        kernel = _kernel(inner, start, end) if stride in FILTERS else np.zeros((1, 3, 1, 1))
        constant(f"kernel{stride}", kernel.astype(np.float32))
        node(
            "Conv", ["picture", f"kernel{stride}"], f"map{stride}",
            strides=[stride] * 2, pads=[end // 2] * 4, kernel_shape=[end] * 2,
        )  # fmt: skip
        node("Mul", [f"map{stride}", "zero"], f"off{stride}")
        node("Concat", [f"map{stride}", f"off{stride}"], f"two{stride}", axis=1)
        node("Transpose", [f"two{stride}"], f"last{stride}", perm=[0, 2, 3, 1])
        node("Reshape", [f"last{stride}", "column"], f"score{stride}")
        node("Mul", [f"score{stride}", "zero"], f"nil{stride}")
        offsets = {"box": np.full(4, box / 2), "points": (POINTS * box).ravel()}
        for part, value in offsets.items():
            constant(f"{part}_offset{stride}", (value / stride).astype(np.float32)[None])
            node("Add", [f"nil{stride}", f"{part}_offset{stride}"], f"{part}{stride}")
    for part, width in (("score", 1), ("box", 4), ("points", 10)):
        for stride in (8, 16, 32):
            count = (side // stride) ** 2 * 2 if side else f"count{stride}"
            shape = [count, width]
            outputs.append(
                helper.make_tensor_value_info(f"{part}{stride}", TensorProto.FLOAT, shape)
            )
    size = [side, side] if side else ["height", "width"]
    picture = helper.make_tensor_value_info("picture", TensorProto.FLOAT, [1, 3, *size])
    return _model(nodes, "detector", [picture], outputs, weights)


def _recogniser():
    """ArcFace layout: the mean colours of 4 x 4 patches through a fixed random matrix."""
    matrix = np.random.default_rng(7).standard_normal((48, 128)).astype(np.float32)
    weights = [numpy_helper.from_array(matrix, "matrix")]
    nodes = [
        helper.make_node("AveragePool", ["face"], ["p"], kernel_shape=[28, 28], strides=[28, 28]),
        helper.make_node("Flatten", ["p"], ["flat"]),
        helper.make_node("MatMul", ["flat", "matrix"], ["embedding"]),
    ]
    face = helper.make_tensor_value_info("face", TensorProto.FLOAT, [1, 3, 112, 112])
    embedding = helper.make_tensor_value_info("embedding", TensorProto.FLOAT, [1, 128])
    return _model(nodes, "recogniser", [face], [embedding], weights)


def _landmarks():
    """insightface's 106 points: the outline on an ellipse round the box, the others in its middle.

    It sees 1.5 times the box; its numbers go from -1 to 1.
    """
    angle = np.arange(len(OUTLINE)) * 2 * np.pi / len(OUTLINE)
    points = np.zeros((106, 2), dtype=np.float32)
    points[list(OUTLINE)] = np.stack([0.8 * np.cos(angle), 0.9 * np.sin(angle)], -1)
    weights = [
        numpy_helper.from_array(points.reshape(1, 212), "points"),
        numpy_helper.from_array(np.float32(0), "zero"),
        numpy_helper.from_array(np.array([1, -1], dtype=np.int64), "row"),
    ]
    nodes = [
        helper.make_node("GlobalAveragePool", ["seen"], ["mean"]),
        helper.make_node("Mul", ["mean", "zero"], ["nil"]),
        helper.make_node("ReduceSum", ["nil"], ["one"], keepdims=1),
        helper.make_node("Reshape", ["one", "row"], ["flat"]),
        helper.make_node("Add", ["flat", "points"], ["found"]),
    ]
    seen = helper.make_tensor_value_info("seen", TensorProto.FLOAT, [1, 3, 192, 192])
    found = helper.make_tensor_value_info("found", TensorProto.FLOAT, [1, 212])
    return _model(nodes, "landmarks", [seen], [found], weights)


def _model(nodes, name, inputs, outputs, weights):
    graph = helper.make_graph(nodes, name, inputs, outputs, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return model


@pytest.fixture(scope="session")
def face_models(tmp_path_factory):
    """Folder with the three files; tests copy what they need."""
    folder = tmp_path_factory.mktemp("onnx_models")
    onnx.save(_detector(128), folder / "detector.onnx")
    onnx.save(_detector(None), folder / "free_detector.onnx")
    onnx.save(_recogniser(), folder / "recogniser.onnx")
    onnx.save(_landmarks(), folder / "landmarks.onnx")
    return folder


@pytest.fixture(scope="session")
def face_directory(face_models, tmp_path_factory):
    """A complete insightface folder with a fixed 128 x 128 detector."""
    folder = tmp_path_factory.mktemp("insight") / "tiny_faces"
    folder.mkdir()
    for name in ("detector.onnx", "recogniser.onnx"):
        (folder / name).write_bytes((face_models / name).read_bytes())
    return folder


@pytest.fixture(scope="session")
def face_encoder(face_directory):
    from difflora_core.vision.face_encoder import InsightFaceEncoder

    return InsightFaceEncoder(face_directory)


@pytest.fixture(scope="session")
def outline_encoder(face_models, tmp_path_factory):
    """A face encoder that also finds the 106 points; its detector takes every size."""
    from difflora_core.vision.face_encoder import InsightFaceEncoder

    folder = tmp_path_factory.mktemp("outlines") / "faces"
    folder.mkdir()
    for name in ("free_detector.onnx", "recogniser.onnx", "landmarks.onnx"):
        (folder / name).write_bytes((face_models / name).read_bytes())
    return InsightFaceEncoder(folder)


@pytest.fixture(scope="session")
def image_encoder():
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    from difflora_core.vision.image_encoder import ClipImageEncoder

    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        image_size=32, patch_size=8, projection_dim=24,
    )  # fmt: skip
    model = CLIPVisionModelWithProjection(config)
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        # Exact in half precision, in which ComfyUI stores CLIP vision weights on the CPU.
        parameter.data = (torch.randn(parameter.shape, generator=generator) * 0.1).half().float()
    return ClipImageEncoder(model)


@pytest.fixture(scope="session")
def photo():
    """Make a picture: grey noise with green squares (left, top, side)."""

    def make(*squares, height=128, width=128, seed=0):
        generator = torch.Generator().manual_seed(seed)
        grey = 0.3 + 0.2 * torch.rand(height, width, 1, generator=generator)
        picture = grey.expand(-1, -1, 3).clone()
        for left, top, side in squares:
            shade = 0.9 + 0.1 * torch.rand(side, side, 1, generator=generator)
            picture[top : top + side, left : left + side] = GREEN * shade
        return picture

    return make
