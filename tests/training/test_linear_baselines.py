"""PCA and ridge regression against NumPy, and what must hold for any data."""

import numpy as np
import pytest
import torch

from difflora_core.errors import ConfigError
from difflora_core.training.difflora.linear_baselines import (
    best_ridge,
    feature_matrix,
    pca_autoencoder,
    ridge_regression,
)
from difflora_core.vision.features import ImageFeatures


def randn(*shape, seed=0):
    """Random float64."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64)


@pytest.mark.parametrize("scaled", [False, True])
def test_pca_is_numpys_svd(scaled):
    tokens = randn(12, 3, 7) * torch.tensor([1.0, 5.0, 0.1], dtype=torch.float64)[None, :, None]
    scale = tokens.std((0, 2))[:, None] if scaled else None
    pca = pca_autoencoder(tokens, 4, scale)
    unit = np.ones((3, 1)) if scale is None else scale.numpy()
    x = (tokens.numpy() / unit).reshape(12, -1)
    u, s, vh = np.linalg.svd(x - x.mean(0), full_matrices=False)
    best = ((u[:, :4] * s[:4]) @ vh[:4] + x.mean(0)).reshape(12, 3, 7) * unit
    np.testing.assert_allclose(pca.decode(pca.encode(tokens)).numpy(), best, atol=1e-10)
    np.testing.assert_allclose(pca.spread.numpy(), s[:4] / np.sqrt(12), atol=1e-10)
    rows = pca.components.flatten(1)
    torch.testing.assert_close(rows @ rows.mT, torch.eye(4, dtype=torch.float64))
    coefficients = randn(5, 4, seed=1)
    torch.testing.assert_close(pca.encode(pca.decode(coefficients)), coefficients)
    whole = pca_autoencoder(tokens, 11, scale)
    torch.testing.assert_close(whole.decode(whole.encode(tokens)), tokens)
    for k in (0, 12):
        with pytest.raises(ConfigError, match="principal components"):
            pca_autoencoder(tokens, k)


@pytest.mark.parametrize("people", [40, 6])
def test_ridge_is_the_closed_form(people):
    x, y = 3 * randn(people, 9) + 1, randn(people, 2, seed=1)
    fit = ridge_regression(x, y, 0.2)
    a = x.numpy()
    a = (a - a.mean(0)) / a.std(0)
    inner = a.T @ a + 0.2 * people * np.eye(9)
    w = np.linalg.solve(inner, a.T @ (y.numpy() - y.numpy().mean(0)))
    np.testing.assert_allclose(fit.predict(x).numpy(), a @ w + y.numpy().mean(0), atol=1e-10)


def test_validation_people_choose_the_strength():
    weight = randn(9, 2, seed=3)
    x, z = randn(30, 9), randn(200, 9, seed=4)
    clean, _ = best_ridge((x, x @ weight), (z, z @ weight))
    torch.testing.assert_close(clean.predict(z), z @ weight, atol=0.2, rtol=0)
    _, weak = best_ridge((x, x @ weight), (z, z @ weight))
    _, strong = best_ridge((x, randn(30, 2, seed=5)), (z, randn(200, 2, seed=6)))
    assert weak == 0.01
    assert strong > 1
    with pytest.raises(ConfigError):
        ridge_regression(x, weight, 0.1)
    with pytest.raises(ConfigError):
        ridge_regression(x, x, 0.0)


def test_feature_rows_do_not_depend_on_photo_order_or_missing_faces():
    g = torch.Generator().manual_seed(0)
    person = ImageFeatures(
        torch.randn(3, 4, generator=g),
        torch.tensor([True, False, True]),
        torch.randn(3, 5, generator=g),
        torch.zeros(3, 2, 2),
    )
    row = feature_matrix([person, person.select([2, 0, 1])])
    assert row.shape == (2, 9)
    torch.testing.assert_close(row[0], row[1])
    faceless = ImageFeatures(
        person.face, torch.zeros(3, dtype=torch.bool), person.image, person.image_tokens
    )
    assert not feature_matrix([faceless])[0, :4].any()
