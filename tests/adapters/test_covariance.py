"""C: second moment over tokens, ridge, condition number, inner product; against plain formulas."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from difflora_core.errors import ConfigError
from difflora_core.text.covariance import Covariance, SecondMoment


def encodings(count=200, dim=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dim, dim, generator=g, dtype=torch.float64)
    return torch.randn(count, dim, generator=g, dtype=torch.float64) @ mixing + 0.5


def test_second_moment_is_uncentred_and_per_token():
    rows = encodings()
    moment = SecondMoment(6)
    for part in rows.split(37):  # the parts do not matter
        moment.add(part)
    plain = torch.stack([torch.outer(row, row) for row in rows]).mean(0)
    torch.testing.assert_close(moment.matrix(), plain, rtol=1e-12, atol=1e-12)
    assert moment.count == 200


@given(st.integers(0, 50), st.floats(1e-4, 1e-1))
def test_inverse_products(seed, ridge):
    rows = encodings(seed=seed)
    matrix = rows.mT @ rows / len(rows)
    covariance = Covariance(matrix, len(rows), ridge)
    full = matrix + ridge * matrix.trace() / 6 * torch.eye(6, dtype=torch.float64)
    inverse = torch.linalg.inv(full)
    e, f = rows[0], rows[1]
    assert (covariance.solve(e) @ f).item() == pytest.approx((e @ inverse @ f).item(), rel=1e-7)
    direction = rows[2]
    energy = direction @ inverse @ direction
    plain = (rows @ inverse @ direction) / energy
    covector = covariance.covector(direction)
    torch.testing.assert_close(rows @ covector, plain, rtol=1e-7, atol=1e-9)
    values = torch.linalg.eigvalsh(full)
    assert covariance.condition_number == pytest.approx((values[-1] / values[0]).item(), rel=1e-6)
    for c in (-1.0, 0.3, 2.0):  # a of a multiple of i* is the multiple
        assert (c * direction @ covector).item() == pytest.approx(c, abs=1e-9)


def test_what_cannot_be_inverted_is_refused():
    flat = torch.outer(torch.ones(4), torch.ones(4))
    with pytest.raises(ConfigError, match="larger ridge"):
        Covariance(flat, 1, ridge=0.0)
    assert Covariance(flat, 1, ridge=1e-3).condition_number < 1e4
    with pytest.raises(ConfigError, match="square"):
        Covariance(torch.zeros(3, 4), 1)
    with pytest.raises(ConfigError, match="not symmetric"):
        Covariance(torch.eye(4) + torch.triu(torch.ones(4, 4), 1), 1)
    with pytest.raises(ConfigError, match="not finite"):
        Covariance(torch.full((2, 2), torch.nan), 1)
    with pytest.raises(ConfigError, match="ridge"):
        Covariance(torch.eye(2), 1, ridge=2.0)
    with pytest.raises(ConfigError, match="inverted"):
        Covariance(torch.zeros(2, 2), 1)


def test_bad_encodings():
    with pytest.raises(ConfigError, match="at least one caption"):
        SecondMoment(3).matrix()
    with pytest.raises(ConfigError, match=r"must be \(tokens, 3\)"):
        SecondMoment(3).add(torch.zeros(2, 4))
    with pytest.raises(ConfigError, match="not finite"):
        SecondMoment(2).add(torch.tensor([[1.0, torch.inf]]))
