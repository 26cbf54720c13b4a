"""Where the layout of a workflow sets its groups, and which links run through their titles."""

import copy
import json

import numpy as np
import pytest

from difflora_core.demo.comfyui.workflow_api import PACK, WorkflowError
from difflora_core.demo.workflows.drawn_links import crossed, curve, title_box, title_crossings
from difflora_core.demo.workflows.layout import Judge, arrange
from difflora_core.demo.workflows.shapes import (
    Arrangement,
    Group,
    Shape,
    columns,
    group_shapes,
    in_window,
)
from difflora_core.demo.workflows.untangle import untangle

WORKFLOWS = sorted((PACK / "workflows").glob("*.json"))


def a_node(number, height=60, **more):
    return {"id": number, "type": "Node", "size": [240, height], "flags": {}, **more}


def a_group(title, *nodes):
    return Group(title, nodes=[(0, node) for node in nodes])


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_no_link_runs_through_the_title_of_a_group(path):
    """By the file alone; test_frontend.py counts what the front end draws."""
    assert title_crossings(json.loads(path.read_text("utf-8"))) == []


def test_a_link_through_a_title_is_found():
    """One group put between the two ends of a level link."""
    workflow = json.loads((PACK / "workflows" / "quickstart_demo.json").read_text("utf-8"))
    spoilt = copy.deepcopy(workflow)
    link, source, output, target, slot, _ = spoilt["links"][0]
    nodes = {node["id"]: node for node in spoilt["nodes"]}
    x, y = 10_000, 10_000  # far from everything else
    nodes[source]["pos"], nodes[target]["pos"] = [x, y - 20 * output], [x + 900, y - 20 * slot]
    spoilt["groups"][0]["bounding"][:2] = [x + 500, y]
    found = title_crossings(spoilt)
    assert (link, spoilt["groups"][0]["title"]) in found
    spoilt["groups"][0]["bounding"][:2] = [x + 500, y + 60]
    assert (link, spoilt["groups"][0]["title"]) not in title_crossings(spoilt)


def test_what_is_found_is_what_a_slow_walk_finds():
    """Every link against every title, point by point in plain numbers, without short cuts."""
    chance = np.random.default_rng(0)
    nodes = {k: a_node(k, flags={"collapsed": True} if k % 3 == 0 else {}) for k in range(12)}
    corners = {k: tuple(float(v) for v in chance.integers(0, 900, 2)) for k in nodes}
    pairs = chance.permutation([(a, b) for a in nodes for b in nodes if a != b])[:40]
    links = [[k, int(a), k % 2, int(b), k % 3, "X"] for k, (a, b) in enumerate(pairs)]
    boxes = [title_box(*chance.integers(0, 900, 2), "Title") for _ in range(5)]
    found = crossed(corners, nodes, links, boxes)
    for (_, a, out, b, slot, _), row in zip(links, found, strict=True):
        (x, y), (p, q) = corners[a], corners[b]
        folded = [bool(nodes[k]["flags"]) for k in (a, b)]
        start = (x + 70 + 5.6 * 4, y - 15) if folded[0] else (x + 231, y + 14 + 20 * out)
        end = (p, q - 15) if folded[1] else (p + 10, q + 14 + 20 * slot)
        path = curve(start, end)
        for (left, top, width, height), hit in zip(boxes, row, strict=True):
            inside = [left <= u <= left + width and top <= v <= top + height for u, v in path]
            assert hit == any(inside)
    assert 5 < found.sum() < found.size / 2


def test_curve_is_the_front_ends():
    """A cubic between its ends whose handles are level, a quarter of the distance long."""
    start, end = (0.0, 0.0), (300.0, 400.0)
    path = curve(start, end)
    assert path[0] == start
    assert path[-1] == pytest.approx(end)
    middle = path[len(path) // 2]
    assert middle == pytest.approx(((0 + 3 * 125 + 3 * 175 + 300) / 8, 200))


def test_a_title_between_two_groups_is_freed():
    """Three groups in a row, the middle one's title in the way of three links."""
    groups = [
        a_group(name, a_node(k + 1)) for k, name in enumerate(("One", "A long title", "Last"))
    ]
    links = [[k + 1, 1, 0, 3, 0, "X"] for k in range(3)]
    shapes = [group_shapes(group) for group in groups]
    start = Arrangement(((0, 0, shapes[0][0]), (280, 60, shapes[1][0]), (560, 0, shapes[2][0])))
    judge = Judge([group.title for group in groups], links)
    assert judge.crossings(start) == 3
    freed = untangle([start], shapes, judge.both)
    assert judge.crossings(freed) == 0
    assert in_window(freed)
    assert freed.corners() == untangle([start], shapes, judge.both).corners()


def test_an_arrangement_without_crossings_stays():
    shapes = [[columns([[a_node(1)]])], [columns([[a_node(2)]])]]
    start = Arrangement(((0, 0, shapes[0][0]), (900, 500, shapes[1][0])))
    assert untangle([start], shapes, lambda one: (0, 9.0)) is start


def test_what_leaves_the_window_or_touches_is_seen():
    shape = columns([[a_node(1)]])
    assert in_window(Arrangement(((0, 0, shape), (shape.width + 20, 0, shape))))
    for x, y in ((shape.width + 10, 0), (0, shape.height + 19), (-10, 500), (1900, 0), (0, 1200)):
        assert not in_window(Arrangement(((0, 0, shape), (x, y, shape))))


def test_too_many_nodes_are_refused():
    many = a_group("Many", *(a_node(k, 1100) for k in range(9)))
    with pytest.raises(WorkflowError, match="does not fit into 2076 x 1158: fewer nodes"):
        arrange(None, [many, a_group("More", *(a_node(9 + k, 1100) for k in range(4)))], [])


def test_columns_of_a_shape():
    one, two, three = (a_node(k) for k in (1, 2, 3))
    shape = columns([[one, three], [two]])
    assert shape.columns == [[one, three], [two]]
    assert (shape.room, shape.mixed, shape.by_columns) == (0, 1, True)
    assert not Shape(280, 100, ((a_node(4) | {"size": [280, 60]}, 0, 70),)).by_columns
