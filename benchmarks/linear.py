"""Linear baselines that a network must beat: PCA of LoRA weights, ridge on the features."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from difflora_core.lora.weights import LoRALayer, LoRAWeights
from difflora_core.vision.features import ImageFeatures

RIDGES = tuple(10.0**k for k in range(-2, 7))
HELD_OUT = 0.25


@dataclass(frozen=True)
class Linear:
    """PCA of the `up` factors over one shared `down`, and a ridge map from features to PCA.

    `mean`: (V,); `basis`: (K, V) orthonormal rows; `feature_mean`, `feature_scale`: (F,);
    `ridge`: (F, K); `offset`: (K,).
    """

    mean: Tensor
    basis: Tensor
    feature_mean: Tensor
    feature_scale: Tensor
    ridge: Tensor
    offset: Tensor

    def project(self, vectors: Tensor) -> Tensor:
        """The nearest LoRAs (B, V) in the span of K directions."""
        return self.mean + (vectors - self.mean) @ self.basis.T @ self.basis

    def predict(self, features: Tensor) -> Tensor:
        """LoRAs (B, V) from features (B, F)."""
        rows = (features - self.feature_mean) / self.feature_scale
        return self.mean + (rows @ self.ridge + self.offset) @ self.basis


def fit_linear(vectors: Tensor, features: Tensor, components: int) -> Linear:
    """Fit both baselines.

    The penalty of the ridge is the best of RIDGES on the last quarter of the people, refitted on
    all of them.

    Args:
        vectors: (M, V) LoRAs of M people.
        features: (M, Q, F) features of Q photos of each; every photo is one example.
        components: K, at most M - 1.
    """
    mean = vectors.mean(0)
    _, _, directions = torch.linalg.svd(vectors - mean, full_matrices=False)
    basis = directions[: min(components, len(vectors) - 1)]
    scores = (vectors - mean) @ basis.T
    flat = features.flatten(0, 1)
    feature_mean, feature_scale = flat.mean(0), flat.std(0).clamp_min(1e-6)
    rows = (features - feature_mean) / feature_scale
    kept = max(1, round(len(vectors) * (1 - HELD_OUT)))
    errors = []
    for penalty in RIDGES:
        weights, offset = _ridge(rows[:kept], scores[:kept], penalty)
        predicted = rows[kept:] @ weights + offset
        errors.append(float((predicted - scores[kept:, None]).square().mean()))
    best = RIDGES[errors.index(min(errors))] if kept < len(vectors) else RIDGES[-1]
    ridge, offset = _ridge(rows, scores, best)
    return Linear(mean, basis, feature_mean, feature_scale, ridge, offset)


def photo_rows(features: ImageFeatures) -> Tensor:
    """Face, image and token features of each photo: (N, F)."""
    tokens = features.image_tokens.float().flatten(1)
    return torch.cat([features.face.float(), features.image.float(), tokens], 1)


def up_vectors(weights: LoRAWeights) -> Tensor:
    """The `up` factors of a batch of LoRAs as rows (B, V), scale folded in."""
    return torch.cat([layer.folded().up.flatten(1) for layer in weights.layers.values()], 1)


def with_up_vectors(vectors: Tensor, like: LoRAWeights) -> LoRAWeights:
    """Inverse of `up_vectors` with the first `down` of `like` for everybody."""
    layers, start = {}, 0
    for name, layer in like.layers.items():
        size = layer.out_features * layer.rank
        up = vectors[:, start : start + size].unflatten(1, (layer.out_features, layer.rank))
        down = layer.down[:1].expand(len(vectors), -1, -1)
        layers[name] = LoRALayer(down, up, float(layer.rank))
        start += size
    return LoRAWeights(layers)


def save_linear(linear: Linear, path: Path, facts: dict[str, object]) -> None:
    """Write the baselines; the large matrices in half precision."""
    tensors = {
        name: (value.half() if value.ndim == 2 else value.float()).contiguous()
        for name, value in vars(linear).items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    save_file(tensors, temporary, {"facts": json.dumps(facts)})
    temporary.replace(path)


def load_linear(path: Path) -> tuple[Linear, dict[str, object]]:
    """Read the baselines and the facts of their making."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name).float() for name in Linear.__dataclass_fields__}
        return Linear(**tensors), json.loads(file.metadata()["facts"])


def _ridge(rows: Tensor, scores: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    """Ridge regression with an offset in its dual form: rows (M, Q, F), scores (M, K)."""
    x = rows.flatten(0, 1)
    y = scores.repeat_interleave(rows.shape[1], 0)
    offset = y.mean(0)
    gram = x @ x.T + penalty * torch.eye(len(x))
    return x.T @ torch.linalg.solve(gram, y - offset), offset
