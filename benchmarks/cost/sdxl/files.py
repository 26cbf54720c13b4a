"""The files that SDXL's workflows ask for, with random weights, where ComfyUI looks for them.

What is measured does not depend on what weights say, so equal shapes share their numbers: a file of
7 GB is drawn in seconds and held in a fraction of its size.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from difflora_core.demo.comfyui.server import comfyui_folder
from difflora_core.demo.networks.detector import FILE_NAME as DETECTOR
from difflora_core.demo.networks.recogniser import export_onnx
from difflora_core.demo.paths import FACES
from difflora_core.demo.workflows.hyperlora import VARIANT
from difflora_core.demo.workflows.needs import SDXL_FILES
from difflora_core.demo.workflows.targets import SDXL_FACES, SDXL_MODEL
from difflora_core.demo.workflows.writer import FOLDER as WORKFLOWS
from difflora_core.lora.layout import sdxl_layout
from difflora_core.lora.weights import LoRALayer, LoRAWeights
from difflora_core.models.difflora import DiffLoRAConfig, DiffLoRAModel
from difflora_core.storage.atomic import replacing
from difflora_core.storage.checkpoint import EXACT_PREFIXES, save_model
from difflora_core.storage.hyperlora_folder import PROJECTOR
from difflora_core.storage.lora_file import write_lora_file
from difflora_core.storage.safetensors_io import write_atomic
from difflora_core.vision.face_cutout import OUTLINE

from ..hyperlora import write_random

Shapes = Mapping[str, Sequence[int]]

RANK = 8
GAINS = {"decoder.conv_out.weight": 0.3, "zero_convs": 0.3, "middle_block_out": 0.3}
"""Factors on layers whose output is seen as it is: pictures keep within their range."""
SPREAD = 0.05
"""Of the factors that the DiffLoRA model and the LoRA file hold: pictures change visibly."""


@dataclass(frozen=True)
class RandomFile:
    """A file, or a folder, that workflows name.

    `place`: below ComfyUI's base directory; of a folder the file that is written last.
    `gigabytes`: about what it takes. `write`: makes it at its place.
    """

    place: str
    gigabytes: float
    write: Callable[[Path], object]


def build(folder: Path, side: int, say: Callable[[str], None]) -> float:
    """Write every file of FILES that is not there yet, and the photos; returns gigabytes.

    Args:
        folder: ComfyUI's base directory.
        side: of the photos in pixels; they are drawn at 64, and SDXL would train and paint at 64.
        say: prints a line for each file.
    """
    for file in FILES:
        path = folder / file.place
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            file.write(path)
            say(f"{file.place}: about {file.gigabytes:.1f} GB")
    _enlarge_photos(folder / "input", side)
    return sum(path.stat().st_size for path in (folder / "models").rglob("*.*")) / 1e9


def drawn(shapes: Shapes, dtype: torch.dtype = torch.float16) -> dict[str, Tensor]:
    """Random numbers of each shape, under which a network neither dies out nor overflows.

    Matrices and kernels are drawn from N(0, 1 / inputs), gains of norms are 1, biases 0.
    """
    generator = torch.Generator().manual_seed(0)
    base: dict[tuple[int, ...], Tensor] = {}
    for shape in {tuple(shape) for shape in shapes.values() if len(shape) > 1}:
        spread = 1 / math.sqrt(math.prod(shape[1:]))
        base[shape] = (spread * torch.randn(shape, generator=generator)).to(dtype)
    return {name: _parameter(name, tuple(shape), base, dtype) for name, shape in shapes.items()}


def _parameter(
    name: str, shape: tuple[int, ...], base: Mapping[tuple[int, ...], Tensor], dtype: torch.dtype
) -> Tensor:
    if len(shape) < 2:
        one = name.endswith(("weight", "logit_scale"))
        return torch.full(shape, float(one), dtype=dtype)
    gain = next((gain for part, gain in GAINS.items() if part in name), None)
    return base[shape] if gain is None else gain * base[shape]


def sdxl_shapes() -> dict[str, dict[str, list[int]]]:
    """What ComfyUI's classes hold, by folder of its models, see shapes.py."""
    command = [sys.executable, str(Path(__file__).with_name("shapes.py")), str(comfyui_folder())]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def write_published(path: Path) -> None:
    """A file in the form of the one that others publish, known by its folder."""
    shapes = sdxl_shapes()[path.parent.name]
    write_atomic(drawn(shapes), {}, path)


def write_photomaker(path: Path) -> None:
    """PhotoMaker's file, but for its LoRA (0.3 GB), which ComfyUI does not read."""
    shapes = sdxl_shapes()[path.parent.name]
    encoder = {name: value.clone() for name, value in drawn(shapes).items()}  # each number stored
    with replacing(path) as temporary:
        torch.save({"id_encoder": encoder, "lora_weights": {}}, temporary)


