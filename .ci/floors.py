"""Runs tests with the oldest packages that requirements.txt allows: run by `make test-floors`.

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
    *("diffusion", "fuzz"),
)


BUILT = {"insightface": "2.0"}
"""Oldest versions that install anywhere; older ones have to be compiled."""


def floors() -> list[str]:
    """Every requirement at its lowest version."""
    lines = (ROOT / "requirements.txt").read_text().split()
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
