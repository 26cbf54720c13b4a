"""One small file of every kind that we write, for the contract of the formats."""

from collections.abc import Callable
from pathlib import Path

import torch

from difflora_core.lora.layout import LayerShape, LoRALayout
from difflora_core.lora.weights import LoRALayer, LoRAWeights
from difflora_core.methods.base import TrainedAdaptation
from difflora_core.methods.lora import lora_adaptation
from difflora_core.methods.perfusion import PerfusionConfig
from difflora_core.models.difflora import DiffLoRAConfig, DiffLoRAModel
from difflora_core.models.dit import DiTConfig
from difflora_core.models.lae.autoencoder import LoRALatent
from difflora_core.models.lae.config import LAEConfig
from difflora_core.models.mif import MIFConfig
from difflora_core.models.predictor import PredictorConfig
from difflora_core.storage.adapter_file import write_adaptation
from difflora_core.storage.checkpoint import save_model
from difflora_core.storage.covariance_file import write_covariance
from difflora_core.storage.features_file import write_features
from difflora_core.storage.identity_library import add_people
from difflora_core.storage.lora_file import LoRAInfo, write_lora_file
from difflora_core.storage.thumbnail import make_thumbnail
from difflora_core.text.covariance import Covariance
from difflora_core.text.new_words import LearnedWord
from difflora_core.vision.features import FeatureSizes, ImageFeatures

SIZES = FeatureSizes(4, 4, 2, 4)


def tiny_layout() -> LoRALayout:
    """Two layers of the middle block."""
    stem = "middle_block.1.transformer_blocks.0.attn2"
    return LoRALayout(
        "demo", 2, (LayerShape(f"{stem}.to_k", 8, 16), LayerShape(f"{stem}.to_v", 8, 16))
    )


def tiny_lora() -> LoRAWeights:
    """A LoRA of that layout with plain numbers."""
    layers = {}
    for k, shape in enumerate(tiny_layout()):
        down = torch.arange(2 * shape.in_features).reshape(2, -1) / 64 - k
        up = torch.arange(2 * shape.out_features).reshape(-1, 2) / 64 + k
        layers[shape.name] = LoRALayer(down, up, 2.0)
    return LoRAWeights(layers)


def write_checkpoint(path: Path) -> Path:
    """A DiffLoRA model of the demo's kind."""
    config = DiffLoRAConfig.demo(
        SIZES,
        mif=MIFConfig(SIZES.face, SIZES.image, SIZES.token_dim, SIZES.tokens, width=16, heads=2),
        predictor=PredictorConfig(width=16, depth=1),
        dit=DiTConfig(width=16, depth=1, heads=2),
        lae=LAEConfig(
            *("structured", 2, 4), width=16, depth=1, heads=2, basis_size=4, decoder_width=16
        ),
    )
    generator = torch.Generator().manual_seed(1)
    model = DiffLoRAModel(config, tiny_layout(), generator=generator)
    for parameter in model.parameters():
        if not parameter.any():  # branches that start at zero
            parameter.data.normal_(0, 0.1, generator=generator)
    return save_model(model, path, torch.float16, {"seed": 1})


def write_library(path: Path) -> Path:
    """A library of two people."""
    z = torch.arange(12.0).reshape(2, 2, 3)
    pictures = [make_thumbnail(torch.full((8, 8, 3), 0.5)), None]
    add_people(path, LoRALatent(z, tiny_layout().hash), ["Ada", "Ben"], pictures, "model")
    return path


def write_lora(path: Path) -> Path:
    """A LoRA that says all it can about itself."""
    info = LoRAInfo("title", "description", "license", "hash", 1, 2, 3.0, (0.5, 0.5))
    write_lora_file(path, tiny_lora(), tiny_layout(), info)
    return path


def write_small_concept(path: Path) -> Path:
    """A concept of one layer, with contexts of its own."""
    layer = "middle_block.1.transformer_blocks.0.attn2.to_v"
    direction = torch.arange(1.0, 9.0)
    word = LearnedWord(
        *("<hat>", "hat", (torch.ones(4), torch.arange(4.0)), torch.arange(64.0)),
        ("a {}", "photo of a {}"),
    )
    concept = TrainedAdaptation(
        *("perfusion", "demo", PerfusionConfig()),
        {"direction": direction, "covector": direction / direction.square().sum()},
        {layer: {"values": torch.arange(16.0) / 8}},
        word,
        {"steps": 1, "pictures": 2},
    )
    return write_adaptation(path, concept).path


def write_small_adapter(path: Path) -> Path:
    """An adaptation without a word: what version 1 of the concept file could not hold."""
    return write_adaptation(path, lora_adaptation(tiny_lora(), "demo")).path


def write_small_covariance(path: Path) -> Path:
    """C of three directions."""
    covariance = Covariance(torch.diag(torch.arange(1.0, 4.0)), 10, 1e-3, torch.arange(64.0))
    return write_covariance(path, covariance)


def write_small_features(path: Path) -> Path:
    """Features of two photos, one without a face."""
    face = torch.tensor([[0.6, 0.8], [0.0, 0.0]])
    tokens = torch.arange(12.0).reshape(2, 2, 3)
    found = torch.tensor([True, False])
    return write_features(path, ImageFeatures(face, found, face + 1, tokens, "crop", "rec.onnx"))


WRITERS: dict[str, Callable[[Path], Path]] = {
    "checkpoint": write_checkpoint,
    "adapter": write_small_adapter,
    "concept": write_small_concept,
    "covariance": write_small_covariance,
    "features": write_small_features,
    "library": write_library,
    "lora": write_lora,
}
