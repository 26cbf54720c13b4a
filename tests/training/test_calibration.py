"""DisenDiff's losses on maps with known overlap; recorded attention against a plain form."""

import math

import pytest
import torch
from torch import nn

from difflora_core.errors import ConfigError
from difflora_core.text.captions import WORLDS, captions
from difflora_core.training.calibration import (
    MAP_SIZE,
    binding_loss,
    intersection_over_union,
    record_attention,
    separation_loss,
    smoothed,
)


def half(side, size=8):
    maps = torch.zeros(1, size, size)
    maps[:, :, :4] = 1
    return maps if side == "left" else maps.flip(2)


def test_overlap():
    left, right = half("left"), half("right")
    assert float(intersection_over_union(left, left)) == pytest.approx(1)
    assert float(intersection_over_union(left, right)) == pytest.approx(1 / (64 + 1))
    partly = intersection_over_union(0.5 * left, left)
    assert float(partly) == pytest.approx((16 + 1) / (48 - 16 + 1))


def test_losses():
    left, right = half("left"), half("right").requires_grad_()
    assert float(binding_loss([left], [left])) == pytest.approx(0)
    far = binding_loss([right], [left])
    assert float(far.detach()) == pytest.approx(1 - 1 / 65)
    far.sum().backward()
    assert float(right.grad.abs().sum()) > 0
    own = half("left").requires_grad_()  # no gradient into the class map
    assert not binding_loss([left], [own]).requires_grad
    three = separation_loss([left, half("right"), left])
    assert float(three) == pytest.approx((1 / 65 + 1 + 1 / 65) / 3)
    with pytest.raises(ConfigError, match="two concepts"):
        separation_loss([left])


def test_smoothing_keeps_range_and_blurs():
    maps = torch.zeros(2, 8, 8)
    maps[0, 4, 4], maps[1] = 7.0, 3.0
    got = smoothed(maps)
    side = math.exp(-2)
    assert float(got[0, 4, 4]) == pytest.approx((1 / (1 + 2 * side)) ** 2, rel=1e-5)
    assert float(got[0].sum()) == pytest.approx(1, rel=1e-5)
    assert float(got[1].abs().max()) == 0  # a flat map says nothing


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.heads = 2
        self.to_q, self.to_k = nn.Linear(6, 8), nn.Linear(5, 8)

    def forward(self, x, e):
        return self.to_q(x), self.to_k(e)


def test_recorded_maps_equal_plain_attention():
    net = nn.ModuleDict({"a": Attention(), "b": Attention()})
    g = torch.Generator().manual_seed(0)
    x, small = torch.randn(2, 16 * 8, 6, generator=g), torch.randn(2, 8 * 4, 6, generator=g)
    e = torch.randn(2, 3, 5, generator=g)
    with record_attention(net, ["a.to_k", "b.to_k"]) as record:
        q, k = net["a"](x, e)
        net["b"](small, e)
    got = record.maps(torch.tensor([1, 2]), (16, 8))
    wanted = []
    for row, place in ((0, 1), (1, 2)):
        heads = [
            (q[row, :, c] @ k[row, :, c].mT / 2).softmax(-1)[:, place].view(16, 8)
            for c in (slice(0, 4), slice(4, 8))
        ]
        wanted.append(sum(heads) / 2)
    plain = torch.nn.functional.interpolate(
        torch.stack(wanted)[:, None], (MAP_SIZE, MAP_SIZE), mode="bilinear"
    )
    torch.testing.assert_close(got, smoothed(plain[:, 0]))
    assert not any(m._forward_hooks for m in net.modules())
    with record_attention(net, []) as empty:
        net["a"](x, e)
    with pytest.raises(ConfigError, match="No cross-attention"):
        empty.maps(torch.tensor([0, 0]), (16, 8))


@pytest.mark.parametrize("world", WORLDS)
def test_captions_are_distinct_and_fixed(world):
    some = captions(5000, world)
    assert len(set(some)) == 5000
    assert captions(5000, world)[:10] == some[:10]
    assert len(set(captions(5000, world, seed=1)) & set(some)) < 50
    assert all(text == " ".join(text.split()) and " ," not in text for text in some)
    assert WORLDS[world].size > 1_000_000
    words = {word.strip(",") for text in some for word in text.split()}
    assert len(words) >= 45


def test_captions_out_of_range():
    with pytest.raises(ConfigError, match="Unknown captions"):
        captions(1, "mars")
    for count in (0, 10**9):
        with pytest.raises(ConfigError, match="were asked for"):
            captions(count)
