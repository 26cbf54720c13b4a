"""Benchmarks by subject: shared files know no subject, subjects do not know each other."""

import ast
import importlib
import sys
from pathlib import Path

import pytest

from benchmarks.__main__ import BENCHMARKS, main

SUBJECTS = {"identity", "concepts", "styles", "cost", "files", "reliability"}


def imported_benchmarks(path: Path, root: Path) -> list[tuple[int, str]]:
    """Line and dotted target below `benchmarks` of every import of a file."""
    here, found = path.relative_to(root).parent.parts, []
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom):
            start = here[: len(here) - node.level + 1] if node.level else ()
            stem = (*start, *(node.module or "").split("."))
            targets = [".".join([*filter(None, stem), alias.name]) for alias in node.names]
        elif isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        else:
            continue
        found += [(node.lineno, t) for t in targets if t.split(".")[0] == "benchmarks"]
    return found


def test_subjects_are_known(root):
    found = {path.parent.name for path in (root / "benchmarks").glob("*/__init__.py")}
    assert found == SUBJECTS


def test_a_subject_imports_itself_and_shared_files_alone(root):
    wrong, seen = [], 0
    for path in sorted((root / "benchmarks").rglob("*.py")):
        own = path.relative_to(root / "benchmarks").parts[0]
        for line, target in imported_benchmarks(path, root):
            seen += 1
            subject = target.split(".")[1]
            if subject in SUBJECTS and subject != own:
                wrong.append(f"{path.relative_to(root)}:{line} {target}")
    assert seen > 20  # or imports were not found at all
    assert not wrong


def test_the_product_imports_no_benchmark(sources):
    assert not [s.path for s in sources for _, t in s.imports() if t.startswith("benchmarks")]


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_name_has_its_command(name):
    module = importlib.import_module(f"benchmarks.{BENCHMARKS[name][0]}")
    assert callable(module.main)
    assert f"make bench name={name}" in module.__doc__.split("\n")[0]


def test_every_command_has_its_name(root):
    """A file with a `main` that the table does not list cannot be called."""
    commands = {
        ".".join(path.relative_to(root / "benchmarks").with_suffix("").parts)
        for path in (root / "benchmarks").glob("*/*.py")
        for node in ast.parse(path.read_text("utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name == "main"
    }
    assert commands == {module for module, _ in BENCHMARKS.values()}


def test_names_of_today_stay():
    assert set(BENCHMARKS) >= {
        *("identity", "composition", "overhead", "compression", "perfusion", "covariance"),
        *("seeds", "full_size", "choose_rates", "choose_strength", "fit_linear"),
    }


@pytest.mark.parametrize("arguments", [[], ["nothing"], ["--quick"]])
def test_a_wrong_name_lists_the_right_ones(arguments):
    with pytest.raises(SystemExit) as refused:
        main(arguments)
    for name, (_, about) in BENCHMARKS.items():
        assert name in refused.value.code
        assert about in refused.value.code
    assert all(f"no benchmark {a!r}" in refused.value.code for a in arguments)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_command_explains_itself(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmarks"])
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    assert f"python -m benchmarks {name}" in capsys.readouterr().out
