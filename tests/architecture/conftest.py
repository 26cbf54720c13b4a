"""What the architecture tests read: every product file of the pack with its syntax tree."""

import ast
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class SourceFile:
    """One Python file: path from the root, text, syntax tree."""

    path: Path
    text: str
    tree: ast.Module

    @property
    def in_core(self) -> bool:
        """True inside the library."""
        return self.path.parts[0] == "difflora_core"

    @property
    def room(self) -> str:
        """`lora` for difflora_core/lora/weights.py, `errors` for difflora_core/errors.py."""
        return self.path.with_suffix("").parts[1]

    def imports(self) -> list[tuple[int, str]]:
        """Line and absolute dotted target of every import, those inside functions too."""
        found = []
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                found += [(node.lineno, alias.name) for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                parts = self.path.parent.parts
                base = parts[: len(parts) - node.level + 1] if node.level else ()
                stem = [*base, *([node.module] if node.module else [])]
                found += [(node.lineno, ".".join([*stem, alias.name])) for alias in node.names]
        return found


@pytest.fixture(scope="session")
def root() -> Path:
    """The pack's folder."""
    return ROOT


@pytest.fixture(scope="session")
def sources() -> list[SourceFile]:
    """Every product file: difflora_core/ and nodes/."""
    return read_sources("difflora_core", "nodes")


@pytest.fixture(scope="session")
def beside() -> list[SourceFile]:
    """Every file of tests/ and benchmarks/."""
    return read_sources("tests", "benchmarks")


def read_sources(*folders: str) -> list[SourceFile]:
    """The Python files of some folders."""
    paths = [path for folder in folders for path in ROOT.glob(f"{folder}/**/*.py")]
    assert len(paths) > 100, "the rules would hold for nothing"
    return [
        SourceFile(path.relative_to(ROOT), text := path.read_text("utf-8"), ast.parse(text))
        for path in sorted(paths)
    ]
