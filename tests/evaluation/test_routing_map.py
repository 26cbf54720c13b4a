"""The map of a router against the eigenvectors of the covariance, and where its dots are."""

import numpy as np
import pytest
import torch

from difflora_core.evaluation.routing import colours_of
from difflora_core.evaluation.routing_map import (
    DOT,
    EDGE,
    LINE,
    SIDE,
    principal_components,
    routing_map,
)


@pytest.mark.parametrize("seed", range(3))
def test_components_are_eigenvectors_of_the_covariance(seed):
    points = torch.randn(11, 5, generator=torch.Generator().manual_seed(seed)).double()
    points[:, 2] *= 4
    points[:, 4] *= 2
    places, shares = principal_components(points)
    values, vectors = np.linalg.eigh(np.cov(points.numpy().T))
    centred = points.numpy() - points.numpy().mean(0)
    for k in range(2):
        vector = vectors[:, -1 - k]
        vector = vector * np.sign(vector[np.abs(vector).argmax()])
        np.testing.assert_allclose(places[:, k].numpy(), centred @ vector, atol=1e-10)
        np.testing.assert_allclose(float(shares[k]), values[-1 - k] / values.sum(), atol=1e-10)


@pytest.mark.parametrize("shape", [(1, 4), (3, 1), (3, 4)])
def test_points_that_do_not_differ_lie_in_the_middle(shape):
    places, shares = principal_components(torch.full(shape, 0.25))
    assert not places.any()
    assert shares.tolist() == [0, 0]
    assert torch.isfinite(routing_map(torch.full(shape, 0.25)[None])).all()


def test_lines_go_from_a_ring_to_a_dot():
    """Two pictures on one axis: the first goes from the middle to +2, the other to -2."""
    table = torch.tensor([[[0.0, 0.0], [0.0, 0.0]], [[2.0, 0.0], [-2.0, 0.0]]])
    picture = (routing_map(table) * 255).round().byte().numpy()
    assert picture.shape == (SIDE + LINE, SIDE, 3)
    first, second = (np.array(colour) for colour in colours_of(2))
    middle = SIDE // 2
    assert (picture[middle, SIDE - EDGE] == first).all()  # its dot, filled
    assert (picture[middle, EDGE] == second).all()
    assert (picture[middle, SIDE - EDGE + DOT + 2] == 255).all()
    assert (picture[middle, middle + 3 * DOT] == first).all()  # on the line
    assert (picture[middle, middle] == 255).all()  # inside the ring
