"""FID and KID against other ways to compute them, in float64."""

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from difflora_core.errors import ConfigError
from difflora_core.evaluation.distribution import frechet_distance, kernel_distance


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    """Float64 normal numbers, correlated and off zero."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.cumsum(1) / 2 + 0.3 * seed


def test_frechet_distance_is_the_formula_with_scipys_matrix_root():
    one, other = draw(60, 5, seed=1), draw(40, 5, seed=2)
    a, b = (np.cov(x.numpy(), rowvar=False) for x in (one, other))
    apart = np.square((one.mean(0) - other.mean(0)).numpy()).sum()
    wanted = apart + np.trace(a + b - 2 * np.real(sqrtm(a @ b)))
    assert frechet_distance(one, other) == pytest.approx(float(wanted), rel=1e-9)
    assert frechet_distance(other, one) == pytest.approx(float(wanted), rel=1e-9)


def test_frechet_distance_where_the_answer_is_known():
    x = draw(50, 6)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    shift = torch.arange(6, dtype=torch.float64)
    assert frechet_distance(x, x + shift) == pytest.approx(55)  # sum of squares of the shift
    wanted = float(x.var(0).sum() + x.mean(0).square().sum())  # of 2 x: tr C + |m|^2
    assert frechet_distance(x, 2 * x) == pytest.approx(wanted)


def test_fewer_pictures_than_features():
    x = draw(4, 9)
    assert frechet_distance(x, x + 1) == pytest.approx(9)


def test_kernel_distance_written_out_in_loops():
    one, other = draw(5, 3, seed=3), draw(7, 3, seed=4)

    def kernel(a, b):
        return (float(a @ b) / 3 + 1) ** 3

    def within(x):
        pairs = [(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j]
        return sum(kernel(a, b) for a, b in pairs) / len(pairs)

    between = sum(kernel(a, b) for a in one for b in other) / 35
    wanted = within(one) + within(other) - 2 * between
    assert kernel_distance(one, other) == pytest.approx(wanted, rel=1e-9)


def test_kernel_distance_has_no_bias_and_frechet_distance_has():
    """Sets of one distribution: KID is 0 on average, FID is not and falls with their size."""
    values = {n: [] for n in (20, 80)}
    kernels = []
    for seed in range(60):
        for n in values:
            generator = torch.Generator().manual_seed(seed)
            one, other = torch.randn(2, n, 8, generator=generator).unbind()
            values[n].append(frechet_distance(one, other))
            kernels.append(kernel_distance(one, other))
    few, many = (np.mean(found) for found in values.values())
    assert few > 2 * many > 0
    assert abs(np.mean(kernels)) < 3 * np.std(kernels) / len(kernels) ** 0.5


@pytest.mark.parametrize("shapes", [((1, 3), (9, 3)), ((9, 3), (9, 4))])
def test_sets_that_cannot_be_compared(shapes):
    for distance in (frechet_distance, kernel_distance):
        with pytest.raises(ConfigError, match="of one network"):
            distance(torch.ones(shapes[0]), torch.ones(shapes[1]))