def write_difflora(path: Path) -> None:
    """A DiffLoRA model of the full-size preset whose LoRAs change pictures."""
    with torch.device("meta"):
        model = DiffLoRAModel(DiffLoRAConfig.sdxl(), sdxl_layout(RANK))
        shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    tensors = drawn(shapes, torch.bfloat16)
    for name in shapes:
        if name.startswith(EXACT_PREFIXES):
            spread = SPREAD if name.startswith("lae.") else 1.0
            tensors[name] = torch.full(shapes[name], spread if "scale" in name else 0.0)
        elif name.startswith(("lae.decoder.basis", "lae.shared_down")):
            inputs = 1 if "basis" in name else shapes[name][-1]  # many matrices, not one
            tensors[name] *= math.sqrt(math.prod(shapes[name][1:]) / inputs)
    model.load_state_dict(tensors, strict=True, assign=True)
    save_model(model, path, torch.bfloat16)


def write_person(path: Path) -> None:
    """The LoRA of some other trainer."""
    layout, generator = sdxl_layout(RANK), torch.Generator().manual_seed(1)
    layers = {
        shape.name: LoRALayer(
            SPREAD * torch.randn(RANK, shape.in_features, generator=generator),
            SPREAD * torch.randn(shape.out_features, RANK, generator=generator),
            float(RANK),
        )
        for shape in layout
    }
    write_lora_file(path, LoRAWeights(layers), layout)


def write_hyperlora(path: Path) -> None:
    """HyperLoRA's folder of the public size; its projector is written last."""
    write_random(path.parent, quick=False)


def write_faces(path: Path) -> None:
    """A face package with the inputs and outputs of antelopev2's models.

    Its detector is the demo's, which finds the drawn faces; it is written last.
    """
    g = torch.Generator().manual_seed(2)
    patches = nn.Linear(48, 512, bias=False)
    patches.weight.data = torch.randn(512, 48, generator=g)
    recogniser = nn.Sequential(nn.AvgPool2d(28), nn.Flatten(), patches)
    crops = torch.zeros(1, 3, 112, 112)
    export_onnx(recogniser, crops, ["embedding"], path.with_name("glintr100.onnx"), batched=True)
    seen = torch.zeros(1, 3, 192, 192)
    points = path.with_name("2d106det.onnx")
    export_onnx(OutlinePoints(), seen, ["points"], points, batched=False)
    path.write_bytes((FACES / DETECTOR).read_bytes())


class OutlinePoints(nn.Module):
    """insightface's 106 points for every picture: an ellipse around the face."""

    def __init__(self) -> None:
        super().__init__()
        angle = torch.arange(len(OUTLINE)) * 2 * math.pi / len(OUTLINE)
        points = torch.zeros(106, 2)
        points[list(OUTLINE)] = torch.stack([0.8 * angle.cos(), 0.9 * angle.sin()], -1)
        self.register_buffer("points", points.reshape(1, 212))

    def forward(self, picture: Tensor) -> Tensor:
        """Picture (1, 3, 192, 192) to points (1, 212) from -1 to 1."""
        return self.points + 0 * picture.mean()


def _enlarge_photos(folder: Path, side: int) -> None:
    """The photos that workflows load, as wide as this."""
    folder.mkdir(parents=True, exist_ok=True)
    for photo in WORKFLOWS.glob("difflora_demo*.png"):
        with Image.open(photo) as picture:
            size = (side, side * picture.height // picture.width)
            picture.resize(size, Image.Resampling.BICUBIC).save(folder / photo.name)


def _models(kind: str) -> str:
    return f"models/{kind}/{SDXL_FILES[kind][0]}"


FILES = (
    RandomFile(_models("checkpoints"), 6.9, write_published),
    RandomFile(_models("clip_vision"), 0.6, write_published),
    RandomFile(_models("controlnet"), 2.5, write_published),
    RandomFile("models/photomaker/photomaker-v1.bin", 0.7, write_photomaker),
    RandomFile(f"models/insightface/models/{SDXL_FACES}/{DETECTOR}", 0.0, write_faces),
    RandomFile(f"models/difflora/{SDXL_MODEL}", 1.7, write_difflora),
    RandomFile(f"models/hyper_lora/hyper_lora/{VARIANT}/{PROJECTOR}", 3.1, write_hyperlora),
    RandomFile("models/loras/my_person.safetensors", 0.0, write_person),
)
"""What workflows need beside what training nodes make, largest first in each group."""
