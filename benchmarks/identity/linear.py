"""The linear baselines as one file: PCA of LoRA tokens, ridge regression from features to PCA."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from difflora_core.lora.layout import LoRALayout
from difflora_core.lora.tokens import TokenGrid
from difflora_core.lora.weights import LoRAWeights
from difflora_core.storage.safetensors_io import write_atomic
from difflora_core.training.difflora.linear_baselines import (
    PCAAutoencoder,
    RidgeRegression,
    best_ridge,
    feature_matrix,
    pca_autoencoder,
)
from difflora_core.vision.features import ImageFeatures


@dataclass(frozen=True)
class Linear:
    """PCA of `up` factors over one shared `down`, and a ridge map from features to its numbers.

    `down`: layer name to (r, in), that of the corpus.
    """

    pca: PCAAutoencoder
    ridge: RidgeRegression
    down: Mapping[str, Tensor]

    @property
    def size(self) -> int:
        """Numbers per LoRA."""
        return len(self.pca.components)

    def reconstruct(self, weights: LoRAWeights, layout: LoRALayout) -> LoRAWeights:
        """The nearest LoRAs in the span of the components; `weights` share their `down`."""
        grid = TokenGrid(layout, ("up",))
        tokens = self.pca.decode(self.pca.encode(grid.encode(weights)[0]))
        return grid.decode(tokens, {name: layer.down[0] for name, layer in weights.layers.items()})

    def predict(self, people: Sequence[ImageFeatures], layout: LoRALayout) -> LoRAWeights:
        """LoRAs of people from the features of their photos, over the shared `down`."""
        tokens = self.pca.decode(self.ridge.predict(feature_matrix(people)))
        return TokenGrid(layout, ("up",)).decode(tokens, dict(self.down))


def fit_linear(
    corpus: tuple[LoRAWeights, LoRAWeights],
    photos: tuple[list[list[ImageFeatures]], list[list[ImageFeatures]]],
    layout: LoRALayout,
    components: int,
) -> Linear:
    """Fit both on training people; validation people choose the penalty of the ridge.

    Args:
        corpus: LoRAs of training and of validation people, all over one shared `down`.
        photos: of the same people, features of each photo on its own; every photo is an example.
        layout: of the LoRAs.
        components: size of the PCA.
    """
    grid = TokenGrid(layout, ("up",))
    tokens = [grid.encode(weights)[0].float() for weights in corpus]
    pca = pca_autoencoder(tokens[0], min(components, len(tokens[0]) - 1))
    sets = []
    for part, people in zip(tokens, photos, strict=True):
        rows = [feature_matrix(person) for person in people]
        counts = torch.tensor([len(row) for row in rows])
        sets.append((torch.cat(rows), pca.encode(part).repeat_interleave(counts, 0)))
    down = {name: layer.down[0] for name, layer in corpus[0].folded().layers.items()}
    return Linear(pca, best_ridge(sets[0], sets[1])[0], down)


def save_linear(linear: Linear, path: Path, facts: dict[str, object]) -> None:
    """Write the baselines; the components in half precision."""
    tensors = {f"down.{name}": value.contiguous() for name, value in linear.down.items()}
    for part in ("pca", "ridge"):
        for name, value in vars(getattr(linear, part)).items():
            kind = torch.float16 if value.ndim == 3 else torch.float32
            tensors[f"{part}.{name}"] = value.to(kind).contiguous()
    write_atomic(tensors, {"facts": json.dumps(facts)}, path)


def load_linear(path: Path) -> tuple[Linear, dict[str, object]]:
    """Read the baselines and the facts of their making."""
    parts: dict[str, dict[str, Tensor]] = {"pca": {}, "ridge": {}, "down": {}}
    with safe_open(path, "pt") as file:
        for key in file.keys():
            part, name = key.split(".", 1)
            parts[part][name] = file.get_tensor(key).float()
        facts = json.loads(file.metadata()["facts"])
    pca, ridge = PCAAutoencoder(**parts["pca"]), RidgeRegression(**parts["ridge"])
    return Linear(pca, ridge, parts["down"]), facts
