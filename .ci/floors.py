"""Runs tests with the oldest packages that the pack allows: run by `make test-floors`.

They are those of requirements.txt and of the extra `train`.

A second environment holds them; everything else, torch above all, it borrows from `.venv`.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FLOORS = ROOT / ".cache" / "floors"
ROOMS = (
    *("lora", "storage", "text", "vision", "adapters", "methods", "models", "training"),
    *("diffusion", "fuzz", "commands", "data"),
)


BUILT = {"insightface": "2.0"}
"""Oldest versions that install anywhere; older ones have to be compiled."""


def floors() -> list[str]:
    """Every requirement, and those of training, at its lowest version."""
    import tomllib  # Python 3.11, as the environment that runs this has

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *project["optional-dependencies"]["train"]]
    pairs = [re.split(">=", line) for line in lines]
    return [f"{name}=={BUILT.get(name, version)}" for name, version in pairs]


def borrow() -> None:
    """Lets the second environment find what `.venv` holds and it lacks."""
    (own,) = FLOORS.glob("lib/python*/site-packages")
    (other,) = (ROOT / ".venv").glob("lib/python*/site-packages")
    (own / "borrowed.pth").write_text(f"{other}\n")


def main() -> int:
    """Install, then test."""
    python = FLOORS / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(FLOORS)], check=True)
        borrow()
    install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*install, *floors()], check=True)
    tests = [f"tests/{room}" for room in ROOMS]
    return subprocess.run([str(python), "-m", "pytest", *sys.argv[1:], *tests], cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main())
