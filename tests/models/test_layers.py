"""What the networks share: weights of other libraries' layers from a generator of one's own."""

import torch
from torch import nn

from difflora_core.models.layers import DrawnFrom


def test_constructors_draw_from_the_generator_and_leave_the_global_state() -> None:
    before = torch.get_rng_state()
    with DrawnFrom(torch.Generator().manual_seed(5)):
        layer, table, more = nn.Linear(4, 3), nn.Embedding(2, 5), torch.randn(6)
    assert torch.equal(torch.get_rng_state(), before)
    g = torch.Generator().manual_seed(5)
    for wanted, got in (
        (torch.empty(3, 4).uniform_(-0.5, 0.5, generator=g), layer.weight),
        (torch.empty(3).uniform_(-0.5, 0.5, generator=g), layer.bias),
        (torch.empty(2, 5).normal_(0, 1, generator=g), table.weight),
        (torch.randn(6, generator=g), more),
    ):
        torch.testing.assert_close(got, wanted)


def test_a_generator_that_is_given_is_used() -> None:
    with DrawnFrom(torch.Generator().manual_seed(5)):
        got = torch.rand(3, generator=torch.Generator().manual_seed(6))
    assert torch.equal(got, torch.rand(3, generator=torch.Generator().manual_seed(6)))
