import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from difflora_core.evaluation.pareto import hypervolume, shortfall


def test_areas_by_hand():
    origin = torch.zeros(2)
    steps = torch.tensor([[1.0, 3.0], [2.0, 2.0], [3.0, 1.0]])
    assert float(hypervolume(steps, origin)) == 6.0
    inside = torch.cat([steps, torch.tensor([[1.0, 1.0], [2.0, 0.5]])])
    assert float(hypervolume(inside, origin)) == 6.0  # what is dominated adds nothing
    assert float(hypervolume(steps, torch.tensor([1.0, 1.0]))) == 1.0
    assert float(hypervolume(steps, torch.tensor([4.0, 0.0]))) == 0.0
    batch = torch.stack([steps, steps * 2])
    torch.testing.assert_close(hypervolume(batch, origin), torch.tensor([6.0, 24.0]))


@given(st.integers(0, 2**31))
def test_area_equals_counting(seed):
    """Against the share of random darts that some point dominates."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.rand(5, 2, generator=generator, dtype=torch.float64)
    axis = (torch.arange(80, dtype=torch.float64) + 0.5) / 80
    darts = torch.cartesian_prod(axis, axis)
    hit = (points[:, None] >= darts).all(-1).any(0).double().mean()
    assert abs(float(hypervolume(points, torch.zeros(2))) - float(hit)) < 0.03


def test_between_two_settings_counts():
    front = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    assert float(shortfall(front, torch.tensor([[0.5, 0.5], [0.2, 0.7], [1.0, 0.0]]))) == 0.0
    assert float(shortfall(front, torch.tensor([[-1.0, 1.0], [0.25, 0.5]]))) == 0.0
    assert float(shortfall(front, torch.tensor([[0.5, 0.5], [0.6, 0.6]]))) > 0
    assert float(shortfall(front, torch.tensor([[0.0, 1.1]]))) > 0
    both = shortfall(torch.stack([front, front / 2]), torch.tensor([[0.4, 0.4]]))
    assert (both <= 0).tolist() == [True, False]
    # a sweep of one setting
    assert float(shortfall(front[:1], torch.tensor([[0.0, 0.5]]))) == 0.0
    assert float(shortfall(front[:1], torch.tensor([[-0.5, 0.5]]))) == -0.5


def test_shortfall_by_hand():
    """The worst point decides, by what it has more in its better column."""
    front = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    far = torch.tensor([[0.0, 1.1], [0.5, 0.75]], dtype=torch.float64)
    assert float(shortfall(front, far[:1])) == pytest.approx(0.1)
    assert float(shortfall(front, far)) == pytest.approx(0.125)  # at (0.375, 0.625)
    assert float(shortfall(front + 0.125, far)) == pytest.approx(0.0)
