"""A run that is killed at any moment goes on, and ends as one that was not."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
KILLS = 4
"""Fewer would say little."""


def files(folder):
    """Bytes of every file of a dataset, without what is kept for going on."""
    return {
        path.name: path.read_bytes()
        for path in sorted(folder.iterdir())
        if path.is_file() and not path.name.startswith(".")
    }


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_random_moments(people_folder, tmp_path):
    """SIGKILL many times while it looks, captions, writes: the same bytes as without."""
    Image.new("RGB", (80, 80), "green").save(people_folder / "anna" / "wall.png")
    program = tmp_path / "captioner.py"
    program.write_text("import sys\nfor line in sys.stdin:\n    print('a picture')\n", "utf-8")
    command = f"{sys.executable} -S {program}"
    script = Path(__file__).with_name("prepare_until_killed.py")
    sets = tmp_path / "sets"
    sets.mkdir()
    words = [str(people_folder), str(sets), command, "7", str(KILLS)]
    subprocess.run(
        [sys.executable, str(script), *words],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        check=True,
    )
    whole = files(sets / "undisturbed")
    assert len([name for name in whole if name.endswith(".arrow")]) == 3
    killed = sorted(sets.glob("killed *"))
    assert killed
    assert all(files(folder) == whole for folder in killed)


def test_workers_end_with_a_killed_parent(tmp_path):
    """No process is left behind that waits for a dead one."""
    program = tmp_path / "parent.py"
    program.write_text(
        "import os, sys, time\n"
        "from difflora_core.data.workers import Workers\n"
        "def number(job):\n    return os.getpid()\n"
        "if __name__ == '__main__':\n"
        "    with Workers(2) as workers:\n"
        "        for pid in workers.each(number, range(4)):\n"
        "            print(pid, flush=True)\n"
        "        time.sleep(60)\n",
        "utf-8",
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    parent = subprocess.Popen(
        [sys.executable, str(program)], stdout=subprocess.PIPE, text=True, env=environment
    )
    workers = {int(parent.stdout.readline()) for _ in range(4)}
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 20
    while (left := {pid for pid in workers if Path(f"/proc/{pid}").exists()}) and (
        time.monotonic() < deadline
    ):
        time.sleep(0.05)
    assert not left
