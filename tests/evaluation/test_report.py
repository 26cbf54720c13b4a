"""Bootstrap intervals, recovered share and tables on numbers worked out by hand."""

import json
import math

import pytest
import torch

from difflora_core.errors import ConfigError
from difflora_core.evaluation.report import (
    Report,
    bootstrap_interval,
    crossed_interval,
    recovered_share,
    share_improved,
)


def test_recovered_share_by_hand():
    base = torch.tensor([0.0, 0.2])
    best = torch.tensor([0.4, 0.6])
    predicted = torch.tensor([0.5, 0.7])
    share = recovered_share(predicted, base, best)
    assert share.value == pytest.approx(1.25)  # (0.6 - 0.1) / (0.5 - 0.1)
    # with people resampled the gains stay 0.5 and 0.4
    assert (share.low, share.high) == pytest.approx((1.25, 1.25))


def test_recovered_share_of_an_error_has_the_same_sign():
    base, best, predicted = torch.tensor([0.5]), torch.tensor([0.3]), torch.tensor([0.4])
    assert recovered_share(predicted, base, best).value == pytest.approx(0.5)


def test_recovered_share_weighs_people_by_their_gain():
    """A person without any gain neither breaks nor decides the ratio of means."""
    base, best = torch.zeros(2), torch.tensor([0.0, 1.0])
    assert recovered_share(torch.tensor([0.0, 0.5]), base, best).value == pytest.approx(0.5)


def test_bootstrap_is_repeatable_and_ordered():
    values = torch.randn(30, generator=torch.Generator().manual_seed(3))
    first = bootstrap_interval(values)
    torch.rand(5)  # another global random state
    assert bootstrap_interval(values) == first
    assert bootstrap_interval(values, seed=1) != first
    assert first.low < first.value < first.high
    assert first.value == pytest.approx(float(values.mean()))


def test_bootstrap_coverage():
    """95 % intervals of the mean of 25 normal numbers hold the truth in about 93 % of trials."""
    generator = torch.Generator().manual_seed(11)
    hits = 0
    for trial in range(300):
        values = 2 + torch.randn(25, generator=generator)
        interval = bootstrap_interval(values, draws=400, seed=trial)
        hits += interval.low <= 2 <= interval.high
    assert 0.88 <= hits / 300 <= 0.98


def test_bootstrap_needs_data():
    with pytest.raises(ConfigError, match="at least one identity"):
        bootstrap_interval(torch.empty(0))
    with pytest.raises(ConfigError, match="one statistic"):
        bootstrap_interval(torch.ones(3, 2))


def test_share_improved():
    values, base = torch.tensor([0.3, 0.1, 0.5]), torch.tensor([0.2, 0.2, 0.2])
    assert share_improved(values, base) == pytest.approx(2 / 3)
    assert share_improved(values, base, lower_is_better=True) == pytest.approx(1 / 3)


def test_report_as_json_and_markdown():
    rows = {"base": {"likeness": 0.12345}, "LoRA": {"likeness": math.nan, "seconds": 1.5}}
    report = Report(rows, {"seed": 3, "interval": [math.inf, 1.0]})
    read = json.loads(report.to_json())
    assert read["rows"]["LoRA"] == {"likeness": None, "seconds": 1.5}
    assert (read["seed"], read["interval"]) == (3, [None, 1.0])
    lines = report.to_markdown({"seconds": 1}).split("\n")
    assert lines[0] == "| | likeness | seconds |"
    assert lines[2] == "| base | 0.123 | – |"
    assert lines[3] == "| LoRA | – | 1.5 |"


def test_crossed_interval_of_rows_and_columns_by_hand():
    """A table that is row effect + column effect: its variance is that of both means."""
    rows, columns = torch.tensor([0.0, 1.0, 5.0]), torch.linspace(-1, 1, 40)
    table = rows[:, None] + columns
    found = crossed_interval(table, draws=20_000)
    assert found.value == pytest.approx(2.0)
    spread = float((rows.var(correction=0) / 3 + columns.var(correction=0) / 40).sqrt())
    normal = 2 * 1.96 * spread
    assert found.high - found.low == pytest.approx(normal, rel=0.1)


def test_crossed_interval_of_one_seed_is_that_of_people():
    values = torch.randn(30, generator=torch.Generator().manual_seed(5))
    crossed, plain = crossed_interval(values[None]), bootstrap_interval(values)
    assert crossed.value == pytest.approx(plain.value)
    assert (crossed.low, crossed.high) == pytest.approx((plain.low, plain.high), abs=0.02)
    with pytest.raises(ConfigError, match="at least one"):
        crossed_interval(torch.zeros(0, 4))


def test_crossed_interval_of_a_function_of_several_numbers():
    """Of two numbers that rise and fall together the difference is certain; neither of them is."""
    one = torch.randn(3, 20, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    table = torch.stack([one + 2, one], -1)
    apart = crossed_interval(table, lambda means: means[..., 0] - means[..., 1])
    assert (apart.value, apart.low, apart.high) == pytest.approx((2.0, 2.0, 2.0))
    ratio = crossed_interval(table.exp(), lambda means: (means[..., 0] / means[..., 1]).log())
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((2.0, 2.0, 2.0))
    first = crossed_interval(table, lambda means: means[..., 0])
    assert (first.low, first.high) == (
        pytest.approx(crossed_interval(table[..., 0]).low),
        pytest.approx(crossed_interval(table[..., 0]).high),
    )
    with pytest.raises(ConfigError, match="statistic"):
        crossed_interval(table)
