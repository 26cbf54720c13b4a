"""The table of a router and its picture, against numbers written out."""

import numpy as np
import pytest
import torch

from difflora_core.errors import ConfigError
from difflora_core.evaluation.routing import (
    GAP,
    LARGEST_SIDE,
    LEFT,
    LINE,
    PANEL,
    RoutingTable,
    routing_picture,
    routing_report,
)


def filled():
    """Two layers of one place and kind, one of another place; three noise levels."""
    table, generator = RoutingTable(), torch.Generator().manual_seed(1)
    for layer in ("input_blocks.4.1.transformer_blocks.0.attn1.to_q",
                  "input_blocks.4.1.transformer_blocks.1.attn1.to_q",
                  "middle_block.1.transformer_blocks.0.attn2.to_v"):  # fmt: skip
        for noise in (0.5, 9.0, 3.0, 3.0):
            table.add(layer, noise, torch.rand(2, 3, generator=generator).softmax(-1))
    return table


def test_the_table_is_means_from_much_noise_to_little():
    table = RoutingTable()
    table.add("a", 1.0, torch.tensor([[1.0, 0.0], [0.5, 0.5]]))
    table.add("a", 7.0, torch.tensor([[0.2, 0.8]]))
    table.add("a", 1.0, torch.tensor([[0.25, 0.75]]))
    table.add("a", 3.0, torch.zeros(0, 2))  # nobody asked for the positive prompt
    table.add("b", 1.0, torch.ones(1, 1))
    shares = table.shares()
    assert list(shares) == ["a"]
    torch.testing.assert_close(shares["a"], torch.tensor([[0.2, 0.8], [0.5, 0.5]]))


def test_the_heights_of_the_colours_are_the_shares():
    shares = filled().shares()
    picture = (routing_picture(shares) * 255).round().byte().numpy()
    pair = [t for name, t in shares.items() if name.startswith("input")]
    places = [
        (0, "first row", torch.stack(pair).mean(0)),
        (1, "second row", next(t for n, t in shares.items() if n.startswith("middle"))),
    ]
    for k, _, table in places:
        left, top = LEFT + k * (PANEL[0] + GAP), 2 * LINE + k * (PANEL[1] + GAP)
        panel = picture[top : top + PANEL[1], left : left + PANEL[0]]
        for step, wanted in enumerate(table):
            column = panel[:, step * PANEL[0] // 3 + 5]
            colours, counts = np.unique(column, axis=0, return_counts=True)
            assert len(colours) == 3
            found = sorted((counts / PANEL[1]).tolist())
            assert np.allclose(found, sorted(wanted.tolist()), atol=1.01 / PANEL[1])
        blank = picture[top : top + PANEL[1], LEFT + (1 - k) * (PANEL[0] + GAP) :][:, : PANEL[0]]
        assert (blank == 255).all()


def test_the_legend_of_many_styles_is_wrapped():
    table = RoutingTable()
    table.add("middle_block.1.attn1.to_q", 1.0, torch.eye(64)[:1])  # its panel has one colour
    picture = (routing_picture(table.shares()) * 255).round().byte().numpy()
    assert picture.shape[1] <= 1000
    marks = picture[5:14, LEFT + 5 :: 76], picture[7 * LINE + 5 : 7 * LINE + 14, LEFT + 5 :: 76]
    for line in marks:  # the first and the last of eight lines hold eight marks each
        assert [len(np.unique(mark, axis=0)) for mark in line.swapaxes(0, 1)] == [1] * 8
        assert len(np.unique(line[0], axis=0)) == 8
    assert (picture[LINE * 9 : LINE * 9 + PANEL[1], LEFT : LEFT + PANEL[0]] == marks[0][0, 0]).all()


def test_a_picture_beyond_the_promised_size_is_refused():
    table, fitting = RoutingTable(), (LARGEST_SIDE - LEFT) // (PANEL[0] + GAP)
    for block in range(fitting):
        table.add(f"input_blocks.{block}.attn1.to_q", 1.0, torch.ones(1, 64) / 64)
    assert max(routing_picture(table.shares()).shape) <= LARGEST_SIDE
    table.add(f"input_blocks.{fitting}.attn1.to_q", 1.0, torch.ones(1, 64) / 64)
    with pytest.raises(ConfigError, match="too large"):
        routing_picture(table.shares())


def test_the_report_says_shares_and_where_it_decides():
    table = RoutingTable()
    table.add("input_blocks.1.0.in_layers.2", 1.0, torch.tensor([[1.0, 0.0]]))
    table.add("middle_block.1.attn1.to_q", 1.0, torch.tensor([[0.5, 0.5]]))
    table.add("file 2 middle_block.1.attn1.to_q", 1.0, torch.tensor([[0.25, 0.25, 0.5]]))
    first, second = routing_report(table.shares()).split("\n")
    assert first == (
        "style 1 75%, style 2 25%; most decided input_blocks.1.0.in_layers.2 (100%), least "
        "middle_block.1.attn1.to_q (0%)"
    )
    assert second.startswith("file 2: style 1 25%, style 2 25%, style 3 50%; ")
    assert routing_picture(table.shares()).shape[0] == 3 * LINE + 3 * (PANEL[1] + GAP)


@pytest.mark.parametrize("width", [None, 1])
def test_nothing_to_choose_is_said(width):
    table = RoutingTable()
    if width:
        table.add("a", 1.0, torch.ones(1, width))
    with pytest.raises(ConfigError, match=r"no router to show.*two or more"):
        table.shares()


def test_every_picture_is_a_row_at_every_noise_level():
    table = RoutingTable()
    table.add("a", 1.0, torch.tensor([[1.0, 0.0], [0.5, 0.5]]))
    table.add("a", 7.0, torch.tensor([[0.2, 0.8], [0.4, 0.6]]))
    table.add("a", 7.0, torch.tensor([[0.4, 0.6], [0.4, 0.6]]))
    table.add("b", 1.0, torch.tensor([[0.1, 0.2, 0.7], [1.0, 0.0, 0.0]]))  # it starts later
    wanted = [
        [[0.3, 0.7, 0, 0, 0], [0.4, 0.6, 0, 0, 0]],
        [[1.0, 0.0, 0.1, 0.2, 0.7], [0.5, 0.5, 1.0, 0.0, 0.0]],
    ]
    torch.testing.assert_close(table.by_picture(), torch.tensor(wanted))
    table.add("b", 7.0, torch.tensor([[0.3, 0.3, 0.4]]))  # a region with a prompt of its own
    wanted = [[[0.35, 0.65, 0.3, 0.3, 0.4]], [[0.75, 0.25, 0.55, 0.1, 0.35]]]
    torch.testing.assert_close(table.by_picture(), torch.tensor(wanted))
