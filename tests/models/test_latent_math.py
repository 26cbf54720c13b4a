"""Blends, steps and differences of identities, against formulas written another way."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from difflora_core.errors import ConfigError, LayoutError
from difflora_core.models.lae.autoencoder import LoRALatent
from difflora_core.models.latent_math import (
    METHODS,
    add_difference,
    blend,
    concatenate,
    interpolate,
    select,
)

SEEDS = st.integers(0, 10_000)


def person(seed=0, count=1, space="s", layout="h", shape=(3, 4)):
    g = torch.Generator().manual_seed(seed)
    return LoRALatent(torch.randn(count, *shape, generator=g), layout, space)


def shoemake(a, b, way):
    """Slerp of directions by sines, lengths straight (K. Shoemake, 1985)."""
    a, b = a.z.double().flatten(), b.z.double().flatten()
    angle = torch.acos(a @ b / (a.norm() * b.norm()))
    first = torch.sin((1 - way) * angle) * a / a.norm()
    turned = (first + torch.sin(way * angle) * b / b.norm()) / torch.sin(angle)
    return (turned * ((1 - way) * a.norm() + way * b.norm())).float().view(1, 3, 4)


@given(SEEDS, st.floats(0.01, 0.99))
def test_slerp_of_two_is_shoemakes(seed, way):
    a, b = person(seed), person(seed + 1)
    torch.testing.assert_close(blend([a, b], [1 - way, way]).z, shoemake(a, b, way))


@given(SEEDS, st.lists(st.floats(0.0, 5.0), min_size=3, max_size=3).filter(lambda w: sum(w) > 0.1))
def test_mean_on_the_sphere_is_nearest_to_everybody(seed, weights):
    """No direction beside it has a smaller weighted sum of squared angles."""
    people = [person(seed + k) for k in range(3)]
    mean = blend(people, weights).z.double().flatten()
    units = torch.stack([p.z.double().flatten() / p.z.double().norm() for p in people])
    shares = torch.tensor(weights, dtype=torch.float64)

    def spread(direction):
        return float((shares * torch.acos((units @ direction).clamp(-1, 1)).square()).sum())

    mean = mean / mean.norm()
    g = torch.Generator().manual_seed(seed)
    for _ in range(5):
        beside = mean + 1e-2 * torch.randn(12, generator=g, dtype=torch.float64)
        assert spread(mean) <= spread(beside / beside.norm()) + 1e-7


@pytest.mark.parametrize("method", METHODS)
@given(seed=SEEDS)
def test_order_and_scale_of_the_weights_do_not_matter(method, seed):
    a, b, c = (person(seed + k) for k in range(3))
    first = blend([a, b, c], [1.0, 2.0, 3.0], method).z
    torch.testing.assert_close(blend([c, a, b], [0.3, 0.1, 0.2], method).z, first)


@pytest.mark.parametrize("method", METHODS)
def test_ends_are_exact(method):
    a, b = person(1), person(2)
    assert torch.equal(blend([a, b], [1.0, 0.0], method).z, a.z)
    way = interpolate(a, b, 5, method)
    assert torch.equal(way.z[0], a.z[0])
    assert torch.equal(way.z[4], b.z[0])
    assert (way.layout_hash, way.space) == ("h", "s")


def test_steps_are_equal_angles_and_lengths():
    way = interpolate(person(1), LoRALatent(3 * person(2).z, "h", "s"), 6).z.flatten(1)
    cosines = torch.cosine_similarity(way[1:], way[:-1])
    torch.testing.assert_close(cosines, cosines[:1].expand(5))
    gaps = way.norm(dim=1).diff()
    torch.testing.assert_close(gaps, gaps[:1].expand(5), rtol=1e-4, atol=1e-5)


@given(SEEDS, st.floats(0.05, 0.95), st.sampled_from([0.0, 1e-9, 1e-6, 1e-4]))
def test_nearly_equal_people_blend_smoothly(seed, way, apart):
    a = person(seed)
    b = LoRALatent(a.z + apart * person(seed + 1).z, "h", "s")
    expected = a.z + way * (b.z - a.z)
    torch.testing.assert_close(blend([a, b], [1 - way, way]).z, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("way", [0.25, 0.5, 0.75])
def test_opposites_and_the_average_person_go_straight(way):
    a = person(3)
    for other in (-a.z, torch.zeros_like(a.z)):
        b = LoRALatent(other, "h", "s")
        torch.testing.assert_close(
            blend([a, b], [1 - way, way]).z, (1 - way) * a.z + way * other, rtol=1e-5, atol=1e-6
        )


def test_batches_go_row_by_row_and_one_serves_all():
    many, one = person(4, 3), person(9)
    mixed = blend([many, one], [0.4, 0.6]).z
    for k in range(3):
        torch.testing.assert_close(mixed[k : k + 1], blend([select(many, k), one], [0.4, 0.6]).z)
    opposite = LoRALatent(torch.cat([-many.z[:1], many.z[1:]]), "h", "s")
    assert torch.isfinite(blend([many, opposite], [1.0, 1.0]).z).all()
    torch.testing.assert_close(blend([many, opposite], [1.0, 1.0]).z[1:], many.z[1:])


def test_difference_is_arithmetic():
    a, b, c = person(1), person(2), person(3)
    torch.testing.assert_close(add_difference(a, b, c, 0.5).z, a.z + 0.5 * (b.z - c.z))
    torch.testing.assert_close(add_difference(a, b, b, 7.0).z, a.z)
    torch.testing.assert_close(add_difference(c, b, c, 1.0).z, b.z)


def test_concatenate_and_select_are_inverse():
    batch = concatenate([person(1), person(2, 2)])
    assert torch.equal(select(batch, 1, 2).z, person(2, 2).z)
    for index, count in ((3, 1), (-1, 1), (2, 2), (0, 0)):
        with pytest.raises(ConfigError, match="the batch holds 3"):
            select(batch, index, count)


@pytest.mark.parametrize(
    "weights", [[0.0, 0.0], [1.0, -0.5], [math.nan, 1.0], [math.inf, 1.0], [1.0]]
)
def test_weights_that_mean_nothing(weights):
    with pytest.raises(ConfigError, match="weight"):
        blend([person(1), person(2)], weights)


def test_what_does_not_belong_together():
    with pytest.raises(ConfigError, match="no identity"):
        blend([], [])
    with pytest.raises(ConfigError, match="no identity"):
        concatenate([person(1, 0)])
    with pytest.raises(ConfigError, match="Unknown way"):
        blend([person(1), person(2)], [1, 1], "cubic")
    with pytest.raises(ConfigError, match="2, 3 identities"):
        blend([person(1, 2), person(2, 3)], [1, 1])
    with pytest.raises(ConfigError, match="at least 2 steps"):
        interpolate(person(1), person(2), 1)
    with pytest.raises(ConfigError, match="Select Identity"):
        interpolate(person(1, 2), person(2), 3)
    with pytest.raises(ConfigError, match="must be a number"):
        add_difference(person(1), person(2), person(3), math.nan)
    for other in (person(2, space="t"), person(2, layout="i"), person(2, shape=(2, 4))):
        with pytest.raises(LayoutError, match="different DiffLoRA models"):
            blend([person(1), other], [1, 1])
    assert len(blend([person(1), person(2, space="")], [1, 1])) == 1  # space not known
