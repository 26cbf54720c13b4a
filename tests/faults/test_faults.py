"""Kill -9 and failing disks: nothing acknowledged is lost, and a run goes on to the same bits."""

import pytest

from benchmarks.reliability.disk import FAULTS, suffer
from benchmarks.reliability.jobs import JOBS
from benchmarks.reliability.kills import kill_often


@pytest.mark.parametrize("name", JOBS)
@pytest.mark.parametrize(("kills", "seed"), [(2, 0), pytest.param(100, 1, marks=pytest.mark.slow)])
def test_kills_at_any_moment(name, kills, seed):
    tally = kill_often(name, kills, seed)
    assert tally.errors == []
    assert tally.lost == 0
    assert tally.kills >= kills
    assert tally.equal == tally.finished > 0


EVERY = [(name, fault) for name in JOBS for fault in FAULTS]
SOME = [("loop", "full"), ("library", "gone"), ("DreamBooth", "read-only")]


@pytest.mark.parametrize(
    ("name", "fault"),
    [*SOME, *(pytest.param(*one, marks=pytest.mark.slow) for one in EVERY if one not in SOME)],
)
def test_a_disk_that_fails_in_the_middle(name, fault):
    """The error is ours, what was saved is there, no half is, and the run goes on."""
    assert suffer(name, fault).sound
