"""Losses of the demo world's face networks, against sums over single pictures in float64."""

import math

import pytest
import torch

from difflora_core.demo.networks.detector_targets import ANCHORS, Targets, detection_loss
from difflora_core.demo.networks.recogniser import margin_loss
from difflora_core.demo.networks.views import contrastive_loss

TEMPERATURE = 0.2


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def by_single_pictures(features, margin):
    """NT-Xent with a margin on the matching cosine, one picture after the other."""
    rows = [[float(x) for x in row] for row in features.double()]
    rows = [[x / math.hypot(*row) for x in row] for row in rows]
    total = 0.0
    for k, own in enumerate(rows):
        partner = (k + len(rows) // 2) % len(rows)
        scores = {
            j: (sum(a * b for a, b in zip(own, other, strict=True)) - margin * (j == partner))
            / TEMPERATURE
            for j, other in enumerate(rows)
            if j != k
        }
        total += math.log(sum(map(math.exp, scores.values()))) - scores[partner]
    return total / len(rows)


def test_contrastive_loss_is_nt_xent():
    features = draw(6, 5)
    wanted = by_single_pictures(features, 0.0)
    assert float(contrastive_loss(features, TEMPERATURE)) == pytest.approx(wanted, rel=1e-5)


def test_margin_loss_takes_the_margin_from_the_matching_cosine():
    features = draw(6, 5, seed=1)
    wanted = by_single_pictures(features, 0.3)
    assert wanted > by_single_pictures(features, 0.0)
    assert float(margin_loss(features, TEMPERATURE, 0.3)) == pytest.approx(wanted, rel=1e-5)


def test_detection_loss_is_focal_and_counts_geometry_where_a_face_is():
    """Two pictures, a map of two by three places; one place is a face's, one is ignored."""
    maps = draw(2, 2, 3, ANCHORS, 15, seed=2)
    positive, ignored = (torch.zeros(2, 2, 3, dtype=torch.bool) for _ in range(2))
    positive[0, 1, 2], ignored[1, 0, 0] = True, True
    boxes, points = draw(2, 2, 3, 4, seed=3), draw(2, 2, 3, 10, seed=4)
    sizes = draw(2, 2, 3, seed=5).exp()
    found = detection_loss([maps], [Targets(positive, ignored, boxes, points, sizes)])
    score = geometry = 0.0
    for place in torch.cartesian_prod(torch.arange(2), torch.arange(2), torch.arange(3)).tolist():
        at = tuple(place)
        for anchor in range(ANCHORS):
            answer = maps[at][anchor].double()
            p = 1 / (1 + math.exp(-float(answer[0])))
            right = p if positive[at] else 1 - p
            if not ignored[at]:
                score += (1 - right) ** 2 * -math.log(right)
            if positive[at]:
                truth = torch.cat([boxes[at], points[at]]).double()
                geometry += float((answer[1:] - truth).abs().mean() / sizes[at])
    wanted = (score + 4 * geometry) / (1 + ANCHORS)
    assert float(found) == pytest.approx(wanted, rel=1e-5)
