"""A slice of `make fuzz`, and that its judge sees every way to fail."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from difflora_core.errors import DiffLoRAError
from tests.fuzz import harness
from tests.fuzz.reader import Case, Reader

ROOT = Path(__file__).resolve().parents[2]


def test_a_few_thousand_hostile_files_break_no_reader(tmp_path):
    report = tmp_path / "report.json"
    command = [sys.executable, "-m", "tests.fuzz", "--files", "3500", "--json", str(report)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    rows = json.loads(report.read_text())
    assert len(rows) > 15
    assert sum(row["files"] for row in rows) > 3500
    assert all(row["accepted"] for row in rows), rows
    assert all(row["refused"] for row in rows if row["files"] > 100), rows


class BadWords(DiffLoRAError):
    """Says what nobody can show."""

    def __str__(self):
        return "\ud800"


class Talkative(BadWords):
    """Says too much."""

    def __str__(self):
        return "x" * 2001


def refuse(error):
    raise error


def spin():
    import time

    end = time.process_time() + 0.3
    while time.process_time() < end:
        pass


BAD = {
    "raw: KeyError": lambda: refuse(KeyError("x")),
    "raw: a message that cannot be encoded": lambda: refuse(BadWords("")),
    "raw: a message of 2000 characters or more": lambda: refuse(Talkative("")),
    "raw: the process ended with -9": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "nonsense: a valid file was refused": lambda: refuse(DiffLoRAError("no")),
    "nonsense: no good": lambda: "no good",
    "slow: accepted": spin,
    "memory: accepted": lambda: torch.zeros(2**26).sum(),
}


@pytest.mark.parametrize("what", BAD)
def test_the_judge_sees(what, monkeypatch):
    monkeypatch.setattr(harness, "SECONDS", 0.2)
    monkeypatch.setattr(harness, "MEMORY", 2**27)

    def check(value, path):
        assert value != "no good", "no good"

    def read(path, family):
        return BAD[what]() if path.read_bytes() == b"bad" else None

    reader = Reader("of tests", {"good": lambda: b"good", "bad": lambda: b"bad"}, read, check)
    cases = [Case(family, (), 0) for family in ("good", "bad", "good")]
    tally = harness.run(reader, cases)
    assert tally.files == 3
    assert tally.counts["accepted"] == 2
    ((why, kept),) = tally.failures.items()
    assert why.startswith(what)
    assert [case.family for case in kept] == ["bad"]


def test_every_family_is_read_as_it_is_and_edited_in_every_way():
    edits = {"a": lambda content, rng: b"a", "b": lambda content, rng: b"b"}
    families = {"x": lambda: b"x", "y": lambda: b"y"}
    reader = Reader("of tests", families, lambda path, family: None, lambda *_: None, edits)
    first = [reader.case(number) for number in range(6)]
    assert {(case.family, case.edits) for case in first} == {
        (family, chosen) for family in "xy" for chosen in ((), ("a",), ("b",))
    }
    assert [reader.content(case) for case in first] == [b"x", b"y", b"a", b"a", b"b", b"b"]
    assert reader.case(1000) == reader.case(1000)
