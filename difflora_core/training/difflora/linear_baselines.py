"""Closed-form baselines: PCA for the autoencoder, ridge regression for the whole prediction.

A network that loses to these is a bug; they stay in every table (demo-world.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import ConfigError, counted
from ...vision.features import ImageFeatures


@dataclass(frozen=True, eq=False)
class PCAAutoencoder:
    """The best linear autoencoder of a corpus of tokens.

    Args:
        mean: (T, L) mean tokens.
        scale: (T, 1) unit of each token; the components live in scaled tokens.
        components: (k, T, L), orthonormal, by falling variance.
        spread: (k,) standard deviation of the corpus along each component.
    """

    mean: Tensor
    scale: Tensor
    components: Tensor
    spread: Tensor

    def encode(self, tokens: Tensor) -> Tensor:
        """Coefficients (B, k) of tokens (B, T, L)."""
        centred = (tokens - self.mean.to(tokens)) / self.scale.to(tokens)
        return centred.flatten(1) @ self.components.to(tokens).flatten(1).mT

    def decode(self, coefficients: Tensor) -> Tensor:
        """Tokens (B, T, L) of coefficients (B, k)."""
        flat = coefficients @ self.components.to(coefficients).flatten(1)
        scaled = flat.unflatten(1, self.mean.shape) * self.scale.to(flat)
        return scaled + self.mean.to(flat)


def pca_autoencoder(tokens: Tensor, k: int, scale: Tensor | None = None) -> PCAAutoencoder:
    """Principal components of a corpus, from its Gram matrix in float64.

    Args:
        tokens: (M, T, L), padding zero.
        k: components, fewer than M.
        scale: (T, 1) divides the tokens first; 1 unless given.

    Raises:
        ConfigError: k is not between 1 and M - 1.
    """
    if not 1 <= k < len(tokens):
        raise ConfigError(
            f"A corpus of {counted(len(tokens), 'LoRA')} has 1 to {len(tokens) - 1} principal "
            f"components; {k} were asked for."
        )
    unit = torch.ones_like(tokens[0, :, :1]) if scale is None else scale
    mean = tokens.double().mean(0)
    centred = ((tokens.double() - mean) / unit.double()).flatten(1)  # M P
    values, vectors = leading(centred @ centred.mT, k)
    rows = F.normalize(vectors.mT @ centred, dim=1)  # k P
    return PCAAutoencoder(
        mean.to(tokens.dtype),
        unit.to(tokens.dtype),
        rows.unflatten(1, tokens.shape[1:]).to(tokens.dtype),
        (values / len(tokens)).sqrt().to(tokens.dtype),
    )


def leading(products: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest eigenvalues (k,), falling, and their vectors (M, k).

    Args:
        products: (M, M) inner products of centred rows.
        k: at most M.
    """
    values, vectors = torch.linalg.eigh(products)  # rising
    return values[-k:].flip(0).clamp_min(0), vectors[:, -k:].flip(1)


@dataclass(frozen=True, eq=False)
class RidgeRegression:
    """targets = (features - mean) / spread @ weight + bias.

    Args:
        mean: (F,) of the training features.
        spread: (F,) their standard deviation.
        weight: (F, K).
        bias: (K,).
    """

    mean: Tensor
    spread: Tensor
    weight: Tensor
    bias: Tensor

    def predict(self, features: Tensor) -> Tensor:
        """Targets (B, K) of features (B, F)."""
        x = (features.to(self.weight) - self.mean) / self.spread
        return x @ self.weight + self.bias


def ridge_regression(features: Tensor, targets: Tensor, strength: float) -> RidgeRegression:
    """Least squares with penalty: minimises |X W + b - Y|^2 + strength * M * |W|^2, in float64.

    Args:
        features: (M, F); standardised here, column by column.
        targets: (M, K).
        strength: above 0.

    Raises:
        ConfigError: shapes do not fit or the strength is not positive.
    """
    if len(features) != len(targets) or features.ndim != 2 or targets.ndim != 2 or strength <= 0:
        raise ConfigError(
            f"Ridge regression needs features (M, F), targets (M, K) and a strength above 0; got "
            f"{tuple(features.shape)}, {tuple(targets.shape)} and {strength}."
        )
    x, y = features.double(), targets.double()
    mean, bias = x.mean(0), y.mean(0)
    spread = x.std(0, unbiased=False).clamp_min(1e-8)
    x = (x - mean) / spread
    penalty = strength * len(x)
    if x.shape[1] <= len(x):
        inner = x.mT @ x + penalty * torch.eye(x.shape[1]).to(x)
        weight = torch.linalg.solve(inner, x.mT @ (y - bias))
    else:  # equal, and smaller when there are more features than people
        outer = x @ x.mT + penalty * torch.eye(len(x)).to(x)
        weight = x.mT @ torch.linalg.solve(outer, y - bias)
    return RidgeRegression(*(part.to(features.dtype) for part in (mean, spread, weight, bias)))


def best_ridge(
    train: tuple[Tensor, Tensor],
    validation: tuple[Tensor, Tensor],
    strengths: Sequence[float] = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0),
) -> tuple[RidgeRegression, float]:
    """Ridge regression with the strength that validation people choose.

    Args:
        train: features (M, F) and targets (M, K).
        validation: the same of other people.
        strengths: candidates.

    Returns:
        The regression (fitted on `train` alone) and the chosen strength.
    """
    fits = [(ridge_regression(*train, strength), strength) for strength in strengths]
    errors = [
        float((fit.predict(validation[0]) - validation[1]).square().mean()) for fit, _ in fits
    ]
    return fits[errors.index(min(errors))]


def feature_matrix(people: Sequence[ImageFeatures]) -> Tensor:
    """One row per person for `ridge_regression`: mean face and mean image embedding, (B, Df + Di).

    Both are averaged over the photos and brought to length 1; a person without a face gets zeros.
    """
    rows = []
    for person in people:
        face = (person.face.float() * person.face_found[:, None]).mean(0)
        image = person.image.float().mean(0)
        rows.append(torch.cat([F.normalize(face, dim=0), F.normalize(image, dim=0)]))
    return torch.stack(rows)
