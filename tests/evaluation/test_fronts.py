import torch
from hypothesis import given
from hypothesis import strategies as st

from difflora_core.evaluation.fronts import hypervolume, on_or_above


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
    assert bool(on_or_above(front, torch.tensor([[0.5, 0.5], [0.2, 0.7], [1.0, 0.0]])))
    assert not bool(on_or_above(front, torch.tensor([[0.5, 0.5], [0.6, 0.6]])))
    assert bool(on_or_above(front, torch.tensor([[-1.0, 1.0]])))
    assert not bool(on_or_above(front, torch.tensor([[0.0, 1.1]])))
    both = on_or_above(torch.stack([front, front / 2]), torch.tensor([[0.4, 0.4]]))
    assert both.tolist() == [True, False]
    assert bool(on_or_above(front[:1], torch.tensor([[0.0, 0.5]])))  # a sweep of one setting
