"""Styles are trained by several processes as by one: every method, by pictures and by a teacher."""

from pathlib import Path
from runpy import run_path
from types import SimpleNamespace

import pytest
import torch

PROGRAM = Path(__file__).with_name("style_processes.py")
program = SimpleNamespace(**run_path(str(PROGRAM)))


@pytest.fixture(scope="module", params=["plain", pytest.param("FSDP", marks=pytest.mark.slow)])
def launched(request, tmp_path_factory, launch_processes):
    """What two processes found."""
    return launch_processes(PROGRAM, tmp_path_factory.mktemp("two"), 2, request.param)


@pytest.mark.parametrize(("way", "method"), program.cases())
def test_two_processes_make_the_style_of_one(launched, way, method, tmp_path):
    """Straight, and with a stop that one of them alone was told; previews are of the same style."""
    first, second = (found[f"{way} {method}"] for found in launched)
    alone = program.WAYS[way](method, tmp_path / "alone")
    untrained = program.WAYS[way](method, tmp_path / "untrained", steps=1, learning_rate=1e-9)
    learned = torch.tensor(alone["style"]) - torch.tensor(untrained["style"])
    assert alone["step"] > 0
    if "stopped" in first:
        assert not first.pop("stopped")["finished"]
        assert first["resumed"]["style"] == first["straight"]["style"]
    if way == "teacher":  # the processes share what it has to draw
        assert alone["drawn"] == [1, 2, 3, 4, 5, 6]
        assert [one["straight"].pop("drawn") for one in (first, second)] == [[1, 3, 5], [2, 4, 6]]
    for case, found in first.items():
        assert second[case] == found | {"shown": []}  # the main process alone shows
        assert (found["step"], found["finished"]) == (alone["step"], True)
        assert found["loss"] == pytest.approx(alone["loss"], rel=1e-4)
        apart = torch.tensor(found["style"]) - torch.tensor(alone["style"])
        assert float(apart.abs().max()) < 1e-3 * float(learned.abs().max())
    assert len(alone["shown"]) == 2
    torch.testing.assert_close(
        torch.tensor(first["straight"]["shown"]), torch.tensor(alone["shown"]), rtol=0, atol=1e-3
    )
