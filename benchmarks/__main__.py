"""`make bench name=NAME args='…'`: one table for each name, whatever folder its file lies in."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

HERE = Path(__file__).parent


def main(arguments: list[str]) -> None:
    """Runs the benchmark named first with the remaining arguments."""
    found = {
        path.stem: ".".join(path.relative_to(HERE.parent).with_suffix("").parts)
        for path in HERE.rglob("*.py")
        if "def main(" in path.read_text("utf-8") and path.stem != "__main__"
    }
    if not arguments or arguments[0] not in found:
        raise SystemExit(f"Name a benchmark: {', '.join(sorted(found))}.")
    name = arguments[0]
    sys.argv = [f"benchmarks {name}", *arguments[1:]]
    runpy.run_module(found[name], run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
