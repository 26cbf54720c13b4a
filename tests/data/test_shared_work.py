"""Work that servers share: nothing lost, nothing twice, whoever fails, dies or is slow."""

import threading
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from difflora_core.data.shared_work import (
    JobFailedError,
    Patience,
    ServerDownError,
    ServerUnfitError,
    SharedWork,
)

QUICK = Patience(tries=2, down=0.0, pause=0.0)


def outcomes(servers, jobs, patience=QUICK):
    """Job to failure, and what was said."""
    said = []
    found = [(o.job, o.failure) for o in SharedWork(servers, patience, said.append).run(jobs)]
    assert len(found) == len(dict(found))  # nothing twice
    return dict(found), said


@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=4),
    st.integers(0, 20),
    st.sets(st.integers(0, 19)),
)
def test_every_job_once(lives, count, bad):
    """Servers that die after some jobs, beside one that lives: all is done once, or named."""
    done, lock = Counter(), threading.Lock()

    def server(life):
        left = [life]

        def do(job):
            if left[0] == 0:
                raise ServerDownError("gone")
            left[0] -= 1
            if job in bad:
                raise JobFailedError(f"{job} is bad")
            with lock:
                done[job] += 1

        return do

    servers = {f"s{n}": server(life) for n, life in enumerate(lives)}
    found, _ = outcomes({**servers, "lives": server(-1)}, range(count))
    assert set(found) == set(range(count))
    assert {job for job, failure in found.items() if failure} == bad & set(range(count))
    assert done == Counter(set(range(count)) - bad)


def test_a_job_is_tried_again_elsewhere():
    def never(job):
        raise JobFailedError("not here")

    done = []
    found, _ = outcomes({"bad": never}, [1], Patience(3))
    assert found == {1: "not here"}
    gate = threading.Event()

    def first(job):
        gate.set()
        raise JobFailedError("not here")

    def second(job):
        gate.wait(5)
        done.append(job)

    found, _ = outcomes({"bad": first, "good": second}, range(9))
    assert found == dict.fromkeys(range(9), "")
    assert sorted(done) == list(range(9))


def test_a_slow_server_holds_nobody_up():
    others, gate = [], threading.Event()

    def slow(job):
        assert gate.wait(20)

    def fast(job):
        others.append(job)
        if len(others) == 19:
            gate.set()

    found, _ = outcomes({"slow": slow, "fast": fast}, range(20))
    assert len(found) == 20


def test_a_server_that_comes_back_goes_on():
    """It is asked again, said once to be silent, and not given up."""
    calls = []

    def do(job):
        calls.append(job)
        if len(calls) in (2, 3, 4):
            raise ServerDownError("restarting")

    found, said = outcomes({"one": do}, range(3), Patience(down=60, pause=0.01))
    assert found == dict.fromkeys(range(3), "")
    assert said == ["one does not answer (restarting); its work goes to others."]


def test_nobody_left():
    """The jobs that remain have no outcome, and it is said of each server why."""

    def down(job):
        raise ServerDownError("refused")

    def unfit(job):
        raise ServerUnfitError("no such model")

    found, said = outcomes({"a": down, "b": unfit}, range(3))
    assert not found
    assert any("b cannot do this and is left out: no such model" in line for line in said)
    assert any(line.startswith("a is given up") for line in said)


def test_a_fault_of_the_program_is_raised():
    def wrong(job):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        list(SharedWork({"a": wrong}, QUICK, print).run([1]))
