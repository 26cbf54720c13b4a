"""What the tests of the command line share."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def command(tmp_path):
    """Runs the command line as a user does; gives the finished process, its words as text."""

    def run(*words: object, code: int = 0, **options: object) -> subprocess.CompletedProcess[str]:
        ended = subprocess.run(
            [sys.executable, "-m", "difflora_core", *map(str, words)],
            **{"cwd": ROOT, "capture_output": True, "text": True, "timeout": 300, **options},
        )
        assert ended.returncode == code, ended.stdout + ended.stderr
        return ended

    return run
